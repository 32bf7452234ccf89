#!/usr/bin/env bash
# Runs an entry point as N processes on this machine, joined into one mesh: a rehearsal of a pod, or one process per GPU.
#   bash launch/local.sh [--dry-run] N MODULE [arguments]
#   bash launch/local.sh 2 tspo_jax.train --config=configs/toy.py --config.mesh.axes='(("data",2),("model",1))'
# PORT (default 8476) is where the processes meet. GPUS=1 gives process i the GPU i. Output of process i > 0 is in
# local_i.log. When one process ends with an error the others are stopped, and its status is returned; a rerun resumes.
source "$(dirname "$0")/command_line.sh"
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] && [ -n "${2:-}" ] || usage
count=$1 module=$2
shift 2

command_of() { # index -> the command, one word a line
  printf '%s\n' python -m "$module" "${@:2}" --config.distributed.enabled=True \
    "--config.distributed.coordinator=127.0.0.1:${PORT:-8476}" "--config.distributed.num_processes=$count" \
    "--config.distributed.process_id=$1"
}

if [ $dry_run = 1 ]; then
  for ((i = 0; i < count; i++)); do
    mapfile -t words < <(command_of "$i" "$@")
    [ "${GPUS:-0}" = 1 ] && printf 'CUDA_VISIBLE_DEVICES=%s ' "$i"
    printf '%q ' "${words[@]}"
    echo
  done
  exit 0
fi

source "$(dirname "$0")/setup.sh"
processes=()
stop() { for process in "${processes[@]}"; do kill "$1" "$process" 2>/dev/null || true; done; }
trap 'stop -TERM' TERM INT # each process saves, see tspo_jax/runs/preemption.py
for ((i = 0; i < count; i++)); do
  mapfile -t words < <(command_of "$i" "$@")
  [ "${GPUS:-0}" = 1 ] && export CUDA_VISIBLE_DEVICES=$i
  if [ "$i" = 0 ]; then "${words[@]}" & else "${words[@]}" >"local_$i.log" 2>&1 & fi
  processes+=($!)
done
status=0
for _ in "${processes[@]}"; do
  wait -n && ended=0 || ended=$?
  if [ $ended != 0 ] && [ $status = 0 ]; then
    status=$ended
    # 75: preempted, the others are saving too. Anything else: they would wait for it.
    if [ $ended != 75 ] && [ $ended -lt 128 ]; then stop -KILL; fi
  fi
done
exit $status
