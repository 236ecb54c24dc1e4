"""Whether a converted model computes what `transformers` computes, on a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_miniplm.core.errors import CheckpointError, ConfigError
from megatron_miniplm.data.instances import Batch
from megatron_miniplm.data.tokenizers import Tokenizer
from megatron_miniplm.models.build import build_model
from megatron_miniplm.models.family import ModelConfig
from megatron_miniplm.models.forward import forward_only
from megatron_miniplm.models.global_tensors import GlobalSource, fill_from
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Topology

MAX_TOKENS = 1024
TOLERANCE = 1e-3
"""Largest difference of two log-probabilities, in nats: fp32 rounding of a deep model is a tenth of
it, a wrong epsilon or rotary base ten times more."""

TEXT = """The tide had gone out further than any of the children could remember, and where the
harbour used to be there was a long brown field of mud with boats lying on their sides. "It will
come back," said the old pilot, who had seen it twice before, "and when it does, it will not ask
whether you are ready." By 1906 the wall was 4.5 metres high and cost 12,300 pounds; nobody laughed
at him any more.

def tide(hour, height=4.5):
    return height * math.cos(2 * math.pi * hour / 12.42)  # metres above the mean
"""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far two models are apart."""

    tokens: int
    largest: float
    """Largest difference of two log-probabilities, nats."""
    loss_ours: float
    loss_theirs: float

    def __str__(self) -> str:
        return (
            f"log-probabilities differ by at most {self.largest:.2e} nats (allowed: "
            f"{TOLERANCE:.0e}) over {self.tokens} tokens of text; loss {self.loss_ours:.6f}, with "
            f"transformers {self.loss_theirs:.6f}"
        )


@torch.no_grad()
def verify_with_transformers(
    ours: GlobalSource,
    shape: ModelConfig,
    theirs: Path,
    *,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    text: str,
    topology: Topology,
) -> Parity:
    """Compare log-probabilities of both models in fp32, with weights rounded to `dtype` in both.

    Refuses, with the figure, models that are further apart than rounding.
    `theirs` is a Hugging Face folder or a GGUF file, which `transformers` loads.
    """
    row = _row(tokenizer, text, shape)
    expected = _log_probs(lambda: _transformers_logits(theirs, row, dtype), row)
    found = _log_probs(lambda: _our_logits(ours, shape, row, dtype, topology), row)
    targets = row[1:, None]
    parity = Parity(
        tokens=len(row) - 1,
        largest=float((found - expected).abs().max()),
        loss_ours=-float(found.gather(1, targets).mean()),
        loss_theirs=-float(expected.gather(1, targets).mean()),
    )
    if not parity.largest <= TOLERANCE:  # NaN neither
        raise CheckpointError(
            f"the converted model does not compute what transformers computes: {parity}; "
            "report this with the model's name"
        )
    return parity


def read_text(path: Path | None) -> str:
    """The text to compare on (None: a built-in one); refuses a file without any."""
    if path is None:
        return TEXT
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--verify-text {path} is not a UTF-8 text file: {error}") from error
    if not text.strip():
        raise ConfigError(f"--verify-text {path} is empty: there is nothing to compare on")
    return text


def require_transformers() -> Any:
    """Its class of causal language models; refuses to go on without the package."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            "--verify takes transformers: pip install 'megatron-miniplm[hf]'"
        ) from error
    return AutoModelForCausalLM


def _row(tokenizer: Tokenizer, text: str, shape: ModelConfig) -> torch.Tensor:
    """int64[tokens] of the text's beginning."""
    ids, _ = tokenizer.encode_flat([text])
    row = torch.from_numpy(ids[: min(MAX_TOKENS, shape.max_position_embeddings)].astype("int64"))
    if len(row) < 2:
        raise ConfigError("--verify-text has fewer than two tokens")
    return row


def _log_probs(logits: Any, row: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(logits()[: len(row) - 1].float(), dim=-1)


def _our_logits(
    source: GlobalSource,
    shape: ModelConfig,
    row: torch.Tensor,
    dtype: torch.dtype,
    topology: Topology,
) -> torch.Tensor:
    vocab = shape.vocab_size or 0
    model = build_model(shape, topology, valid_vocab=vocab, dtype=torch.float32).eval()
    fill_from(model, source)
    _round(model, dtype)
    ids = row[None]
    batch = Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(1))
    (logits_sbv,) = forward_only(
        model, [batch.to(platform.device())], lambda head, _: head.logits()
    )
    return logits_sbv[:, 0, :vocab].cpu()


def _transformers_logits(path: Path, row: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    folder, file = (path.parent, path.name) if path.is_file() else (path, None)
    model = require_transformers().from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    _round(model, dtype)
    logits: torch.Tensor = model.eval()(row[None]).logits[0]
    return logits


def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters only: rotary frequencies are no weights."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
