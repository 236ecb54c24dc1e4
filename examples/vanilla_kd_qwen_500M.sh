#!/usr/bin/env bash
# Vanilla KD: the 500M Qwen student of the paper beside its teacher, on one machine of 8 GPUs.
#
#   examples/vanilla_kd_qwen_500M.sh [--dry-run] TEXT TEACHER OUTPUT
#
# As pretrain_qwen_500M.sh, with TEACHER (Hugging Face folder of Qwen1.5-1.8B; its tokenizer is the
# corpus's) in every step, and as many steps as cost the same FLOPs.
METHOD=vanilla_kd
source "$(dirname "${BASH_SOURCE[0]}")/pretrain_qwen_500M.sh"
