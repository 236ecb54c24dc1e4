#!/usr/bin/env bash
# A teacher's likeliest next tokens over a whole corpus, stored once for any number of students, on
# one machine of 8 GPUs.
#
#   examples/pd_cache_logits.sh [--dry-run] TEXT TEACHER OUTPUT
#
# TEXT     JSONL files of the corpus, a quoted glob; key "text"
# TEACHER  Hugging Face folder, GGUF file or checkpoint; its tokenizer is the corpus's
# OUTPUT   folder for corpus and store
#
# Environment: KEPT (100), most tokens of a position; WHAT_IF=1 says what the store would take, from
# some instances, and writes none.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TEXT=${1:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
TEACHER=${2:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
OUTPUT=${3:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
DATA=$OUTPUT/data
KEPT=${KEPT:-100}

DATA_ARGS=(
    --json-keys text
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TEACHER"
    --seq-length 4096
)
CACHE_ARGS=(
    --top-p 0.95
    --top-k "$KEPT"
    --micro-batch-size 4
    --bf16
)

preprocess
if [[ ${WHAT_IF:-0} == 1 ]]; then
    on_all cache-logits --data-path "$DATA/corpus" --load "$TEACHER" "${CACHE_ARGS[@]}" --estimate
    run "${ALL[@]}"
else
    cache_logits "$OUTPUT/logits-top-$KEPT" "$TEACHER"
fi
