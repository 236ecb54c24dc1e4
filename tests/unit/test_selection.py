"""Split and select: exact counts, the sign of the difference, and what is refused."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import kstest, spearmanr

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.errors import ConfigError, DataError, LineageError
from megatron_miniplm.core.manifest import hash_parts
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.scores import Scores, ScoreWriter
from megatron_miniplm.data.tokenizers import load_tokenizer
from megatron_miniplm.selection import diagnostics
from megatron_miniplm.selection.diagnostics import spearman
from megatron_miniplm.selection.quota import ratio_quota
from megatron_miniplm.selection.registry import SELECTORS, SelectorInput
from megatron_miniplm.selection.split import split_rows, uniform_keys
from megatron_miniplm.selection.top_k import count_kept, top_k
from megatron_miniplm.stages import select, split
from tests.small_artifacts import random_instances, visible, write_corpus, write_scores

COUNT = 60


@pytest.fixture
def corpus(tmp_path, tiny_tokenizer) -> Corpus:
    return write_corpus(tmp_path / "pool", tiny_tokenizer, random_instances(COUNT), per_shard=25)


@pytest.fixture
def nll() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {"teacher": rng.uniform(1, 5, COUNT), "reference": rng.uniform(1, 5, COUNT)}


@pytest.fixture
def scores(tmp_path, corpus, nll) -> dict[str, Path]:
    return {
        f"{role}_scores": write_scores(tmp_path / "scores" / role, corpus, values, name=role)
        for role, values in nll.items()
    }


def run_select(corpus: Corpus, name: str = "chosen", **settings) -> Corpus:
    prefix = corpus.prefix.with_name(name)
    select.run(select.Config(data_path=corpus.prefix, output_prefix=prefix, **settings))
    return Corpus.open(prefix)


# ---- the exact top K -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "count", "kept"),
    [(0.57, 100, 57), (0.29, 100, 29), (0.5, 7, 3), (1.0, 7, 7), (1e-9, 7, 1), (0.1, 30, 3)],
)
def test_the_number_kept_is_exact(ratio, count, kept):
    assert count_kept(ratio, count) == kept


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.5, 1.0000001, float("nan"), float("inf")])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ConfigError, match=rf"--selection-ratio is {ratio}"):
        count_kept(ratio, 10)


@settings(deadline=None)
@given(
    keys=arrays(
        np.float64, st.integers(1, 40), elements=st.sampled_from([-1.5, 0.0, -0.0, 0.25, 3])
    ),
    data=st.data(),
)
def test_top_k_is_the_literal_sort_with_ties_by_row(keys, data):
    k = data.draw(st.integers(1, len(keys)))
    by_key_then_row = sorted(range(len(keys)), key=lambda row: (-keys[row], row))
    assert top_k(keys, k).tolist() == sorted(by_key_then_row[:k])


@settings(deadline=None)
@given(keys=arrays(np.int8, 12), chosen=st.sets(st.integers(0, 11), min_size=1), data=st.data())
def test_top_k_only_takes_candidates(keys, chosen, data):
    candidates = np.isin(np.arange(12), list(chosen))
    keys = keys.astype(np.float64)
    k = data.draw(st.integers(1, len(chosen)))
    allowed = np.flatnonzero(candidates)
    by_key_then_row = sorted(allowed.tolist(), key=lambda row: (-keys[row], row))
    assert top_k(keys, k, candidates=candidates).tolist() == sorted(by_key_then_row[:k])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_key_that_is_not_finite_is_refused(bad):
    with pytest.raises(DataError, match="the key of row 2"):
        top_k(np.array([1.0, 2.0, bad, 0.0]), 2)


def test_more_than_there_is_cannot_be_kept():
    with pytest.raises(ConfigError, match="3 instances are to be kept, but 2"):
        top_k(np.arange(4.0), 3, candidates=np.array([True, False, True, False]))


# ---- keys ----------------------------------------------------------------------------------------


def test_difference_is_reference_minus_teacher():
    # Paper Tables 10-12: an easy, a hard and a noisy instance, in nats a token.
    inputs = SelectorInput(
        ids=np.arange(3), seed=0,
        teacher_scores=np.array([0.10, 2.83, 9.00]), reference_scores=np.array([0.14, 3.86, 6.10]),
    )  # fmt: skip
    keys = SELECTORS["difference"](inputs)
    np.testing.assert_allclose(keys, [0.04, 1.03, -2.90], rtol=0, atol=1e-12)
    assert np.argsort(-keys).tolist() == [1, 0, 2]
    assert SELECTORS["teacher"](inputs).tolist() == [-0.10, -2.83, -9.00]
    assert SELECTORS["reference"](inputs).tolist() == [0.14, 3.86, 6.10]


@pytest.mark.parametrize("name", ["difference", "teacher", "reference"])
def test_a_selector_names_the_scores_it_lacks(name):
    with pytest.raises(ConfigError, match=r"--(teacher|reference)-scores"):
        SELECTORS[name](SelectorInput(ids=np.arange(3), seed=0))


def test_draws_are_uniform_and_differ_by_seed_and_purpose():
    ids = np.arange(20_000)
    keys = uniform_keys(ids, 1, purpose="a")
    assert keys.min() >= 0
    assert keys.max() < 1
    # 20,000 draws: a p-value below 1e-4 would be a broken generator, not bad luck (seed is fixed).
    assert kstest(keys, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(keys[1:], keys[:-1])[0, 1]) < 0.03  # 4 standard errors
    for other in (uniform_keys(ids, 2, purpose="a"), uniform_keys(ids, 1, purpose="b")):
        assert abs(np.corrcoef(keys, other)[0, 1]) < 0.03
    assert np.array_equal(uniform_keys(ids[7:9], 1, purpose="a"), keys[7:9])


# ---- split ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    count=st.integers(10, 300),
    reference=st.sampled_from([0.01, 0.05, 0.3, 0.5]),
    heldout=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 2**40),
)
def test_parts_are_disjoint_exact_and_together_everything(count, reference, heldout, seed):
    ids = np.arange(count) * 3
    parts = split_rows(ids, reference_fraction=reference, heldout_fraction=heldout, seed=seed)
    assert len(parts.reference) == count_kept(reference, count)
    assert len(parts.heldout) == (count_kept(heldout, count) if heldout else 0)
    together = np.concatenate([parts.reference, parts.heldout, parts.pool])
    assert sorted(together.tolist()) == list(range(count))
    for part in (parts.reference, parts.heldout, parts.pool):
        assert (np.diff(part) > 0).all()
    # A held-out part is taken from the pool, never from the reference.
    alone = split_rows(ids, reference_fraction=reference, seed=seed)
    assert np.array_equal(alone.reference, parts.reference)


def test_a_split_is_decided_by_its_seed():
    one, same, other = (
        split_rows(np.arange(200), reference_fraction=0.3, seed=seed).reference.tolist()
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    ("reference", "heldout"), [(1.0, 0), (0.5, 0.5), (0, 0), (1.5, 0), (0.5, -1)]
)
def test_fractions_that_leave_no_pool_are_refused(reference, heldout):
    with pytest.raises(ConfigError):
        split_rows(np.arange(20), reference_fraction=reference, heldout_fraction=heldout, seed=1)


def test_the_split_stage_writes_subsets_of_the_corpus(tmp_path, corpus):
    config = split.Config(
        data_path=corpus.prefix, reference_fraction=0.1, reference_prefix=tmp_path / "ref",
        pool_prefix=tmp_path / "rest", seed=1,
        heldout_fraction=0.2, heldout_prefix=tmp_path / "held",
    )  # fmt: skip
    split.run(config)
    parts = [Corpus.open(tmp_path / name) for name in ("ref", "rest", "held")]
    assert [len(part) for part in parts] == [6, 42, 12]
    assert sorted(i for part in parts for i in part.ids.tolist()) == list(range(COUNT))
    assert {part.root_fingerprint for part in parts} == {corpus.fingerprint}


def test_a_killed_split_is_completed_by_the_same_command(tmp_path, corpus):
    config = split.Config(
        data_path=corpus.prefix, reference_fraction=0.1, reference_prefix=tmp_path / "ref",
        pool_prefix=tmp_path / "rest", seed=1,
    )  # fmt: skip
    split.run(config)
    kept = Corpus.open(tmp_path / "ref").manifest_path.stat().st_mtime_ns
    for path in tmp_path.glob("rest*"):
        path.unlink()
    split.run(config)
    assert len(Corpus.open(tmp_path / "rest")) == 54
    assert Corpus.open(tmp_path / "ref").manifest_path.stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    "flags",
    [
        {"pool_prefix": "ref"},
        {"reference_prefix": "pool"},
        {"heldout_fraction": 0.1},
        {"heldout_prefix": "held"},
    ],
)
def test_contradictory_split_flags_are_refused(tmp_path, corpus, flags):
    flags = {k: tmp_path / v if isinstance(v, str) else v for k, v in flags.items()}
    settings = {"reference_prefix": tmp_path / "ref", "pool_prefix": tmp_path / "rest"} | flags
    with pytest.raises(ConfigError):
        split.run(split.Config(data_path=corpus.prefix, reference_fraction=0.5, **settings))
    assert not (tmp_path / "ref.json").exists()


# ---- select --------------------------------------------------------------------------------------


def test_select_keeps_the_highest_differences(corpus, scores, nll):
    chosen = run_select(corpus, **scores, selection_ratio=0.4)
    r = nll["reference"] - nll["teacher"]
    assert chosen.ids.tolist() == sorted(np.argsort(-r)[:24].tolist())
    facts = chosen.manifest.content["selection"]
    assert facts["threshold"] == pytest.approx(np.sort(r)[-24], abs=1e-5)  # float32 sums
    assert {"parent", "root", "teacher_scores", "reference_scores"} == set(chosen.manifest.parents)
    assert chosen.manifest.config["selection_ratio"] == 0.4


def test_equal_models_give_zero_differences_and_the_first_k(corpus, scores):
    same = {
        "teacher_scores": scores["teacher_scores"],
        "reference_scores": scores["teacher_scores"],
    }
    chosen = run_select(corpus, **same)
    assert chosen.ids.tolist() == list(range(COUNT // 2))
    facts = chosen.manifest.content["selection"]
    assert set(facts["quantiles"]["all"].values()) == {0.0}
    assert facts["spearman"] == {"reference_nll": None, "teacher_log_prob": None}


def test_swapping_the_models_reverses_the_choice(corpus, scores):
    swapped = {
        "teacher_scores": scores["reference_scores"],
        "reference_scores": scores["teacher_scores"],
    }
    best, worst = run_select(corpus, **scores), run_select(corpus, "swapped", **swapped)
    assert sorted([*best.ids, *worst.ids]) == list(range(COUNT))


def test_everything_is_kept_at_ratio_one(corpus, scores):
    chosen = run_select(corpus, **scores, selection_ratio=1.0)
    assert chosen.ids.tolist() == list(range(COUNT))
    assert chosen.manifest.content["selection"]["mean_length"]["dropped"] is None


@pytest.mark.parametrize("normalization", ["mean", "sum"])
def test_the_normalization_decides_what_is_ranked(corpus, scores, nll, normalization):
    chosen = run_select(corpus, **scores, score_normalization=normalization)
    r = nll["reference"] - nll["teacher"]
    if normalization == "sum":
        r = r * (corpus.lengths - 1)
    assert chosen.ids.tolist() == sorted(np.argsort(-r)[: COUNT // 2].tolist())


def test_short_instances_are_not_candidates_but_count_for_the_ratio(corpus, scores):
    chosen = run_select(corpus, **scores, selection_ratio=0.25, min_tokens=10)
    assert len(chosen) == COUNT // 4
    assert chosen.lengths.min() >= 11
    with pytest.raises(ConfigError, match="are to be kept, but"):
        run_select(corpus, "none", **scores, selection_ratio=1.0, min_tokens=10)
    with pytest.raises(
        ConfigError, match="but 0 can be chosen: the others have fewer than --min-tokens 33"
    ):
        run_select(corpus, "none", **scores, min_tokens=33)


def test_a_token_budget_is_filled_from_the_top(corpus, scores, nll):
    budget = corpus.num_tokens // 3
    chosen = run_select(corpus, **scores, selection_tokens=budget)
    order = np.argsort(nll["teacher"] - nll["reference"])
    fitting = int(np.searchsorted(np.cumsum(corpus.lengths[order]), budget, side="right"))
    assert chosen.ids.tolist() == sorted(order[:fitting].tolist())
    assert chosen.manifest.content["selection"]["token_budget"] == budget
    for wrong in (0, corpus.num_tokens + 1):
        with pytest.raises(ConfigError, match=f"--selection-tokens is {wrong}, but must be from 1"):
            run_select(corpus, "none", **scores, selection_tokens=wrong)
    with pytest.raises(ConfigError, match="give one of them"):
        run_select(corpus, "none", **scores, selection_tokens=5, selection_ratio=0.5)


@pytest.mark.parametrize("by", ["ratio", "tokens"])
def test_each_domain_keeps_its_share(tmp_path, tiny_tokenizer, by):
    instances = random_instances(COUNT, seed=3)
    domains = [0] * 40 + [1] * 17 + [2] * 3
    corpus = write_corpus(
        tmp_path / "own", tiny_tokenizer, instances, per_shard=25, domains=domains
    )
    nll = {role: np.random.default_rng(n).uniform(1, 5, COUNT) for n, role in enumerate("tr")}
    scores = {
        "teacher_scores": write_scores(tmp_path / "t", corpus, nll["t"]),
        "reference_scores": write_scores(tmp_path / "r", corpus, nll["r"]),
    }
    budget = {"selection_ratio": 0.25} if by == "ratio" else {"selection_tokens": 300}
    chosen = run_select(corpus, **scores, stratify="domain", **budget)
    expected = []
    r = nll["r"] - nll["t"]
    for domain in range(3):
        rows = np.flatnonzero(corpus.domains == domain)
        ranked = rows[np.argsort(-r[rows])]
        count = {0: 10, 1: 4, 2: 1}[domain]  # 10, 4.25 and 0.75 of 15
        if by == "tokens":
            share = 300 * corpus.lengths[rows].sum() / corpus.num_tokens
            assert abs(share - round(share)) > 0.01  # no tie in rounding decides here
            running = np.cumsum(corpus.lengths[ranked])
            count = int(np.searchsorted(running, share + 0.5, side="right"))
        expected += ranked[:count].tolist()
    assert chosen.ids.tolist() == sorted(expected)
    if by == "ratio":
        with pytest.raises(ConfigError, match=r"instances of domain \w+ are to be kept, but"):
            run_select(corpus, "none", **scores, stratify="domain", selection_ratio=1.0,
                       min_tokens=10)  # fmt: skip


@given(
    sizes=st.lists(st.integers(0, 10**12), min_size=1, max_size=6).filter(any),
    ratio=st.sampled_from([1e-6, 0.29, 0.5, 1.0]),
)
def test_quotas_are_exact_shares_rounded_to_one_total(sizes, ratio):
    quota = ratio_quota(ratio, np.array(sizes))
    assert quota.sum() == count_kept(ratio, sum(sizes))
    exact = [Fraction(int(quota.sum()) * size, sum(sizes)) for size in sizes]
    assert all(abs(int(q) - e) < 1 for q, e in zip(quota, exact, strict=True))
    assert all(q <= size for q, size in zip(quota, sizes, strict=True))


def test_facts_of_more_rows_than_are_sampled_stay_close(monkeypatch, corpus, scores):
    everything = run_select(corpus, **scores).manifest.content["selection"]
    monkeypatch.setattr(diagnostics, "SAMPLED_ROWS", 40)
    monkeypatch.setattr(diagnostics, "_BLOCK", 4)
    sampled = run_select(corpus, "sampled", **scores).manifest.content["selection"]
    assert 30 <= sampled["sampled_rows"] <= 50
    exact = ("num_kept", "tokens_kept", "threshold", "domains", "lengths", "mean_length")
    assert {name: sampled[name] for name in exact} == {name: everything[name] for name in exact}
    assert sampled["quantiles"]["all"]["0.5"] == pytest.approx(
        everything["quantiles"]["all"]["0.5"], abs=1.0
    )


def test_the_plot_is_drawn_whole(corpus, scores, tmp_path):
    run_select(corpus, **scores, plot=tmp_path / "plots" / "chosen.png")
    assert visible(tmp_path / "plots") == {"chosen.png"}
    assert (tmp_path / "plots" / "chosen.png").read_bytes().startswith(b"\x89PNG")


def test_random_selection_needs_no_scores_and_follows_its_seed(corpus):
    one = run_select(corpus, "one", selector="random", seed=1)
    assert run_select(corpus, "same", selector="random", seed=1).fingerprint == one.fingerprint
    assert run_select(corpus, "other", selector="random", seed=2).fingerprint != one.fingerprint


def test_the_manifest_says_what_was_preferred(corpus, scores, nll):
    chosen = run_select(corpus, **scores)
    facts = chosen.manifest.content["selection"]
    r = nll["reference"] - nll["teacher"]
    # float32 sums may swap near neighbours in rank; 60 ranks move the statistic by far less.
    assert facts["spearman"]["reference_nll"] == pytest.approx(
        spearmanr(r, nll["reference"]).statistic, abs=1e-3
    )
    assert facts["spearman"]["teacher_log_prob"] == pytest.approx(
        spearmanr(r, -nll["teacher"]).statistic, abs=1e-3
    )
    assert facts["variance_ratio"] == pytest.approx(
        nll["teacher"].var() / nll["reference"].var(), rel=1e-5
    )
    histogram = facts["histogram"]
    assert facts["sampled_rows"] == sum(histogram["all"]) == COUNT
    assert sum(histogram["kept"]) == COUNT // 2
    # The threshold is an edge: no bin holds both kept and dropped.
    dropped = np.subtract(histogram["all"], histogram["kept"])
    assert not (dropped * histogram["kept"]).any()
    assert facts["threshold"] == pytest.approx(r[chosen.ids].min(), rel=1e-6)
    assert sum(facts["lengths"]["all"]) == COUNT
    assert sum(facts["lengths"]["kept"]) == COUNT // 2
    assert facts["tokens_kept"] == chosen.num_tokens
    tokens = [facts["domains"][name]["tokens"] for name in corpus.domain_names]
    assert sum(tokens) == corpus.num_tokens
    kept_domains = np.bincount(chosen.domains, minlength=3).tolist()
    assert [facts["domains"][name]["kept"] for name in corpus.domain_names] == kept_domains
    lengths = facts["mean_length"]
    assert lengths["kept"] == pytest.approx(chosen.lengths.mean())
    assert lengths["kept"] + lengths["dropped"] == pytest.approx(2 * lengths["all"])


@settings(deadline=None)
@given(
    pair=st.integers(3, 30).flatmap(
        lambda n: st.tuples(*[arrays(np.float64, n, elements=st.integers(0, 6))] * 2)
    )
)
def test_rank_correlation_is_scipy_s_with_ties(pair):
    mine = spearman(*pair)
    if any(np.ptp(column) == 0 for column in pair):
        assert mine is None
    else:
        assert mine == pytest.approx(spearmanr(*pair).statistic, abs=1e-12)


# ---- what does not belong together ---------------------------------------------------------------


def test_scores_of_another_corpus_are_refused_with_both_fingerprints(
    tmp_path, corpus, tiny_tokenizer
):
    other = write_corpus(tmp_path / "other", tiny_tokenizer, random_instances(COUNT, seed=8))
    theirs = write_scores(tmp_path / "s", other, np.ones(COUNT))
    with pytest.raises(LineageError, match=f"(?s){other.fingerprint}.*{corpus.fingerprint}"):
        run_select(corpus, teacher_scores=theirs, reference_scores=theirs)
    assert not (tmp_path / "chosen.json").exists()


def test_scores_of_the_whole_do_not_fit_a_part(tmp_path, corpus, scores):
    run_select(corpus, "part", **scores)
    with pytest.raises(LineageError, match=r"60 instances.*\(30\)"):
        run_select(Corpus.open(tmp_path / "part"), **scores)


def test_scores_made_with_another_tokenizer_are_refused(tmp_path, corpus, tiny_tokenizer):
    spec = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "NFC"}
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(spec))
    other = write_corpus(tmp_path / "other", tmp_path / "t", random_instances(COUNT))
    theirs = write_scores(tmp_path / "s", other, np.ones(COUNT))
    mine, found = load_tokenizer(tiny_tokenizer).fingerprint, other.tokenizer().fingerprint
    with pytest.raises(LineageError, match=f"tokenizer {found}.*{mine}"):
        run_select(corpus, teacher_scores=theirs, reference_scores=theirs)


def test_scores_over_other_tokens_are_refused(tmp_path, corpus, scores):
    writer = ScoreWriter(tmp_path / "s", corpus=corpus, config={}, model={})
    counts = (corpus.lengths - 1).astype(np.int32)
    counts[7] -= 1
    writer.write_window(0, np.ones(COUNT, np.float32), counts)
    writer.finish()
    with pytest.raises(LineageError, match="row 7 has"):
        run_select(
            corpus, teacher_scores=tmp_path / "s", reference_scores=scores["reference_scores"]
        )


def test_an_injected_nan_aborts_the_selection(corpus, scores):
    folder = scores["teacher_scores"]
    column = np.load(folder / "sum_nll.npy")
    column[3] = np.nan
    np.save(folder / "sum_nll.npy", column)
    with pytest.raises(DataError, match="changed since they were written"):
        run_select(corpus, **scores)
    # Even where somebody recomputed the fingerprint.
    manifest = json.loads((folder / "manifest.json").read_text())
    counts = np.load(folder / "num_tokens.npy")
    manifest["fingerprint"] = hash_parts(corpus.fingerprint, column.data, counts.data)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="row 3 has sum_nll nan"):
        run_select(corpus, **scores)
    assert not corpus.prefix.with_name("chosen.json").exists()


# ---- the commands --------------------------------------------------------------------------------


def command(corpus: Corpus, scores: dict[str, Path], *more: str) -> list[str]:
    return [
        "select", "--data-path", str(corpus.prefix),
        "--teacher-scores", str(scores["teacher_scores"]),
        "--reference-scores", str(scores["reference_scores"]),
        "--output-prefix", str(corpus.prefix.with_name("chosen")), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("ratio", ["0", "1.5"])
def test_a_wrong_ratio_is_an_error_that_leaves_no_file(corpus, scores, ratio):
    before = visible(corpus.prefix.parent)
    assert main(command(corpus, scores, "--selection-ratio", ratio)) == 2
    assert visible(corpus.prefix.parent) == before


def test_an_unknown_selector_is_an_error(corpus, scores):
    assert main(command(corpus, scores, "--selector", "ratio")) == 2


def test_a_finished_selection_is_only_replaced_on_request(corpus, scores, capsys):
    assert main(command(corpus, scores)) == 0
    assert "30 of 60 instances kept" in capsys.readouterr().out
    assert main(command(corpus, scores, "--selection-ratio", "0.25")) == 2
    assert len(Corpus.open(corpus.prefix.with_name("chosen"))) == 30
    assert main(command(corpus, scores, "--selection-ratio", "0.25", "--overwrite")) == 0
    assert len(Corpus.open(corpus.prefix.with_name("chosen"))) == 15


def test_the_manifest_of_a_selection_repeats_it(corpus, scores):
    assert main(command(corpus, scores, "--score-normalization", "sum")) == 0
    manifest = corpus.prefix.with_name("chosen.json")
    again = corpus.prefix.with_name("again")
    assert main(["select", "--from-run", str(manifest), "--output-prefix", str(again)]) == 0
    first = Corpus.open(corpus.prefix.with_name("chosen"))
    assert Corpus.open(again).fingerprint == first.fingerprint
    assert Scores.open(scores["teacher_scores"]).fingerprint in {
        parent.fingerprint for parent in Corpus.open(again).manifest.parents.values()
    }
