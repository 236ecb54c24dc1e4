"""MiniLLM with real models: what is written, the same in every layout, batch and after a stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_miniplm.core.config import parse_flags
from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.manifest import read_json
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.instances import make_batch
from megatron_miniplm.models.flops import count_parameters
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.objectives.advantages import AdvantageConfig
from megatron_miniplm.objectives.objective import Normalization, Progress
from megatron_miniplm.objectives.rollouts import Explorer, Rollout, RolloutConfig
from megatron_miniplm.parallel.topology import Layout, ParallelConfig, initialize, shutdown
from megatron_miniplm.stages import minillm
from megatron_miniplm.training.checked_run import CheckedRun
from megatron_miniplm.training.preflight import check
from tests.parallel.test_distillation import STUDENT, TEACHER, save_model
from tests.parallel.test_mamba import SHAPE as MAMBA
from tests.pool import RankPool
from tests.runs import PP2, TP2, curve, pretrain_flags
from tests.small_artifacts import write_corpus

pytest.importorskip("transformers", reason="the [hf] extra is not installed")

TOLERANCE = 1e-5  # fp32 sums in another order; one draw that falls otherwise shows as 1e-2
UPDATES = 3
PROMPT, MIXTURE = 20, 0.2


@pytest.fixture(scope="module")
def models(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    shapes = {"student": STUDENT, "teacher": TEACHER}
    return {
        name: save_model(root / name, tiny_tokenizer, seed, shape)
        for seed, (name, shape) in enumerate(shapes.items(), 1)
    }


class TestRollouts:
    """Of a few random instances, one of which has a separator in its prompt, and one is short."""

    @pytest.fixture(scope="class")
    def explorer(
        self, models: dict[str, Path], tiny_tokenizer: Path, tmp_path_factory
    ) -> Iterator[Explorer]:
        rng = np.random.default_rng(0)
        instances = [rng.integers(1, 512, size) for size in (33, 33, 33, 9, 28, 33)]
        instances[1][5] = instances[2][PROMPT - 1] = 0
        prefix = tmp_path_factory.mktemp("corpus") / "random"
        corpus = write_corpus(prefix, tiny_tokenizer, instances)
        assert corpus.eod_id == 0
        topology = initialize(ParallelConfig())
        student, teacher = (
            open_weights(models[role]).build(corpus, topology, torch.float32)
            for role in ("student", "teacher")
        )
        yield Explorer(
            config=RolloutConfig(prompt_length=PROMPT, teacher_mixture=MIXTURE),
            advantage=AdvantageConfig(), normalization="sequence",
            student=student, teacher=teacher, topology=topology, seed=3,
            data=Blend.open([str(prefix)], seed=1),
        )  # fmt: skip
        del student, teacher
        shutdown()

    def explore(
        self, explorer: Explorer, parts: Sequence[Sequence[int]] = [range(6)], length: int = 32
    ) -> Rollout:
        """Rollouts of the rows, in these micro-batches, joined."""
        batches = [make_batch(explorer.data, part, length=length) for part in parts]
        made = explorer(batches, Progress(consumed=40, total=99, warmup=1, decay=1))
        assert [part.tokens_bs.shape for part in made] == [b.tokens_bs.shape for b in batches]
        columns = ([getattr(part, item.name) for part in made] for item in fields(Rollout))
        return Rollout(*(torch.cat(column) for column in columns))

    def test_prompts_stay_and_what_follows_is_new(self, explorer: Explorer) -> None:
        made, eod = self.explore(explorer), explorer.data.eod_id
        prompts = [PROMPT, PROMPT, PROMPT, 6, PROMPT, PROMPT]  # three quarters of 9
        for row, prompt in enumerate(prompts):
            tokens, given = made.tokens_bs[row], explorer.data.tokens(row)
            assert tokens[:prompt].tolist() == given[:prompt].tolist()
            written = (made.response_weight_bs[row] != 0).nonzero()[:, 0]
            # What follows the separator is not predicted, in a prompt and right after it.
            first = prompt if tokens[prompt - 1] == eod else prompt - 1
            assert written.tolist() == list(range(first, int(written[-1]) + 1))
            last = int(written[-1])
            assert made.labels_bs[row, last] == eod or last == len(given) - 2
            assert made.labels_bs[row, first:last].tolist() != given[first + 1 : last + 1].tolist()
            assert (made.labels_bs[row, last + 1 :] == eod).all()
            assert not made.mask_bs[row, last + 1 :].any()
        assert not made.mask_bs[1, 5]
        assert not made.mask_bs[2, PROMPT - 1]
        assert not (made.prompt_weight_bs * made.response_weight_bs).any()
        torch.testing.assert_close(made.prompt_weight_bs.sum(1), torch.ones(6))
        torch.testing.assert_close(made.response_weight_bs.sum(1), torch.ones(6))

    def test_rewards_and_weights_are_those_of_a_pass_over_the_whole_text(
        self, explorer: Explorer
    ) -> None:
        made = self.explore(explorer)
        places = torch.arange(32).expand(6, -1)
        with torch.no_grad():
            student, teacher = (
                model[0](made.tokens_bs, places, None)[..., :512]
                .log_softmax(-1).gather(-1, made.labels_bs[..., None])[..., 0]
                for model in (explorer.student, explorer.teacher)
            )  # fmt: skip
        written = made.response_weight_bs != 0
        drawn = ((1 - MIXTURE) * student.exp() + MIXTURE * teacher.exp()).log()
        for found, expected in (
            (made.reward_bs, teacher - student),
            (made.logprob_bs, student),
            (made.importance_bs, (student - drawn).exp()),
        ):
            torch.testing.assert_close(found[written], expected[written], atol=1e-5, rtol=0)
        assert made.importance_bs.max() <= 1 / (1 - MIXTURE) + 1e-6
        assert (made.highest_importance_b == made.importance_bs.max()).all()
        advantage = made.advantage_bs[written]
        assert advantage.mean().abs() < 1e-6
        assert advantage.var(correction=0) == pytest.approx(1, rel=1e-5)
        assert not made.advantage_bs[~written].any()

    def test_batches_and_padding_change_nothing(self, explorer: Explorer) -> None:
        expected = self.explore(explorer)
        for parts, length in (([[0, 1], [2, 3], [4, 5]], 32), ([range(6)], 40)):
            found = self.explore(replace(explorer, config=replace(
                explorer.config, rollout_batch_size=4)), parts, length)  # fmt: skip
            for item in fields(Rollout):
                value, other = getattr(found, item.name), getattr(expected, item.name)
                value = value[:, :32] if value.dim() == 2 else value
                if value.is_floating_point():
                    torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5)
                else:
                    assert torch.equal(value, other), item.name

    def test_another_seed_or_another_moment_is_another_text(self, explorer: Explorer) -> None:
        first = self.explore(explorer).tokens_bs
        assert torch.equal(first, self.explore(explorer).tokens_bs)
        assert not torch.equal(first, self.explore(replace(explorer, seed=4)).tokens_bs)
        batch = make_batch(explorer.data, range(6), length=32)
        (later,) = explorer([batch], Progress(consumed=46, total=99, warmup=1, decay=1))
        assert not torch.equal(first, later.tokens_bs)

    @pytest.mark.parametrize("normalization", ["token", "sequence"])
    def test_means_are_over_what_there_is(
        self, explorer: Explorer, normalization: Normalization
    ) -> None:
        config = replace(explorer.config, short_instances="copy")  # of 5 rows something is written
        made = self.explore(replace(explorer, normalization=normalization, config=config))
        assert not made.response_weight_bs[3].any()
        for weight, rows in ((made.prompt_weight_bs, 6), (made.response_weight_bs, 5)):
            assert weight.sum() == pytest.approx(6)
            if normalization == "token":
                assert len(weight.unique()) == 2
            else:
                assert weight.sum(1).max() == pytest.approx(6 / rows)

    def test_prompts_that_leave_nothing_to_write_are_refused(self, explorer: Explorer) -> None:
        config = RolloutConfig(prompt_length=PROMPT, short_instances="copy")
        longest = explorer.data.language.seq_length + 1
        replace(explorer, config=replace(config, prompt_length=longest - 1))
        with pytest.raises(ConfigError, match="nothing would be written"):
            replace(explorer, config=replace(config, prompt_length=longest))


def flags(corpus: Path, save: Path, models: dict[str, Path], *more: str) -> list[str]:
    """A student that is given 56 of 65 tokens, or all of what is shorter."""
    _, *words = pretrain_flags(
        corpus, save, "--rotary-base", "10000", "--max-position-embeddings", "128",
        "--lr-warmup-iters", "1", "--prompt-length", "56", "--short-instances", "copy",
        "--rollout-batch-size", "8",
        "--teacher-load", str(models["teacher"]), "--load", str(models["student"]), "--finetune",
        *more, iterations=UPDATES,
    )  # fmt: skip
    return ["minillm", *words]


@pytest.fixture(scope="module")
def whole(models, corpus: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, uninterrupted."""
    save = tmp_path_factory.mktemp("whole") / "run"
    pool.run(flags(corpus, save, models), 1)
    return save


