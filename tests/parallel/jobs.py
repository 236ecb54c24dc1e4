"""Functions that ranks of the pool run by name."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_miniplm.core.config import parse_flags
from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.data.blend import Blend
from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import Batch, make_batch
from megatron_miniplm.kernels.sparse_loss import SparseTargets
from megatron_miniplm.models.build import (
    InitialWeights,
    build_model,
    fill_by_name,
    transformer_config,
)
from megatron_miniplm.models.checkpoint import latest_checkpoint, read_trained_model
from megatron_miniplm.models.family import ModelConfig, get_family
from megatron_miniplm.models.forward import forward_only, run_decoder
from megatron_miniplm.models.global_tensors import fill_from
from megatron_miniplm.models.head import Head, Positions
from megatron_miniplm.models.hf_folder import HfFolder
from megatron_miniplm.models.layers import block_spec
from megatron_miniplm.models.logit_loss import SparseKernelLoss
from megatron_miniplm.models.megatron_lm import UNFUSED
from megatron_miniplm.models.recompute import RecomputeConfig, recompute_layers
from megatron_miniplm.models.signal import InstanceValues
from megatron_miniplm.models.weights import open_weights
from megatron_miniplm.objectives.kd import Distillation
from megatron_miniplm.objectives.lm import LanguageModeling
from megatron_miniplm.objectives.objective import OBJECTIVES, LossConfig, LossOutput
from megatron_miniplm.parallel.topology import ParallelConfig, initialize, shutdown
from megatron_miniplm.parallel.vocab import VocabShard
from megatron_miniplm.stages import convert, pretrain
from megatron_miniplm.teachers import online, scores, stored  # noqa: F401 - register themselves
from megatron_miniplm.teachers.teacher import TEACHERS, Lesson
from megatron_miniplm.training import session
from megatron_miniplm.training.guard import UpdateGuard
from megatron_miniplm.training.loader import Update
from megatron_miniplm.training.loop import Loop
from megatron_miniplm.training.optimizer import (
    OptimizationConfig,
    build_optimizer,
    build_scheduler,
)
from megatron_miniplm.training.preflight import check
from megatron_miniplm.training.resume import Counters
from megatron_miniplm.training.spikes import SpikeConfig, SpikeDetector
from megatron_miniplm.training.step import TrainStep, wrap_for_training
from megatron_miniplm.training.timers import Timers
from tests.memory import peak_bytes


def plain_nll(corpus: str, load: str, rows: np.ndarray) -> list[tuple[float, int]]:
    """(sum of NLL, tokens) of each row: one row at a time, whole logits, mask written out."""
    topology = initialize(ParallelConfig())
    try:
        opened = Corpus.open(corpus)
        model = open_weights(Path(load)).build(opened, topology, torch.float32)
        results = []
        for row in rows:
            ids = torch.from_numpy(opened.tokens(int(row)).astype(np.int64))
            with torch.no_grad():
                logits = model[0](ids[None, :-1], torch.arange(len(ids) - 1)[None], None)[0]
            logp = logits[:, : opened.vocab_size].double().log_softmax(-1)
            keep = ids[:-1] != opened.eod_id
            nll = -logp[torch.arange(len(ids) - 1), ids[1:]]
            results.append((float(nll[keep].sum()), int(keep.sum())))
        return results
    finally:
        shutdown()


def hf_logits(folder: str, ids: torch.Tensor, flags: dict[str, int]) -> torch.Tensor | None:
    """[b, s, V] logits of a Hugging Face folder in a layout, gathered; None off the last stage."""
    topology = initialize(ParallelConfig(**flags))
    try:
        source = HfFolder(folder)
        config = source.config
        assert config.vocab_size is not None
        model = build_model(
            config, topology, valid_vocab=config.vocab_size, dtype=torch.float32
        ).eval()
        fill_from(model, source)
        batch = Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(len(ids)))
        parts = forward_only(model, [batch], lambda head, _: head.logits())
        if not parts:
            return None
        mine = parts[0].contiguous()
        shards = [torch.empty_like(mine) for _ in range(topology.tp_size)]
        dist.all_gather(shards, mine, group=topology.tp_group)
        return torch.cat(shards, -1).transpose(0, 1)[..., : config.vocab_size]
    finally:
        shutdown()


def sharded_losses(
    models: dict[str, torch.Tensor],
    positions: dict[str, torch.Tensor],
    *,
    real: int,
    kinds: dict,
    targets: SparseTargets,
) -> dict[str, dict[str, Any]]:
    """Loss, gradients (weight: this rank's rows) and number of collectives of each kind of loss.

    The sparse kinds have the targets for a teacher.
    """
    world = int(os.environ["WORLD_SIZE"])
    topology = initialize(ParallelConfig(tensor_model_parallel_size=world))
    try:
        size = models["weight"].shape[0] // world
        first = topology.tp_rank * size
        shard = VocabShard(first=first, size=size, valid=real, group=topology.tp_group)
        mine = {name: models[name][first : first + size] for name in ("weight", "teacher_weight")}
        teacher = Head(
            hidden_sbh=models["teacher_hidden"], weight_vh=mine["teacher_weight"], shard=shard
        )
        found = {}
        for name, kind in kinds.items():
            hidden = models["hidden"].clone().requires_grad_()
            weight = mine["weight"].clone().requires_grad_()
            head = Head(hidden_sbh=hidden, weight_vh=weight, shard=shard)
            with counted_collectives() as forward:
                signal = targets if isinstance(kind, SparseKernelLoss) else teacher
                loss, _ = head.loss(kind, Positions(**positions), signal)
            with counted_collectives() as backward:
                loss.backward()
            found[name] = {
                "loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad,
                "collectives": (sum(forward.values()), sum(backward.values())),
            }  # fmt: skip
        return found
    finally:
        shutdown()


@contextmanager
def counted_collectives() -> Iterator[Counter]:
    """How often each collective of torch.distributed is called inside."""
    counts: Counter = Counter()
    names = [name for name in dir(dist) if name.startswith(("all_", "reduce", "broadcast"))]
    real = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}

    def counting(name: str):
        def call(*args, **kwargs):
            counts[name] += 1
            return real[name](*args, **kwargs)

        return call

    for name in real:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def one_update(batches: list[Batch], size: int) -> Update:
    """An update of these micro-batches, with nothing read beside them."""
    return Update(batches=batches, ahead=[None] * len(batches), global_batch_size=size, waited=0.0)


def memory_of_a_step(*, vocab: int, tokens: int) -> int:
    """Bytes by which the peak of this process's memory exceeds what it held before a KD step."""
    topology = initialize(ParallelConfig())
    try:
        shape = ModelConfig(
            num_layers=1, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2,
            vocab_size=vocab,
        )  # fmt: skip
        build = partial(build_model, topology=topology, valid_vocab=vocab, dtype=torch.float32)
        wider = replace(shape, hidden_size=48)
        student, expert = build(shape), build(wider)
        fill_by_name(student, InitialWeights(shape, 1))
        fill_by_name(expert, InitialWeights(wider, 2))
        optimization, timers = OptimizationConfig(), Timers()
        wrapped = wrap_for_training(student, optimization, bf16=False, timers=timers)
        optimizer = build_optimizer(optimization, wrapped, bf16=False)
        step = TrainStep(
            model=student, wrapped=wrapped, optimizer=optimizer, topology=topology,
            scheduler=build_scheduler(
                optimization, optimizer, train_iters=2, samples_after=lambda updates: updates
            ),
            objective=Distillation(LossConfig()),
            guard=UpdateGuard(topology=topology, say_rows=str),
            spikes=SpikeDetector(config=SpikeConfig(), say_rows=str), timers=timers,
            teacher=lambda batches, ahead: [
                partial(lambda head: head, head)
                for head in forward_only(expert, batches, lambda head, _: head)
            ],
        )  # fmt: skip
        ids = torch.randint(0, vocab, (4, tokens // 4))
        batch = Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(4))
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        step(one_update([batch], 4), step.scheduler.progress(0, 8))
        return _memory("VmHWM") - before
    finally:
        shutdown()


def gradients_and_bytes_kept(settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """Gradient of each parameter, and bytes of what the forward pass keeps for the backward."""
    topology = initialize(ParallelConfig())
    try:
        shape = ModelConfig(
            num_layers=3, hidden_size=32, ffn_hidden_size=96, num_attention_heads=2, vocab_size=50
        )
        model = build_model(shape, topology, valid_vocab=50, dtype=torch.float32)
        fill_by_name(model, InitialWeights(shape, 1))
        recompute_layers(model, RecomputeConfig(**settings))
        ids = torch.arange(80).view(2, 40) % 50
        batch = Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(2))
        kept: list[int] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = run_decoder(model[0], batch, lambda head: head.logits().logsumexp(-1).sum())
        output.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(kept)
    finally:
        shutdown()


def memory_of_a_stage(words: list[str]) -> int:
    """Bytes by which the peak of this rank's memory exceeds what it held before the command."""
    stage = importlib.import_module(f"megatron_miniplm.stages.{words[0]}")
    config = parse_flags(stage.Config, words[1:], prog=words[0])
    gc.collect()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    stage.run(config)
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(kilobytes)


def chunks_and_recomputed_layers(words: list[str]) -> tuple[int, int]:
    """Of the model that a `pretrain` command trains: chunks, and layers that recompute, here."""
    seen: list[tuple[int, int]] = []

    class Noting(Loop):
        def run(self, counters: Counters) -> bool:
            layers = [layer for chunk in self.step.model for layer in chunk.decoder.layers]
            recomputed = [layer for layer in layers if isinstance(layer.forward, partial)]
            seen.append((len(self.step.wrapped), len(recomputed)))
            return super().run(counters)

    session.Loop = Noting
    try:
        pretrain.run(parse_flags(pretrain.Config, words[1:], prog="pretrain"))
    finally:
        session.Loop = Loop
    return seen[0]


class Poisoned(LanguageModeling):
    """Language modeling, but where one row (or any) is in the batch something is wrong."""

    row: ClassVar[int | None] = None
    what: ClassVar[str] = ""
    hits = 0

    def __call__(self, head: Head, batch: Batch, teacher: Head | None = None) -> LossOutput:
        hit = self.row in (None, *batch.rows_b.tolist())
        self.hits += hit
        hit = hit and self.hits % self.updates_per_batch == 0  # the last epoch alone
        if self.what == "logits":
            bad_b = torch.from_numpy(batch.rows_b.cpu().numpy() == self.row)
            hidden = head.hidden_sbh.masked_fill(bad_b[None, :, None], torch.nan)
            return super().__call__(replace(head, hidden_sbh=hidden), batch, teacher)
        if hit and self.what == "weight":
            head.weight_vh.data[3, 5] = torch.nan
        output = super().__call__(head, batch, teacher)
        if not hit or self.what == "weight":
            return output
        if self.what == "spike":
            return replace(
                output, metrics={"lm loss": output.metrics["lm loss"] * torch.tensor([9.0, 1.0])},
                loss_sum=output.loss_sum + 8 * output.loss_sum.detach(),
            )  # fmt: skip
        if self.what == "loss":
            return replace(
                output, metrics={"lm loss": output.metrics["lm loss"] * torch.nan},
                loss_sum=output.loss_sum + torch.nan,
            )  # fmt: skip
        # 0, with the derivative 0 * infinity.
        return replace(output, loss_sum=output.loss_sum + (0 * head.hidden_sbh).abs().sqrt().sum())


def poisoned_run(words: list[str], *, row: int | None, what: str, epochs: int = 1) -> None:
    """A training run in which `what` (loss, gradient, ...) of a row is not a number.

    Each batch is learned from in `epochs` updates of the weights, of which the last one is wrong.
    """
    if "poisoned" not in OBJECTIVES.names():
        OBJECTIVES.register("poisoned")(Poisoned)
    Poisoned.row, Poisoned.what, Poisoned.updates_per_batch = row, what, epochs
    pretrain.run(parse_flags(pretrain.Config, words[1:], prog="pretrain"))


def teacher_signals(name: str, settings: dict[str, Any], corpus: str) -> dict[str, Any]:
    """What a registered teacher says of three micro-batches, at once and one by one."""
    topology = initialize(ParallelConfig())
    try:
        opened = Corpus.open(corpus)
        cls = TEACHERS[name]
        lesson = Lesson(
            data=Blend.open([corpus], seed=1), layout=topology, dtype=torch.float32,
            student=ModelConfig(vocab_size=opened.vocab_size),
        )  # fmt: skip
        teacher = cls(cls.Config(**settings), lesson)
        teacher.load(topology)
        batches = [
            make_batch(opened, np.arange(at, at + 4), length=opened.seq_length)
            for at in (0, 40, 80)
        ]
        ahead = [teacher.read_ahead(batch) for batch in batches]
        together = [ask() for ask in teacher(batches, ahead)]
        alone = [teacher([batch], [read])[0]() for batch, read in zip(batches, ahead, strict=True)]
        return {
            "parents": [fingerprint for fingerprint, _ in teacher.parents.values()],
            "together": [_said(signal) for signal in together],
            "alone": [_said(signal) for signal in alone],
            "labels": [batch.labels_bs for batch in batches],
        }
    finally:
        shutdown()


def _said(signal: Any) -> torch.Tensor:
    if isinstance(signal, InstanceValues):
        return signal.nats_b
    return signal.logits() if isinstance(signal, Head) else signal.log_probs


def megatron_lm_checkpoint(
    save: str, style: str, ids: torch.Tensor, change: dict[str, Any]
) -> torch.Tensor:
    """A stock GPTModel of random weights, saved as Megatron-LM does, TP2; its [b, s, V] logits."""
    topology = initialize(ParallelConfig(tensor_model_parallel_size=2))
    try:
        shape = ModelConfig(
            num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4,
            num_query_groups=2, vocab_size=512, max_position_embeddings=64, rotary_base=5e4,
            norm_epsilon=1e-5, untie_embeddings_and_output_weights=True, init_method_std=0.1,
        )  # fmt: skip
        torch.manual_seed(3)
        core = transformer_config(shape, topology, torch.float32)
        model = GPTModel(
            core, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=512,
            max_sequence_length=64, share_embeddings_and_output_weights=False,
            position_embedding_type="rope", rotary_base=5e4,
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.normal_(1.0, 0.3)
        layers = {"non_homogeneous_layers": style == "a key a layer"}
        state = model.sharded_state_dict(metadata=layers)
        if style == "norms of their own":
            for tensor in state.values():
                tensor.key = UNFUSED.get(tensor.key, tensor.key)
        moment = ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.ones(32),
            replica_id=topology.tp_rank,
        )  # fmt: skip
        arguments = {
            "num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
            "group_query_attention": True, "num_query_groups": 2, "kv_channels": 8,
            "max_position_embeddings": 64, "rotary_base": 50000, "norm_epsilon": 1e-5,
            "add_qkv_bias": True, "add_bias_linear": False, "swiglu": True,
            "normalization": "RMSNorm", "position_embedding_type": "rope", "rotary_percent": 1.0,
            "untie_embeddings_and_output_weights": True, "make_vocab_size_divisible_by": 128,
            "padded_vocab_size": 512, "qk_layernorm": False, "num_experts": None,
            "params_dtype": torch.bfloat16, "use_rope_scaling": False,
        } | change  # fmt: skip
        folder = Path(save) / "iter_0000005"
        if topology.rank == 0:
            folder.mkdir(parents=True)
            (Path(save) / "latest_checkpointed_iteration.txt").write_text("5")
        dist.barrier()
        args = argparse.Namespace(**arguments)
        whole = {"model": state, "optimizer": {"m": moment}, "args": args, "iteration": 5}
        dist_checkpointing.save(whole, str(folder))
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1]).triu(1).bool()
        with torch.no_grad():
            mine = model(ids, positions, mask).contiguous()
        parts = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(parts, mine, group=topology.tp_group)
        return torch.cat(parts, -1)
    finally:
        shutdown()


