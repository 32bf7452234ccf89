# Sourced by the scripts that submit a job to Kubernetes, behind command_line.sh; defines
#   submit FILE NAMES ARGUMENT...   FILE with ${NAME} replaced by the variable of each of the NAMES, ${ARGUMENTS} by a list
submit() {
  [ -n "${IMAGE:-}" ] || { echo "error: IMAGE is not set: the container image with this project in /workspace" >&2; exit 1; }
  manifest "$@" | { do_it kubectl apply -f -; if [ $dry_run = 1 ]; then cat; fi; }
}

manifest() {
  local text list="" argument name names=$2
  text=$(cat "$1")
  shift 2
  for argument in "$@"; do
    argument=${argument//\\/\\\\}
    list+=", \"${argument//\"/\\\"}\""
  done
  local ARGUMENTS="[${list#, }]"
  for name in $names ARGUMENTS; do
    text=${text//"\${$name}"/"${!name}"}
  done
  echo "$text"
}