def test_a_run_says_what_was_written_and_what_it_was_worth(whole: Path) -> None:
    for row in curve(whole):
        assert 0 < row["importance"] <= row["importance max"] <= 1 / (1 - MIXTURE) + 1e-6
        assert 0 < row["response length"] <= 9
        assert row["reverse kl"] > 0  # a mean of so few rewards may have either sign
        assert row["reward"] != 0
    manifest = read_json(whole / f"iter_{UPDATES:07d}" / "manifest.json")
    assert set(manifest["parents"]) == {"corpus", "teacher", "initial_weights"}


OVERLAPPED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


@pytest.mark.parametrize(
    "layout", [TP2, f"--micro-batch-size 4 {OVERLAPPED}"], ids=["TP2", "DP2, overlapped"]
)
def test_two_ranks_give_the_curve_of_one(
    layout: str, whole: Path, models, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    pool.run(flags(corpus, tmp_path / "run", models, *layout.split()), 2)
    found, expected = curve(tmp_path / "run"), curve(whole)
    assert len(found) == len(expected) == UPDATES
    for name in ("lm loss", "reverse kl", "policy loss", "reward", "importance", "importance max"):
        worst = max(abs(a[name] - b[name]) for a, b in zip(found, expected, strict=True))
        print(f"{name}: largest difference {worst:.1e}")
        assert worst <= TOLERANCE, name
    for a, b in zip(found, expected, strict=True):
        assert a["response length"] == b["response length"]
        assert a["grad norm"] == pytest.approx(b["grad norm"], rel=1e-4)


def test_a_run_that_lost_an_update_goes_on_bit_for_bit_under_either_name(
    whole: Path, models, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    pool.run(flags(corpus, save, models, "--save-interval", "1", "--exit-interval", "2"), 1)
    assert len(curve(save)) == 2
    _, *words = flags(corpus, save, models)
    words = [word for word in words if word not in ("--load", str(models["student"]), "--finetune")]
    words += ["--objective", "minillm", "--teacher", "online", "--ckpt-step", "1"]
    pool.run(["pretrain", *words], 1)
    for name in ("lm loss", "reverse kl", "policy loss", "reward", "grad norm"):
        assert [row[name] for row in curve(save)] == [row[name] for row in curve(whole)], name


def test_a_warm_start_writes_nothing_and_several_epochs_learn_more_of_what_is_written(
    whole: Path, models, corpus: Path, pool: RankPool, tmp_path: Path
) -> None:
    more = ["--warm-start-samples", "8", "--ppo-epochs", "2", "--lm-kd-ratio", "0.5"]
    pool.run(flags(corpus, tmp_path / "run", models, *more), 1)
    rows = curve(tmp_path / "run")
    assert ["reverse kl" in row for row in rows] == [False, True, True]
    assert ["exploration" in row["timers (ms)"] for row in rows] == [False, True, True]
    once = curve(whole)
    assert [row["learning rate"] for row in rows] == [row["learning rate"] for row in once]
    # The first update has a learning rate of 0, so the second one's rollouts are those of `whole`.
    assert rows[1]["reward"] == pytest.approx(once[1]["reward"], abs=TOLERANCE)
    assert rows[1]["reverse kl"] < once[1]["reverse kl"]  # after the first of its epochs


def checked(command: list[str]) -> CheckedRun:
    config = parse_flags(minillm.Config, command[1:], prog="minillm")
    return check(config, Layout.of(config.parallel, 2), transformer_engine=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (PP2, "pass through the stages one after the other"),
        (f"{' '.join(MAMBA)} --rotary-base 1e6", "of family mamba is not supported"),
        ("--fp8-format e4m3 --bf16", "--fp8-format e4m3 is not supported"),
        ("--cache-logits s", "--cache-logits s is a store of the corpus's text"),
        ("--objective lm", "use `miniplm pretrain` for that"),
        ("--teacher-mixture 1", "importance weights have no bound"),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_the_reason(
    words: str, message: str, models, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(flags(corpus, tmp_path, models, *words.split()))


def test_every_epoch_counts_as_work(models, corpus: Path, tmp_path: Path) -> None:
    once, four = (
        checked(flags(corpus, tmp_path, models, "--ppo-epochs", epochs)) for epochs in "14"
    )
    assert four.flops_per_token == four.work().flops_per_token == 4 * once.flops_per_token
    student, teacher = count_parameters(once.shape), once.teacher.num_parameters
    for run, epochs in ((once, 1), (four, 4)):  # sampling, epochs; sampling and reward
        passes = (1 + 3 * epochs) * student + 2 * teacher
        assert run.times_plain == pytest.approx(passes / (3 * student))


def test_updates_of_equal_flops_count_a_warm_start_as_plain_training(
    models, corpus: Path, tmp_path: Path
) -> None:
    words = flags(corpus, tmp_path, models, "--train-iters", "100", "--align-flops-to", "1")
    for samples, warm in (("0", 0), ("100", 13)):  # of updates of 8
        found = checked([*words, "--warm-start-samples", samples])
        student, teacher = count_parameters(found.shape), found.teacher.num_parameters
        share = 3 * student / (4 * student + 2 * teacher)
        assert found.config.training.train_iters == warm + round(share * (100 - warm))
