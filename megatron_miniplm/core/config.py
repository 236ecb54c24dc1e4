"""Flags from frozen dataclasses: one definition gives the flag, its type, default and help.

A configuration is a frozen, keyword-only dataclass beside the thing it configures; nested ones
become groups of flags without a prefix. ``--config FILE.yaml`` and ``--from-run run.json`` hold
the same names; explicit flags win.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from megatron_miniplm.core.errors import ConfigError
from megatron_miniplm.core.manifest import provenance, read_json, write_json
from megatron_miniplm.core.megatron_flags import refuse, settle

C = TypeVar("C")


def parse_flags(cls: type[C], argv: Sequence[str], *, prog: str) -> C:
    """Build a `cls` from command-line words; Megatron's flags among them: `megatron_flags`.

    A class may define ``expand_flags``: flag -> function of its value giving the settings that it
    stands for (``--model qwen1.5-104m``); they yield to every explicit flag.
    """
    words = settle(_expand_files(cls, list(argv)), _own_flags(cls))
    return tyro.cli(cls, args=words, prog=prog, config=(tyro.conf.OmitArgPrefixes,))


def _own_flags(cls: type) -> set[str]:
    """The flags of a command, as they are typed."""
    names = {name.replace("_", "-") for name in flat_fields(cls)}
    return {f"--{start}{name}" for start in ("", "no-") for name in names}


def compose(name: str, parts: Mapping[str, type]) -> type:
    """A configuration made of others: the flags that the implementations of a room bring along."""
    fields = [
        (key.replace("-", "_"), part, dataclasses.field(default_factory=part))
        for key, part in parts.items()
    ]
    return dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)


def part_of(composed: Any, key: str | None, flag: str) -> Any:
    """The part of the chosen implementation (None if it has none) of a `compose`d configuration.

    Refuses flags of the others that were given a value: they would have no effect.
    """
    chosen = None
    for item in dataclasses.fields(composed):
        part = getattr(composed, item.name)
        if key is not None and item.name == key.replace("-", "_"):
            chosen = part
            continue
        given = [
            f"--{name.replace('_', '-')} {value}"
            for name, value in to_flat(part).items()
            if value != to_flat(type(part)()).get(name)
        ]
        if given:
            raise ConfigError(
                f"{', '.join(given)} has no effect without {flag} {item.name} (it is {key})"
            )
    return chosen


def refuse_idle(config: Any, users: Mapping[str, Collection[str]], flag: str, chosen: str) -> None:
    """Refuse flags that were given a value which the value of another does not make use of.

    `users`: field -> the values of `flag` that use it; `chosen`: the value that `flag` has.
    """
    for item in dataclasses.fields(config):
        value, using = getattr(config, item.name), users.get(item.name, (chosen,))
        if value != item.default and chosen not in using:
            raise ConfigError(
                f"--{item.name.replace('_', '-')} {value} has no effect on {flag} {chosen}, only "
                f"on {', '.join(using)}: leave it out"
            )


def refuse_without(config: Any, names: Iterable[str], needed: str) -> None:
    """Refuse those flags that were given a value, since nothing but `needed` makes use of them."""
    values, defaults = to_flat(config), flat_defaults(type(config))
    given = [
        f"--{name.replace('_', '-')} {values[name]}"
        for name in names if values[name] != defaults[name]
    ]  # fmt: skip
    if given:
        raise ConfigError(f"{', '.join(given)} has no effect without {needed}: leave it out")


def flat_fields(cls: type) -> dict[str, Any]:
    """Flag name (underscores) -> type, through nested configuration dataclasses.

    A flag that is a Python keyword (``--from``) has a field with an underscore after it.
    """
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            found |= flat_fields(typing.cast(type, kind))
        else:
            found[item.name.rstrip("_")] = kind
    return found


def flat_defaults(cls: type) -> dict[str, Any]:
    """Flag name -> what it is where nobody says it, as in `to_flat`; without those that must be."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(kind := hints[item.name]):
            found |= flat_defaults(typing.cast(type, kind))
        elif item.default is not dataclasses.MISSING:
            found[item.name.rstrip("_")] = _listed(item.default)
    return found


def to_flat(config: Any) -> dict[str, Any]:
    """A configuration as one flat JSON-ready dictionary, named like its flags."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= to_flat(value)
        else:
            flat[item.name.rstrip("_")] = _listed(value)
    return flat


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def write_run(path: Path, verb: str, config: Any, **extra: Any) -> None:
    """Write ``run.json``: what was asked, with what versions (``--from-run`` repeats it)."""
    write_json(path, {"verb": verb, "config": to_flat(config), **provenance(), **extra})


def _expand_files(cls: type, words: list[str]) -> list[str]:
    """Replace --config/--from-run by the flags they hold, put first so that explicit ones win."""
    known = flat_fields(cls)
    from_files: list[str] = []
    rest: list[str] = []
    queue = iter(words)
    for word in queue:
        flag, _, inline = word.partition("=")
        if flag not in ("--config", "--from-run"):
            rest.append(word)
            continue
        path = inline or next(queue, "")
        if not path:
            raise ConfigError(f"{flag} needs a file name")
        values = _read_yaml(Path(path)) if flag == "--config" else _read_run(Path(path))
        from_files += _as_words(values, known, path)
    # A preset stands before what is said beside it: files may change a file's preset, and explicit
    # flags an explicit one, which itself wins over everything from files.
    return _expand_presets(cls, from_files, known) + _expand_presets(cls, rest, known)


def _expand_presets(cls: type, words: list[str], known: Mapping[str, Any]) -> list[str]:
    for flag, settings in getattr(cls, "expand_flags", {}).items():
        value = _last_value(words, flag)
        if value:
            words = _as_words(settings(value), known, f"{flag} {value}") + words
    return words


def _last_value(words: Sequence[str], flag: str) -> str:
    """The value that `flag` has at last on the command line, or an empty string."""
    value = ""
    for at, word in enumerate(words):
        if word == flag and at + 1 < len(words):
            value = words[at + 1]
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold `name: value` lines")
    return values


def _read_run(path: Path) -> Mapping[str, Any]:
    return typing.cast(Mapping[str, Any], read_json(path).get("config", {}))


def _as_words(values: Mapping[str, Any], known: Mapping[str, Any], source: str) -> list[str]:
    words: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            refuse("--" + name.replace("_", "-"))
            raise ConfigError(f"{source}: unknown setting {key!r}; see --help for the names")
        flag = "--" + name.replace("_", "-")
        if value is None and typing.get_origin(known[name]) is tuple:
            continue  # of a version in which the flag took one value
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list):
            words += [flag, *map(str, value)] if value else []
        else:
            words += [flag, str(value)]
    return words


def print_json(value: Mapping[str, Any]) -> None:
    """Answer of a command for machines, on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")
