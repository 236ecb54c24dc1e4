#!/usr/bin/env bash
# Pre-Train w/o KD: the 500M Qwen student of the MiniPLM paper, on one machine of 8 GPUs.
#
#   examples/pretrain_qwen_500M.sh [--dry-run] TEXT TOKENIZER OUTPUT
#
# As pretrain_qwen_200M.sh, with this student, its learning rate and half the micro-batch.
STUDENT=qwen1.5-500m
MICRO_BATCH_SIZE=8
LR=3e-4
MIN_LR=3e-5
source "$(dirname "${BASH_SOURCE[0]}")/pretrain_qwen_200M.sh"