def refusal_of_a_conversion(flags: list[str]) -> str:
    """What this rank says when it refuses."""
    with pytest.raises(ConfigError) as error:
        convert.run(parse_flags(convert.Config, flags, prog="convert"))
    return str(error.value)


def shared_work(items: int) -> tuple[list[tuple[int, int]], str]:
    """What `Topology.share` gives for (item, the rank that did it), and how it fails."""
    topology = initialize(ParallelConfig())

    def fail(item: int) -> None:
        if item == 4:
            raise DataError(f"item {item} is broken")

    def act(item: int) -> tuple[int, int]:
        time.sleep(0.3 * (item == 6))  # longer than what a rank waits for another
        return item, topology.rank

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron_miniplm.parallel.topology._PATIENCE_S", 0.1)
            done = topology.share(range(items), act)
        with pytest.raises(DataError) as error:
            topology.share(range(items), fail)
        return done, str(error.value)
    finally:
        shutdown()


def stock_model_loads(load: str, ids: torch.Tensor) -> torch.Tensor | None:
    """[b, s, V] logits of a stock GPTModel that megatron.core itself loads, on the last stage."""
    topology = initialize(ParallelConfig(pipeline_model_parallel_size=2))
    try:
        folder = latest_checkpoint(Path(load))
        assert folder is not None
        shape = read_trained_model(folder)[1].config
        core = transformer_config(shape, topology, torch.float32)
        layer = get_family(shape.model_family).architecture.layer(shape, core)
        model = GPTModel(
            core, block_spec(layer, core),
            vocab_size=shape.padded_vocab_size, max_sequence_length=64,
            pre_process=topology.is_first_stage, post_process=topology.is_last_stage,
            share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
            position_embedding_type="rope", rotary_base=shape.rotary_base,
        )  # fmt: skip
        state = {"model": model.sharded_state_dict()}
        model.load_state_dict(dist_checkpointing.load(state, str(folder))["model"], strict=True)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        with torch.no_grad():
            if topology.is_first_stage:
                dist.send(model(ids, positions, None), 1)
                return None
            hidden = torch.empty(ids.shape[1], ids.shape[0], shape.hidden_size)
            dist.recv(hidden, 0)
            model.set_input_tensor(hidden)
            return model(ids, positions, None)
    finally:
        shutdown()


