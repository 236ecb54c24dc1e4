"""What becomes of a Megatron-LM flag that is not one of ours.

A user of Megatron-LM brings a launch script. Every flag in it is ours, of the same name and
meaning; or says what is so anyway and is left out; or is another spelling of one of ours; or is
refused with the reason and what to do instead. None is ignored: a flag without effect is a run that
silently differs from what its script says. What a script leaves out has our default, which may be
another one (`docs/megatron.md` has the table).

Names are those of Megatron-LM's ``megatron/training/arguments.py`` (core 0.16 to 0.19). A
command's own flags come first: a line here is without effect where the command has that flag.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from megatron_miniplm.core.errors import ConfigError

_TOKENIZER = "the corpus brings its tokenizer, and weights are checked against it; leave it out"
_SPLIT = "validation data is a corpus of its own: --valid-data-path (make one with `split`)"
_EXPERTS = "mixture-of-experts models are not supported"
_ZERO = "use --use-distributed-optimizer (ZeRO-1)"
_MLP = "every supported family has a gated SiLU MLP"
_ROPE = "positions are rotary, over the whole head, in Hugging Face's order of columns"
_NO_SCALING = "there is no loss scaling: use --bf16 or fp32"
_STAGES = "stages are divided evenly, or the last gets fewer layers; leave it out"
_IN_ITERATIONS = "give iterations (samples / --global-batch-size)"
_WEIGHTS_ONLY = "--load with --finetune takes the weights only and starts another run"
_SAME_SETTINGS = "a run continues under the settings that it began with; leave it out"
_KD = "use --objective kd --teacher online --teacher-load CHECKPOINT (docs/distillation.md)"
_ORDER = "the order follows from --seed and the epoch, whatever loads it; leave it out"
_TOOLS = "use torch's or NVIDIA's profiler around the command"
_LOGGED = "what is logged cannot be chosen so finely (look at SAVE/metrics.jsonl); leave it out"
_WRITING = "how checkpoints are written cannot be chosen; leave it out"
_COMMUNICATION = "communication cannot be tuned so far; leave it out"
_OTHER_MODEL = "it belongs to a kind of model that is not supported"

REFUSED: Mapping[str, str] = {
    # layout
    "--context-parallel-size": "instances are short (about 1K tokens); use TP, PP and DP",
    "--hierarchical-context-parallel-sizes": "instances are short; use TP, PP and DP",
    "--cp-comm-type": "instances are short; use TP, PP and DP",
    "--num-layers-per-virtual-pipeline-stage": "use --num-virtual-stages-per-pipeline-rank: layers "
    "/ (pipeline stages x this number)",
    "--pipeline-model-parallel-layout": _STAGES,
    "--decoder-first-pipeline-num-layers": _STAGES,
    "--decoder-last-pipeline-num-layers": _STAGES,
    "--account-for-embedding-in-pipeline-split": _STAGES,
    "--account-for-loss-in-pipeline-split": _STAGES,
    "--standalone-embedding-stage": _STAGES,
    "--microbatch-group-size-per-virtual-pipeline-stage": _STAGES,
    "--no-overlap-p2p-communication": "the interleaved schedule trains wrong without the overlap",
    "--overlap-p2p-communication-warmup-flush": _COMMUNICATION,
    "--expert-model-parallel-size": _EXPERTS,
    "--expert-tensor-parallel-size": _EXPERTS,
    "--num-experts": _EXPERTS,
    "--use-torch-fsdp2": _ZERO,
    "--use-megatron-fsdp": _ZERO,
    "--data-parallel-sharding-strategy": _ZERO,
    "--num-distributed-optimizer-instances": "optimizer state is divided over all data-parallel "
    "ranks; leave it out",
    "--use-tp-pp-dp-mapping": "ranks are numbered TP, DP, PP, as is Megatron's default",
    "--overlap-param-gather-with-optimizer-step": _COMMUNICATION,
    "--ddp-bucket-size": _COMMUNICATION,
    "--ddp-num-buckets": _COMMUNICATION,
    "--ddp-average-in-collective": "losses are summed and divided once, by the count of the batch",
    "--no-align-grad-reduce": _COMMUNICATION,
    "--no-align-param-gather": _COMMUNICATION,
    "--use-nccl-ub": _COMMUNICATION,
    "--use-sharp": _COMMUNICATION,
    "--nccl-communicator-config-path": _COMMUNICATION,
    "--high-priority-stream-groups": _COMMUNICATION,
    "--delay-wgrad-compute": _COMMUNICATION,
    "--optimizer-cpu-offload": _ZERO,
    "--cpu-offloading-num-layers": "use --recompute-granularity full",
    # data
    "--data-path": "name the corpus or subset to train on: --train-data-path",
    "--test-data-path": "measure a trained model with `evaluate`",
    "--data-args-path": "name corpora in --train-data-path, or put the flag into --config FILE",
    "--split": _SPLIT,
    "--mock-data": "train on a corpus; `make quickstart` builds a small one",
    "--reset-attention-mask": "an instance is one attention span, as in the paper",
    "--reset-position-ids": "positions run through an instance, as in the paper",
    "--data-cache-path": "no index is built or cached: the corpus is mapped as it is; leave it out",
    "--no-mmap-bin-files": "training reads instances by pread, through no mapping; leave it out",
    "--num-dataset-builder-threads": "no index is built; leave it out",
    "--dataloader-type": _ORDER,
    "--no-data-sharding": _ORDER,
    "--tokenizer-type": _TOKENIZER,
    "--tokenizer-model": _TOKENIZER,
    "--tokenizer-hf-use-fast": _TOKENIZER,
    "--vocab-file": _TOKENIZER,
    "--merge-file": _TOKENIZER,
    "--legacy-tokenizer": _TOKENIZER,
    # precision
    "--fp16": _NO_SCALING,
    "--loss-scale": _NO_SCALING,
    "--initial-loss-scale": _NO_SCALING,
    "--min-loss-scale": _NO_SCALING,
    "--loss-scale-window": _NO_SCALING,
    "--hysteresis": _NO_SCALING,
    "--grad-reduce-in-bf16": "gradients are summed in fp32",
    "--use-precision-aware-optimizer": "optimizer state is fp32",
    "--fp32-residual-connection": "residuals have the type that is computed in; train in fp32",
    "--first-last-layers-bf16": "which layers compute in FP8 cannot be chosen",
    # model
    "--apply-layernorm-1p": "norms are RMSNorm with weights around 1, as Hugging Face stores them",
    "--apply-residual-connection-post-layernorm": "every supported family normalises before",
    "--qk-l2-norm": "use --qk-layernorm, or a family without",
    "--squared-relu": _MLP,
    "--openai-gelu": _MLP,
    "--onnx-safe": _MLP,
    "--quick-geglu": _MLP,
    "--rotary-interleaved": _ROPE,
    "--rotary-seq-len-interpolation-factor": "use --use-rope-scaling",
    "--no-rope-freq": _ROPE,
    "--window-size": "attention reaches over the whole instance",
    "--window-attn-skip-freq": "attention reaches over the whole instance",
    "--multi-latent-attention": _OTHER_MODEL,
    "--mtp-num-layers": "there is one head; multi-token prediction is not supported",
    "--apply-query-key-layer-scaling": _NO_SCALING,
    "--is-hybrid-model": _OTHER_MODEL,
    "--spec": "a layer follows from --model-family",
    "--init-method-xavier-uniform": "weights are drawn from a normal: --init-method-std",
    "--use-mup": "widths are not reparameterised",
    "--cross-entropy-fusion-impl": "the head and its losses are the project's own",
    "--use-fused-weighted-squared-relu": _MLP,
    # recomputation and memory
    "--distribute-saved-activations": "use --sequence-parallel",
    # optimizer and schedule
    "--lr-decay-samples": f"{_IN_ITERATIONS}: --lr-decay-iters",
    "--lr-warmup-samples": f"{_IN_ITERATIONS}: --lr-warmup-iters",
    "--lr-wsd-decay-samples": f"{_IN_ITERATIONS}: --lr-wsd-decay-iters",
    "--decoupled-lr": "there is one learning rate",
    "--decoupled-min-lr": "there is one learning rate",
    "--start-weight-decay": "weight decay is constant: --weight-decay",
    "--end-weight-decay": "weight decay is constant: --weight-decay",
    "--override-opt-param-scheduler": _SAME_SETTINGS,
    "--use-checkpoint-opt-param-scheduler": _SAME_SETTINGS,
    "--sgd-momentum": "the optimizer is AdamW",
    "--decrease-batch-size-if-needed": "every global batch has the size that was asked for",
    # checkpoints
    "--no-load-optim": _WEIGHTS_ONLY,
    "--no-save-optim": "a checkpoint can always continue its run; `convert` writes weights alone",
    "--pretrained-checkpoint": _WEIGHTS_ONLY,
    "--use-checkpoint-args": "repeat the flags, or take all of a run: --from-run SAVE/run.json",
    "--use-mp-args-from-checkpoint-args": "any layout loads any checkpoint; say the one to use",
    "--exit-signal": "SIGTERM and SIGUSR1 both save and exit: --exit-signal-handler",
    "--exit-on-missing-checkpoint": "a missing --load is always an error; leave it out",
    "--ckpt-convert-format": "use `convert`",
    "--ckpt-convert-save": "use `convert`",
    "--ckpt-assume-constant-structure": _WRITING,
    "--ckpt-fully-parallel-save": _WRITING,
    "--no-ckpt-fully-parallel-save": _WRITING,
    "--ckpt-fully-parallel-load": _WRITING,
    "--dist-ckpt-strictness": "a checkpoint fits the model exactly, or is refused",
    "--replication": _WRITING,
    # what is said and stopped
    "--skip-train": "measure a model with `evaluate`",
    "--no-check-for-nan-in-loss-and-grad": "what is not finite never reaches weights; to go on "
    "without such an update: --on-nan-skip",
    "--check-for-large-grads": "use --clip-grad",
    "--log-progress": _LOGGED,
    "--log-energy": _LOGGED,
    "--log-params-norm": _LOGGED,
    "--log-num-zeros-in-grad": _LOGGED,
    "--log-loss-scale-to-tensorboard": _LOGGED,
    "--log-world-size-to-tensorboard": _LOGGED,
    "--log-validation-ppl-to-tensorboard": _LOGGED,
    "--log-straggler": _LOGGED,
    "--tensorboard-log-interval": "TensorBoard gets what the log gets: --log-interval",
    "--tensorboard-queue-size": _LOGGED,
    "--timing-log-option": _LOGGED,
    "--one-logger-project": _LOGGED,
    "--profile": _TOOLS,
    "--profile-step-start": _TOOLS,
    "--profile-step-end": _TOOLS,
    "--profile-ranks": _TOOLS,
    "--use-pytorch-profiler": _TOOLS,
    "--record-memory-history": _TOOLS,
    "--memory-snapshot-path": _TOOLS,
    "--manual-gc": "garbage is collected as Python does; leave it out",
    "--manual-gc-interval": "garbage is collected as Python does; leave it out",
    "--yaml-cfg": "use --config FILE.yaml, with the names of the flags",
    "--enable-experimental": "nothing experimental is hidden; leave it out",
}
"""Flag -> why not, and what to do."""

REFUSED_KINDS: Mapping[str, str] = {
    "--moe-": _EXPERTS,
    "--mla-": _OTHER_MODEL,
    "--hybrid-": _OTHER_MODEL,
    "--mtp-": "there is one head; multi-token prediction is not supported",
    "--fp8-": "of FP8, only --fp8-format and --fp8-recipe can be said",
    "--fp4-": "FP4 is not supported; there is FP8, --fp8-format",
    "--tp-comm-": _COMMUNICATION,
    "--cuda-graph-": "CUDA graphs are not supported",
    "--enable-cuda-graph": "CUDA graphs are not supported",
    "--external-cuda-graph": "CUDA graphs are not supported",
    "--fine-grained-activation-offloading": "use --recompute-granularity full",
    "--non-persistent-": _WRITING,
    "--tiktoken-": _TOKENIZER,
    "--export-kd-": _KD,
    "--logits-load-": _KD,
    "--logits-save-": _KD,
    "--muon-": "the optimizer is AdamW",
    "--rl-": "this is pre-training",
    "--inference-": "this is pre-training",
    "--retro-": _OTHER_MODEL,
    "--bert-": _OTHER_MODEL,
    "--vision-": _OTHER_MODEL,
}
"""The same for all flags that begin so."""

Value = str | float

ALREADY_SO: Mapping[str, Sequence[Value]] = {
    # Megatron-Core is what there is.
    "--use-mcore-models": (),
    "--transformer-impl": ("local",),
    "--attention-backend": ("auto",),
    "--use-flash-attn": (),  # torch's attention, which on a GPU is FlashAttention
    "--attention-softmax-in-fp32": (),
    "--cross-entropy-loss-fusion": (),
    "--accumulate-allreduce-grads-in-fp32": (),
    "--main-grads-dtype": ("fp32",),
    "--main-params-dtype": ("fp32",),
    "--exp-avg-dtype": ("fp32",),
    "--exp-avg-sq-dtype": ("fp32",),
    "--use-cpu-initialization": (),  # the same draw on any device
    "--optimizer": ("adam",),
    "--weight-decay-incr-style": ("constant",),
    "--lr-warmup-init": (0.0,),
    "--check-for-nan-in-loss-and-grad": (),
    "--check-for-spiky-loss": (),
    "--log-throughput": (),
    "--log-timers-to-tensorboard": (),
    "--log-memory-to-tensorboard": (),
    "--empty-unused-memory-level": (0.0,),
    # Models: no biases beside q, k, v, no dropout, rotary positions over whole heads.
    "--attention-dropout": (0.0,),
    "--hidden-dropout": (0.0,),
    "--position-embedding-type": ("rope",),
    "--use-rotary-position-embeddings": (),
    "--no-position-embedding": (),
    "--rotary-percent": (1.0,),
    "--no-query-key-layer-scaling": (),
    # A position whose input is the separator is never trained; no mask is made for attention.
    "--eod-mask-loss": (),
    "--no-create-attention-mask-in-dataloader": (),
    # Nothing of these is fused.
    "--no-masked-softmax-fusion": (),
    "--no-bias-gelu-fusion": (),
    "--no-bias-swiglu-fusion": (),
    "--no-bias-dropout-fusion": (),
    "--no-rope-fusion": (),
    "--no-gradient-accumulation-fusion": (),
    "--no-persist-layer-norm": (),
    # Sizes of what is not divided or not there.
    "--context-parallel-size": (1.0,),
    "--expert-model-parallel-size": (1.0,),
    "--num-distributed-optimizer-instances": (1.0,),
    # Checkpoints: reshardable, in torch's distributed format; there is no random state in them.
    "--ckpt-format": ("torch_dist",),
    "--dist-ckpt-format": ("torch_dist",),
    "--use-dist-ckpt": (),
    "--auto-detect-ckpt-format": (),
    "--dist-ckpt-optim-fully-reshardable": (),
    "--no-load-rng": (),
    "--no-save-rng": (),
}
"""Flag -> the values with which it says what is so anyway; none: it takes none."""

SPELLED: Mapping[str, Sequence[str]] = {
    "--calculate-per-token-loss": ("--loss-normalization", "token"),
    "--layernorm-epsilon": ("--norm-epsilon",),
    "--recompute-activations": ("--recompute-granularity", "selective"),
}
"""Flag -> our words for it; a value that it takes comes after them."""

_UNDECIDED: Mapping[str, Sequence[str]] = {
    "--group-query-attention": ("--num-query-groups", "--model"),
    "--disable-bias-linear": ("--add-qkv-bias", "--no-add-qkv-bias", "--model"),
}
"""Switch -> flags of which one must say the rest: there, Megatron has another default than we."""


def settle(words: Sequence[str], own: Collection[str]) -> list[str]:
    """The words without what is so anyway, and in our spelling; refuses what is not supported.

    `own`: flags of the command, as they are typed.
    """
    settled: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        typed, equals, inline = word.partition("=")
        flag = typed.replace("_", "-")
        if not flag.startswith("--") or flag in own:
            settled.append(word)
        elif flag in _UNDECIDED:
            _refuse_alone(flag, words)
        elif flag in SPELLED:
            settled += [*SPELLED[flag], *([inline] if equals else [])]
        elif flag in ALREADY_SO:
            allowed = ALREADY_SO[flag]
            if allowed:
                value = inline if equals else (queue.pop(0) if queue else "")
                _refuse_other(flag, value, allowed)
        else:
            refuse(flag)
            settled.append(word)
    return settled


def refuse(flag: str) -> None:
    """Refuse a flag of Megatron's that is not supported; says nothing of others."""
    kinds = (why for start, why in REFUSED_KINDS.items() if flag.startswith(start))
    why = REFUSED.get(flag) or next(kinds, None)
    if why is not None:
        raise ConfigError(f"{flag} is not supported: {why}")


def _refuse_other(flag: str, value: str, allowed: Sequence[Value]) -> None:
    try:
        number = float(value)
    except ValueError:
        number = None
    if value in allowed or (number is not None and number in allowed):
        return
    why = REFUSED.get(flag, "it cannot be changed")
    words = " or ".join(f"{each:g}" if isinstance(each, float) else each for each in allowed)
    raise ConfigError(f"{flag} {value} is not supported, only {words}: {why}")


def _refuse_alone(flag: str, words: Sequence[str]) -> None:
    said = {word.partition("=")[0].replace("_", "-") for word in words}
    if said.isdisjoint(_UNDECIDED[flag]):
        raise ConfigError(
            f"{flag} alone leaves open what Megatron's default and ours differ in: also give "
            f"{' or '.join(_UNDECIDED[flag])}"
        )
