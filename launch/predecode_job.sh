#!/usr/bin/env bash
# Decodes videos into one frame store with a Kubernetes indexed job (launch/predecode_job.yaml): pod I of SHARDS takes
# every SHARDS-th video.
#   IMAGE=REPOSITORY/tspo:1 bash launch/predecode_job.sh [--dry-run] run --videos=/data/videos --store=/data/frames [flags]
#   bash launch/predecode_job.sh [--dry-run] logs | delete
# NAME (predecode), SHARDS (16), PARALLELISM (SHARDS), CPUS per pod (8), MEMORY per pod (16Gi), CLAIM (tspo-data: a
# ReadWriteMany volume, mounted at /data). Run again with the same SHARDS after `delete`, it goes on where it stopped.
# A failed index with exit status 2 has videos in the store's quarantine*.jsonl. --dry-run prints commands and manifest.
set -euo pipefail
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 1; }
dry_run=0
if [ "${1:-}" = --dry-run ]; then dry_run=1; shift; fi
[ $# -ge 1 ] || usage
action=$1
shift
NAME=${NAME:-predecode} SHARDS=${SHARDS:-16} CPUS=${CPUS:-8} MEMORY=${MEMORY:-16Gi} CLAIM=${CLAIM:-tspo-data}
PARALLELISM=${PARALLELISM:-$SHARDS}

manifest() {
  local text list="" argument name
  for argument in "--num_shards=$SHARDS" "--workers=$CPUS" "$@"; do
    argument=${argument//\\/\\\\}
    list+=", \"${argument//\"/\\\"}\""
  done
  ARGUMENTS="[${list#, }]"
  text=$(cat "$(dirname "$0")/predecode_job.yaml")
  for name in NAME SHARDS PARALLELISM IMAGE CPUS MEMORY CLAIM ARGUMENTS; do
    text=${text//"\${$name}"/"${!name}"}
  done
  echo "$text"
}

do_it() { if [ $dry_run = 1 ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

case $action in
  run)
    [ $# -ge 1 ] || usage
    [ -n "${IMAGE:-}" ] || { echo "error: IMAGE is not set: the container image with this project in /workspace" >&2; exit 1; }
    manifest "$@" | { do_it kubectl apply -f -; if [ $dry_run = 1 ]; then cat; fi; }
    ;;
  logs) do_it kubectl logs -f --prefix --max-log-requests="$SHARDS" -l "batch.kubernetes.io/job-name=$NAME" ;;
  delete) do_it kubectl delete job "$NAME" ;;
  *) usage ;;
esac
