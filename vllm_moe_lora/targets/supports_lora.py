"""Experts for which an adapter would be ignored, or applied to others.

Some classes say they take LoRA, and their `apply` never looks at it (0.20 to 0.33).
They inherit `supports_lora` from `TritonExperts` and replace `apply`: factors on routed experts are
ignored without a word. An adapter with such factors is refused; others are served. Where a hook
has put LoRA into that `apply` (quantised-experts: INT4, INT8, Triton's MXFP8), it is like any
other.
"""

from __future__ import annotations

from typing import Any

from ..adapters.errors import AdapterError
from ..patching import MARK
from . import target_modules

# class -> where it is met and what takes LoRA instead
IGNORING = {
    "TritonWNA16Experts": "INT4/INT8 that Marlin does not take (MoeWNA16, ROCm, "
    "--moe-backend triton). vllm-moe-lora's feature quantised-experts makes it apply LoRA, and is "
    "off here. Marlin takes LoRA; it wants moe_intermediate_size / tensor parallel "
    "size to be a multiple of 128: change --tensor-parallel-size or --enable-expert-parallel, or "
    "serve an unquantised checkpoint",
    "Mxfp8NativeTritonExperts": "MXFP8 on ROCm. vllm-moe-lora's feature quantised-experts makes it "
    "apply LoRA, and is off here: serve a bf16 or FP8 checkpoint",
    "AiterMxfp8Experts": "MXFP8 on ROCm. Serve a bf16 or FP8 checkpoint",
}


def ignores(experts: type[Any]) -> bool:
    """Whether this class of vLLM's experts says that it applies LoRA, and does not."""
    return experts.__name__ in IGNORING and not hasattr(getattr(experts, "apply", None), MARK)


def takes_lora(experts: type[Any]) -> bool:
    """Whether this class of vLLM's experts applies LoRA."""
    return bool(experts.supports_lora()) and not ignores(experts)


def _moving(name: str) -> str:
    return (
        f"{name}: --enable-eplb moves experts between devices while the engine runs, and "
        "--enable-lora's factors stay where they are, so that adapters would be applied to the "
        "wrong experts. Start without --enable-eplb, without --enable-lora, or with "
        "--lora-target-modules that leave out the routed experts."
    )


def _moves(wrapper: Any) -> bool:
    """Whether vLLM may give a rank other experts as the load asks (EPLB)."""
    return bool(getattr(wrapper.base_layer.moe_config.moe_parallel_config, "enable_eplb", False))


def _meeting(name: str, ranks: int) -> str:
    return (
        f"{name}: with --data-parallel-size {ranks} its experts compute the tokens of all {ranks} "
        "ranks, and --enable-lora gives each rank slots of its own, so that tokens would get "
        f"another rank's adapter, or none. Start {ranks} servers without data parallelism, one "
        "with --tensor-parallel-size, or without --enable-lora. "
    )


def _meet(wrapper: Any) -> int:
    """How many ranks' tokens meet in the experts, which have an engine and slots of each its own.

    With and without expert parallelism: vLLM spreads the experts over all ranks, or each expert.
    """
    return int(getattr(wrapper.base_layer.moe_config.moe_parallel_config, "dp_size", 1))


def refuse(wrapper: Any) -> None:
    """
    Args:
        wrapper: a `FusedMoEWithLoRA` that is being made.

    Raises:
        NotImplementedError: its experts may move without their factors, or get tokens whose slots
            are another engine's.
    """
    routed = getattr(wrapper.base_layer, "routed_experts", wrapper.base_layer)
    name = getattr(routed, "layer_name", type(routed).__name__)
    if _meet(wrapper) > 1:
        raise NotImplementedError(_meeting(name, _meet(wrapper)) + target_modules.cure(None))
    if _moves(wrapper):
        raise NotImplementedError(_moving(name))


def demand(name: str, wrapper: Any) -> None:
    """
    Raises:
        AdapterError: the experts behind ``wrapper`` (layer ``name``) would ignore an adapter, may
            move without its factors, or take its slot for another adapter's.
    """
    if _meet(wrapper) > 1:  # also where `refuse` is off
        raise AdapterError(_meeting(name, _meet(wrapper)).rstrip())
    if _moves(wrapper):
        raise AdapterError(_moving(name))
    kernel = getattr(wrapper, "_moe_kernel", None)
    kind = type(getattr(kernel, "fused_experts", None))
    if ignores(kind):
        experts = kind.__name__
        raise AdapterError(
            f"it has LoRA on the routed experts of {name}, which vLLM runs by {experts}: there it "
            f"would be ignored. {experts} is for {IGNORING[experts]}."
        )
