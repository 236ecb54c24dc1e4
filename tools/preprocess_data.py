"""Megatron's name for `miniplm preprocess`; same flags."""

import sys

from megatron_miniplm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
