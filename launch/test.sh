#!/usr/bin/env bash
# Sets up and runs the checks: ruff, the order of the rooms (pyproject.toml), then the tests, on the CPU also where there
# is an accelerator.
#   bash launch/test.sh [pytest's arguments, e.g. tests/tspo/test_policy.py -k gumbel]
#   WITH_TORCH=1 bash launch/test.sh   also installs PyTorch and compares with Hugging Face's classes
#   WITH_SLOW=1 bash launch/test.sh    also the longest tests, which take longer than all others together (CI runs them)
source "$(dirname "$0")/setup.sh"
ruff check .
ruff format --check .
PYTHONPATH=. lint-imports --no-cache
[ "${WITH_SLOW:-0}" = 1 ] || set -- -m "not slow" "$@"
exec python -m pytest --numprocesses=2 --dist=loadfile "$@"
