#!/usr/bin/env bash
# The whole workflow for the 1s and 500ms data sets: token pairs of both models, adapters, decoding.
#
#   ./run_full_workflow.sh --demo                        a small made-up world, 2 CPU cores, minutes
#   EVENTGPT=models/EventGPT-7b ./run_full_workflow.sh   the real models, from a terminal
#   DSEC_ROOT=/data/DSEC EVENTGPT=... ./run_full_workflow.sh     makes missing data sets from raw DSEC
#   TRAIN_DATA=a TEST_DATA=b EVENTGPT=none ./run_full_workflow.sh   two folders of videos, no draft model
#   nohup ./run_full_workflow.sh > workflow.log 2>&1 &   for hours; watch it with: tail -f workflow.log
#   kill %1  (or kill PID)                               stops it; the RESUME line is how to go on
#   ./run_full_workflow.sh --new                         trains into new task folders (keeps the tokens)
#   ./run_full_workflow.sh --only 1s|500ms               one of the two data sets alone
#   ./run_full_workflow.sh --until extract|train         ends with the tokens, or with the adapters
#
# Leaves TOKENS_DIR/{train_tokens_full,test_tokens_1s,train_tokens_500ms,test_tokens_500ms}.json and the
# task folders TASK_DIR/{1s_draft,1s,500ms_draft,500ms}_{date}_{time} with best_model.pt, results.json,
# RESULTS.md and pictures; in 1s and 500ms decode_{date}_{time} with decode.json, DECODE.md and pictures.
# With TRAIN_DATA and TEST_DATA: {train,test}_tokens_own.json, and one task, own (and own_draft).
not_sourced="ERROR | run this script, don't source it"
case "${ZSH_EVAL_CONTEXT:-}" in *:file*) echo "${not_sourced}" >&2; return 2 ;; esac
if [ -z "${BASH_VERSION:-}" ] || shopt -qo posix; then exec bash "$0" "$@"; fi       # sh, dash, zsh
if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then echo "${not_sourced}" >&2; return 2; fi
set -euo pipefail