def teacher_logits(load: str, corpus: str, ids: torch.Tensor, flags: dict[str, int]) -> list:
    """[fingerprint, logits of this rank's columns] of weights opened for a corpus."""
    topology = initialize(ParallelConfig(**flags))
    try:
        weights = open_weights(Path(load))
        model = weights.build(Corpus.open(corpus), topology, torch.float32)
        batch = Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(len(ids)))
        (logits,) = forward_only(model, [batch], lambda head, _: head.logits())
        return [weights.fingerprint, logits.transpose(0, 1)]
    finally:
        shutdown()


def memory_of_a_run(words: list[str]) -> dict[str, int]:
    """Bytes that a rank of a training run holds after an update, and the peak of the next one."""
    config = parse_flags(pretrain.Config, words[1:], prog="pretrain")
    topology = initialize(config.parallel)
    try:
        run = check(config, topology, transformer_engine=False)
        step, state = session.build(run, topology)
        size = config.training.micro_batch_size
        rows = np.arange(size * config.training.micro_batches(topology)).reshape(-1, size)
        length = run.data.language.seq_length
        batches = [make_batch(run.data, part, length=length) for part in rows]

        def update() -> None:
            size = config.training.global_batch_size
            step(one_update(batches, size), step.scheduler.progress(0, 2 * size))

        update()
        weights = {each.untyped_storage() for each in state.model.parameters()}
        buffers = [buffer.grad_data for chunk in step.wrapped for buffer in chunk.buffers]
        parts = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
        held = [
            tensor
            for part in parts
            for group in part.optimizer.param_groups
            for parameter in group["params"]
            for tensor in [parameter, *part.optimizer.state[parameter].values()]
        ]
        known = {storage.data_ptr() for storage in weights}
        return {
            "stage": topology.pp_rank,
            "parameters": sum(each.numel() for each in state.model.parameters()),
            "weights": sum({s.data_ptr(): s.nbytes() for s in weights}.values()),
            "gradients": sum(each.nbytes for each in buffers),
            "optimizer": sum(
                each.nbytes
                for each in held
                if each.ndim and each.untyped_storage().data_ptr() not in known
            ),
            "peak": peak_bytes(update, "cpu"),
        }
    finally:
        shutdown()


