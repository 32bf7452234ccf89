#!/usr/bin/env bash
# The whole path on a toy world, in a few minutes on two cores: makes real videos, decodes them into a frame store, trains
# the temporal agent by TSPO with a frozen LLaVA-Video, evaluates it on held-out videos and writes a report page.
#   bash launch/quickstart.sh [--config.num_steps=300 ...]    (what follows is passed on to training and evaluation)
# Stopped halfway, it goes on where it stopped. DATA (default: toy_data) and RUN (default: runs/toy) say where things go.
if [ "${1:-}" = --help ]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
fi
source "$(dirname "$0")/setup.sh"
DATA=${DATA:-toy_data}
RUN=${RUN:-runs/toy}
config=(--config=configs/toy.py "--config.data.store=$DATA/frames" "--config.data.questions=$DATA/train.jsonl"
  "--config.evaluation.questions=$DATA/eval.jsonl" "$@")

step() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }

step "1/5  Videos and questions"
python -m tspo_jax.toy.videos --output="$DATA"
step "2/5  Decoding at 1 frame per second, CLIP features"
python -m tspo_jax.predecode --videos="$DATA" --store="$DATA/frames" \
  --clip=tspo_jax/toy/checkpoints/clip --output="$DATA/predecode.json"
step "3/5  Training the temporal agent"
python -m tspo_jax.train "${config[@]}" --run_dir="$RUN"
step "4/5  Evaluation on held-out videos: uniform sampling, untrained CLIP top-k, the trained agent"
python -m tspo_jax.evaluate "${config[@]}" --run_dir="$RUN" --output="$RUN/evaluation.json"
step "5/5  Report"
python -m tspo_jax.report "$RUN"
