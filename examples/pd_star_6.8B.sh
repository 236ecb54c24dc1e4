#!/usr/bin/env bash
# Offline pre-training distillation, PD*: the 6.8B student of arXiv 2410.16215.
#
#   examples/pd_star_6.8B.sh [--dry-run] TEXT TEACHER OUTPUT
#
# As pd_vanilla_1.9B.sh, with the paper's best configuration and fewer logits, over four tensor ranks.
RECIPE=pd-star
KEPT=50
STUDENT=pd-6.8b
TENSOR_RANKS=4
source "$(dirname "${BASH_SOURCE[0]}")/pd_vanilla_1.9B.sh"
