#!/usr/bin/env bash
# A 7B model (the shape of Qwen2.5-7B) over tensor and pipeline ranks, on machines of 8 GPUs of 80 GB.
#
#   examples/pretrain_qwen2.5_7B.sh [--dry-run] TEXT TOKENIZER OUTPUT
#   sbatch --nodes 4 examples/slurm/launch.sbatch examples/pretrain_qwen2.5_7B.sh TEXT TOKENIZER OUTPUT
#
# TEXT       JSONL files of the corpus, a quoted glob; "text" and, for the Pile, meta.pile_set_name
# TOKENIZER  folder with the tokenizer.json of Qwen2.5
# OUTPUT     folder for corpus and checkpoints, which all machines see
#
# TP stays inside of a machine; PP crosses machines where it must. Two chunks of 7 layers a rank
# halve the pipeline's bubble. METHOD=vanilla_kd beside a teacher, as in the smaller examples.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TEXT=${1:?usage: $0 [--dry-run] TEXT TOKENIZER OUTPUT}
TOKENIZER=${2:?usage: $0 [--dry-run] TEXT TOKENIZER OUTPUT}
OUTPUT=${3:?usage: $0 [--dry-run] TEXT TOKENIZER OUTPUT}
DATA=$OUTPUT/data
STUDENT=qwen2.5-7b

MODEL_ARGS=(
    --num-layers 28
    --hidden-size 3584
    --ffn-hidden-size 18944
    --num-attention-heads 28
    --group-query-attention
    --num-query-groups 4
    --swiglu
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --disable-bias-linear
    --add-qkv-bias
    --untie-embeddings-and-output-weights
    --position-embedding-type rope
    --rotary-base 1000000
    --max-position-embeddings 32768
    --vocab-size 152064
)
MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 4
    --sequence-parallel
    --pipeline-model-parallel-size 2
    --num-virtual-stages-per-pipeline-rank 2
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
TRAINING_ARGS=(
    --config "$EXAMPLES/recipes/miniplm-paper.yaml"
    --micro-batch-size 4
    --lr 3e-4
    --min-lr 3e-5
    --recompute-granularity full
    --recompute-method block
    --recompute-num-layers 2
)
DATA_ARGS=(
    --json-keys text
    --domain-key meta.pile_set_name
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TOKENIZER"
    --seq-length 4096
)
EVAL_AND_LOGGING_ARGS=(
    --log-interval 10
    --save-interval 1000
    --save-keep-last 3
    --async-save
)

"${METHOD:-without_kd}"
