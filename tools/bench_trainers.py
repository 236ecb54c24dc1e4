"""Other trainers on a corpus of ours: a plain PyTorch loop, and Hugging Face's Trainer.

``python tools/bench_trainers.py JOB.json`` runs one of them in a process of its own, where nothing
of megatron.core is imported, and prints a JSON object: seconds and loss of every update. Order and
mask of the data, optimizer, clipping and schedule are those of `pretrain` with
``--loss-normalization token --wd-scope matrices``, which is what Trainer can say; so the three give
the same losses, and whoever times them can check it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_plain_qwen import PlainQwen

from megatron_miniplm.data.corpus import Corpus
from megatron_miniplm.data.instances import Batch, SampleOrder, make_batch

BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 1e-6, 0.1, 1.0
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Job:
    """A short run of one trainer."""

    trainer: str
    """plain or hf."""
    corpus: str
    model: str
    """Hugging Face folder with the initial weights."""
    output: str
    """Folder for what the trainer leaves behind."""
    updates: int
    micro_batch: int
    micro_batches: int
    """Of one update."""
    lr: float
    warmup: int
    seed: int = 10
    bf16: bool = False
    """Autocast to bfloat16."""
    teacher: str | None = None
    """Hugging Face folder of a teacher: half cross entropy, half forward KL (plain only)."""

    def rate(self, update: int) -> float:
        """Learning rate of an update, from 0: linear warm-up, cosine to a tenth."""
        if update < self.warmup:
            return self.lr * update / self.warmup
        share = (update - self.warmup) / (self.updates - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))

    def write(self, path: Path) -> Path:
        """As a file that the command takes."""
        path.write_text(json.dumps(asdict(self)))
        return path

    def autocast(self) -> Any:
        """The context of a forward pass."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)


@dataclass(frozen=True)
class Rows:
    """The micro-batches of a run, in the order of `pretrain`; a dataset of lists of row numbers."""

    job: Job
    corpus: Corpus

    def __len__(self) -> int:
        return self.job.updates * self.job.micro_batches * self.job.micro_batch

    def __getitem__(self, sample: int) -> int:
        order = SampleOrder(len(self.corpus), seed=self.job.seed)
        return int(order.rows(sample, 1)[0])

    def update(self, number: int) -> Iterator[Batch]:
        """Micro-batches of one update."""
        size = self.job.micro_batch * self.job.micro_batches
        rows = SampleOrder(len(self.corpus), seed=self.job.seed).rows(number * size, size)
        for part in rows.reshape(-1, self.job.micro_batch):
            yield make_batch(self.corpus, part, length=self.corpus.seq_length)


def plain(job: Job) -> dict[str, list[float]]:
    """The loop that everybody writes first: whole logits, autograd, fused AdamW."""
    corpus = Corpus.open(job.corpus)
    rows, model = Rows(job, corpus), PlainQwen.load(Path(job.model))
    teacher = PlainQwen.load(Path(job.teacher)).eval() if job.teacher else None
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices}, {"params": vectors, "weight_decay": 0.0},
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(
        groups, lr=job.lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True,
    )  # fmt: skip
    seconds, losses = [], []
    for update in range(job.updates):
        started = time.perf_counter()
        batches = list(rows.update(update))
        count = sum(int(batch.mask_bs.sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            labels = batch.labels_bs.masked_fill(~batch.mask_bs, IGNORED).flatten()
            with job.autocast():
                logits = model(batch.tokens_bs).flatten(0, 1)
                loss = F.cross_entropy(
                    logits.float(), labels, ignore_index=IGNORED, reduction="sum"
                )
                total += loss.item()
                if teacher is not None:
                    loss = 0.5 * loss + 0.5 * _divergence(logits, teacher, batch)
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = job.rate(update)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "losses": losses}


def _divergence(logits_NV: torch.Tensor, teacher: PlainQwen, batch: Batch) -> torch.Tensor:
    """Sum over trained positions of KL(teacher || student)."""
    with torch.no_grad():
        log_q = teacher(batch.tokens_bs).flatten(0, 1).float().log_softmax(-1)
    log_p = logits_NV.float().log_softmax(-1)
    kl_N = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return kl_N[batch.mask_bs.flatten()].sum()


def hf(job: Job) -> dict[str, list[float]]:
    """Hugging Face's Trainer with what it has for this: fused AdamW, cosine with a floor."""
    import transformers

    corpus = Corpus.open(job.corpus)

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        batch = make_batch(corpus, rows, length=corpus.seq_length)
        labels = batch.labels_bs.masked_fill(~batch.mask_bs, IGNORED)
        return {"input_ids": batch.tokens_bs, "labels": labels, "shift_labels": labels}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *unused: Any) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    clock = _Clock()
    trainer = InOrder(
        model=transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=transformers.TrainingArguments(
            output_dir=job.output, max_steps=job.updates, use_cpu=True, bf16=job.bf16,
            per_device_train_batch_size=job.micro_batch,
            gradient_accumulation_steps=job.micro_batches,
            learning_rate=job.lr, warmup_steps=job.warmup,
            lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1},
            optim="adamw_torch_fused", adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
            weight_decay=WEIGHT_DECAY, max_grad_norm=CLIP, seed=job.seed, report_to=[],
            save_strategy="no", logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
        ),
        train_dataset=Rows(job, corpus),
        data_collator=collate,
        callbacks=[clock.callback()],
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"seconds": clock.seconds, "losses": losses}


class _Clock:
    """Seconds from the end of one update to the end of the next; of the first, from the start."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.at = 0.0

    def callback(self) -> Any:
        import transformers

        clock = self

        class Callback(transformers.TrainerCallback):
            def on_train_begin(self, *unused: Any, **more: Any) -> None:
                clock.at = time.perf_counter()

            def on_step_end(self, *unused: Any, **more: Any) -> None:
                now = time.perf_counter()
                clock.seconds.append(now - clock.at)
                clock.at = now

        return Callback()


TRAINERS = {"plain": plain, "hf": hf}

if __name__ == "__main__":
    asked = Job(**json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps(TRAINERS[asked.trainer](asked)))
