#!/usr/bin/env bash
# Offline pre-training distillation: the 1.9B student of arXiv 2410.16215, vanilla configuration, on
# one machine of 8 GPUs.
#
#   examples/pd_vanilla_1.9B.sh [--dry-run] TEXT TEACHER OUTPUT
#
# TEXT     JSONL files of the corpus, a quoted glob; key "text"
# TEACHER  model whose likeliest tokens are stored once (Hugging Face folder, GGUF file, checkpoint);
#          its tokenizer is the corpus's
# OUTPUT   folder for corpus, logits and checkpoints; students of one teacher may share one
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TEXT=${1:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
TEACHER=${2:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
OUTPUT=${3:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
DATA=$OUTPUT/data
RECIPE=${RECIPE:-pd-vanilla}
STUDENT=${STUDENT:-pd-1.9b}
KEPT=${KEPT:-100}

MODEL_ARGS=(
    --model "$STUDENT"
)
MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "${TENSOR_RANKS:-1}"
    --pipeline-model-parallel-size 1
    --use-distributed-optimizer
)
TRAINING_ARGS=(
    --config "$EXAMPLES/recipes/$RECIPE.yaml"
    --micro-batch-size 4
)
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
EVAL_AND_LOGGING_ARGS=(
    --log-interval 10
    --save-interval 1000
)

offline_kd
