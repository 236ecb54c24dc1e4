"""The one program: ``miniplm VERB --flags``; each verb is one module of `stages`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from megatron_miniplm.core.config import parse_flags
from megatron_miniplm.core.errors import MiniPLMError
from megatron_miniplm.core.log import get_logger, setup_logging

VERBS = {
    "preprocess": "text -> corpus of packed instances",
    "adopt": "Megatron's tokenised documents -> corpus, without copying a token",
    "split": "corpus -> reference subset and the disjoint pool",
    "pretrain": "corpus or subset -> checkpoint",
    "score": "corpus and model -> per-instance negative log-likelihoods",
    "cache-logits": "corpus and teacher -> store of its next-token distributions",
    "select": "two sets of scores -> difference-sampled subset",
    "generate": "corpus and teacher -> corpus of the teacher's continuations",
    "retokenize": "corpus or subset -> corpus in another tokenizer",
    "minillm": "corpus and teacher -> checkpoint, by reverse KL of what the student writes",
    "convert": "Hugging Face, GGUF -> Megatron checkpoint, and back",
    "evaluate": "checkpoint, held-out corpora, tasks -> losses and accuracies",
    "inspect": "what an artifact is, where it came from, is it intact",
    "plan": "sizes of models, data and cluster -> cost of every method",
    "report": "runs -> curves and tables as HTML and PNG",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; exit code 0 only if its artifact is complete."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    verb, *rest = words
    if verb not in VERBS:
        sys.stderr.write(f"miniplm: unknown verb {verb!r}\n{_usage()}")
        return 2
    setup_logging()
    stage = stage_of(verb)
    try:
        stage.run(parse_flags(stage.Config, rest, prog=f"miniplm {verb}"))
    except MiniPLMError as error:
        get_logger().error("miniplm %s: %s: %s", verb, type(error).__name__, error)
        return 2
    return 0


def stage_of(verb: str) -> ModuleType:
    """The module of a verb: its `Config` and `run`."""
    return importlib.import_module(f"megatron_miniplm.stages.{verb.replace('-', '_')}")


def _usage() -> str:
    verbs = "\n".join(f"  {name:<14}{what}" for name, what in VERBS.items())
    return f"usage: miniplm VERB --flags   (miniplm VERB --help for one)\n\n{verbs}\n"


if __name__ == "__main__":
    sys.exit(main())
