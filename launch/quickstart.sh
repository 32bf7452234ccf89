#!/usr/bin/env bash
# The whole path on a toy world, in a few minutes on two cores: makes real videos, decodes them into a frame store, trains
# two temporal agents with a frozen LLaVA-Video, evaluates them on held-out videos and writes a report page. The one is
# the paper's (configs/toy.py), the other also sees the question and starts on labels (configs/toy_plus.py:quick).
#   bash launch/quickstart.sh [--config.seed=1 ...]    (what follows is passed on to training and evaluation)
# Stopped halfway, it goes on where it stopped. DATA (default: toy_data), RUN (default: runs/toy, the paper's agent) and
# PLUS (default: ${RUN}_plus, the other, and the report) say where things go.
if [ "${1:-}" = --help ]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
fi
source "$(dirname "$0")/setup.sh"
DATA=${DATA:-toy_data}
RUN=${RUN:-runs/toy}
PLUS=${PLUS:-${RUN}_plus}
config=("--config.data.store=$DATA/frames" "--config.data.questions=$DATA/train.jsonl"
  "--config.evaluation.questions=$DATA/eval.jsonl" "$@")
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(dirname "$RUN")/compiled}"  # most programs are needed twice
paper=(--config=configs/toy.py "${config[@]}" "--run_dir=$RUN")
plus=(--config=configs/toy_plus.py:quick "${config[@]}" "--run_dir=$PLUS")

step() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }

step "1/5  Videos and questions"
python -m tspo_jax.toy.videos --output="$DATA"
step "2/5  Decoding at 1 frame per second, CLIP features"
python -m tspo_jax.predecode --videos="$DATA" --store="$DATA/frames" \
  --clip=tspo_jax/toy/checkpoints/clip --output="$DATA/predecode.json"
step "3/5  The paper's temporal agent (see $RUN.log), and beside it the training of one that also sees the question"
mkdir -p "$(dirname "$RUN")"
{
  python -m tspo_jax.train "${paper[@]}" && python -m tspo_jax.evaluate "${paper[@]}" --output="$RUN/evaluation.json"
} >"$RUN.log" 2>&1 &
trap 'pkill -P $! 2>/dev/null' EXIT
python -m tspo_jax.train "${plus[@]}"
step "4/5  Evaluation on held-out videos: uniform sampling, untrained CLIP top-k, and both agents"
wait $! || { cat "$RUN.log" >&2; exit 1; }
trap - EXIT
python -m tspo_jax.evaluate "${plus[@]}" --beside="$RUN" --output="$PLUS/evaluation.json"
step "5/5  Report"
python -m tspo_jax.report "$PLUS"
