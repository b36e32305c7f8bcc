"""Where the Python files of vLLM's releases are: ``$VLLM_TREES/v<release>`` (see ci/trees.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("VLLM_TREES", Path(__file__).parents[2] / ".trees"))


def find(release: str) -> Path:
    """The folder that holds ``vllm/``; skips the test where there is none."""
    tree = ROOT / f"v{release}"
    if not (tree / "vllm").is_dir():
        pytest.skip(f"no {tree}: run ci/trees.py {release}")
    return tree
