#!/usr/bin/env bash
# The tests of what computes, on the newest version of everything that pyproject.toml admits and pip finds, under a newer
# Python than the pinned set's. Skipped, in words, on a machine without one.
#   bash launch/test_newest.sh [pytest's arguments; default: the tests of models, devices, tspo and runs, and of the
#                               quickstart's path: the toy world, pre-decoding, training, evaluation, report]
#   NEWEST_VENV=DIR     where its virtual environment lies (default: .venv-newest in the project)
#   NEWEST_PYTHON=FILE  the interpreter it is made with (default: the newest of Python 3.13 and 3.12, pyenv's among them)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${NEWEST_VENV:-.venv-newest}

find_python() {
  local candidate
  shopt -s nullglob
  for candidate in ${NEWEST_PYTHON:-python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13.*/bin/python \
    python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python}; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

python=$(find_python)
if [ -z "$python" ]; then
  echo "skipped: the tests on the newest versions need Python 3.12 or 3.13, and this machine has neither"
  exit 0
fi
wanted="$python $(cat pyproject.toml)"
if [ ! -f "$VENV/installed" ] || [ "$(cat "$VENV/installed")" != "$wanted" ]; then
  [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
  echo "Installing the newest versions into $VENV (once) ..." >&2
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
    --editable '.[test]' pytest-xdist
  echo "$wanted" >"$VENV/installed"
fi
"$VENV/bin/python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(jax|jaxlib|flax|orbax-checkpoint|numpy) '
[ $# -gt 0 ] || set -- -m "not slow" tests/models tests/devices tests/tspo tests/runs tests/toy \
  tests/data/test_predecoding.py tests/test_train.py tests/evaluation tests/test_report.py
exec "$VENV/bin/python" -m pytest --numprocesses=2 --dist=loadfile "$@"
