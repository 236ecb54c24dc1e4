#!/usr/bin/env bash
# MiniPLM + Vanilla KD: the 200M Qwen student of the paper, on one machine of 8 GPUs.
#
#   examples/miniplm_kd_qwen_200M.sh [--dry-run] TEXT TEACHER OUTPUT
#
# As miniplm_qwen_200M.sh, with TEACHER in every step of the student's training, too, and as many
# steps as cost the same FLOPs.
METHOD=miniplm_kd
source "$(dirname "${BASH_SOURCE[0]}")/miniplm_qwen_200M.sh"
