#!/usr/bin/env python3
"""Copy the installed vLLM into a folder, what is not Python as links, and apply the patches to it.

ci/patched_tree.py FOLDER          # makes FOLDER/vllm
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_moe_lora import cli  # noqa: E402


def main(folder: str) -> int:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    ignored = shutil.ignore_patterns("__pycache__")
    vllm, target = Path(spec.origin).parent, Path(folder, "vllm")
    shutil.copytree(vllm, target, copy_function=_place, ignore=ignored)
    return cli.main(["patches", "apply", "--tree", folder])


def _place(have: str, want: str) -> object:
    return (shutil.copy2 if have.endswith(".py") else os.symlink)(have, want)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
