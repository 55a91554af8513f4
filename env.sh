# Sourced by run_full_workflow.sh and run_tests.sh:  source ./env.sh REQUIREMENTS_FILE
# Sets PYTHON. An active virtual or conda environment is used as it is (its packages are checked, never changed);
# without one, .venv is made beside this file and the requirements are installed into it, once.

log() { printf '[%s] %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*" 2> /dev/null || true; }      # a full disk ends no work
die() { log "ERROR | $*" >&2; exit 2; }

requirements="$1"
if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
  PYTHON="${PYTHON:-python}"
  "${PYTHON}" base.py "${requirements}" || exit 2
else
  system_python="${PYTHON:-python3}"
  command -v "${system_python}" > /dev/null || die "${system_python} not found: install Python 3.11 or newer"
  "${system_python}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || die "$("${system_python}" --version) found, wanted Python 3.11 or newer: set PYTHON=/path/to/python3"
  PYTHON="${PWD}/.venv/bin/python"
  installed=".venv/${requirements}.installed"       # written last: without it the installation is not whole
  if ! cmp -s "${requirements}" "${installed}"; then
    log "env | making .venv from ${requirements} (about 1.7 GB, minutes)"
    [[ -x "${PYTHON}" ]] || "${system_python}" -m venv .venv || die "could not make .venv: is python3-venv installed?"
    "${PYTHON}" -m pip install --quiet --disable-pip-version-check -r "${requirements}" \
      || die "pip could not install ${requirements}: see the lines above"
    cp "${requirements}" "${installed}"
  fi
fi
export PYTHON PYTHONUNBUFFERED=1                    # third-party prints reach a log file at once too
