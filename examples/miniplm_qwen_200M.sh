#!/usr/bin/env bash
# MiniPLM: the 200M Qwen student of the paper, on one machine of 8 GPUs.
#
#   examples/miniplm_qwen_200M.sh [--dry-run] TEXT TEACHER OUTPUT
#
# TEXT     JSONL files of the corpus, a quoted glob; "text" and, for the Pile, meta.pile_set_name
# TEACHER  Hugging Face folder of Qwen1.5-1.8B; its tokenizer is the corpus's
# OUTPUT   folder for corpus, scores and checkpoints; methods and sizes may share one
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TEXT=${1:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
TEACHER=${2:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
OUTPUT=${3:?usage: $0 [--dry-run] TEXT TEACHER OUTPUT}
DATA=$OUTPUT/data
STUDENT=${STUDENT:-qwen1.5-200m}

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
    --micro-batch-size "${MICRO_BATCH_SIZE:-16}"
    --lr "${LR:-6e-4}"
    --min-lr "${MIN_LR:-6e-5}"
)
DATA_ARGS=(
    --json-keys text
    --domain-key meta.pile_set_name
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TEACHER"
    --seq-length 1024
)
SPLIT_ARGS=(
    --reference-fraction 0.05
    --seed 10
)
REFERENCE_ARGS=(
    --config "$EXAMPLES/recipes/miniplm-paper.yaml"
    --model qwen1.5-104m
    --use-distributed-optimizer
    --micro-batch-size 16
    --lr 6e-4
    --min-lr 6e-5
    --train-iters 9500
)
SCORING_ARGS=(
    --micro-batch-size 16
    --bf16
)
SELECTION_ARGS=(
    --selector difference
    --selection-ratio 0.5
)
EVAL_AND_LOGGING_ARGS=(
    --log-interval 10
    --save-interval 5000
)

"${METHOD:-miniplm}"
