"""The environment variables of the plugin, in one table."""

from __future__ import annotations

import os
from collections.abc import Callable

MODES = ("auto", "0", "1")
KERNELS = ("auto", "upstream", "ours", "tail")


def _mode() -> str:
    value = os.environ.get("VLLM_MOE_LORA", "auto").strip().lower() or "auto"
    if value not in MODES and not all(part.startswith("-") for part in value.split(",")):
        modes = ", ".join(MODES)
        raise ValueError(f"VLLM_MOE_LORA={value!r}: use one of {modes}, or -FEATURE,-FEATURE")
    return value


def _kernels() -> str:
    value = os.environ.get("VLLM_MOE_LORA_KERNELS", "auto").strip().lower() or "auto"
    if value not in KERNELS:
        raise ValueError(f"VLLM_MOE_LORA_KERNELS={value!r}: use one of {', '.join(KERNELS)}")
    return value


def left_out() -> set[str]:
    """The features that VLLM_MOE_LORA turns off one by one. Raises ValueError as `get` does."""
    value = _mode()
    return set() if value in MODES else {part.removeprefix("-") for part in value.split(",")}


VARIABLES: dict[str, Callable[[], str | bool]] = {
    # auto: on where the vLLM release is known, otherwise off with a warning.
    # 0: off. 1: must be on, or the process fails with the reason.
    # -FEATURE,-FEATURE: auto without these features.
    "VLLM_MOE_LORA": _mode,
    # 1: also patch functions whose source is not one we have read.
    "VLLM_MOE_LORA_ALLOW_UNVERIFIED": lambda: (
        os.environ.get("VLLM_MOE_LORA_ALLOW_UNVERIFIED", "0") == "1"
    ),
    # Triton kernels for LoRA on routed experts, on a GPU. auto: ours on the parts they were
    # measured on (none yet), else upstream's. upstream, ours: whatever the part. tail: ours, and
    # unquantised experts in Triton multiply by our kernel, whose tail LoRA is.
    "VLLM_MOE_LORA_KERNELS": _kernels,
}


def get(name: str) -> str | bool:
    """The value of one of `VARIABLES` now. Raises ValueError for a value it cannot have."""
    return VARIABLES[name]()
