"""A proxy is trained to one curve in every layout, goes on bit for bit, and predicts alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import CheckpointError, ConfigError, DataError, LineageError
from megatron_miniplm.core.manifest import Parent, read_json, write_json
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.predictions import Predictions, PredictionWriter
from megatron_miniplm.data.scores import Scores
from tests.pool import RankFailedError, RankPool
from tests.runs import (
    INTERLEAVED,
    PP2,
    TP2,
    curve,
    pretrain_flags,
    score_flags,
    some_slow,
)
from tests.small_artifacts import random_instances, write_corpus, write_scores

TOLERANCE = 1e-5  # fp32 sums in another order, 20 updates
LAYOUTS = {
    "TP2 x PP2, sequence parallel": (4, f"{TP2} {PP2} --sequence-parallel"),
    "DP2, micro-batches of one, ZeRO-1": (
        2, "--micro-batch-size 1 --use-distributed-optimizer --overlap-grad-reduce"
    ),
    "TP2, sequence parallel": (2, f"{TP2} --sequence-parallel"),
    "PP2, interleaved": (2, INTERLEAVED),
    "PP2, overlapped": (2, f"{PP2} --overlap-grad-reduce"),
}  # fmt: skip
SLOW = ("TP2 x PP2, sequence parallel", "PP2, interleaved")


@pytest.fixture(scope="module")
def data(corpus: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model, a sample of the corpus, most of it to train on, and scores of the sample.

    Their difference grows with the share of instances' first 64 tokens that are frequent ones, so a
    linear head on mean hidden states can tell it.
    """
    folder = tmp_path_factory.mktemp("proxy")
    sample, train, rest = folder / "sample", folder / "train", folder / "rest"
    draw = ["select", "--data-path", str(corpus), "--selector", "random"]
    assert main([*draw, "--selection-ratio", "0.2", "--output-prefix", str(sample)]) == 0
    assert main(split_flags(sample, rest, train)) == 0
    opened = Corpus.open(sample)
    tokens = [opened.tokens(row)[:-1] for row in range(len(opened))]
    frequent = np.argsort(np.bincount(np.concatenate(tokens)))[-12:]
    share = np.array([np.isin(each, frequent).mean() for each in tokens])
    write_scores(folder / "teacher", opened, np.full(len(opened), 2.0), name="teacher")
    write_scores(folder / "reference", opened, 2.0 + share, name="reference")
    pool.run(pretrain_flags(train, folder / "language model", iterations=5), 1)
    return {path.name: path for path in (sample, train, rest)} | {
        name: folder / name for name in ("teacher", "reference", "language model")
    }


def split_flags(sample: Path, rest: Path, train: Path) -> list[str]:
    """A quarter of the sample is held out."""
    words = ["split", "--data-path", str(sample), "--reference-fraction", "0.25"]
    return [*words, "--reference-prefix", str(rest), "--pool-prefix", str(train)]


def flags(data: dict[str, Path], save: Path, *more: str, **kwargs) -> list[str]:
    return pretrain_flags(
        data["train"], save, "--objective", "regression", "--teacher", "scores",
        "--teacher-scores", str(data["teacher"]), "--reference-scores", str(data["reference"]),
        "--lr", "1e-3", *more, **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(pool: RankPool, data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    save = tmp_path_factory.mktemp("alone") / "run"
    pool.run(flags(data, save), 1)
    return save


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, SLOW))
def test_layout_gives_the_curve_of_one_process(
    layout: str, alone: Path, data, pool: RankPool, tmp_path: Path
) -> None:
    world, more = LAYOUTS[layout]
    pool.run(flags(data, tmp_path / "run", *more.split()), world)
    found, expected = curve(tmp_path / "run"), curve(alone)
    assert len(found) == len(expected) == 20
    for a, b in zip(found, expected, strict=True):
        for name in ("regression loss", "absolute error"):
            assert abs(a[name] - b[name]) <= TOLERANCE, name
        assert a["grad norm"] == pytest.approx(b["grad norm"], rel=1e-4)


def test_a_run_that_stopped_goes_on_bit_for_bit_in_the_checkpoint_with_its_scale(
    alone: Path, data, pool: RankPool, tmp_path: Path
) -> None:
    words = flags(data, tmp_path / "run")
    pool.run([*words, "--exit-interval", "7"], 1)
    assert len(curve(tmp_path / "run")) == 7
    pool.run(words, 1)
    for name in ("regression loss", "absolute error", "grad norm"):
        found, expected = ([row[name] for row in curve(run)] for run in (tmp_path / "run", alone))
        assert found == expected, name
    manifest = read_json(alone / "iter_0000020" / "manifest.json")
    assert set(manifest["parents"]) == {"corpus", "teacher_scores", "reference_scores"}
    assert manifest["content"]["targets"]["sd"] > 0.01
    with pytest.raises(RankFailedError, match="was trained with teacher_scores"):
        pool.run([*words, "--reference-scores", str(data["teacher"]), "--teacher-scores",
                  str(data["reference"])], 1)  # fmt: skip


