#!/usr/bin/env bash
# Pre-Train w/o KD: the 1.2B Qwen student of the MiniPLM paper, on one machine of 8 GPUs.
#
#   examples/pretrain_qwen_1.2B.sh [--dry-run] TEXT TOKENIZER OUTPUT
#
# As pretrain_qwen_200M.sh, with this student, its learning rate and half the micro-batch.
STUDENT=qwen1.5-1.2b
MICRO_BATCH_SIZE=8
LR=2.5e-4
MIN_LR=2.5e-5
source "$(dirname "${BASH_SOURCE[0]}")/pretrain_qwen_200M.sh"
