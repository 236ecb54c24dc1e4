#!/usr/bin/env bash
# Offline pre-training distillation, PD*: the 1.9B student of arXiv 2410.16215.
#
#   examples/pd_star_1.9B.sh [--dry-run] TEXT TEACHER OUTPUT
#
# As pd_vanilla_1.9B.sh, with the paper's best configuration and fewer logits.
RECIPE=pd-star
KEPT=50
source "$(dirname "${BASH_SOURCE[0]}")/pd_vanilla_1.9B.sh"
