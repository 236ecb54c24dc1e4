"""Batch-size ramp-up is Megatron's, and what follows from it is counted in samples."""

from __future__ import annotations

from dataclasses import asdict, replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import num_microbatches_calculator as megatron

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.training.batch_size import BatchConfig
from megatron_miniplm.training.loop import TrainingConfig
from tests.unit.test_optimizer import Groups, OptimizationConfig, build_scheduler

RAMP = BatchConfig(micro_batch_size=2, global_batch_size=32, rampup_batch_size=(8, 8, 120))


@st.composite
def ramps(draw: st.DrawFn) -> BatchConfig:
    start, increment, steps = (draw(st.integers(1, 40)) for _ in range(3))
    return BatchConfig(
        global_batch_size=start + increment * steps,
        rampup_batch_size=(start, increment, draw(st.integers(1, 5000))),
    )


@pytest.mark.skipif(
    not hasattr(megatron, "RampupBatchsizeNumMicroBatchesCalculator"),
    reason="megatron.core 0.19 has no ramp-up of its own any more",
)
@given(ramps())
@settings(max_examples=60)
def test_sizes_are_those_of_megatrons_calculator(config: BatchConfig) -> None:
    assert config.rampup_batch_size is not None
    start, increment, samples = config.rampup_batch_size
    theirs = megatron.RampupBatchsizeNumMicroBatchesCalculator(
        config.global_batch_size, 1, 1, False, 1, start, increment, samples
    )
    consumed, update = 0, 0
    while consumed <= samples + 3 * config.global_batch_size:
        theirs.update(consumed, consistency_check=True)
        assert config.size_after(consumed) == theirs.get_current_global_batch_size()
        # Counting by stages is counting one by one.
        assert config.samples_after(update) == consumed
        assert config.updates_of(consumed) == update
        consumed, update = consumed + config.size_after(consumed), update + 1


def test_constant_size_is_multiplication() -> None:
    config = BatchConfig(global_batch_size=512)
    assert (config.samples_after(7), config.updates_of(512 * 7 + 256)) == (3584, Fraction(15, 2))


def length(**settings: int) -> int:
    return TrainingConfig(
        global_batch_size=32, micro_batch_size=2, rampup_batch_size=(8, 8, 120), **settings
    ).iterations


def test_length_of_a_run_in_samples_and_in_updates() -> None:
    # 0, 8, ..., 40 | 40, 56, 72, 88: 16 | 88, 112: 24, and 136 is beyond 120: 32
    sizes = [8] * 5 + [16] * 3 + [24] * 2 + [32] * 4
    consumed = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    assert [RAMP.size_after(c) for c in consumed[:-1]] == sizes
    assert length(train_samples=consumed[13]) == 13
    assert length(train_samples=consumed[13] + 31) == 13, "a batch in part is left out"
    assert length(train_iters=9) == 9
    with pytest.raises(ConfigError, match="less than one global batch of 8"):
        length(train_samples=7)


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ((8, 0, 100), "all three must be at least 1"),
        ((8, 7, 100), "does not lead from 8 to --global-batch-size 32 in whole steps of 7"),
        ((32, 8, 100), "does not lead from 32"),
    ],
)
def test_ramps_that_lead_nowhere_are_refused(ramp: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(RAMP, rampup_batch_size=ramp)


def test_every_size_must_divide_over_the_ranks_before_the_run_starts() -> None:
    config = TrainingConfig(train_iters=1, **asdict(RAMP))
    config.refuse_misfits(SimpleNamespace(dp_size=4, pp_size=1))
    with pytest.raises(ConfigError, match=r"--global-batch-size 8 \(of --rampup-batch-size\) is"):
        config.refuse_misfits(SimpleNamespace(dp_size=8, pp_size=1))
    odd = replace(config, rampup_batch_size=(8, 4, 120), num_virtual_stages_per_pipeline_rank=2)
    with pytest.raises(ConfigError, match=r"--global-batch-size 12 .* makes 3"):
        odd.refuse_misfits(SimpleNamespace(dp_size=2, pp_size=2))


def test_rates_are_reached_at_the_iterations_that_the_flags_say() -> None:
    config = OptimizationConfig(
        lr=1.0, min_lr=0.0, lr_decay_style="WSD", lr_wsd_decay_style="linear",
        lr_warmup_iters=8, lr_wsd_decay_iters=4,
    )  # fmt: skip
    optimizer = Groups(config)
    scheduler = build_scheduler(config, optimizer, train_iters=14, samples_after=RAMP.samples_after)
    rates = []
    for update in range(15):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=RAMP.size_after(RAMP.samples_after(update)))
    assert rates[4] == pytest.approx(32 / 88), "linear in samples, up to those of 8 updates"
    assert rates[8] == rates[10] == 1.0
    assert rates[12] == pytest.approx(0.5)
    assert rates[14] == 0.0


def test_alignment_counts_samples_and_not_updates() -> None:
    config = TrainingConfig(
        global_batch_size=32, rampup_batch_size=(8, 8, 120), train_iters=14, align_flops_to=1
    )
    # 264 samples; beside a teacher of thrice the size, half as many: 132 are 9 5/6 updates.
    aligned = config.aligned(student=10, teacher=30)
    assert aligned.train_iters == 10
    constant = replace(config, rampup_batch_size=None)
    assert constant.aligned(student=10, teacher=30).train_iters == 7


def test_what_is_trained_without_a_teacher_first_is_counted_as_that() -> None:
    config = TrainingConfig(global_batch_size=4, train_iters=400, align_flops_to=1)
    work = {"student": 10, "teacher": 40, "student_passes": 4, "teacher_passes": 2}
    for samples, warm, whole in ((0, 0, 100), (250, 63, 147), (252, 63, 147), (1600, 400, 400)):
        # Updates of 4 x 10 + 2 x 40 passes for the 3 x 10 each that `warm` leave of 400.
        assert whole == warm + round((400 - warm) * 30 / 120)
        aligned = config.aligned(**work, plain_samples=samples)
        assert aligned.train_iters == whole, "an update belongs to the phase in which it begins"
    beyond = config.aligned(**work, plain_samples=10**6)
    assert beyond.train_iters == 400
    ramped = replace(config, rampup_batch_size=(1, 1, 12), train_iters=20)
    sizes = [ramped.size_after(ramped.samples_after(update)) for update in range(20)]
    warm = next(at for at in range(20) if ramped.samples_after(at) >= 9)
    left = Fraction(sum(sizes[warm:]), 4)
    exact = ramped.updates_of(ramped.samples_after(warm) + left)
    assert ramped.aligned(**work, plain_samples=9).train_iters == round(exact)
