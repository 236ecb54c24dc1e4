# Shared by the launch scripts; source it, then call a method: the last functions here.
#
#   examples/SCRIPT.sh [--dry-run] ARGUMENTS      --dry-run prints the exact commands and runs none;
#                                                 a training run whose corpus is there is rehearsed
#
# Every step may be repeated: a finished artifact is left alone, an unfinished one continues, so a
# killed or requeued job is started again by the same line. Exit code 75: a training run was told to
# stop before its end (a signal, the job's time limit) and has saved.
#
# Environment: GPUS_PER_NODE (8); GPU_GB, the memory of a GPU that a rehearsal compares with; of the
# Qwen students, MICRO_BATCH_SIZE, LR and MIN_LR in place of a script's own. Under Slurm, start through slurm/launch.sbatch: training and scoring then span all nodes of the job, and
# training stops ten minutes before the job's end.
set -euo pipefail

EXAMPLES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $EXAMPLES/../.venv/bin/python ]]; then
    PATH=$(cd "$EXAMPLES/../.venv/bin" && pwd):$PATH  # what `make install` or a quickstart set up
fi
export CUDA_DEVICE_MAX_CONNECTIONS=1  # compute and communication start in the order they are issued

DRY_RUN=0
if [[ ${1:-} == --dry-run ]]; then
    DRY_RUN=1
    shift
fi

DISTRIBUTED_ARGS=(
    --nproc-per-node "${GPUS_PER_NODE:-8}"
)
LAUNCH=(torchrun)
if [[ ${SLURM_NNODES:-1} -gt 1 ]]; then
    DISTRIBUTED_ARGS+=(
        --nnodes "$SLURM_NNODES"
        --rdzv-id "$SLURM_JOB_ID"
        --rdzv-backend c10d
        --rdzv-endpoint "$(hostname):${MASTER_PORT:-29500}"
    )
    LAUNCH=(srun --ntasks-per-node 1 torchrun)
fi

# run COMMAND...: print it in full, and run it unless this is a dry run.
run() {
    printf '%q ' "$@"
    printf '\n'
    if ((!DRY_RUN)); then
        "$@"
    fi
}

# unless_there FILE COMMAND...: run it if the artifact's FILE, written last, is not there.
unless_there() {
    local artifact=$1
    shift
    if ((!DRY_RUN)) && [[ -e $artifact ]]; then
        printf '# %s is there\n' "$artifact"
    else
        run "$@"
    fi
}

# on_one VERB FLAGS...: words of a command on this machine; on_all: on all GPUs of the job.
on_one() { ONE=(python -m megatron_miniplm "$@"); }
on_all() { ALL=("${LAUNCH[@]}" "${DISTRIBUTED_ARGS[@]}" -m megatron_miniplm "$@"); }

preprocess() {
    on_one preprocess --input "$TEXT" --output-prefix "$DATA/corpus" "${DATA_ARGS[@]}"
    unless_there "$DATA/corpus.json" "${ONE[@]}"
}

# rehearse VERB FLAGS...: check a training run for the GPUs of the job, and say what it takes.
rehearse() {
    local gpus=$((${SLURM_NNODES:-1} * ${GPUS_PER_NODE:-8}))
    on_one "$@" --dry-run --dry-run-world-size "$gpus" ${GPU_GB:+--dry-run-gpu-gb "$GPU_GB"}
    "${ONE[@]}" | sed 's/^/# /'
}

# pretrain NAME CORPUS FLAGS...: train a model into OUTPUT/NAME, or go on where it stopped. VERB may
# say another verb that trains.
pretrain() {
    local save=$OUTPUT/$1 corpus=$2 limit=()
    shift 2
    if [[ -n ${SLURM_JOB_END_TIME:-} ]]; then
        limit=(--exit-duration-in-mins "$(((SLURM_JOB_END_TIME - $(date +%s)) / 60 - 10))")
    fi
    local words=(
        "${VERB:-pretrain}" --train-data-path "$corpus" --save "$save" "$@"
        "${EVAL_AND_LOGGING_ARGS[@]}" --tensorboard-dir "$save/tensorboard" "${limit[@]}"
    )
    on_all "${words[@]}"
    run "${ALL[@]}"
    if ((DRY_RUN)) && [[ -e $corpus.json ]]; then
        rehearse "${words[@]}"
    fi
    if ((!DRY_RUN)) && ! is_complete "$save"; then
        printf '# %s stopped before its end; the same line continues it\n' "$save"
        exit 75
    fi
}

# is_complete SAVE: whether the last checkpoint is that of the last iteration asked for.
is_complete() {
    local wanted
    wanted=$(sed -n 's/^ *"train_iters": \([0-9]*\).*/\1/p' "$1/run.json")
    [[ $(<"$1/latest_checkpointed_iteration.txt") == "$wanted" ]]
}

# score NAME MODEL [CORPUS FLAGS...]: what MODEL thinks of the pool, or of CORPUS, into
# OUTPUT/scores/NAME.
score() {
    local output=$OUTPUT/scores/$1
    on_all score --data-path "${3:-$DATA/pool}" --load "$2" --output "$output" \
        "${SCORING_ARGS[@]}" "${@:4}"
    unless_there "$output/manifest.json" "${ALL[@]}"
}

# cache_logits STORE MODEL: the likeliest next tokens of MODEL over the whole corpus.
cache_logits() {
    on_all cache-logits --data-path "$DATA/corpus" --load "$2" --output "$1" "${CACHE_ARGS[@]}"
    unless_there "$1/manifest.json" "${ALL[@]}"
}

