#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster as a JobSet (launch/gke_jobset.yaml), one pod per host.
#   IMAGE=REPOSITORY/tspo:1 bash launch/gke_jobset.sh [--dry-run] run --config=configs/x.py --run_dir=/data/runs/x ...
#   bash launch/gke_jobset.sh [--dry-run] logs | delete
# NAME (tspo), ACCELERATOR (tpu-v5-lite-podslice), TOPOLOGY (4x4), HOSTS (4), CHIPS per host (4), CLAIM (tspo-data: a
# ReadWriteMany volume with data, checkpoints and runs). --dry-run prints the commands and the manifest. Needs kubectl
# and the JobSet controller (kubectl apply -f https://github.com/kubernetes-sigs/jobset/releases/latest/download/manifests.yaml).
set -euo pipefail
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 1; }
dry_run=0
if [ "${1:-}" = --dry-run ]; then dry_run=1; shift; fi
[ $# -ge 1 ] || usage
action=$1
shift
NAME=${NAME:-tspo} ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} TOPOLOGY=${TOPOLOGY:-4x4} HOSTS=${HOSTS:-4}
CHIPS=${CHIPS:-4} CLAIM=${CLAIM:-tspo-data}

manifest() {
  local text list="" argument name
  for argument in "$@" --config.distributed.enabled=True; do
    argument=${argument//\\/\\\\}
    list+=", \"${argument//\"/\\\"}\""
  done
  ARGUMENTS="[${list#, }]"
  text=$(cat "$(dirname "$0")/gke_jobset.yaml")
  for name in NAME HOSTS ACCELERATOR TOPOLOGY IMAGE CHIPS CLAIM ARGUMENTS; do
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
  logs) do_it kubectl logs -f -l "jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
  delete) do_it kubectl delete jobset "$NAME" ;;
  *) usage ;;
esac
