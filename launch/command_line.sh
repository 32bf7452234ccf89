# Sourced by the scripts that print the commands they would run: takes --dry-run off their arguments, of which there must
# be one more, and defines
#   usage     prints the comment at the head of the script, exits with 1
#   do_it     runs a command, or prints it
set -euo pipefail
usage() { sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$0" >&2; exit 1; }
dry_run=0
if [ "${1:-}" = --dry-run ]; then dry_run=1; shift; fi
[ $# -ge 1 ] && [ "$1" != --help ] || usage
do_it() { if [ $dry_run = 1 ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
