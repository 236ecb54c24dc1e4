#!/usr/bin/env bash
# MiniPLM: the 500M Qwen student of the paper, on one machine of 8 GPUs.
#
#   examples/miniplm_qwen_500M.sh [--dry-run] TEXT TEACHER OUTPUT
#
# As miniplm_qwen_200M.sh, with this student, its learning rate and half the micro-batch.
STUDENT=qwen1.5-500m
MICRO_BATCH_SIZE=8
LR=3e-4
MIN_LR=3e-5
source "$(dirname "${BASH_SOURCE[0]}")/miniplm_qwen_200M.sh"
