# Sourced by the other scripts: enters a virtual environment with the pinned requirements, making it where it is absent.
# `bash launch/setup.sh` only makes it; enter it with `source .venv/bin/activate`.
#   VENV=DIR     where it lies (default: .venv in the project)
#   PYTHON=FILE  the interpreter it is made with (default: the newest of python3.13 ... python3.11, python3)
#   WITH_TORCH=1 also installs PyTorch, against which the tests compare (TORCH=... for another version or build)
#   WITH_TPU=1   also installs the TPU compiler (210 MB, x86-64 Linux), with which aot_compile needs no TPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}

find_python() {
  local name
  for name in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    if "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: Python 3.11 or newer with the venv module is needed; name it: PYTHON=/path/to/python3.11 bash $0" >&2
  return 1
}

wanted=$(cat requirements.txt pyproject.toml; echo "torch ${WITH_TORCH:-0} ${TORCH:-} tpu ${WITH_TPU:-0}")
if [ ! -f "$VENV/installed" ] || [ "$(cat "$VENV/installed")" != "$wanted" ]; then
  [ -x "$VENV/bin/python" ] || "$(find_python)" -m venv "$VENV"
  echo "Installing the requirements into $VENV (once) ..." >&2
  # Compiled are the modules that are used, when they are: but where Python may not keep what it compiled, now.
  [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] && compile=--compile || compile=--no-compile
  install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check $compile "$@"; }
  install -r requirements.txt
  install --no-deps --no-build-isolation --editable . 2>/dev/null || install --no-deps --editable .
  if [ "${WITH_TORCH:-0}" = 1 ]; then install "${TORCH:-torch==2.13.0}"; fi
  if [ "${WITH_TPU:-0}" = 1 ]; then install --no-deps libtpu==0.0.42; fi
  echo "$wanted" >"$VENV/installed"
fi
PATH="$PWD/$VENV/bin:$PATH"
[ "${VENV#/}" = "$VENV" ] || PATH="$VENV/bin:$PATH"
