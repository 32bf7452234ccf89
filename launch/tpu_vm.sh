#!/usr/bin/env bash
# A TPU pod slice by gcloud: every command acts on all of its workers.
#   bash launch/tpu_vm.sh [--dry-run] create                          the slice, waits until it is there
#   bash launch/tpu_vm.sh [--dry-run] setup                           copies this checkout and installs it
#   bash launch/tpu_vm.sh [--dry-run] run --config=configs/x.py ...   starts training in the background, or resumes it
#   bash launch/tpu_vm.sh [--dry-run] logs                            follows the first worker's output
#   bash launch/tpu_vm.sh [--dry-run] stop                            SIGTERM: saves after the step in progress
#   bash launch/tpu_vm.sh [--dry-run] delete                          the slice and its disks
# NAME (tspo), ZONE (us-east5-a), TYPE (v5litepod-16), VERSION (v2-alpha-tpuv5-lite), SPOT=1, PROJECT. --dry-run prints
# the exact commands instead. `run` hands JAX_COMPILATION_CACHE_DIR, where it is set, on to the workers. Put data,
# checkpoints and --run_dir where all workers see them: a bucket mounted by gcsfuse, or Filestore. See
# docs/running_on_tpu.md.
source "$(dirname "$0")/command_line.sh"
action=$1
shift
NAME=${NAME:-tspo} TYPE=${TYPE:-v5litepod-16} VERSION=${VERSION:-v2-alpha-tpuv5-lite}
where=("--zone=${ZONE:-us-east5-a}")
[ -z "${PROJECT:-}" ] || where+=("--project=$PROJECT")
tpu=(gcloud compute tpus tpu-vm)

on_workers() { do_it "${tpu[@]}" ssh "$NAME" "${where[@]}" "--worker=$1" "--command=$2"; }

case $action in
  create)
    do_it "${tpu[@]}" create "$NAME" "${where[@]}" "--accelerator-type=$TYPE" "--version=$VERSION" \
      ${SPOT:+--spot}
    ;;
  setup)
    archive=${TMPDIR:-/tmp}/tspo_jax.tar.gz
    do_it git -C "$(dirname "$0")/.." archive --output="$archive" HEAD
    do_it "${tpu[@]}" scp "$archive" "$NAME:tspo_jax.tar.gz" "${where[@]}" --worker=all
    on_workers all "mkdir -p tspo_jax && tar -xzf tspo_jax.tar.gz -C tspo_jax && cd tspo_jax && source launch/setup.sh && pip install --quiet 'jax[tpu]'"
    ;;
  run)
    [ $# -ge 1 ] || usage
    arguments=$(printf '%q ' "$@" --config.distributed.enabled=True)
    cache=${JAX_COMPILATION_CACHE_DIR:+env JAX_COMPILATION_CACHE_DIR=$(printf '%q ' "$JAX_COMPILATION_CACHE_DIR")}
    idle="! kill -0 \$(cat train.pid 2>/dev/null) 2>/dev/null || { echo 'error: process' \$(cat train.pid) 'is training; stop it first' >&2; exit 1; }"
    on_workers all "cd tspo_jax && { $idle; } && source launch/setup.sh && (setsid nohup ${cache}python -m tspo_jax.train $arguments >>train.log 2>&1 & echo \$! >train.pid)"
    ;;
  logs) on_workers 0 "tail -n 50 -F tspo_jax/train.log" ;;
  stop) on_workers all "kill -TERM \$(cat tspo_jax/train.pid)" ;;
  delete) do_it "${tpu[@]}" delete "$NAME" "${where[@]}" --quiet ;;
  *) usage ;;
esac
