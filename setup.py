"""Builds and installs megatron_miniplm; the native part needs g++ and pybind11, nothing else."""

import os
import re
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "megatron_miniplm/__init__.py").read_text(), re.MULTILINE
).group(1)
README = ROOT / "README.md"
ParallelCompile("MAX_JOBS").install()  # as many files at once as there are cores, or MAX_JOBS
# A warning of a future compiler must not keep a user from installing.
STRICT = ["-Werror"] if os.environ.get("CI") else []

# torch brings a library of the same name (libgomp.so.1): the process has one pool of threads. Where
# the system's compiler has no OpenMP, rows are done one after another.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []

DEPENDENCIES = [
    "torch>=2.8",  # addmm with a wider output
    "megatron-core>=0.16,<0.20",
    "numpy>=1.26",
    "psutil>=5.9",  # without it, megatron-core's checkpoint saving hangs
    "fastokens>=0.3",
    "tokenizers>=0.20",
    "sentencepiece>=0.2",
    "safetensors>=0.4.3",
    "tyro>=0.9",
    "pyyaml>=6.0",
    "rich>=13.0",
    "tensorboard>=2.15",
    "orjson>=3.9",
    "zstandard>=0.22",
    "xxhash>=3.4",
    "scipy>=1.11",
    "matplotlib>=3.8",
]
EXTRAS = {
    "hf": ["transformers>=4.56", "gguf>=0.17", "accelerate>=1.0"],  # from_pretrained(dtype=...)
    "gpu": ["triton>=3.6"],
    "eval": ["lm-eval>=0.4.13,<0.5"],
    "wandb": ["wandb>=0.17"],
    "te": ["transformer-engine[pytorch]>=1.13"],
    "parquet": ["pyarrow>=15.0"],
    "mamba": ["mamba-ssm>=2.2", "causal-conv1d>=1.4"],
    "test": [
        "pytest>=8.0",
        "hypothesis>=6.100",
        "html5lib>=1.1",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "mypy>=1.10",
        "triton>=3.6; platform_system == 'Linux'",  # whose interpreter runs the kernels here
        "types-PyYAML",
        "transformers>=4.56",
        "gguf>=0.17",
        "accelerate>=1.0",  # without it, transformers does not read GGUF
        "pyarrow>=15.0",
        "wandb>=0.17",
        "lm-eval>=0.4.13,<0.5",
    ],
}

setup(
    name="megatron-miniplm",
    version=VERSION,
    description="Knowledge distillation for pre-training language models, at Megatron scale",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_miniplm", "megatron_miniplm.*"]),
    package_data={"megatron_miniplm": ["py.typed", "_C.pyi"]},
    ext_modules=[
        Pybind11Extension(
            "megatron_miniplm._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", *OPENMP, *STRICT],
            extra_link_args=OPENMP,
        )
    ],
    cmdclass={"build_ext": build_ext},
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["miniplm = megatron_miniplm.__main__:main"]},
    zip_safe=False,
)
