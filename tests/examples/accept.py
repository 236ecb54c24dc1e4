"""Whether the program would take a command line."""

from __future__ import annotations

from megatron_miniplm.__main__ import VERBS, stage_of
from megatron_miniplm.core.config import parse_flags


def accept(words: list[str]) -> object:
    """Feed one command line, with whatever launches it, to the real parser of its verb."""
    at = words.index("megatron_miniplm") if "megatron_miniplm" in words else words.index("miniplm")
    verb, *flags = words[at + 1 :]
    assert verb in VERBS
    stage = stage_of(verb)
    return parse_flags(stage.Config, flags, prog=verb)
