#!/usr/bin/env bash
# Everything that must hold: lint, types, scripts, then all tests. Needs only Python >= 3.11 and pip.
#
#   ./run_tests.sh                        all of it, in two processes, minutes on 2 CPU cores
#   ./run_tests.sh tests/test_base.py     one file; every argument goes to pytest
#
# Uses the active virtual or conda environment, else makes .venv from requirements-dev.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./env.sh requirements-dev.txt

"${PYTHON}" -m ruff check .
"${PYTHON}" -m mypy
PATH="$(dirname "$(command -v "${PYTHON}")"):${PATH}"
shellcheck -x ./*.sh machine/*.sh demo/*.sh .ci/run
if (( $# == 0 )); then set -- --numprocesses 2 --dist loadfile; fi     # a file's tests share fixtures
exec "${PYTHON}" -m pytest "$@"
