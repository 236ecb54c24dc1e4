"""A run on its devices: from the checked flags to the last checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megatron_miniplm.core.config import flat_defaults, write_run
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.models.build import InitialWeights, build_model, fill_by_name
from megatron_miniplm.models.checkpoint import CheckpointWriter
from megatron_miniplm.models.flops import count_parameters, peak_flops
from megatron_miniplm.models.recompute import recompute_layers
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Topology
from megatron_miniplm.training.capture import OWNER, LogitCapture
from megatron_miniplm.training.checked_run import CheckedRun
from megatron_miniplm.training.guard import UpdateGuard
from megatron_miniplm.training.loader import Loader
from megatron_miniplm.training.loop import Loop
from megatron_miniplm.training.optimizer import build_optimizer, build_scheduler
from megatron_miniplm.training.resume import Counters, Parents, TrainingState
from megatron_miniplm.training.run_config import RunConfig
from megatron_miniplm.training.run_folder import begin, own_folder
from megatron_miniplm.training.sinks import Sink, open_sinks
from megatron_miniplm.training.spikes import SpikeDetector
from megatron_miniplm.training.step import TrainStep, wrap_for_training
from megatron_miniplm.training.telemetry import RunFacts, Telemetry, hours_so_far
from megatron_miniplm.training.timers import Timers


def train(run: CheckedRun, topology: Topology) -> None:
    """Train until done or told to stop; on disk under --save."""
    step, state = build(run, topology)
    config, save = run.config, Path(run.config.save)
    with ExitStack() as held:
        # Nothing of --save is touched before this line, so whatever was refused left it as it was.
        topology.from_rank0(lambda: held.enter_context(own_folder(config, run.resume_from)))
        capture = _capture(run, topology, state.parents, held)
        if run.resume_from is not None:
            counters = state.load(run.resume_from)
            get_logger().info("continuing from %s", run.resume_from)
        else:
            counters = Counters()
            topology.from_rank0(lambda: begin(config, save, run.data.language, run.sources))
        if capture is not None:
            capture.go_on(counters)
            step = replace(step, watched=capture.watched)
            state = replace(state, before_save=capture.seal)
        facts = _facts(run, topology, counters)  # before rows of lost work are dropped
        sinks: list[Sink] = []
        topology.from_rank0(
            lambda: sinks.extend(
                open_sinks(config.sinks, save, run=run.flat, start_iteration=counters.iteration)
            )
        )
        telemetry = Telemetry(
            facts,
            config=config.telemetry,
            sinks=sinks,
            timers=step.timers,
            ranks=topology.ranks,
        )
        held.push(lambda error, *_: telemetry.close(failed=error is not None))
        loop = Loop(
            config=config.training, topology=topology,
            loader=Loader(
                data=run.data, config=config.training, topology=topology,
                read_ahead=run.teacher.read_ahead if run.teacher else None,
            ),
            valid_sets=run.valid_sets, step=step, state=state,
            model=run.described, telemetry=telemetry,
        )  # fmt: skip
        if loop.run(counters):
            if capture is not None:
                capture.finish()
            get_logger().info(
                "complete: %d iterations, %s tokens, checkpoint in %s",
                counters.iteration, f"{counters.consumed_tokens:,}", save,
            )  # fmt: skip


def build(run: CheckedRun, topology: Topology) -> tuple[TrainStep, TrainingState]:
    """Everything that takes a device: the model with what it starts from, optimizer, teacher."""
    config, training = run.config, run.config.training
    if run.teacher is not None:
        run.teacher.load(topology)
    model = build_model(
        run.shape,
        topology,
        valid_vocab=run.data.language.vocab_size,
        dtype=run.dtype,
        virtual_stages=training.num_virtual_stages_per_pipeline_rank,
        engine=config.engine,
        value_head=run.objective.targets is not None,
    )
    if run.resume_from is None and run.initial is not None:
        run.initial.fill(model, topology)
    elif run.resume_from is None:
        fill_by_name(model, InitialWeights(run.shape, training.seed))
    recompute_layers(model, config.recompute)
    timers = Timers()
    wrapped = wrap_for_training(model, config.optimization, bf16=training.bf16, timers=timers)
    optimizer = build_optimizer(
        config.optimization, wrapped, bf16=training.bf16, head_lr_mult=run.objective.head_lr_mult
    )
    scheduler = build_scheduler(
        config.optimization,
        optimizer,
        train_iters=training.iterations,
        samples_after=training.samples_after,
    )
    spikes = SpikeDetector(config=config.spikes, ranks=topology.ranks, say_rows=run.data.say)
    state = TrainingState(
        model=model, optimizer=optimizer, scheduler=scheduler, topology=topology,
        config=run.flat, parents=run.parents(topology),
        retention=config.retention, writer=CheckpointWriter(Path(config.save), topology),
        spikes=spikes,
    )  # fmt: skip
    explore = None
    if run.objective.explores:
        assert run.teacher is not None
        assert run.teacher.model is not None
        explore = run.objective.explorer(
            student=model, teacher=run.teacher.model, data=run.data, topology=topology,
            seed=training.seed,
        )  # fmt: skip
    step = TrainStep(
        model=model, wrapped=wrapped, optimizer=optimizer, scheduler=scheduler, topology=topology,
        objective=run.objective, teacher=run.teacher, explore=explore, timers=timers, spikes=spikes,
        guard=UpdateGuard(
            topology=topology, may_skip=training.on_nan_skip, say_rows=run.data.say
        ),
    )  # fmt: skip
    return step, state


def _capture(
    run: CheckedRun, topology: Topology, parents: Parents, held: ExitStack
) -> LogitCapture | None:
    """The store that is filled on the way, if one is asked for (a collective)."""
    config = run.config
    if not config.capture.cache_logits:
        return None
    facts = {
        "teacher": {"path": config.save, "family": run.shape.model_family},
        "teacher_iteration": config.training.iterations,
    }
    capture = LogitCapture(config.capture, data=run.data, topology=topology)
    held.callback(capture.close)
    begins = run.resume_from is None
    capture.open(
        facts, run.flat, parents,
        defaults=flat_defaults(RunConfig), begins=begins, overwrite=config.overwrite,
    )  # fmt: skip
    extra = {OWNER: str(Path(config.save).absolute())}

    def sign() -> None:
        for store in capture.filling:
            write_run(store.path / "run.json", "pretrain", config, **extra)

    topology.from_rank0(sign)
    return capture


def _facts(run: CheckedRun, topology: Topology, counters: Counters) -> RunFacts:
    """What turns times into rates; says once what is being trained."""
    config, shape, data = run.config, run.shape, run.data
    seq_length = data.language.seq_length
    get_logger().info(
        "model %s: %s parameters, %s logit columns (%s real) | %s: %s instances, %s tokens "
        "| TP %d x PP %d x DP %d on %s",
        shape.model or shape.model_family, f"{count_parameters(shape):,}",
        f"{shape.padded_vocab_size:,}", f"{data.language.vocab_size:,}",
        ", ".join(f"{role} {prefix}" for role, (_, prefix) in data.parents.items()),
        f"{len(data):,}", f"{data.num_tokens:,}", topology.tp_size, topology.pp_size,
        topology.dp_size, platform.device_name(),
    )  # fmt: skip
    peak = config.telemetry.peak_flops
    if peak is None and config.training.bf16:  # the known peaks are those of bf16
        peak = peak_flops(platform.device_name())
    return RunFacts(
        train_iters=counters.iteration + run.updates_left,
        train_samples=config.training.samples_in_all,
        data_progress=data.progress,
        flops_per_sample=run.flops_per_token * seq_length,
        teacher_flops_per_sample=run.teacher_flops_per_token * seq_length,
        times_plain=run.times_plain,
        plain_samples=config.training.samples_begun(run.objective.plain_samples),
        peak_flops=peak,
        hours_before=topology.from_rank0(lambda: hours_so_far(Path(config.save) / "metrics.jsonl")),
    )
