# shellcheck shell=bash
# For run_full_workflow.sh and run_tests.sh, in this folder:  source ./env.sh REQUIREMENTS_FILE
# Sets PYTHON. An active virtual or conda environment is used as it is: its packages are checked, never
# changed. Without one, the requirements are installed into VENV (.venv in this folder), once.
# shellcheck source=machine/steps.sh
source ./machine/steps.sh

requirements="$1"
venv="${VENV:-${PWD}/.venv}"

# check_version PYTHON ADVICE
check_version() {
  command -v "$1" > /dev/null || die "$1 not found, wanted Python 3.11 or newer: $2"
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null \
    || die "$("$1" --version 2>&1) found ($1), wanted Python 3.11 or newer: $2"
}

has_pip() { "${PYTHON}" -m pip --version > /dev/null 2>&1; }

# is_installed : the marker is written last; requirements-dev.txt includes requirements.txt
is_installed() {
  [[ "$(cat requirements.txt "${requirements}")" == "$(cat "${marker}" 2> /dev/null)" ]] \
    && "${PYTHON}" -c '' 2> /dev/null
}

make_venv() {
  mkdir -p "${venv}" 2> /dev/null && [[ -w "${venv}" ]] \
    || die "can't write to ${venv}: activate an environment, or set VENV to a folder for one"
  exec 8>> "${venv}.lock"                      # two first starts at once: the second waits
  if command -v flock > /dev/null; then flock 8 2> /dev/null || true; fi
  if ! is_installed; then
    log "env | making ${venv} from ${requirements} (about 1.7 GB, minutes)"
    rm -f "${venv}"/*.installed                # the marker goes before what it marks is touched
    has_pip || "${system_python}" -m venv "${venv}" > /dev/null 2>&1 || true
    has_pip || "${system_python}" -m venv --clear "${venv}" \
      || die "could not make ${venv}: is python3-venv installed?"
    "${PYTHON}" -m pip install --quiet --disable-pip-version-check -r "${requirements}" \
      || die "pip could not install ${requirements}: see the lines above"
    cat requirements.txt "${requirements}" > "${marker}.tmp"
    mv "${marker}.tmp" "${marker}"
  fi
  exec 8>&-
}

if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
  active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
  if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="${active}/bin/python"              # PATH may name another
    [[ -x "${PYTHON}" ]] || PYTHON=python
  fi
  check_version "${PYTHON}" "activate a newer environment than ${active}, or none"
  "${PYTHON}" base.py "${requirements}" || exit 2
else
  system_python="${PYTHON:-python3}"
  check_version "${system_python}" "install it, or set PYTHON=/path/to/python3"
  PYTHON="${venv}/bin/python"
  marker="${venv}/${requirements}.installed"
  is_installed || make_venv
fi
export PYTHON PYTHONUNBUFFERED=1               # third-party prints reach a log file at once too
