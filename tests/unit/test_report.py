"""Plots show what they are given; a page is one inert file, whatever the corpus holds."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_miniplm.core.errors import DataError
from megatron_miniplm.evaluation import report

PNG = b"\x89PNG\r\n\x1a\n"
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>&amp;\" \x00\x1b[31m"


class Tags(HTMLParser):
    """Collects every tag with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """A --save folder of 40 logged steps and two validations."""
    return write_metrics(tmp_path / "run", steps=40)


def write_metrics(folder: Path, *, steps: int, offset: float = 0.0) -> Path:
    folder.mkdir()
    rows = []
    for step in range(1, steps + 1):
        row = {"iteration": step, "consumed_samples": 4 * step, "consumed_tokens": 400 * step}
        rows.append(row | {"lm loss": 5.0 - step / steps + offset})
        if step % (steps // 2) == 0:
            valid = {"iteration": step, "consumed_samples": 4 * step}
            rows.append(valid | {"validation": {"lm loss": 6.0 - step / steps + offset}})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def page_with(text: str) -> str:
    return report.render_page(
        text,
        [
            report.Section(
                title=text,
                text=text,
                table=report.Table(header=[text], rows=[[text]]),
                plots=[report.Plot(png=PNG, caption=text)],
                examples=[report.Example(title=text, text=text, kept=True)],
            )
        ],
        lead=text,
        facts={text: text},
    )


def test_corpus_text_cannot_add_a_tag_or_an_attribute_anywhere_on_the_page():
    evil, plain = Tags(page_with(EVIL)), Tags(page_with("plain"))
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
    assert [list(attrs) for _, attrs in evil.tags] == [list(attrs) for _, attrs in plain.tags]
    assert "script" not in {tag for tag, _ in evil.tags}
    assert evil.text.count("<script>alert('x')</script>") == plain.text.count("plain")


def test_page_loads_nothing_and_its_policy_forbids_scripts():
    page = page_with("plain")
    sources = [
        a.get("src") or a.get("href") for _, a in Tags(page).tags if {"src", "href"} & set(a)
    ]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import", page)
    policy = next(a["content"] for t, a in Tags(page).tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_control_characters_become_replacement_characters():
    assert not re.search(r"[\x00-\x08\x0e-\x1f]", page_with(EVIL))


def test_read_run_places_validations_by_tokens_and_the_later_row_of_a_step_wins(save: Path):
    with (save / "metrics.jsonl").open("a") as file:
        row = {"iteration": 40, "consumed_samples": 160, "consumed_tokens": 16000, "lm loss": 1.5}
        file.write(json.dumps(row) + "\n")
    found = report.read_run(save, "x")
    np.testing.assert_array_equal(found.tokens, 400.0 * np.arange(1, 41))
    np.testing.assert_array_equal(found.validation_tokens, [8000.0, 16000.0])
    np.testing.assert_array_equal(found.validation_loss, [5.5, 5.0])
    assert found.loss[-1] == 1.5
    assert found.loss[-2] == 5.0 - 39 / 40


def test_torn_last_line_is_left_out_but_a_broken_middle_line_is_refused(save: Path):
    path = save / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 41, "lm lo')
    assert len(report.read_run(save, "x").loss) == 40
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is not JSON"):
        report.read_run(save, "x")


@pytest.mark.parametrize("content", [None, "", '{"iteration": 1, "consumed_samples": 1}\n'])
def test_run_without_losses_is_refused_by_name(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        report.read_run(tmp_path, "x")


def test_smoothing_keeps_a_constant_and_the_mean_of_a_line_and_reduces_noise():
    np.testing.assert_allclose(report.smooth(np.full(50, 3.0), 7), 3.0)
    line = np.arange(50.0)
    np.testing.assert_allclose(report.smooth(line, 7)[3:-3], line[3:-3])
    noise = np.random.default_rng(0).normal(size=400)
    assert report.smooth(noise).std() < 0.5 * noise.std()
    assert len(report.smooth(noise[:1])) == 1


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, to look at what it shows."""
    figures: list[Figure] = []
    real = Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_curves_show_the_mean_over_seeds_and_one_line_a_label(drawn: list[Figure], tmp_path: Path):
    folders = [write_metrics(tmp_path / f"{n}", steps=40, offset=n / 10) for n in range(3)]
    runs = [report.read_run(f, "a") for f in folders[:2]] + [report.read_run(folders[2], "b")]
    assert report.loss_curves(runs).startswith(PNG)
    validation = drawn[0].axes[1]
    bold = {line.get_label(): line for line in validation.lines if line.get_linewidth() == 2}
    assert set(bold) == {"a (2 seeds)", "b"}
    np.testing.assert_allclose(bold["a (2 seeds)"].get_ydata(), [5.55, 5.05])
    np.testing.assert_allclose(bold["b"].get_ydata(), [5.7, 5.2])


def test_mean_over_seeds_reaches_the_end_of_the_shortest(drawn: list[Figure]):
    def seed(end: float) -> report.Run:
        at = np.array([100.0, end])
        return report.Run(
            label="a",
            tokens=at,
            loss=at,
            validation_tokens=at,
            validation_loss=np.array([3.0, 1.0]),
        )

    report.loss_curves([seed(205.0), seed(200.0)])
    mean = next(line for line in drawn[0].axes[1].lines if line.get_linewidth() == 2)
    np.testing.assert_allclose(mean.get_xdata(), [100e-6, 200e-6])
    assert mean.get_ydata()[-1] == pytest.approx(1.0, abs=0.1)


def test_curves_of_no_runs_are_refused():
    with pytest.raises(DataError, match="no runs"):
        report.loss_curves([])