class Recording(LanguageModeling):
    """Language modeling that notes the rows of every micro-batch."""

    seen: ClassVar[list[list[int]]] = []
    truncated: ClassVar[str | None] = None

    def __call__(self, head: Head, batch: Batch, teacher: Head | None = None) -> LossOutput:
        self.seen.append(batch.rows_b.tolist())
        if self.truncated and len(self.seen) == 4:
            os.truncate(self.truncated, 1000)
        return super().__call__(head, batch, teacher)


def recorded_run(words: list[str], truncated: str | None = None) -> list[list[int]]:
    """A training run; the rows of each micro-batch that this rank trained on, in order.

    `truncated`: a file that loses its end while the fourth of them is trained on.
    """
    if "recording" not in OBJECTIVES.names():
        OBJECTIVES.register("recording")(Recording)
    Recording.seen, Recording.truncated = [], truncated
    pretrain.run(parse_flags(pretrain.Config, words[1:], prog="pretrain"))
    return Recording.seen


def threads_of_groups(words: list[str]) -> list[int]:
    """Threads of gloo in this process after each of three runs of a `pretrain` command."""
    found = []
    for number in range(3):
        run = [*words[1:], "--save", f"{words[words.index('--save') + 1]}{number}"]
        # Every run meets at a store of its own, as under a launcher.
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + number)
        pretrain.run(parse_flags(pretrain.Config, run, prog="pretrain"))
        gc.collect()
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        found.append(sum("gloo" in name for name in names))
    return found
