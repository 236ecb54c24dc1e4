#!/usr/bin/env bash
# Offline pre-training distillation, vanilla configuration: the 6.8B student of arXiv 2410.16215.
#
#   examples/pd_vanilla_6.8B.sh [--dry-run] TEXT TEACHER OUTPUT
#
# As pd_vanilla_1.9B.sh, over four tensor ranks.
STUDENT=pd-6.8b
TENSOR_RANKS=4
source "$(dirname "${BASH_SOURCE[0]}")/pd_vanilla_1.9B.sh"
