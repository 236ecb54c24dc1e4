"""Fixtures of the unit tests."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from hypothesis import settings

# Time limits on single examples fail on a busy machine and find nothing here.
settings.register_profile("unit", deadline=None)
settings.load_profile("unit")


@pytest.fixture(scope="session")
def shared_tokenizers(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the real tokenizers smollm2_hf, qwen2.5_hf and gpt2_hf."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for archive in sorted((shared_dir / "tokenizers").glob("*.tar.xz")):
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    return folder
