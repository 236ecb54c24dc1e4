#!/usr/bin/env bash
# Students of other families on what a Qwen teacher selected, at laptop size: Llama and Mamba, with a
# tokenizer of their own, on the difference-sampled and on a random half of the pool.
#
#   make quickstart && examples/cross_family.sh [--dry-run] [QUICKSTART]
#
# QUICKSTART  folder that `make quickstart` filled (runs/quickstart); results go below it
#
# Prints bits per byte of held-out text, which tokenizers do not change: lower is better.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

QUICKSTART=${1:-runs/quickstart}
OUTPUT=$QUICKSTART/cross-family
TOKENIZER=$OUTPUT/text/tokenizer

LLAMA_ARGS=(
    --model-family llama --no-add-qkv-bias
    --num-layers 2 --hidden-size 96 --ffn-hidden-size 256 --num-attention-heads 2
)
MAMBA_ARGS=(
    --model-family mamba --no-add-qkv-bias
    --num-layers 2 --hidden-size 96 --ffn-hidden-size 192 --num-attention-heads 1
)
TRAINING_ARGS=(
    --micro-batch-size 4 --global-batch-size 4 --train-iters 400
    --lr 3e-3 --lr-warmup-iters 20 --init-method-std 0.07 --log-interval 50
)

# bits_per_byte RESULTS: the one figure that is wanted of results.json.
bits_per_byte() {
    sed -n 's/^ *"bits_per_byte": \([0-9.]*\).*/\1/p' "$1"
}

# An own tokenizer: another vocabulary, trained on the same text.
run python "$(dirname "$EXAMPLES")/tools/build_corpus.py" --output "$OUTPUT/text" \
    --vocab-size 1500 --train-mb 4 --heldout-mb 0.4

for part in random miniplm heldout; do
    on_one retokenize --data-path "$QUICKSTART/data/$part" --tokenizer-model "$TOKENIZER" \
        --output-prefix "$OUTPUT/data/$part"
    unless_there "$OUTPUT/data/$part.json" "${ONE[@]}"
done

for family in llama mamba; do
    [[ $family == llama ]] && MODEL_ARGS=("${LLAMA_ARGS[@]}") || MODEL_ARGS=("${MAMBA_ARGS[@]}")
    for part in random miniplm; do
        save=$OUTPUT/$family-$part
        on_one pretrain --train-data-path "$OUTPUT/data/$part" --save "$save" \
            "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}"
        run "${ONE[@]}"
        on_one evaluate --load "$save" --lm-loss "$OUTPUT/data/heldout" --output "$save/heldout"
        unless_there "$save/heldout/results.json" "${ONE[@]}"
    done
done

if ((!DRY_RUN)); then
    printf '\n%-8s %-10s %s\n' student selection "bits per byte"
    for family in llama mamba; do
        for part in random miniplm; do
            printf '%-8s %-10s %.4f\n' "$family" "$part" \
                "$(bits_per_byte "$OUTPUT/$family-$part/heldout/results.json")"
        done
    done
fi
