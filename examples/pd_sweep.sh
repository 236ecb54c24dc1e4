#!/usr/bin/env bash
# The design space of pre-training distillation at laptop size: a tiny teacher on the text of the
# Python standard library, and students that differ in one thing each.
#
#   examples/pd_sweep.sh [--dry-run] [OUTPUT]
#
# OUTPUT  folder for everything (runs/pd-sweep)
#
# Prints the held-out loss of every student (lower is better) and draws their curves: report/. Without
# a teacher, beside it (online), and on what it said once: losses, tails, temperatures, alpha.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OUTPUT=${1:-runs/pd-sweep}
TEXT=$OUTPUT/text
DATA=$OUTPUT/data
TEACHER=$OUTPUT/teacher
STORE=$OUTPUT/logits
ITERATIONS=${ITERATIONS:-150}

SHAPE_ARGS=(
    --num-layers 2 --ffn-hidden-size 192 --num-attention-heads 2 --init-method-std 0.07
)
TEACHER_ARGS=(
    --num-layers 3 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 2
    --init-method-std 0.07
    --micro-batch-size 8 --global-batch-size 8 --train-iters "$((4 * ITERATIONS))"
    --lr 3e-3 --lr-warmup-iters 20 --log-interval 50
)
STUDENT_ARGS=(
    "${SHAPE_ARGS[@]}" --hidden-size 64
    --micro-batch-size 8 --global-batch-size 8 --train-iters "$ITERATIONS"
    --lr 3e-3 --lr-warmup-fraction 0.1 --log-interval 10
    --valid-data-path "$DATA/heldout" --eval-interval 50
)
ONLINE=(--objective kd --teacher online --teacher-load "$TEACHER" --kd-student-temperature 1)
OFFLINE=(--objective kd --teacher stored --logits-path "$STORE" --kd-student-temperature 1)
PAPER=("${OFFLINE[@]}" --kd-tail renormalize)  # a softmax over the kept tokens
WSD=(--lr-decay-style WSD)
ALPHA=--kd-alpha-schedule

run python "$(dirname "$EXAMPLES")/tools/build_corpus.py" --output "$TEXT" \
    --vocab-size 1500 --train-mb 1 --heldout-mb 0.1
for part in train heldout; do
    on_one preprocess --input "$TEXT/$part.jsonl" --json-keys text --seq-length 128 \
        --tokenizer-model "$TEXT/tokenizer" --output-prefix "$DATA/$part"
    unless_there "$DATA/$part.json" "${ONE[@]}"
done
on_one pretrain --train-data-path "$DATA/train" --save "$TEACHER" "${TEACHER_ARGS[@]}"
run "${ONE[@]}"
on_one cache-logits --data-path "$DATA/train" --load "$TEACHER" --output "$STORE" \
    --top-p 0.95 --top-k 50
unless_there "$STORE/manifest.json" "${ONE[@]}"

NAMES=()
# point NAME FLAGS...: one point of the space.
point() {
    local name=$1
    shift
    NAMES+=("$name")
    on_one pretrain --train-data-path "$DATA/train" --save "$OUTPUT/students/$name" \
        "${STUDENT_ARGS[@]}" "$@"
    run "${ONE[@]}"
}

point lm
point lm-wsd-lr "${WSD[@]}"
point online "${ONLINE[@]}" --kd-alpha 0.9
point online-adakd-h "${ONLINE[@]}" --kd-alpha 0.9 --kd-temperature-method adakd-h

point vanilla "${PAPER[@]}" --kd-alpha 1 --kd-loss soft_nll
for alpha in 0.1 0.5 0.9; do
    point "alpha-$alpha" "${PAPER[@]}" --kd-alpha "$alpha"
done
for tail in residual renormalize-both raw uniform; do
    point "tail-$tail" "${OFFLINE[@]}" --kd-alpha 0.9 --kd-tail "$tail"
done
for loss in brier mse_centered; do
    point "loss-$loss" "${PAPER[@]}" --kd-alpha 0.9 --kd-loss "$loss"
done
for temperature in 0.5 2; do
    point "temperature-$temperature" "${PAPER[@]}" --kd-alpha 0.9 --kd-temperature "$temperature"
done
point temperature-2-wttm "${PAPER[@]}" --kd-alpha 0.9 --kd-temperature 2 --kd-temperature-method wttm
for method in normkd adakd-sd adakd-h; do
    point "temperature-$method" "${PAPER[@]}" --kd-alpha 0.9 --kd-temperature-method "$method"
done
for shape in linear-inc linear-dec period wsd wsd-beta; do
    point "alpha-$shape" "${PAPER[@]}" --kd-alpha 1 "$ALPHA" "$shape" "${WSD[@]}"
done
point pd-star "${PAPER[@]}" --kd-alpha 0.9 "$ALPHA" wsd --kd-temperature 2 "${WSD[@]}"

on_one report --title "Pre-training distillation, at laptop size" --output "$OUTPUT/report" --overwrite \
    --runs "${NAMES[@]/#/$OUTPUT/students/}"
run "${ONE[@]}"

# final_loss RUN: the last held-out loss.
final_loss() {
    sed -n 's/.*"validation": {"lm loss": \([0-9.]*\).*/\1/p' "$1/metrics.jsonl" | tail -n 1
}

if ((!DRY_RUN)); then
    printf '\n%-26s %s\n' student "held-out loss (nats a token)"
    for name in "${NAMES[@]}"; do
        printf '%-26s %s\n' "$name" "$(final_loss "$OUTPUT/students/$name")"
    done
fi