def test_a_checkpoint_of_another_layout_is_gone_on_from(
    alone: Path, data, pool: RankPool, tmp_path: Path
) -> None:
    pool.run(flags(data, tmp_path / "run", *PP2.split(), "--exit-interval", "10"), 2)
    pool.run(flags(data, tmp_path / "run", *TP2.split(), "--sequence-parallel"), 2)
    for a, b in zip(curve(tmp_path / "run"), curve(alone), strict=True):
        assert abs(a["regression loss"] - b["regression loss"]) <= TOLERANCE


class TestPredictions:
    """What a trained proxy says of instances that it was not trained on."""

    @pytest.fixture(scope="class")
    def proxy(self, data, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Trained until it knows."""
        save = tmp_path_factory.mktemp("toy") / "run"
        small = ["--micro-batch-size", "32", "--global-batch-size", "32", "--lr", "3e-3"]
        pool.run(flags(data, save, *small, "--num-layers", "2", iterations=100), 1)
        return save

    @pytest.fixture(scope="class")
    def predictions(self, data, proxy: Path, pool: RankPool) -> Path:
        """Of the whole sample, by one process."""
        output = proxy.parent / "predictions"
        pool.run(score_flags(data["sample"], proxy, output, "--head", "proxy"), 1)
        return output

    def test_what_is_linear_in_hidden_states_is_learned(
        self, data, predictions: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        scores = ["--teacher-scores", str(data["teacher"])]
        scores += ["--reference-scores", str(data["reference"])]
        words = ["evaluate", "--proxy-scores", str(predictions), *scores, "--held-out"]
        assert main([*words, str(data["rest"])]) == 0
        found = json.loads(capsys.readouterr().out)["proxy"]
        # What is learned of some 150 instances moves with the text of the corpus, from 0.88 up.
        assert found["r_squared"]["value"] > 0.7
        assert found["cost"] is None, "these scores are of no model"
        assert found["overlap"]["low"] > 0.65
        assert found["overlap_by_chance"] == pytest.approx(0.5, abs=0.01)  # an odd number of them
        assert found["spearman"]["low"] < found["spearman"]["value"] < found["spearman"]["high"]
        assert main([*words, str(data["train"])]) == 2
        assert "on which the proxy was trained" in capsys.readouterr().err

    def test_only_what_the_predictions_are_really_of_is_compared(
        self, data, predictions: Path, tiny_tokenizer: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        def judged(said: Path, teacher: Path, reference: Path, held_out: Path) -> str:
            scores = ["--teacher-scores", str(teacher), "--reference-scores", str(reference)]
            words = ["evaluate", "--proxy-scores", str(said), *scores, "--held-out", str(held_out)]
            code, found = main(words), capsys.readouterr()
            return found.err if code else found.out

        ours = data["teacher"], data["reference"], data["rest"]
        hold = split_flags(data["sample"], data["rest"], data["train"])
        assert main([*hold, "--overwrite", "--seed", "99"]) == 0
        capsys.readouterr()
        try:
            found = judged(predictions, *ours)
            assert "LineageError: what the proxy was trained on was" in found
            assert f"{data['train']} is now {Corpus.open(data['train']).fingerprint}" in found
        finally:
            assert main([*hold, "--overwrite"]) == 0
            capsys.readouterr()

        other = shutil.copytree(predictions, predictions.with_name("other"))
        raw = read_json(other / "manifest.json")
        raw["parents"]["model"]["fingerprint"] = "0" * 32
        write_json(other / "manifest.json", raw)
        assert f"the proxy that predicted was {'0' * 32}, but" in judged(other, *ours)

        # Ids of another root are of other instances, however they are numbered.
        foreign = write_corpus(tmp_path / "foreign", tiny_tokenizer, random_instances(80))
        assert len(np.intersect1d(foreign.ids, Corpus.open(data["train"]).ids))
        wave = np.sin(np.arange(len(foreign)))
        teacher, reference = (
            write_scores(tmp_path / name, foreign, 2 + share * wave, name=name)
            for name, share in (("teacher", 0.0), ("reference", 0.5))
        )
        made, said = Predictions.open(predictions).manifest, tmp_path / "said"
        path = made.parent_path(predictions / "manifest.json", "model")
        model = Parent(fingerprint=made.parents["model"].fingerprint, path=str(path))
        writer = PredictionWriter(
            said, corpus=foreign, config=made.config, model=made.content["model"],
            parents={"model": model},
        )  # fmt: skip
        writer.write_window(0, 0.5 * wave)
        assert writer.finish()
        found = json.loads(judged(said, teacher, reference, foreign.prefix))["proxy"]
        assert found["num_instances"] == 80
        assert found["r_squared"]["value"] > 0.99

    @pytest.mark.parametrize("layout", ["", f"{TP2} --sequence-parallel", PP2])
    def test_ranks_predict_alike(
        self, layout: str, data, proxy: Path, predictions: Path, pool: RankPool, tmp_path: Path
    ) -> None:
        output, words = tmp_path / "two", ["--head", "proxy", *layout.split()]
        pool.run(score_flags(data["sample"], proxy, output, *words), 2)
        found, expected = (Predictions.open(path).difference for path in (output, predictions))
        if layout:
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
        else:
            assert np.array_equal(found, expected)

    def test_the_highest_predictions_are_selected(
        self, data, predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["select", "--data-path", str(data["sample"]), "--selector", "proxy"]
        chosen = tmp_path / "chosen"
        words += ["--selection-ratio", "0.25", "--output-prefix", str(chosen)]
        assert main(words) == 2
        assert "needs --proxy-scores; `score --head proxy`" in capsys.readouterr().err
        assert main([*words, "--proxy-scores", str(predictions)]) == 0
        ids, said = Corpus.open(chosen).ids, Predictions.open(predictions).difference
        best = np.argsort(-said, kind="stable")[: len(ids)]
        assert np.array_equal(np.sort(Corpus.open(data["sample"]).ids[best]), ids)
        assert "proxy_scores" in read_json(tmp_path / "chosen.json")["parents"]
        capsys.readouterr()
        assert main(["inspect", str(chosen), "--show", "2", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)["examples"]
        assert [each["predicted_difference"] for each in shown] == pytest.approx(said[best[:2]])

    def test_a_proxy_is_no_language_model_and_the_reverse(
        self, data, proxy: Path, pool: RankPool, tmp_path: Path
    ) -> None:
        for load, more, message in (
            (proxy, (), "is no language model any more"),
            (data["language model"], ("--head", "proxy"), "predicts no number for an instance"),
        ):
            with pytest.raises(RankFailedError, match=message) as caught:
                pool.run(score_flags(data["sample"], load, tmp_path / "s", *more), 1)
            assert CheckpointError.__name__ in str(caught.value)
        assert not (tmp_path / "s").exists()

    def test_a_prediction_that_is_not_finite_is_refused(self, predictions: Path) -> None:
        with pytest.raises(DataError, match="row 7 is nan"):
            Predictions.refuse_broken({"difference": np.array([np.nan])}, what="it", first_row=7)


def test_training_starts_from_a_language_model_and_its_predictions_at_the_mean(
    data, pool: RankPool, tmp_path: Path
) -> None:
    start = ["--load", str(data["language model"]), "--finetune"]
    pool.run(flags(data, tmp_path / "run", *start, iterations=5), 1)
    trained = Corpus.open(data["train"])
    rows = np.isin(Corpus.open(data["sample"]).ids, trained.ids)
    exact = Scores.open(data["reference"]).mean_nll()[rows] - 2.0
    targets = read_json(tmp_path / "run/iter_0000005/manifest.json")["content"]["targets"]
    assert targets["mean"] == pytest.approx(exact.mean(), rel=1e-6)
    assert targets["sd"] == pytest.approx(exact.std(), rel=1e-5)
    first = curve(tmp_path / "run")[0]
    # Of 8 instances: the head is 0, so what it is apart from a target is the target.
    assert 0.1 < first["regression loss"] < 4
    parents = read_json(tmp_path / "run/iter_0000005/manifest.json")["parents"]
    assert "initial_weights" in parents


def test_what_does_not_fit_is_refused(data, corpus: Path, pool: RankPool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for words, error, message in (
        (["--train-data-path", str(corpus)], LineageError, "neither that nor chosen from it"),
        (["--reference-scores", str(data["teacher"])], DataError, "nothing to learn"),
        (["--objective", "kd"], ConfigError, "learns from distributions over tokens"),
        (["--objective", "minillm"], ConfigError, "neither stores nor scores know"),
        (["--z-loss-weight", "0.1"], ConfigError, "has no effect on --objective regression"),
        (["--valid-data-path", str(data["rest"])], ConfigError, "asks for a language model"),
    ):
        with pytest.raises(RankFailedError, match=message) as caught:
            pool.run(flags(data, run, *words), 1)
        assert error.__name__ in str(caught.value)
        assert not run.exists()
