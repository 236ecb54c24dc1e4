#!/usr/bin/env bash
# Every method of the papers at laptop size, at equal training FLOPs: the quickstart's students, and
# those that it has not, on the same data from the same initial weights.
#
#   make quickstart && examples/proxy.sh && examples/all_methods.sh [--dry-run] [QUICKSTART]
#
# QUICKSTART  folder that `make quickstart` and examples/proxy.sh filled (runs/quickstart)
#
# Prints a table of methods: training FLOPs, FLOPs before, held-out loss over seeds, bits per byte; it
# is in QUICKSTART/methods/table.json, too. Students without selection see the random half of the pool.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

QUICKSTART=${1:-runs/quickstart}
DATA=$QUICKSTART/data
TEACHER=$QUICKSTART/teacher
OUTPUT=$QUICKSTART/methods
SEEDS=${SEEDS:-1 2 3}
PROMPT=192  # of 256 tokens, as 768 of 1,024

TRAINING_ARGS=(  # the quickstart's
    --num-layers 2 --hidden-size 96 --ffn-hidden-size 256 --num-attention-heads 2
    --init-method-std 0.07 --micro-batch-size 4 --global-batch-size 4
    --train-iters 400 --lr 3e-3 --lr-warmup-fraction 0.05 --log-interval 20
)
MINILLM_ARGS=(  # a third of its updates is a warm start: what an untrained student writes is noise
    --teacher-load "$TEACHER" --prompt-length "$PROMPT" --align-flops-to 1
    --warm-start-samples 250
)

on_one generate --data-path "$DATA/random" --load "$TEACHER" --prompt-length "$PROMPT" \
    --output-prefix "$OUTPUT/data/seqkd"
unless_there "$OUTPUT/data/seqkd.json" "${ONE[@]}"
on_one cache-logits --data-path "$DATA/random" --load "$TEACHER" --output "$OUTPUT/logits"
unless_there "$OUTPUT/logits/manifest.json" "${ONE[@]}"

# student METHOD SEED VERB CORPUS FLAGS...: train one and judge it.
student() {
    local save=$OUTPUT/student-$1-$2 seed=$2 verb=$3 corpus=$4
    shift 4
    on_one "$verb" --train-data-path "$corpus" --save "$save" --seed "$seed" \
        "${TRAINING_ARGS[@]}" "$@"
    run "${ONE[@]}"
    on_one evaluate --load "$save" --lm-loss "$DATA/heldout" --output "$save/heldout"
    unless_there "$save/heldout/results.json" "${ONE[@]}"
}

for seed in $SEEDS; do
    student seqkd "$seed" pretrain "$OUTPUT/data/seqkd"
    student miniplm-proxy "$seed" pretrain "$QUICKSTART/proxy/data/selected"
    student pd-offline "$seed" pretrain "$DATA/random" --objective kd --kd-alpha 0.5 \
        --teacher stored --logits-path "$OUTPUT/logits"
    student minillm "$seed" minillm "$DATA/random" "${MINILLM_ARGS[@]}"
done

# shellcheck disable=SC2086 # seeds are words
run python "$(dirname "$EXAMPLES")/tools/methods_table.py" --quickstart "$QUICKSTART" --seeds $SEEDS
