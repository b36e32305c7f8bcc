"""The environment variables that the plugin reads: `VARIABLES` lists them, `get` reads one."""

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


def disabled_features() -> set[str]:
    """Return the features that VLLM_MOE_LORA=-FEATURE,-FEATURE turns off.

    Raises:
        ValueError: VLLM_MOE_LORA has a value that is not allowed.
    """
    value = _mode()
    return set() if value in MODES else {part.removeprefix("-") for part in value.split(",")}


VARIABLES: dict[str, Callable[[], str | bool]] = {
    # Whether the plugin changes vLLM.
    #   auto (default)      on if the vLLM release is known, otherwise off with a warning
    #   0                   off
    #   1                   on; if that is not possible, the process stops with the reason
    #   -FEATURE,-FEATURE   like auto, without these features
    "VLLM_MOE_LORA": _mode,
    # 1: replace a function of vLLM even if its source is not one the hook was written for.
    "VLLM_MOE_LORA_ALLOW_UNVERIFIED": lambda: (
        os.environ.get("VLLM_MOE_LORA_ALLOW_UNVERIFIED", "0") == "1"
    ),
    # Which Triton kernels compute LoRA on routed experts, on a GPU.
    #   auto (default)  the fastest that `vllm-moe-lora tune` measured on this GPU; vLLM's without
    #                   a record of it
    #   upstream        vLLM's, on every GPU
    #   ours            ours, on every GPU
    #   tail            like ours; and for unquantised experts in Triton, LoRA is fused into the
    #                   end (the "tail") of the base experts' grouped GEMM. The kernel computes
    #                   y = W x + B z in one accumulator, where z = A x.
    "VLLM_MOE_LORA_KERNELS": _kernels,
    # The folder with the records of `vllm-moe-lora tune`; "" for moe_lora_tuned in vLLM's
    # configuration folder.
    "VLLM_MOE_LORA_TUNED": lambda: os.environ.get("VLLM_MOE_LORA_TUNED", ""),
    # 0: compute LoRA on a CPU with torch's operators, not with native kernels (made by numba).
    "VLLM_MOE_LORA_NATIVE": lambda: os.environ.get("VLLM_MOE_LORA_NATIVE", "1") != "0",
    # How much memory LoRA on routed experts may take in a worker: a share of its memory or its
    # GPU's, as 0.25 (the default), or a size, as 8GiB. On a CPU it limits all loaded adapters, on a
    # GPU those in slots (where our kernels serve all batches, see layers/gpu/pages.py).
    "VLLM_MOE_LORA_MEMORY": lambda: os.environ.get("VLLM_MOE_LORA_MEMORY", "").strip() or "0.25",
    # 1: a request may bring its own routes, see rl/replay.py. The engine then has to be eager.
    "VLLM_MOE_LORA_REPLAY": lambda: os.environ.get("VLLM_MOE_LORA_REPLAY", "0") == "1",
}


def get(name: str) -> str | bool:
    """Return the current value of one of `VARIABLES`.

    Raises:
        ValueError: the variable has a value that is not allowed; the text lists the allowed ones.
    """
    return VARIABLES[name]()
