"""Links to a ``.bin`` that is there already: how an artifact names tokens that it does not copy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from megatron_miniplm.core.errors import ConfigError

Link = Literal["relative", "hard", "absolute"]


def link_tokens(bin_path: Path, path: Path, folder: Path, link: Link) -> None:
    """Link the file behind `bin_path` at `path`, which will move to `folder`.

    Refuses a hard link to another file system.
    """
    source = os.path.realpath(bin_path)
    if link == "hard":
        try:
            os.link(source, path)
        except OSError as error:
            raise ConfigError(
                f"no hard link from {folder} to {source}: {error.strerror}; hard links stay on "
                f"one file system, use --link relative"
            ) from error
    elif link == "absolute":
        path.symlink_to(source)
    else:
        # Links are resolved from where they physically lie, not from the path that led there.
        path.symlink_to(os.path.relpath(source, os.path.realpath(folder)))
