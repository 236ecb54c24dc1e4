#!/usr/bin/env bash
# A proxy in the place of two models' scores, at laptop size: trained on 15 % of the quickstart's pool,
# it predicts the rest, where its ranking is compared with the exact one.
#
#   make quickstart && examples/proxy.sh [--dry-run] [QUICKSTART]
#
# QUICKSTART  folder that `make quickstart` filled (runs/quickstart); results go below it
#
# Prints R^2, Spearman and overlap of the upper halves with their intervals, and the FLOPs of both
# ways. The quickstart scored its whole pool, so the exact ranking of all that is held out is known; a
# proxy only needs scores of the sample.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

QUICKSTART=${1:-runs/quickstart}
OUTPUT=$QUICKSTART/proxy
SCORES_ARGS=(
    --teacher-scores "$QUICKSTART/scores/teacher"
    --reference-scores "$QUICKSTART/scores/reference"
)
MODEL_ARGS=(  # the reference's
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 1
)
TRAINING_ARGS=(  # 472 instances, three times, in small batches: 177 updates
    --objective regression --teacher scores "${SCORES_ARGS[@]}"
    --micro-batch-size 8 --global-batch-size 8 --train-samples 1416
    --lr 1e-3 --lr-warmup-iters 5 --log-interval 20
)

on_one split --data-path "$QUICKSTART/data/pool" --seed 2 --reference-fraction 0.15 \
    --reference-prefix "$OUTPUT/data/sample" --pool-prefix "$OUTPUT/data/heldout"
unless_there "$OUTPUT/data/heldout.json" "${ONE[@]}"
on_one pretrain --train-data-path "$OUTPUT/data/sample" --load "$QUICKSTART/reference" --finetune \
    --save "$OUTPUT/model" "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}"
run "${ONE[@]}"
on_one score --head proxy --data-path "$QUICKSTART/data/pool" --load "$OUTPUT/model" \
    --output "$OUTPUT/scores"
unless_there "$OUTPUT/scores/manifest.json" "${ONE[@]}"
on_one select --data-path "$QUICKSTART/data/pool" --selector proxy --proxy-scores "$OUTPUT/scores" \
    --output-prefix "$OUTPUT/data/selected"
unless_there "$OUTPUT/data/selected.json" "${ONE[@]}"
on_one evaluate --proxy-scores "$OUTPUT/scores" "${SCORES_ARGS[@]}" \
    --held-out "$OUTPUT/data/heldout" --output "$OUTPUT/heldout"
unless_there "$OUTPUT/heldout/results.json" "${ONE[@]}"
