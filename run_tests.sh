#!/usr/bin/env bash
# Everything that must hold: lint, then all tests. Needs nothing but Python >= 3.11 and pip.
#
#   ./run_tests.sh                        all of it, 2 CPU cores, minutes
#   ./run_tests.sh tests/test_base.py     one file; every argument goes to pytest
#
# Uses the active virtual or conda environment, else makes .venv from requirements-dev.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./env.sh requirements-dev.txt

"${PYTHON}" -m ruff check .
exec "${PYTHON}" -m pytest "$@"
