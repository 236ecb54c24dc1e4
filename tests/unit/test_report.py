"""A page is one inert file, whatever the corpus holds."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import html5lib

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


def test_every_character_that_a_page_may_hold_is_on_it_and_no_other_one():
    planes = [*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFD00, 0x10010)]
    ends = [0x10000 * plane + end for plane in range(1, 17) for end in (0xFFFD, 0xFFFE, 0xFFFF)]
    text = "".join(map(chr, planes + ends))
    page = page_with(text).encode().decode()
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    shown = next(tree.iter("pre")).text.replace("\ufffd", "")
    lost = set(text) - set(shown) - {"\r", "\ufffd"}
    assert not [c for c in lost if c.isprintable()]
    assert {"\x0b", "\x1c", "\x85", "\ud800", "\ufdd0", "\U0010ffff"} <= lost
    assert not {"\u200c", "\u200d", "\u00ad", "\ufeff", "\u2028"} & lost
