#!/usr/bin/env bash
# The whole workflow: token pairs of both models, a trained adapter, speculative decoding; for 1s and 500ms data sets.
#
#   ./run_full_workflow.sh --demo                              everything on a small made-up world, 2 CPU cores, minutes
#   EVENTGPT=models/EventGPT-7b ./run_full_workflow.sh         the real thing, from a terminal
#   DSEC_ROOT=/data/DSEC EVENTGPT=... ./run_full_workflow.sh   makes missing data sets from a raw DSEC download first
#   nohup ./run_full_workflow.sh > workflow.log 2>&1 &         for hours; watch it with: tail -f workflow.log
#   kill %1  (or kill PID)                                     stops it and what it started; the same command goes on
#   ./run_full_workflow.sh --new                               trains into new task folders (tokens are kept)
#
# Leaves TOKENS_DIR/{train_tokens_full,test_tokens_1s,train_tokens_500ms,test_tokens_500ms}.json and four task folders
# TASK_DIR/{1s_draft,1s,500ms_draft,500ms}_{date}_{time} with best_model.pt, results.json, RESULTS.md and the pictures;
# in 1s and 500ms decode_{date}_{time} with decode.json, DECODE.md and pictures of speculative decoding, checked and timed.
set -euo pipefail
for name in DATA_ROOT DSEC_ROOT TOKENS_DIR TASK_DIR EVENTGPT VIDEO_LLAVA TEST_1S PYTHON; do
  value="${!name:-}"               # a path is meant from where the script was called, not from its own folder
  if [[ "${name}" == VIDEO_LLAVA && ! -d "${value}" || "${name}" == PYTHON && "${value}" != */* ]]; then continue; fi
  if [[ -n "${value}" && "${value}" != /* ]]; then export "${name}=${PWD}/${value}"; fi
done
cd "$(dirname "${BASH_SOURCE[0]}")"

demo=''; new=''
for argument in "$@"; do
  case "${argument}" in
    --demo) demo=1 ;;
    --new) new=1 ;;
    -h|--help) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "ERROR | unknown argument ${argument}: wanted --demo, --new or --help" >&2; exit 2 ;;
  esac
done

# Settings: environment variables win over these defaults.
if [[ -n "${demo}" ]]; then
  DATA_ROOT="${DATA_ROOT:-demo/data}"
  DSEC_ROOT=''
  TOKENS_DIR="${TOKENS_DIR:-demo/tokens}"
  TASK_DIR="${TASK_DIR:-demo/task}"
  EVENTGPT="${EVENTGPT:-demo/models/eventgpt}"
  VIDEO_LLAVA="${VIDEO_LLAVA:-demo/models/video_llava}"
  EXTRACT_FLAGS="${EXTRACT_FLAGS:---max_new_tokens 80 --batch_size 16 --num_workers 2}"
  # Models this small run fastest on one thread; the other core decodes pictures and videos meanwhile.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  TRAIN_FLAGS="${TRAIN_FLAGS:---embed_dim 64 --num_layers 2 --num_heads 4 --num_epochs 24 --batch_size 16 \
    --learning_rate 3e-3 --dropout 0.1 --draft_text 0 --early_stopping 0 --no-refit --no-online}"
  DRAFT_FLAGS="${DRAFT_FLAGS:---num_epochs 8}"
  DECODE_FLAGS="${DECODE_FLAGS:---max_samples 8 --max_new_tokens 80 --num_workers 1}"
else
  DATA_ROOT="${DATA_ROOT:-data}"
  DSEC_ROOT="${DSEC_ROOT:-}"                                      # raw DSEC recordings, to make what DATA_ROOT lacks
  TOKENS_DIR="${TOKENS_DIR:-tokens}"
  TASK_DIR="${TASK_DIR:-task}"
  EVENTGPT="${EVENTGPT:-}"                                        # folder of the EventGPT checkpoint
  VIDEO_LLAVA="${VIDEO_LLAVA:-LanguageBind/Video-LLaVA-7B-hf}"    # folder or hub id
  EXTRACT_FLAGS="${EXTRACT_FLAGS:-}"                              # e.g. "--quantization none"
  TRAIN_FLAGS="${TRAIN_FLAGS:-}"                                  # e.g. "--num_epochs 30"
fi
DECODE_FLAGS="${DECODE_FLAGS:---max_samples 100}"    # further flags of decoding
PREPARE_FLAGS="${PREPARE_FLAGS:-}"  # further flags of prepare_dsec.py, e.g. "--video_size 480x360 --allow_missing"
DRAFT_FLAGS="${DRAFT_FLAGS:-}"    # further flags of the training in draft conditioning alone
DEMO_FLAGS="${DEMO_FLAGS:-}"      # further flags of make_demo.py, e.g. "--train_clips 48"
TEST_1S="${TEST_1S:-}"            # an existing pair file to test the 1s adapter on, instead of extracting one
LOCK_WAIT_S="${LOCK_WAIT_S:-120}" # how long to wait for another workflow in the same TASK_DIR to end
STATE="${TASK_DIR}/.workflow"     # the task folders that this workflow chose

source ./env.sh requirements.txt

child=''
stop() {
  log "stopping; the same command goes on from here"
  if [[ -n "${child}" ]]; then kill -TERM "${child}" 2>/dev/null || true; wait "${child}" || true; fi
  exit 143
}
trap stop TERM INT HUP
bound=()                          # a step ends with the script even when that is killed with -9
if command -v setpriv > /dev/null; then bound=(setpriv --pdeathsig TERM); fi

# unwritable FILE : the end, where this file in TASK_DIR can't be written
unwritable() { die "can't write to $1: make room in ${TASK_DIR}, or choose another"; }

# alone : one workflow at a time in TASK_DIR; the lock is held by the script and its steps, and can't go stale
alone() {
  [[ ! -d "${STATE}" ]] || die "${STATE} is a folder, wanted a file: remove it, or choose another TASK_DIR"
  true 2> /dev/null >> "${STATE}.lock" || unwritable "${STATE}.lock"
  exec 9>> "${STATE}.lock"
  if command -v flock > /dev/null && ! flock -w "${LOCK_WAIT_S}" 9; then
    die "another workflow is at work in ${TASK_DIR} ($(cat "${STATE}.lock")): wait for it, or name another TASK_DIR"
  fi
  echo "process $$ since $(date '+%Y-%m-%d %H:%M:%S')" 2> /dev/null > "${STATE}.lock" \
    || unwritable "${STATE}.lock"
}

# step NAME RESULT COMMAND... : run COMMAND unless RESULT is there already, which is written whole, and last
step() {
  local name="$1" result="$2" start="${SECONDS}" status=0
  shift 2
  if [[ -s "${result}" ]]; then log "${name} | skipped, ${result} exists"; return; fi
  log "${name} | start | $*"
  ${bound[@]+"${bound[@]}"} "$@" &               # not in the foreground: bash would let a kill wait for its end
  child=$!
  wait "${child}" || status=$?
  child=''
  if (( status != 0 )); then       # 2: the program has said what is wrong, in one ERROR line
    log "$( (( status == 2 )) || echo "ERROR | ")${name} ended with status ${status} after $((SECONDS - start)) s"
    exit 2
  fi
  [[ -s "${result}" ]] || die "${name} ended well but did not write ${result}"
  log "${name} | done in $((SECONDS - start)) s | ${result}"
}

# prepare SPLIT DURATION DATASET : from raw recordings, if DSEC_ROOT says where they are and nobody else made the folder
prepare() {
  if [[ -z "${DSEC_ROOT}" || ( -e "$3/mp4" && ! -e "$3/prepare_dsec.json" ) ]]; then return; fi
  # shellcheck disable=SC2086
  step "prepare $1 $2" "$3/EventGPT_Instruction_Subset.json" "${PYTHON}" prepare_dsec.py --dsec_root "${DSEC_ROOT}" \
    --output_root "${DATA_ROOT}" --split "$1" --duration "$2" --wait ${PREPARE_FLAGS}
}

# extract NAME DATASET OUTPUT : waits by itself when another process is extracting to the same output
extract() {
  # shellcheck disable=SC2086  # the flags are meant to split
  step "$1" "$3" "${PYTHON}" extract_tokens_train.py --dataset_dir "$2" --output_file "$3" \
    --draft_model "${EVENTGPT}" --target_model "${VIDEO_LLAVA}" --wait ${EXTRACT_FLAGS}
}

# chosen NAME PREFIX : the folder in TASK_DIR PREFIX_{date}_{time} chosen for this, now or when it was started before
chosen() {
  local folder
  folder="$(sed -n "s/^$1=//p" "${STATE}" 2> /dev/null || true)"
  if [[ -z "${folder}" ]]; then
    folder="$2_$(date +%Y%m%d_%H%M%S)"
    { cat "${STATE}" 2> /dev/null || true; echo "$1=${folder}"; } 2> /dev/null > "${STATE}.tmp" \
      && mv -f "${STATE}.tmp" "${STATE}" || unwritable "${STATE}"
  fi
  echo "${TASK_DIR}/${folder}"
}

# train NAME TRAIN TEST : the default conditioning, and draft conditioning as the reference; sets `tasks`
train() {
  local name="$1" folder how
  for name in "$1_draft" "$1"; do
    folder="$(chosen "${name}" "${name}")"
    # shellcheck disable=SC2206
    how=(--train_benchmark "$2" --test_benchmark "$3" --task_name "${name}" --task_folder "${folder}" ${TRAIN_FLAGS}
         $(if [[ "${name}" == *_draft ]]; then echo "--conditioning draft ${DRAFT_FLAGS}"; fi))
    if [[ -e "${folder}/resume.pt" ]]; then how=(--resume "${folder}"); fi
    step "train ${name}" "${folder}/RESULTS.md" "${PYTHON}" train_and_evaluate.py "${how[@]}"
    tasks+=("${folder}")
  done
}

# decode NAME DATASET : with the task NAME, after `train NAME`; in a dated folder inside the task's
decode() {
  local task folder
  if [[ ! -d "$2" ]]; then log "decode $1 | skipped, no data set folder $2"; return; fi       # TEST_1S does without
  task="$(chosen "$1" "$1")"
  folder="$(chosen "decode $1" "$(basename "${task}")/decode")"
  # shellcheck disable=SC2086
  step "decode $1" "${folder}/DECODE.md" "${PYTHON}" speculative_decode.py --task "${task}" --dataset_dir "$2" \
    --draft_model "${EVENTGPT}" --target_model "${VIDEO_LLAVA}" --output_folder "${folder}" --compare ${DECODE_FLAGS}
}

main() {
  [[ -n "${EVENTGPT}" ]] || die "EVENTGPT is not set: name the folder of the EventGPT checkpoint, or try --demo"
  [[ -z "${TEST_1S}" || -f "${TEST_1S}" ]] || die "TEST_1S=${TEST_1S}: no such file"
  [[ "${LOCK_WAIT_S}" =~ ^[0-9]+$ ]] || die "LOCK_WAIT_S=${LOCK_WAIT_S}: wanted whole seconds"
  [[ -z "${DSEC_ROOT}" || -d "${DSEC_ROOT}" ]] || die "DSEC_ROOT=${DSEC_ROOT}: no such folder"
  [[ -d "${EVENTGPT}" ]] || die "EVENTGPT=${EVENTGPT}: no such folder"
  for folder in "${TOKENS_DIR}" "${TASK_DIR}"; do
    mkdir -p "${folder}" 2> /dev/null || die "can't make the folder ${folder}: choose another, or mend its rights"
  done
  alone
  if [[ -n "${new}" ]]; then rm -f "${STATE}"; fi
  local train_root="${DATA_ROOT}/my_egpt_dsec_train/my_egpt_dsec_train" test_root="${DATA_ROOT}/my_egpt_dsec_test/my_egpt_dsec_seq"
  local test_1s="${TEST_1S:-${TOKENS_DIR}/test_tokens_1s.json}"
  tasks=()
  if [[ -n "${demo}" ]]; then
    # shellcheck disable=SC2086
    step "demo data" "${test_root}_500ms/EventGPT_Instruction_Subset.json" "${PYTHON}" make_demo.py \
      --output_dir "${DATA_ROOT}" --wait ${DEMO_FLAGS}
  fi

  log "PHASE 1 | the 1s data set"
  prepare train 1s "${train_root}_1s"
  prepare test 1s "${test_root}_1s"
  extract "extract train 1s" "${train_root}_1s" "${TOKENS_DIR}/train_tokens_full.json"
  extract "extract test 1s" "${test_root}_1s" "${test_1s}"
  train 1s "${TOKENS_DIR}/train_tokens_full.json" "${test_1s}"
  decode 1s "${test_root}_1s"

  log "PHASE 2 | the 500ms data set"
  prepare train 500ms "${train_root}_500ms"
  prepare test 500ms "${test_root}_500ms"
  extract "extract train 500ms" "${train_root}_500ms" "${TOKENS_DIR}/train_tokens_500ms.json"
  extract "extract test 500ms" "${test_root}_500ms" "${TOKENS_DIR}/test_tokens_500ms.json"
  train 500ms "${TOKENS_DIR}/train_tokens_500ms.json" "${TOKENS_DIR}/test_tokens_500ms.json"
  decode 500ms "${test_root}_500ms"

  log "SUMMARY"
  "${PYTHON}" report.py "${tasks[@]}"
}
main
