"""Vanilla KD by hand: `transformers` models, whole logits, autograd, torch's AdamW.

It shares nothing with the package but the corpus and its order, so that it can be believed where
the two agree. One process, fp32.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import transformers

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import SampleOrder


def train(
    student: Path, teacher: Path, corpus: Path, *, alpha: float, temperature: float,
    updates: int = 20, batch: int = 8, lr: float = 6e-4, warmup: int = 4,
) -> list[dict[str, float]]:  # fmt: skip
    """(lm loss, kd loss, grad norm) of every update."""
    data = Corpus.open(corpus)
    order = SampleOrder(len(data), seed=10)
    learner = transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    expert = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(
        learner.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1
    )
    curve = []
    for update in range(updates):
        lm_losses, kd_losses = [], []
        for row in order.rows(update * batch, batch):
            ids = torch.from_numpy(data.tokens(int(row)).astype(np.int64))
            inputs, labels = ids[:-1], ids[1:]
            counts = inputs != data.eod_id
            logits = learner(inputs[None]).logits[0, :, : data.vocab_size]
            with torch.no_grad():
                theirs = expert(inputs[None]).logits[0, :, : data.vocab_size]
            ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            log_p = (logits / temperature).log_softmax(-1)
            log_q = (theirs / temperature).log_softmax(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            lm_losses.append(ce[counts].mean())
            kd_losses.append(kl[counts].mean())
        lm_loss, kd_loss = torch.stack(lm_losses).mean(), torch.stack(kd_losses).mean()
        optimizer.zero_grad()
        ((1 - alpha) * lm_loss + alpha * temperature**2 * kd_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        rate = lr * update / warmup
        if update >= warmup:
            share = (update - warmup) / (updates - warmup)
            rate = 0.1 * lr + 0.45 * lr * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        curve.append(
            {"lm loss": lm_loss.item(), "kd loss": kd_loss.item(), "grad norm": norm.item()}
        )
    return curve