# The folder of the suite: that of this file (behind links), or where a batch system was given a copy.
script="$0"
while [[ -L "${script}" ]]; do
  link="$(readlink "${script}")"
  case "${link}" in /*) script="${link}" ;; *) script="$(dirname "${script}")/${link}" ;; esac
done
for suite in "${SUITE:-}" "$(cd "$(dirname "${script}")" && pwd)" "${SLURM_SUBMIT_DIR:-}" \
             "${PBS_O_WORKDIR:-}" "${SGE_O_WORKDIR:-}" "${PWD}" ''; do
  if [[ -f "${suite}/machine/steps.sh" && -f "${suite}/base.py" ]]; then break; fi
done
if [[ -z "${suite}" ]]; then
  echo "ERROR | $0 is a copy without the suite beside it: set SUITE=/path/to/the/suite" >&2
  exit 2
fi

demo=''; new=''; only=''; until=''; arguments=()
while (( $# )); do
  case "$1 ${2:-}" in
    "--demo "*) demo=1 ;;
    "--new "*) new=1; shift; continue ;;                     # no part of the command that resumes
    "--only 1s"|"--only 500ms") only="$2"; arguments+=("$1"); shift ;;
    "--until extract"|"--until train") until="$2"; arguments+=("$1"); shift ;;
    "-h "*|"--help "*) sed -n '2,16s/^# \{0,1\}//p' "${suite}/run_full_workflow.sh"; exit 0 ;;
    *) case "$1" in --only|--until) wrong="$1 ${2:-}" ;; *) wrong="$1" ;; esac
       echo "ERROR | unknown argument ${wrong}: wanted --demo, --new, --only 1s|500ms," \
         "--until extract|train or --help" >&2
       exit 2 ;;
  esac
  arguments+=("$1"); shift
done

# shellcheck source=machine/steps.sh
source "${suite}/machine/steps.sh"
RESUME="cd $(quoted "${PWD}") &&"
none_or_id='^(none|[[:alnum:]._-]+/[[:alnum:]._-]+)$'       # what EVENTGPT may be, if no folder
flags=(PREPARE_FLAGS EXTRACT_FLAGS TRAIN_FLAGS DRAFT_FLAGS DECODE_FLAGS DEMO_FLAGS)
for name in DATA_ROOT DSEC_ROOT TRAIN_DATA TEST_DATA SEQUENCE_PATTERN TOKENS_DIR TASK_DIR EVENTGPT \
            VIDEO_LLAVA TEST_1S PYTHON VENV LOCK_WAIT_S NUM_PROCESSES "${flags[@]}"; do
  value="${!name:-}"
  if [[ -n "${value}" ]]; then RESUME+=" ${name}=$(quoted "${value}")"; fi
  # A relative path starts in the folder where the script was called.
  case "${name}" in
    *_FLAGS|LOCK_WAIT_S|NUM_PROCESSES|SEQUENCE_PATTERN) continue ;;
    VIDEO_LLAVA) [[ -d "${value}" ]] || continue ;;
    EVENTGPT) [[ -d "${value}" || ! "${value}" =~ ${none_or_id} ]] || continue ;;
    PYTHON) [[ "${value}" == */* ]] || continue ;;
  esac
  if [[ -n "${value}" && "${value}" != /* ]]; then export "${name}=${PWD}/${value}"; fi
done
RESUME+=" $(quoted "${suite}/run_full_workflow.sh" ${arguments[@]+"${arguments[@]}"})"
cd "${suite}"

# Settings: environment variables win over these defaults.
# shellcheck source=demo/settings.sh
if [[ -n "${demo}" ]]; then source demo/settings.sh; fi
DATA_ROOT="${DATA_ROOT:-data}"
DSEC_ROOT="${DSEC_ROOT:-}"            # raw DSEC recordings, to make the data sets that DATA_ROOT lacks
TRAIN_DATA="${TRAIN_DATA:-}"          # with TEST_DATA: data set folders of your own, instead of DSEC's;
TEST_DATA="${TEST_DATA:-}"            # a folder of videos is one
SEQUENCE_PATTERN="${SEQUENCE_PATTERN:-}"    # finds the sequence in a clip's path, e.g. '^(.*)_[0-9]+$'
TOKENS_DIR="${TOKENS_DIR:-tokens}"
TASK_DIR="${TASK_DIR:-task}"
EVENTGPT="${EVENTGPT:-}"              # folder (or hub id) of the draft model; none: the target alone
VIDEO_LLAVA="${VIDEO_LLAVA:-LanguageBind/Video-LLaVA-7B-hf}"    # folder or hub id
TEST_1S="${TEST_1S:-}"                # a pair file to test the 1s adapter on, instead of extracting one
LOCK_WAIT_S="${LOCK_WAIT_S:-120}"     # how long to wait for another workflow in the same TASK_DIR
NUM_PROCESSES="${NUM_PROCESSES:-}"    # that extract; default: one for each visible GPU, one on a CPU
# Further flags of the programs; values with spaces in quotes.
PREPARE_FLAGS="${PREPARE_FLAGS:-}"    # e.g. "--video_size 480x360 --allow_missing"
EXTRACT_FLAGS="${EXTRACT_FLAGS:-}"    # e.g. '--query "What is on the road?"'
TRAIN_FLAGS="${TRAIN_FLAGS:-}"        # e.g. "--num_epochs 30"
DRAFT_FLAGS="${DRAFT_FLAGS:-}"        # of the training in draft conditioning alone
DECODE_FLAGS="${DECODE_FLAGS:---max_samples 100}"
DEMO_FLAGS="${DEMO_FLAGS:-}"          # of make_demo.py, e.g. "--train_clips 48"
STATE="${TASK_DIR}/.workflow"         # the task folders that this workflow chose

check_settings() {
  [[ -n "${EVENTGPT}" ]] || die "EVENTGPT is not set: name its checkpoint's folder, or none, or try --demo"
  [[ -z "${TRAIN_DATA}${TEST_DATA}" || ( -d "${TRAIN_DATA}" && -d "${TEST_DATA}" ) ]] \
    || die "TRAIN_DATA=${TRAIN_DATA} TEST_DATA=${TEST_DATA}: wanted two folders of clips"
  [[ -z "${TRAIN_DATA}" || -z "${DSEC_ROOT}${TEST_1S}${only}${demo}" ]] \
    || die "TRAIN_DATA stands in place of DSEC's data sets: leave out DSEC_ROOT, TEST_1S, --only and --demo"
  [[ -z "${TEST_1S}" || -f "${TEST_1S}" ]] || die "TEST_1S=${TEST_1S}: no such file"
  [[ "${LOCK_WAIT_S}" =~ ^[0-9]+$ ]] || die "LOCK_WAIT_S=${LOCK_WAIT_S}: wanted whole seconds"
  [[ -z "${DSEC_ROOT}" || -d "${DSEC_ROOT}" ]] || die "DSEC_ROOT=${DSEC_ROOT}: no such folder"
  [[ -d "${EVENTGPT}" || "${EVENTGPT}" =~ ${none_or_id} ]] \
    || die "EVENTGPT=${EVENTGPT}: no such folder, nor a hub id"
  if [[ -z "${NUM_PROCESSES}" ]]; then NUM_PROCESSES="$(visible_gpus)"; fi
  [[ "${NUM_PROCESSES}" =~ ^[1-9][0-9]*$ ]] || die "NUM_PROCESSES=${NUM_PROCESSES}: wanted 1 or more"
  for name in "${flags[@]}"; do split "${name}"; done
  models=(--draft_model "${EVENTGPT}" --target_model "${VIDEO_LLAVA}")
  pattern=()
  if [[ -n "${SEQUENCE_PATTERN}" ]]; then pattern=(--sequence_pattern "${SEQUENCE_PATTERN}"); fi
}

# visible_gpus : how many GPUs the programs see, 1 where there is none or EXTRACT_FLAGS names a device
visible_gpus() {
  local count=0
  if [[ -n "${demo}" || "${EXTRACT_FLAGS}" == *--device* ]]; then echo 1; return; fi
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    count="$(tr ',' '\n' <<< "${CUDA_VISIBLE_DEVICES}" | grep -c '[^[:space:]]' || true)"
  elif command -v nvidia-smi > /dev/null; then
    count="$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)"
  fi
  echo "$(( count > 1 ? count : 1 ))"
}

# run NAME RESULT SETTING PROGRAM FLAGS... : a step of a program, with the further flags of SETTING
launcher=()
run() {
  local name="$1" result="$2" setting="$3"
  shift 3
  split "${setting}"
  step "${name}" "${result}" "${PYTHON}" ${launcher[@]+"${launcher[@]}"} "$@" ${words[@]+"${words[@]}"}
}

# prepare SPLIT DURATION DATASET : from raw recordings in DSEC_ROOT, unless somebody else made the folder
prepare() {
  if [[ -z "${DSEC_ROOT}" || ( -e "$3/mp4" && ! -e "$3/prepare_dsec.json" ) ]]; then return; fi
  run "prepare $1 $2" "$3/EventGPT_Instruction_Subset.json" PREPARE_FLAGS prepare_dsec.py \
    --dsec_root "${DSEC_ROOT}" --output_root "${DATA_ROOT}" --split "$1" --duration "$2" --wait
}

# extract NAME DATASET OUTPUT : waits by itself when another process is extracting to the same output
extract() {
  local launcher=()
  if (( NUM_PROCESSES > 1 )); then
    launcher=(-m torch.distributed.run --standalone --nproc_per_node "${NUM_PROCESSES}")
  fi
  run "extract $1" "$3" EXTRACT_FLAGS extract_tokens_train.py --dataset_dir "$2" \
    --output_file "$3" "${models[@]}" ${pattern[@]+"${pattern[@]}"} --wait
}

# train NAME TRAIN TEST : draft conditioning for comparison, then the default; adds to `tasks`
train() {
  local name folder command
  for name in "$1_draft" "$1"; do
    if [[ "${EVENTGPT} ${name}" == "none "*_draft ]]; then continue; fi      # there are no drafts
    folder="$(chosen "${name}" "${name}")"
    command=(--train_benchmark "$2" --test_benchmark "$3" --task_name "${name}" --task_folder "${folder}")
    split TRAIN_FLAGS
    command+=(${words[@]+"${words[@]}"})
    if [[ "${name}" == *_draft ]]; then
      split DRAFT_FLAGS
      command+=(--conditioning draft ${words[@]+"${words[@]}"})
    fi
    if [[ -e "${folder}/resume.pt" ]]; then command=(--resume "${folder}"); fi
    step "train ${name}" "${folder}/RESULTS.md" "${PYTHON}" train_and_evaluate.py "${command[@]}"
    tasks+=("${folder}")
  done
}

# decode NAME DATASET : with the task of this name, into a dated folder inside the task's
decode() {
  local task folder
  if [[ ! -d "$2" ]]; then           # a workflow with TEST_1S needs none
    log "decode $1 | skipped, no data set folder $2"
    return
  fi
  task="$(chosen "$1" "$1")"
  folder="$(chosen "decode $1" "$(basename "${task}")/decode")"
  run "decode $1" "${folder}/DECODE.md" DECODE_FLAGS speculative_decode.py --task "${task}" \
    --dataset_dir "$2" "${models[@]}" ${pattern[@]+"${pattern[@]}"} --output_folder "${folder}" --compare
}

# weigh NAME SECONDS... : adds the steps of a phase to the plan, each with its seconds in the demo;
# a preparation, which the demo has not, counts as an extraction
weigh() {
  if [[ -n "${only}" && "${only}" != "$1" ]]; then return; fi
  if [[ -n "${DSEC_ROOT}" && -z "${TRAIN_DATA}" ]]; then
    plan+=("prepare train $1 $2" "prepare test $1 $3")
  fi
  plan+=("extract train $1 $2" "extract test $1 $3")
  if [[ "${until}" == extract ]]; then return; fi
  if [[ "${EVENTGPT}" != none ]]; then plan+=("train $1_draft $4"); fi
  plan+=("train $1 $5")
  if [[ "${until}" == train ]]; then return; fi
  plan+=("decode $1 $6")
}

# phase NAME TRAIN_DATASET TEST_DATASET TRAIN_TOKENS TEST_TOKENS
phase() {
  extract "train $1" "$2" "$4"
  extract "test $1" "$3" "$5"
  if [[ "${until}" == extract ]]; then return; fi
  train "$1" "$4" "$5"
  if [[ "${until}" == train ]]; then return; fi
  decode "$1" "$3"
}

# dsec_phase NUMBER DURATION TRAIN_TOKENS TEST_TOKENS
dsec_phase() {
  if [[ -n "${only}" && "${only}" != "$2" ]]; then return; fi
  log "PHASE $1 | the $2 data set"
  prepare train "$2" "${train_root}_$2"
  prepare test "$2" "${test_root}_$2"
  phase "$2" "${train_root}_$2" "${test_root}_$2" "$3" "$4"
}

main() {
  check_settings
  source ./env.sh requirements.txt
  for folder in "${TOKENS_DIR}" "${TASK_DIR}"; do
    mkdir -p "${folder}" 2> /dev/null \
      || die "can't make the folder ${folder}: choose another, or correct its permissions"
  done
  lock
  if [[ -n "${new}" ]]; then rm -f "${STATE}"; fi
  train_root="${DATA_ROOT}/my_egpt_dsec_train/my_egpt_dsec_train"
  test_root="${DATA_ROOT}/my_egpt_dsec_test/my_egpt_dsec_seq"
  tasks=()
  if [[ -n "${demo}" ]]; then plan+=("demo data 34"); fi
  if [[ -n "${TRAIN_DATA}" ]]; then
    weigh own 15 9 14 62 23
  else
    weigh 1s 15 9 14 62 23
    weigh 500ms 33 21 25 90 38
  fi
  if [[ -n "${demo}" ]]; then
    run "demo data" "${test_root}_500ms/EventGPT_Instruction_Subset.json" DEMO_FLAGS make_demo.py \
      --output_dir "${DATA_ROOT}" --wait
  fi
  if [[ -n "${TRAIN_DATA}" ]]; then
    phase own "${TRAIN_DATA}" "${TEST_DATA}" "${TOKENS_DIR}/train_tokens_own.json" \
      "${TOKENS_DIR}/test_tokens_own.json"
  else
    dsec_phase 1 1s "${TOKENS_DIR}/train_tokens_full.json" "${TEST_1S:-${TOKENS_DIR}/test_tokens_1s.json}"
    dsec_phase 2 500ms "${TOKENS_DIR}/train_tokens_500ms.json" "${TOKENS_DIR}/test_tokens_500ms.json"
  fi
  if [[ "${until}" == extract ]]; then log "RESULT | tokens in ${TOKENS_DIR}"; return; fi
  log "SUMMARY"
  "${PYTHON}" report.py --html "${tasks[@]}"
}
main
