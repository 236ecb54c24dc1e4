"""Where the rows of a run go: JSON lines, TensorBoard, Weights & Biases.

A row is one flat object under the names of the log line, of an update or of a validation
(``validation``: losses by name). TensorBoard and W&B have no units and blanks in names, Megatron's
way: ``iteration time (ms)`` is ``iteration-time`` there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_miniplm.core.errors import ConfigError, DataError
from megatron_miniplm.core.lines import LineFile, read_objects
from megatron_miniplm.core.log import get_logger
from megatron_miniplm.core.manifest import atomic_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SinkConfig:
    """Where metrics go besides --save/metrics.jsonl."""

    tensorboard_dir: str | None = None
    """Also write TensorBoard events there."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases; WANDB_MODE=offline needs no network."""
    wandb_exp_name: str | None = None
    """Name of the run there; default: the name of --save."""
    wandb_entity: str | None = None
    """Its team; default: the user's own."""
    wandb_save_dir: str | None = None
    """Folder for its local files; default: --save."""

    def __post_init__(self) -> None:
        for name in ("wandb_exp_name", "wandb_entity", "wandb_save_dir"):
            value = getattr(self, name)
            if value is not None and self.wandb_project is None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value} has no effect without --wandb-project"
                )
        if self.wandb_project is not None and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"--wandb-project {self.wandb_project} needs the package wandb: "
                "pip install 'megatron-miniplm[wandb]'"
            )


class Sink(Protocol):
    """Takes rows, in the order of iterations."""

    def write(self, row: Row) -> None:
        """Add one row."""

    def close(self, *, failed: bool = False) -> None:
        """Write what is still held back; `failed`: an error ended the run."""


def open_sinks(config: SinkConfig, save: Path, *, run: Row, start_iteration: int) -> list[Sink]:
    """All sinks of a run that starts or continues after `start_iteration`; `run`: its flags."""
    sinks: list[Sink] = [JsonLines(save / "metrics.jsonl", start_iteration)]
    if config.tensorboard_dir is not None:
        sinks.append(TensorBoard(config.tensorboard_dir, start_iteration))
    if config.wandb_project is not None:
        sinks.append(WeightsAndBiases(config, save, run, start_iteration))
    return sinks


class JsonLines:
    """A file of one object a line that reads as one run, however often it was resumed."""

    def __init__(self, path: Path, start_iteration: int) -> None:
        drop_rows_after(path, start_iteration)
        self.lines = LineFile(path)

    def write(self, row: Row) -> None:
        """Add a line; where there is no room for it, with the next one."""
        self.lines.add(json.dumps(row))

    def close(self, *, failed: bool = False) -> None:
        """Nothing more can be done for what is held back."""


class TensorBoard:
    """Event files; events beyond the checkpoint that a run continues from are purged.

    TensorBoard's writer never recovers from a full disk: the next row then begins another file,
    and what the failed writer held back is only in metrics.jsonl.
    """

    def __init__(self, folder: str, start_iteration: int) -> None:
        self.folder = Path(folder)
        self.purge_step: int | None = start_iteration + 1
        self.writer: SummaryWriter | None = None
        self.failing = False

    def write(self, row: Row) -> None:
        """Add every number."""
        with self._going_on_without():
            if self.writer is None:
                self.writer = self._open()
            for name, value in scalars(row).items():
                self.writer.add_scalar(name, value, row["iteration"])

    def close(self, *, failed: bool = False) -> None:
        """Flush and close the file."""
        with self._going_on_without():
            if self.writer is not None:
                self.writer.close()

    def _open(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        try:
            writer = SummaryWriter(str(self.folder), purge_step=self.purge_step)
            writer.flush()
        except OSError:
            own = f"events.out.tfevents.*.{socket.gethostname()}.{os.getpid()}.*"
            for path in self.folder.glob(own):
                if not path.stat().st_size:  # else every row would leave another one
                    path.unlink()
            raise
        self.purge_step, self.failing = None, False
        return writer

    @contextmanager
    def _going_on_without(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.writer = None
            if not self.failing:
                get_logger().error(
                    "%s: %s; rows are left out there until it can be written again",
                    self.folder, error,
                )  # fmt: skip
            self.failing = True


class WeightsAndBiases:
    """A run of W&B; a training run that is continued continues its run there, too."""

    def __init__(self, config: SinkConfig, save: Path, run: Row, start_iteration: int) -> None:
        import wandb

        remembered = save / "wandb_run_id.txt"
        if start_iteration == 0 or not remembered.exists():
            with atomic_file(remembered) as file:
                file.write(uuid.uuid4().hex.encode())
        folder = Path(config.wandb_save_dir or save)
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.wandb_exp_name or save.name,
            dir=str(folder),
            id=remembered.read_text(),
            resume="allow",
            config=dict(run),
        )
        # Its own counter only grows, but a run may be taken back to an earlier checkpoint.
        self.run.define_metric("*", step_metric="iteration")

    def write(self, row: Row) -> None:
        """Add every number."""
        self.run.log({"iteration": row["iteration"], **scalars(row)})

    def close(self, *, failed: bool = False) -> None:
        """Wait until everything is written or sent; a failed run has exit code 1 there."""
        self.run.finish(exit_code=int(failed))


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row under TensorBoard's names; of timers, those of the slowest rank."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if name == "validation":
            found |= {f"{_tag(key)}-validation": loss for key, loss in value.items()}
        elif name == "timers (ms)":
            found |= {f"{_tag(key)}-time": slowest for key, (_, slowest) in value.items()}
        elif name != "iteration":
            found[_tag(name)] = value
    return found


def _tag(name: str) -> str:
    unit = re.compile(r" \((ms|s|GiB|TFLOP/s/GPU)\)$")
    return re.sub(r"[ _]", "-", unit.sub("", name))


def drop_rows_after(path: Path, iteration: int) -> None:
    """Keep the rows up to `iteration`; where these are all, the file is not touched."""
    if not path.exists():
        return
    rows = [row for row in read_objects(path) if row["iteration"] <= iteration]
    kept = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if kept == path.read_bytes():
        return
    try:
        with atomic_file(path) as file:
            file.write(kept)
    except OSError as error:
        raise DataError(
            f"{path} has rows after iteration {iteration}, where the run continues, or half a "
            f"one, and cannot be rewritten: {error}; make room there and start again"
        ) from error
