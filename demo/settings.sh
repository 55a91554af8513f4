# shellcheck shell=bash disable=SC2034
# Settings of `run_full_workflow.sh --demo`: minutes on 2 CPU cores. Variables of the environment win.
DATA_ROOT="${DATA_ROOT:-demo/data}"
DSEC_ROOT=''
TOKENS_DIR="${TOKENS_DIR:-demo/tokens}"
TASK_DIR="${TASK_DIR:-demo/task}"
EVENTGPT="${EVENTGPT:-demo/models/eventgpt}"
VIDEO_LLAVA="${VIDEO_LLAVA:-demo/models/video_llava}"
# Models this small run fastest on one thread; the other core decodes pictures and videos meanwhile.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
EXTRACT_FLAGS="${EXTRACT_FLAGS:---max_new_tokens 80 --batch_size 16 --num_workers 2}"
TRAIN_FLAGS="${TRAIN_FLAGS:---embed_dim 64 --num_layers 2 --num_heads 4 --num_epochs 24 \
  --batch_size 16 --learning_rate 3e-3 --dropout 0.1 --draft_text 0 --early_stopping 0 \
  --no-refit --no-online}"
DRAFT_FLAGS="${DRAFT_FLAGS:---num_epochs 8}"
DECODE_FLAGS="${DECODE_FLAGS:---max_samples 8 --max_new_tokens 80 --num_workers 1}"
