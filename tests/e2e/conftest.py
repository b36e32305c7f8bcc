"""Checkpoints made once a test session, and engines in forks of a process that has vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
from engine_cases import Case

from vllm_moe_lora.tiny import engine, models, multimodal, quantise

engine.launch = forks.launch  # test_routes.py has processes of its own


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """make_case(family, quant=(form, group, symmetric) or None) -> a fresh `Case`."""
    plain: dict[str, Path] = {}

    def make(
        family: str,
        quant: tuple[str, int, bool] | None = None,
        experts_only: bool = False,
        **overrides: object,
    ) -> Case:
        folder = tmp_path_factory.mktemp(family)
        if family not in plain or overrides:
            built = models.build(family, folder / "full", **overrides)
            if overrides:
                return Case(folder, built, built)
            plain[family] = built
        full = plain[family]
        if quant is None:
            twin = full / multimodal.TWIN  # adapters and oracles have its names
            return Case(folder, full, twin if family in models.OWN_NAMES else full)
        form, group, symmetric = quant
        packed, dequantised = folder / "int4", folder / "dequantised"
        quantise.quantise(full, packed, dequantised, form, group, symmetric, experts_only)
        return Case(folder, packed, dequantised)

    return make


# vLLM's Qwen3.5 file imports image code that imports torchvision, which has no CPU build for this
# torch. Nothing of it is called for text, so names that cannot do anything are enough.
STUB = """
__version__ = "0.0.0"


class Meta(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Meta(name, (), {})
"""


# vLLM's file of Kimi K2.5 imports numba for its image code. A CPU engine in the same process then
# does not start, with or without LoRA: vLLM 0.32 looks for Triton kernels in all loaded modules,
# and fails on an object of llvmlite.
NUMBA = """
class config:
    THREADING_LAYER = ""


def njit(*args, **more):
    return args[0] if args and callable(args[0]) else lambda function: function


jit, prange, get_num_threads, set_num_threads = njit, range, lambda: 1, lambda number: None
"""


@pytest.fixture(scope="session")
def no_torchvision(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which torchvision and numba can be imported and do nothing."""
    tmp_path = tmp_path_factory.mktemp("no-torchvision")
    names = ["", "io", "transforms", "transforms/functional", "transforms/v2"]
    for name in [*names, "transforms/v2/functional"]:
        folder = tmp_path / "torchvision" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(STUB)
    (tmp_path / "numba.py").write_text(NUMBA)
    paths = (str(tmp_path), os.environ.get("PYTHONPATH", ""))  # ci/patched.sh has a tree there
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
