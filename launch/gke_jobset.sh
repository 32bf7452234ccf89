#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster as a JobSet (launch/gke_jobset.yaml), one pod per host.
#   IMAGE=REPOSITORY/tspo:1 bash launch/gke_jobset.sh [--dry-run] run --config=configs/x.py --run_dir=/data/runs/x ...
#   bash launch/gke_jobset.sh [--dry-run] logs | delete
# NAME (tspo), ACCELERATOR (tpu-v5-lite-podslice), TOPOLOGY (4x4), HOSTS (4), CHIPS per host (4), CLAIM (tspo-data: a
# ReadWriteMany volume with data, checkpoints and runs). --dry-run prints the commands and the manifest. Needs kubectl
# and the JobSet controller (kubectl apply -f https://github.com/kubernetes-sigs/jobset/releases/latest/download/manifests.yaml).
source "$(dirname "$0")/command_line.sh"
source "$(dirname "$0")/kubernetes.sh"
action=$1
shift
NAME=${NAME:-tspo} ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} TOPOLOGY=${TOPOLOGY:-4x4} HOSTS=${HOSTS:-4}
CHIPS=${CHIPS:-4} CLAIM=${CLAIM:-tspo-data}

case $action in
  run)
    [ $# -ge 1 ] || usage
    submit "$(dirname "$0")/gke_jobset.yaml" "NAME HOSTS ACCELERATOR TOPOLOGY IMAGE CHIPS CLAIM" \
      "$@" --config.distributed.enabled=True
    ;;
  logs) do_it kubectl logs -f -l "jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
  delete) do_it kubectl delete jobset "$NAME" ;;
  *) usage ;;
esac
