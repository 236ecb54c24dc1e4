"""`report` over a run of a selected subset: what was kept, as text, evaluations, lineage; inert."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import html5lib
import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_miniplm.__main__ import main
from megatron_miniplm.core.manifest import Manifest
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.evaluation.results_tables import evaluated, results_sections
from megatron_miniplm.evaluation.run_curves import read_history, with_evaluations
from tests.small_artifacts import write_scores

EVIL = "<script>alert(1)</script>"
DOMAIN = r"<b>web</b> $\usd$"
TEXTS = {f"def {name}(x):\n    return x{name}\n" * 10: "code" for name in "abcdefg"} | {
    f"{EVIL} and <img src=x onerror=alert(1)> & more\n" * 10: DOMAIN
}
LIMIT = 5_000_000


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_tokenizer) -> Path:
    """A pool with scores by which the text with a script is best, half of it, and a run."""
    root = tmp_path_factory.mktemp("study")
    lines = (json.dumps({"text": text, "domain": d}) + "\n" for text, d in TEXTS.items())
    (root / "text.jsonl").write_text("".join(lines))
    assert main([
        "preprocess", "--input", str(root / "text.jsonl"), "--json-keys", "text",
        "--domain-key", "domain", "--tokenizer-model", str(tiny_tokenizer),
        "--seq-length", "64", "--output-prefix", str(root / "pool"),
    ]) == 0  # fmt: skip
    pool = Corpus.open(root / "pool")
    best = [EVIL in pool.tokenizer().decode(pool.tokens(row)) for row in range(len(pool))]
    assert 0 < sum(best) < len(pool) // 2
    r = np.where(best, 2.0, np.linspace(0.0, 1.0, len(pool)))
    write_scores(root / "scores/teacher", pool, np.full(len(pool), 2.0))
    write_scores(root / "scores/reference", pool, 2.0 + r, name="reference")
    assert main([
        "select", "--data-path", str(pool.prefix), "--output-prefix", str(root / "half"),
        "--teacher-scores", str(root / "scores/teacher"),
        "--reference-scores", str(root / "scores/reference"),
    ]) == 0  # fmt: skip
    write_run(root / "run", Corpus.open(root / "half"))
    return root


def write_run(save: Path, corpus: Corpus) -> None:
    """What `report` reads of a run: its log, and the manifest of its checkpoint."""
    folder = save / "iter_0000020"
    folder.mkdir(parents=True)
    parents = {"corpus": corpus.as_parent(folder / "manifest.json")}
    Manifest(kind="checkpoint", fingerprint="model-a", parents=parents).write(
        folder / "manifest.json"
    )
    (save / "latest_checkpointed_iteration.txt").write_text("20\n")
    rows = [
        {"iteration": at, "consumed_samples": at, "consumed_tokens": 64 * at, "lm loss": 5 - at / 9}
        for at in range(1, 21)
    ]
    (save / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are not rendered, which takes most of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)


def report(output: Path, *words: object) -> str:
    assert main(["report", *map(str, words), "--output", str(output)]) == 0
    return (output / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(study, tmp_path_factory) -> str:
    return report(tmp_path_factory.mktemp("page") / "report", "--runs", study / "run")


def test_a_document_with_a_script_is_shown_as_text_and_the_page_is_valid_html(page):
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    tags = {element.tag for element in tree.iter()}
    assert not tags & {"script", "b", "link", "iframe"}
    assert {i.get("src").partition(",")[0] for i in tree.iter("img")} == {"data:image/png;base64"}
    first = next(tree.iter("details"))
    assert EVIL in first.find("pre").text
    summary = "".join(first.find("summary").itertext())
    assert summary.startswith("kept highest r")
    assert "r +2.000" in summary
    assert any(DOMAIN in "".join(each.itertext()) for each in tree.iter("summary"))
    assert len(page) < LIMIT


def test_a_selection_has_its_pictures_and_the_same_lie_beside_the_page(study, tmp_path):
    page = report(tmp_path / "r", "--runs", study / "run", "--examples", "0")
    pictures = {path.stem for path in (tmp_path / "r").glob("*.png")}
    expected = {f"selection_1_{what}" for what in ("keys", "domains", "lengths")}
    assert pictures == expected | {"curves"}
    assert page.count("data:image/png;base64,") == 4
    assert "<details" not in page  # --examples 0


def test_the_lineage_has_the_lines_of_inspect_and_runs_that_share_it_share_a_tree(
    study, tmp_path, capsys, undrawn
):
    shutil.copytree(study / "run", study / "twin", dirs_exist_ok=True)
    assert main(["inspect", str(study / "run")]) == 0
    said = capsys.readouterr().out.partition("\nlineage\n")[2].splitlines()
    page = report(tmp_path / "r", "--runs", study / "run", study / "twin", "--examples", "0")
    tree = html5lib.parse(page.partition('<div class="tree">')[2], namespaceHTMLElements=False)
    found = [item.text for item in tree.iter("li")]
    assert found == ["run, twin", *(line.lstrip("│├└─ \xa0") for line in said if line)]
    assert sum("What was kept" in part for part in page.split("<section>")) == 1


def test_a_pool_that_is_gone_costs_its_text_alone(study, tmp_path, undrawn):
    copy = tmp_path / "moved"
    shutil.copytree(study, copy, symlinks=True)
    (tokens,) = copy.glob("pool*.bin")
    tokens.unlink()
    page = report(tmp_path / "r", "--runs", copy / "run")
    assert "It cannot be shown" in page
    assert "What was kept: half" in page
    shutil.rmtree(copy / "scores/teacher")
    page = report(tmp_path / "s", "--runs", copy / "run", "--examples", "0")
    assert "What was kept: half" in page
    assert "teacher_scores: MISSING" in page


@pytest.mark.parametrize(
    ("flags", "key", "text"),
    [
        ("--selector random", "key of random", "Chosen by chance."),
        ("--score-normalization sum", "summed r", "summed r = log p(teacher) - log p(reference), "),
    ],
)
def test_shown_instances_are_named_by_the_key_that_chose(
    study, tmp_path, undrawn, flags, key, text
):
    assert main([
        "select", "--data-path", str(study / "pool"), "--output-prefix", str(tmp_path / "half"),
        "--teacher-scores", str(study / "scores/teacher"),
        "--reference-scores", str(study / "scores/reference"), *flags.split(),
    ]) == 0  # fmt: skip
    write_run(tmp_path / "run", Corpus.open(tmp_path / "half"))
    page = report(tmp_path / "r", "--runs", tmp_path / "run", "--examples", "1")
    summaries = html5lib.parse(page, namespaceHTMLElements=False).iter("summary")
    titles = ["".join(each.itertext()).split(" ", 1)[1].split(" | ")[0] for each in summaries]
    assert titles == [f"highest {key}", "nearest to the threshold", f"lowest {key}"]
    assert text in page


def test_curves_over_checkpoints_belong_by_fingerprint_also_after_a_run_was_moved(study, tmp_path):
    shutil.copytree(study / "run", tmp_path / "moved")
    model = {"path": "elsewhere/run/iter_0000020", "fingerprint": "model-a"}
    point = {"iteration": 20, "model": model, "lm_loss": {"held": {"instance_mean": 2.5}}}
    other = {**point, "iteration": 10, "model": {**model, "fingerprint": "model-b"}}
    curves = [{"run": "elsewhere/run", "parameters": 1, "points": [other, point]}]
    (tmp_path / "results.json").write_text(json.dumps({"curves": curves}))
    found = with_evaluations(read_history(study / "run", ""), tmp_path / "moved", [tmp_path])
    assert [each.tolist() for each in found.validations["held"]] == [[20], [2.5]]


def results(
    folder: Path, model: Path, print_: str, *, examples: int = 100, of: str = "file", **facts: float
) -> Path:
    tasks = {
        name: {
            "label": name.upper(), "metric": "acc", "value": value, "stderr": 0.04,
            "examples": examples, "data": {"hash": of},
        }
        for name, value in facts.items()
    }  # fmt: skip
    mean = {"instance_mean": 3.25, "bits_per_byte": 1.5, "corpus": of, "num_instances": examples}
    about = {"path": str(model), "fingerprint": print_}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(
        json.dumps({"model": about, "tasks": tasks, "lm_loss": {"held": mean}})
    )
    return folder


def cells(page: str, title: str) -> list[list[str]]:
    card = page.partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]
    tree = html5lib.parse(card, namespaceHTMLElements=False)
    return [[cell.text or "" for cell in row] for row in tree.iter("tr")]


def test_evaluations_are_found_in_the_run_or_given_and_belong_by_fingerprint(
    study, tmp_path, undrawn
):
    save = tmp_path / "run"
    shutil.copytree(study / "run", save)
    shutil.copytree(study / "run", tmp_path / "later")
    results(save / "old", save / "iter_0000010", "gone", hs=0.1, piqa=0.6)
    results(save / "new", Path("elsewhere/iter_0000020"), "model-a", hs=0.3)
    given = results(tmp_path / "x", tmp_path / "later", "gone", hs=0.5, piqa=0.7)
    other = results(tmp_path / "y", Path("hf/Some-1B"), "hf", hs=0.7)
    runs = ("--runs", save, tmp_path / "later", "--examples", "0")
    page = report(tmp_path / "r", *runs, "--evaluations", given, other)
    assert cells(page, "Zero-shot tasks") == [
        ["model", "HS (acc)", "PIQA (acc)", "mean"],
        ["run", "0.300 ± 0.040", "not measured", "of other tasks"],
        ["later", "0.500 ± 0.040", "0.700 ± 0.040", "0.600 (n=1)"],
        ["Some-1B", "0.700 ± 0.040", "not measured", "of other tasks"],
    ]
    assert cells(page, "Losses by evaluate")[1] == ["run", "3.2500 (n=1)", "1.5000 (n=1)"]
    page = report(tmp_path / "s", *runs, "--labels", "a", "a", "--evaluations", given)
    assert cells(page, "Zero-shot tasks")[1] == [
        "a", "0.400 ± 0.141 (n=2)", "0.700 ± 0.040", "0.600 (n=1)"
    ]  # fmt: skip


def test_a_column_is_of_the_same_examples_in_all_rows(tmp_path):
    model = Path("run/iter_0000010")
    given = [
        results(tmp_path / "all", model, "m", hs=0.5),
        results(tmp_path / "few", model, "m", examples=20, hs=0.9),
        results(tmp_path / "other", Path("hf/few"), "few", examples=20, hs=0.7),
        results(tmp_path / "newer", Path("hf/newer"), "newer", of="another file", hs=0.6),
    ]
    (save := tmp_path / "run").mkdir()
    (save / "iter_0000010").mkdir()
    (save / "iter_0000010/manifest.json").write_text('{"fingerprint": "m"}')
    tasks, losses = (each.table for each in results_sections(evaluated([save], ["run"], given)))
    assert tasks.header == [
        "model", "HS (acc), 100 of file", "HS (acc), 20 of file", "HS (acc), 100 of another ",
        "mean",
    ]  # fmt: skip
    assert [row[:4] for row in tasks.rows] == [
        ["run", "0.500 ± 0.040", "not measured", "not measured"],
        ["few", "not measured", "0.700 ± 0.040", "not measured"],
        ["newer", "not measured", "not measured", "0.600 ± 0.040"],
    ]
    assert losses.header[3] == "held, 20 of file: nats per token"
    assert [row.count("not measured") for row in losses.rows] == [4, 4, 4]


def test_results_that_are_of_no_model_are_refused(study, tmp_path, capsys, undrawn):
    (tmp_path / "results.json").write_text('{"proxy": {}}')
    words = ["report", "--runs", str(study / "run"), "--evaluations", str(tmp_path)]
    assert main([*words, "--output", str(tmp_path / "r")]) == 2
    assert "says nothing of a model" in " ".join(capsys.readouterr().err.split())
