#!/usr/bin/env bash
# MiniPLM-proxy: the 200M Qwen student of the paper, on one machine of 8 GPUs.
#
#   examples/miniplm_prx_qwen_200M.sh [--dry-run] TEXT TEACHER OUTPUT
#
# As miniplm_qwen_200M.sh, but the teacher scores a sample of about 0.1B tokens alone (0.1 % of a pool
# of 100B); a proxy of the reference's size learns the difference from it and ranks the whole pool.
METHOD=miniplm_proxy
SAMPLE_ARGS=(
    --reference-fraction 0.001
    --heldout-fraction 0.00005
    --seed 11
)
PROXY_ARGS=(  # three epochs of 97.7K instances
    --config "$(dirname "${BASH_SOURCE[0]}")/recipes/proxy.yaml"
    --model qwen1.5-104m
    --use-distributed-optimizer
    --micro-batch-size 8
    --train-iters 4580
)
source "$(dirname "${BASH_SOURCE[0]}")/miniplm_qwen_200M.sh"
