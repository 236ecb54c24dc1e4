#!/usr/bin/env bash
# SeqKD: the 200M Qwen student of the paper on its teacher's continuations, on one machine of 8 GPUs.
#
#   examples/seqkd_qwen_200M.sh [--dry-run] TEXT TEACHER OUTPUT
#
# As pretrain_qwen_200M.sh, on a corpus that TEACHER (Hugging Face folder of Qwen1.5-1.8B; its
# tokenizer is the corpus's) wrote: of every instance, it continues the first 768 tokens.
METHOD=seqkd
GENERATION_ARGS=(
    --prompt-length 768
    --micro-batch-size 64
    --bf16
)
source "$(dirname "${BASH_SOURCE[0]}")/pretrain_qwen_200M.sh"
