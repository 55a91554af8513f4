# shellcheck shell=bash
# Steps of a workflow: skipped when done, stopped with the script, one workflow at a time. To be sourced.
# Works with bash 3.2, the newest that macOS has.

now() { date '+%Y-%m-%d %H:%M:%S'; }
log() { printf '[%s] %s\n' "$(now)" "$*" 2> /dev/null || true; }                # a full disk ends no work
die() { log "ERROR | $*" >&2; exit 2; }

# quoted WORD... : the words as a line that can be pasted into a shell
quoted() { local line; line="$(printf '%q ' "$@")"; echo "${line% }"; }

# split NAME : sets the array `words` to the words of the setting NAME; quotes work, nothing is expanded
split() {
  local word
  words=()
  [[ -n "${!1//[[:space:]]/}" ]] || return 0
  xargs true <<< "${!1}" 2> /dev/null || die "$1 has a quote that is not closed on its line: ${!1}"
  while IFS= read -r -d '' word; do words+=("${word}"); done < <(xargs printf '%s\0' <<< "${!1}")
}

# stop : what a signal does. RESUME, set by the script, is the command that resumes it.
child=''
stop() {
  local numbers=(TERM INT HUP USR1 USR2 XCPU)
  trap 'kill -TERM "${child}" 2> /dev/null || true' "${numbers[@]}"       # one more goes to the step
  if [[ -n "${child}" ]]; then
    kill -TERM "${child}" 2> /dev/null || true
    while kill -0 "${child}" 2> /dev/null; do wait "${child}" || true; done
  fi
  log "RESUME | ${RESUME}"
  exit 143
}
trap stop TERM INT HUP USR1 USR2 XCPU      # Slurm announces the end of a job with USR1, USR2 or XCPU
trap '' PIPE                               # the reader of the log may go; the work goes on

bound=()                                   # a step ends with the script even if that gets kill -9
if command -v setpriv > /dev/null; then bound=(setpriv --pdeathsig TERM); fi

# The steps to come as "NAME WEIGHT", set by the script; what those that ran have taken and weighed.
plan=(); ran_s=0; ran_weight=0

# announce NAME : sets `weight` and tells the step its place among all, for the bar on a terminal
announce() {
  local at number=0 later=0
  weight=0
  for (( at = 0; at < ${#plan[@]}; at++ )); do
    if [[ "${plan[at]% *}" == "$1" ]]; then
      number=$((at + 1)); weight="${plan[at]##* }"
    elif (( number )); then
      later=$((later + ${plan[at]##* }))
    fi
  done
  WORKFLOW_STEP=''
  if (( number )); then
    WORKFLOW_STEP="${number} ${#plan[@]} ${ran_s} ${ran_weight} ${weight} ${later}"
  fi
  export WORKFLOW_STEP
}

# step NAME RESULT COMMAND... : run COMMAND unless RESULT exists, which is written whole, and last
step() {
  local name="$1" result="$2" start="${SECONDS}" status=0 weight
  shift 2
  if [[ -s "${result}" ]]; then log "${name} | skipped, ${result} exists"; return; fi
  log "${name} | start | $(quoted "$@")"
  announce "${name}"
  RUN_BY_WORKFLOW=1 ${bound[@]+"${bound[@]}"} "$@" &       # in the foreground a kill would have to wait
  child=$!
  wait "${child}" || status=$?
  child=''
  if (( status != 0 )); then
    if (( status != 2 )); then name="ERROR | ${name}"; fi      # 2: the program has printed its ERROR line
    log "${name} ended with status ${status} after $((SECONDS - start)) s"
    exit 2
  fi
  [[ -s "${result}" ]] || die "${name} ended well but did not write ${result}"
  ran_s=$((ran_s + SECONDS - start)); ran_weight=$((ran_weight + weight))
  log "${name} | done in $((SECONDS - start)) s | ${result}"
}

unwritable() { die "can't write to $1: make room in ${TASK_DIR}, or choose another"; }

# lock : one workflow at a time in TASK_DIR; script and steps hold the lock, which can't go stale
lock() {
  local file="${STATE}.lock" trouble
  [[ ! -d "${STATE}" ]] || die "${STATE} is a folder, wanted a file: remove it, or change TASK_DIR"
  true 2> /dev/null >> "${file}" || unwritable "${file}"
  exec 9>> "${file}"
  if ! command -v flock > /dev/null; then
    log "WARNING | there is no flock command here: start one workflow at a time in ${TASK_DIR}"
  elif ! trouble="$(flock -n 9 2>&1)"; then
    if [[ -n "${trouble}" ]]; then         # nobody holds it: Lustre and NFS may have no locks
      log "WARNING | no locks on the disk of ${TASK_DIR} (${trouble##*: }): start one workflow at a time"
    elif ! flock -w "${LOCK_WAIT_S}" 9; then
      die "another workflow is at work in ${TASK_DIR} ($(cat "${file}")): wait for it, or change TASK_DIR"
    fi
  fi
  echo "process $$ on ${HOSTNAME} since $(now)" 2> /dev/null > "${file}" || unwritable "${file}"
}

# chosen NAME PREFIX : the folder TASK_DIR/PREFIX_{date}_{time} for NAME, chosen at its first start
chosen() {
  local folder
  folder="$(sed -n "s/^$1=//p" "${STATE}" 2> /dev/null || true)"
  if [[ -z "${folder}" ]]; then
    folder="$2_$(date +%Y%m%d_%H%M%S)"
    { cat "${STATE}" 2> /dev/null || true; echo "$1=${folder}"; } 2> /dev/null > "${STATE}.tmp" \
      || unwritable "${STATE}"
    mv -f "${STATE}.tmp" "${STATE}" || unwritable "${STATE}"
  fi
  echo "${TASK_DIR}/${folder}"
}
