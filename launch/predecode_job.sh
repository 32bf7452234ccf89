#!/usr/bin/env bash
# Decodes videos into one frame store with a Kubernetes indexed job (launch/predecode_job.yaml): pod I of SHARDS takes
# every SHARDS-th video.
#   IMAGE=REPOSITORY/tspo:1 bash launch/predecode_job.sh [--dry-run] run --videos=/data/videos --store=/data/frames [flags]
#   bash launch/predecode_job.sh [--dry-run] logs | delete
# NAME (predecode), SHARDS (16), PARALLELISM (SHARDS), CPUS per pod (8), MEMORY per pod (16Gi), CLAIM (tspo-data: a
# ReadWriteMany volume, mounted at /data). Run again with the same SHARDS after `delete`, it goes on where it stopped.
# A failed index with exit status 2 has videos in the store's quarantine*.jsonl. --dry-run prints commands and manifest.
source "$(dirname "$0")/command_line.sh"
source "$(dirname "$0")/kubernetes.sh"
action=$1
shift
NAME=${NAME:-predecode} SHARDS=${SHARDS:-16} CPUS=${CPUS:-8} MEMORY=${MEMORY:-16Gi} CLAIM=${CLAIM:-tspo-data}
PARALLELISM=${PARALLELISM:-$SHARDS}

case $action in
  run)
    [ $# -ge 1 ] || usage
    submit "$(dirname "$0")/predecode_job.yaml" "NAME SHARDS PARALLELISM IMAGE CPUS MEMORY CLAIM" \
      "--num_shards=$SHARDS" "--workers=$CPUS" "$@"
    ;;
  logs) do_it kubectl logs -f --prefix --max-log-requests="$SHARDS" -l "batch.kubernetes.io/job-name=$NAME" ;;
  delete) do_it kubectl delete job "$NAME" ;;
  *) usage ;;
esac
