"""Divergences between teacher and student by name: what ``--kd-loss`` can say.

An entry is the name of a kernel's divergence (`kernels.token_loss`), or a torch function of a chunk
of logits (`models.logit_loss.LogitFunction`). A new one is one file in this room that registers a
function; gradients, memory bounds and tensor parallelism come with it.
"""

from __future__ import annotations

from megatron_miniplm.core.registry import Registry
from megatron_miniplm.kernels.token_loss import DIVERGENCES, Divergence
from megatron_miniplm.models.logit_loss import LogitFunction

KD_LOSSES: Registry[Divergence | LogitFunction] = Registry("KD loss")

for _name in DIVERGENCES:
    KD_LOSSES.register(_name)(_name)
