#!/usr/bin/env bash
# Pre-Train w/o KD: the 212M Llama 3.1 student of the MiniPLM paper, on one machine of 8 GPUs.
#
#   examples/pretrain_llama_212M.sh [--dry-run] TEXT TOKENIZER OUTPUT
#
# TEXT       JSONL files of the corpus, a quoted glob; "text" and, for the Pile, meta.pile_set_name
# TOKENIZER  folder with the tokenizer.json of Llama 3.1
# OUTPUT     folder for corpus and checkpoints; methods and sizes may share one
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TEXT=${1:?usage: $0 [--dry-run] TEXT TOKENIZER OUTPUT}
TOKENIZER=${2:?usage: $0 [--dry-run] TEXT TOKENIZER OUTPUT}
OUTPUT=${3:?usage: $0 [--dry-run] TEXT TOKENIZER OUTPUT}
DATA=$OUTPUT/data
STUDENT=llama3.1-212m

MODEL_ARGS=(
    --model "$STUDENT"
)
MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --use-distributed-optimizer
)
TRAINING_ARGS=(
    --config "$EXAMPLES/recipes/miniplm-paper.yaml"
    --micro-batch-size 16
    --lr 6e-4
    --min-lr 6e-5
)
DATA_ARGS=(
    --json-keys text
    --domain-key meta.pile_set_name
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TOKENIZER"
    --seq-length 1024
)
EVAL_AND_LOGGING_ARGS=(
    --log-interval 10
    --save-interval 5000
)

without_kd
