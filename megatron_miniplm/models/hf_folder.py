"""Reading Hugging Face model folders, without `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_miniplm.core.errors import CheckpointError, ConfigError, DataError
from megatron_miniplm.core.manifest import hash_file, hash_parts, read_json
from megatron_miniplm.models.family import family_of
from megatron_miniplm.models.pretrained import Pretrained
from megatron_miniplm.models.tensor_files import Stored, open_pickled, open_safetensors

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class _Format(NamedTuple):
    """How weights may lie in a folder: in one file, or in several with an index."""

    file: str
    listing: str
    """The index: which tensor is in which of several files."""
    open: Callable[[Path], dict[str, Stored]]


_FORMATS = (
    _Format(WEIGHTS, INDEX, open_safetensors),
    _Format("pytorch_model.bin", "pytorch_model.bin.index.json", open_pickled),
)
"""In the order in which they are looked for."""


def is_hf_folder(path: Path) -> bool:
    """Whether `path` looks like a Hugging Face folder (as against a Megatron checkpoint)."""
    return (Path(path) / CONFIG).is_file()


def hash_folder(path: Path) -> str:
    """Hash of configuration and weights in a Hugging Face folder, of whatever family.

    Refuses a folder that lacks either.
    """
    weights = sorted(file for kind in ("*.safetensors", "*.bin") for file in path.glob(kind))
    if not is_hf_folder(path) or not weights:
        raise CheckpointError(
            f"{path} is no Hugging Face folder: it has no {CONFIG}, or no weights in .safetensors "
            "or .bin files"
        )
    return hash_parts(*map(hash_file, [path / CONFIG, *weights]))


class HfFolder(Pretrained):
    """A checked Hugging Face folder: tensor name -> tensor, read when asked for.

    Opening refuses, with a `CheckpointError`, anything missing, unknown, truncated, of another
    shape than config.json says, or not floating point; and with a `ConfigError` a model that this
    program cannot reproduce.
    """

    described_in = CONFIG

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.raw = self._json(CONFIG)
        try:
            self.family = family_of(self.raw)
            self.config = self.family.config_from_hf(self.raw)
        except ConfigError as error:
            raise ConfigError(f"{self.path}/{error}") from error
        # -1 there means none.
        self.token_ids = {
            name: self.raw[name] for name in TOKEN_IDS if self.raw.get(name) not in (None, -1)
        }
        self._format = self._find_format()
        self.tensors = self._open()
        self._check()

    def files(self) -> list[Path]:
        """See `ForeignSource.files`."""
        return [self.path / name for name in sorted({file for file, _ in self._locations()})]

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.path / name)
        except DataError as error:
            raise CheckpointError(f"not a usable Hugging Face folder: {error}") from error

    def _find_format(self) -> _Format:
        for found in _FORMATS:
            if (self.path / found.listing).is_file() or (self.path / found.file).is_file():
                return found
        names = (name for one in _FORMATS for name in (one.file, one.listing))
        raise CheckpointError(f"{self.path} has no weights: none of {', '.join(names)}")

    def _locations(self) -> Iterator[tuple[str, str | None]]:
        """(file, tensor that the index claims for it), or the one file without a claim."""
        name = self._format.listing
        if not (self.path / name).is_file():
            yield self._format.file, None
            return
        index = self._json(name).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{self.path / name} has no weight_map")
        for tensor, file in index.items():
            if Path(str(file)).name != file:
                raise CheckpointError(f"{self.path / name}: {file!r} is not a plain file name")
            yield file, tensor

    def _open(self) -> dict[str, Stored]:
        """The tensors by name; a sharded folder must hold just what its index claims."""
        opened: dict[str, dict[str, Stored]] = {}
        found: dict[str, Stored] = {}
        claimed: dict[str, str] = {}
        for file, tensor in self._locations():
            if tensor is not None:
                claimed[tensor] = file
            if file in opened:
                continue
            opened[file] = self._format.open(self.path / file)
            for name, stored in opened[file].items():
                if name in found:
                    raise CheckpointError(f"{self.path}: {name} is in two files")
                found[name] = stored
        for name, file in claimed.items():
            if name not in opened[file]:
                raise CheckpointError(
                    f"{self.path / self._format.listing}: {name} is not in {file}"
                )
        return found
