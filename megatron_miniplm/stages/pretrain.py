"""``pretrain``: corpus or subset -> checkpoint, for every method that trains."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from megatron_miniplm.core.config import print_json
from megatron_miniplm.models.engine import has_transformer_engine
from megatron_miniplm.parallel import platform
from megatron_miniplm.parallel.topology import Layout, alone, initialize, shutdown
from megatron_miniplm.training.estimate import memory_of_stages
from megatron_miniplm.training.forecast import forecast, lines, refuse_too_large
from megatron_miniplm.training.preflight import check
from megatron_miniplm.training.run_config import RunConfig
from megatron_miniplm.training.session import train


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Pre-train a model on a corpus or subset; the same command continues an unfinished run."""


def run(config: RunConfig) -> None:
    """Train until done or told to stop; the artifact is the last checkpoint under --save."""
    if config.rehearsal.dry_run:
        if int(os.environ.get("RANK", "0")) == 0:
            with platform.without_gpus() as has_gpus:
                rehearse(config, has_gpus=has_gpus)
        return
    topology = initialize(config.parallel)
    try:
        there = has_transformer_engine(has_gpus=not platform.on_cpu())
        train(check(config, topology, transformer_engine=there), topology)
    finally:
        shutdown()


def rehearse(config: RunConfig, *, has_gpus: bool) -> None:
    """Refuse what `run` refuses, read what it reads, and say what it will take."""
    asked = config.rehearsal
    gpus = has_gpus or asked.dry_run_world_size is not None
    world_size = asked.dry_run_world_size or int(os.environ.get("WORLD_SIZE", "1"))
    layout = Layout.of(config.parallel, world_size)
    platform.refuse_foreign_apex()
    # Of GPUs that are somewhere else, the user knows what is installed beside them.
    there = asked.dry_run_world_size is not None or has_transformer_engine(has_gpus=has_gpus)
    run = check(config, layout, transformer_engine=there)
    run.verify()
    setting = run.setting(layout, "cuda" if gpus else "cpu")
    with alone() as topology:
        stages = memory_of_stages(setting, topology)
    refuse_too_large(stages, asked.dry_run_gpu_gb)
    said = forecast(run.work(), layout, stages, device=setting.device)
    if asked.json:
        print_json(said.as_json())
    else:
        sys.stdout.write("\n".join(lines(said)) + "\n")
