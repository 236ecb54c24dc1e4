#!/usr/bin/env bash
# MiniLLM: the 200M Qwen student of the paper on what it writes itself, judged by its teacher, on one
# machine of 8 GPUs.
#
#   examples/minillm_qwen_200M.sh [--dry-run] TEXT TEACHER OUTPUT
#
# As pretrain_qwen_200M.sh, with TEACHER (Hugging Face folder of Qwen1.5-1.8B; its tokenizer is the
# corpus's) in every step, and as many steps as cost the same FLOPs, sampling included.
METHOD=minillm
MINILLM_ARGS=(
    --rollout-batch-size 64
)
source "$(dirname "${BASH_SOURCE[0]}")/pretrain_qwen_200M.sh"