# export_student NAME: the trained model as a Hugging Face folder.
export_student() {
    on_one convert --from megatron --to hf --load "$OUTPUT/$1" --save "$OUTPUT/$1-hf"
    unless_there "$OUTPUT/$1-hf/config.json" "${ONE[@]}"
}

# What a teacher inside the training step adds: its loss, and steps of equal FLOPs (TEACHER is known
# when this is called).
with_teacher() {
    KD_ARGS=(--config "$EXAMPLES/recipes/vanilla-kd-paper.yaml" --teacher-load "$TEACHER")
}

# student METHOD CORPUS FLAGS...: train it into OUTPUT/METHOD-STUDENT and export it.
student() {
    local name=$1-$STUDENT corpus=$2
    shift 2
    pretrain "$name" "$corpus" \
        "${MODEL_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "$@"
    export_student "$name"
}

# The pool, and the reference.
reference() {
    preprocess
    on_one split --data-path "$DATA/corpus" "${SPLIT_ARGS[@]}" \
        --reference-prefix "$DATA/reference" --pool-prefix "$DATA/pool"
    unless_there "$DATA/pool.json" "${ONE[@]}"
    pretrain reference "$DATA/reference" "${REFERENCE_ARGS[@]}"
}

# Reference, both scores, difference sampling: the subset DATA/miniplm.
difference_sampling() {
    reference
    score reference "$OUTPUT/reference"
    score teacher "$TEACHER"
    on_one select --data-path "$DATA/pool" "${SELECTION_ARGS[@]}" \
        --teacher-scores "$OUTPUT/scores/teacher" --reference-scores "$OUTPUT/scores/reference" \
        --output-prefix "$DATA/miniplm"
    unless_there "$DATA/miniplm.json" "${ONE[@]}"
}

# The methods. The paper's MiniPLM:
miniplm() {
    difference_sampling
    student miniplm "$DATA/miniplm"
}

# MiniPLM-proxy: a regression on a scored sample of the pool ranks all of it.
miniplm_proxy() {
    reference
    on_one split --data-path "$DATA/pool" "${SAMPLE_ARGS[@]}" --reference-prefix "$DATA/sample" \
        --heldout-prefix "$DATA/sample-heldout" --pool-prefix "$DATA/unscored"
    unless_there "$DATA/unscored.json" "${ONE[@]}"
    local part
    for part in sample sample-heldout; do
        score "teacher-$part" "$TEACHER" "$DATA/$part"
        score "reference-$part" "$OUTPUT/reference" "$DATA/$part"
    done
    pretrain proxy "$DATA/sample" "${PROXY_ARGS[@]}" --load "$OUTPUT/reference" --finetune \
        --teacher-scores "$OUTPUT/scores/teacher-sample" \
        --reference-scores "$OUTPUT/scores/reference-sample"
    score proxy "$OUTPUT/proxy" "$DATA/pool" --head proxy
    on_one evaluate --proxy-scores "$OUTPUT/scores/proxy" --held-out "$DATA/sample-heldout" \
        --teacher-scores "$OUTPUT/scores/teacher-sample-heldout" \
        --reference-scores "$OUTPUT/scores/reference-sample-heldout" --output "$OUTPUT/proxy-heldout"
    unless_there "$OUTPUT/proxy-heldout/results.json" "${ONE[@]}"
    on_one select --data-path "$DATA/pool" --selector proxy --selection-ratio 0.5 \
        --proxy-scores "$OUTPUT/scores/proxy" --output-prefix "$DATA/miniplm-proxy"
    unless_there "$DATA/miniplm-proxy.json" "${ONE[@]}"
    student miniplm-proxy "$DATA/miniplm-proxy"
}

# MiniPLM, with the teacher in the student's training as well.
miniplm_kd() {
    difference_sampling
    with_teacher
    student miniplm-kd "$DATA/miniplm" "${KD_ARGS[@]}"
}

# MiniPLM for a student of another family: what was chosen in the teacher's tokens is written anew
# in the student's.
miniplm_cross_family() {
    difference_sampling
    local chosen=$DATA/miniplm-$STUDENT
    on_one retokenize --data-path "$DATA/miniplm" --tokenizer-model "$STUDENT_TOKENIZER" \
        --output-prefix "$chosen"
    unless_there "$chosen.json" "${ONE[@]}"
    student miniplm "$chosen"
}

# The baseline: the same student on the whole corpus, in its order by seed.
without_kd() {
    preprocess
    student without-kd "$DATA/corpus"
}

# The same on logits that the teacher said once; its tokenizer is the corpus's.
offline_kd() {
    preprocess
    local store=$OUTPUT/logits-top-$KEPT
    cache_logits "$store" "$TEACHER"
    student "$RECIPE" "$DATA/corpus" --logits-path "$store"
}

# SeqKD: the student on what the teacher makes of the first 768 tokens of every instance.
seqkd() {
    preprocess
    on_all generate --data-path "$DATA/corpus" --load "$TOKENIZER" \
        --output-prefix "$DATA/seqkd" "${GENERATION_ARGS[@]}"
    unless_there "$DATA/seqkd.json" "${ALL[@]}"
    student seqkd "$DATA/seqkd"
}

# MiniLLM: the student on what it writes after the first 768 tokens of every instance; the teacher's
# tokenizer is the corpus's.
minillm() {
    preprocess
    VERB=minillm student minillm "$DATA/corpus" \
        --config "$EXAMPLES/recipes/minillm-paper.yaml" --teacher-load "$TOKENIZER" \
        "${MINILLM_ARGS[@]}"
}

# The same beside a teacher, whose tokenizer is the corpus's.
vanilla_kd() {
    preprocess
    TEACHER=$TOKENIZER
    with_teacher
    student vanilla-kd "$DATA/corpus" "${KD_ARGS[@]}"
}
