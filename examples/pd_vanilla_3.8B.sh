#!/usr/bin/env bash
# Offline pre-training distillation, vanilla configuration: the 3.8B student of arXiv 2410.16215.
#
#   examples/pd_vanilla_3.8B.sh [--dry-run] TEXT TEACHER OUTPUT
#
# As pd_vanilla_1.9B.sh, over two tensor ranks.
STUDENT=pd-3.8b
TENSOR_RANKS=2
source "$(dirname "${BASH_SOURCE[0]}")/pd_vanilla_1.9B.sh"
