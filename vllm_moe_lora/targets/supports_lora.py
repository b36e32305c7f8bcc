"""Refuses LoRA on routed experts where vLLM would ignore it or apply it wrongly.

Three cases are known:

- A class of experts inherits `supports_lora` from vLLM's `TritonExperts`, but has its own `apply`,
  which ignores LoRA (vLLM 0.20 to 0.33). `IGNORING` lists these classes. The hooks of our feature
  quantised-experts make some of them apply LoRA (INT4, INT8, Triton's MXFP8).
- With --enable-eplb, vLLM moves experts between devices, but not their LoRA. From 0.30 on
  fitting/moved.py brings the LoRA there.
- With --data-parallel-size, experts compute the tokens of several engines; data_parallel.py says
  where that is right.

The first case is an error when an adapter with LoRA on routed experts is loaded. The other two are
already errors when the engine starts.
"""

from __future__ import annotations

from typing import Any

from ..adapters.errors import AdapterError
from ..patching import MARK
from . import data_parallel, target_modules

# Class of experts that ignores LoRA -> when vLLM uses it, and what to use instead.
IGNORING = {
    "TritonWNA16Experts": "INT4 and INT8 where Marlin cannot run (MoeWNA16, ROCm, "
    "--moe-backend triton). vllm-moe-lora's feature quantised-experts makes it apply LoRA, but is "
    "off here. Marlin takes LoRA too, but needs a moe_intermediate_size / tensor parallel size "
    "that is a multiple of 128: change --tensor-parallel-size or --enable-expert-parallel, or "
    "serve an unquantised checkpoint",
    "Mxfp8NativeTritonExperts": "MXFP8 on ROCm. vllm-moe-lora's feature quantised-experts makes it "
    "apply LoRA, but is off here. Serve a bf16 or FP8 checkpoint",
    "AiterMxfp8Experts": "MXFP8 on ROCm. Serve a bf16 or FP8 checkpoint",
}


def ignores(experts: type[Any]) -> bool:
    """Whether this class of vLLM's experts says that it supports LoRA but ignores it.

    Not if one of our hooks has replaced its `apply`.
    """
    return experts.__name__ in IGNORING and not hasattr(getattr(experts, "apply", None), MARK)


def takes_lora(experts: type[Any]) -> bool:
    """Whether this class of vLLM's experts applies LoRA."""
    return bool(experts.supports_lora()) and not ignores(experts)


def has_eplb(wrapper: Any) -> bool:
    """Whether vLLM may move experts between devices to balance their load."""
    return bool(getattr(wrapper.base_layer.moe_config.moe_parallel_config, "enable_eplb", False))


def _eplb_refusal(name: str, wrapper: Any) -> str:
    """Why LoRA on a layer would be wrong with this engine's EPLB; "" if it is not."""
    if not has_eplb(wrapper):
        return ""
    if not _factors_move():
        flag, why = "--enable-eplb", "moves experts between devices while the engine runs, but "
        why += "their LoRA stays where it is, so adapters would be applied to the wrong experts"
    elif data_parallel.parallel_config("enable_elastic_ep"):
        flag, why = "--enable-elastic-ep", "changes how many experts a device has, but its LoRA "
        why += "slots have room for as many as at the start"
    else:
        return ""
    return (
        f"{name}: {flag} {why}. Start without {flag}, without --enable-lora, or with "
        "--lora-target-modules that leave out the routed experts."
    )


def _factors_move() -> bool:
    """Whether our hooks write the slots again when experts have moved: from vLLM 0.30 on."""
    try:
        from vllm.distributed.eplb import eplb_state
    except ImportError:  # releases of which only some files are here
        return False
    names = ("_commit_eplb_maps", "_commit_eplb_maps_for_layer")
    return all(hasattr(getattr(eplb_state, name, None), MARK) for name in names)


def check_layer(wrapper: Any) -> None:
    """Refuse settings with which LoRA on a MoE layer would be wrong, when the engine starts.

    Args:
        wrapper: a `FusedMoEWithLoRA` that is being built.

    Raises:
        NotImplementedError: with the engine's EPLB or data parallelism LoRA would be wrong.
    """
    routed = getattr(wrapper.base_layer, "routed_experts", wrapper.base_layer)
    name = getattr(routed, "layer_name", type(routed).__name__)
    if message := data_parallel.refusal(name, wrapper):
        raise NotImplementedError(f"{message} {target_modules.cure(None)}")
    if message := _eplb_refusal(name, wrapper):
        raise NotImplementedError(message)


def check_adapter(name: str, wrapper: Any) -> None:
    """Refuse LoRA on the routed experts of a layer, when an adapter is loaded.

    Also checks what `check_layer` checks, because that hook may be off.

    Args:
        name: the layer's name.
        wrapper: vLLM's LoRA layer around the experts.

    Raises:
        AdapterError: the experts would ignore LoRA, or the engine has settings that `check_layer`
            refuses.
    """
    if message := data_parallel.refusal(name, wrapper):
        raise AdapterError(message)
    if message := _eplb_refusal(name, wrapper):
        raise AdapterError(message)
    kernel = getattr(wrapper, "_moe_kernel", None)
    kind = type(getattr(kernel, "fused_experts", None))
    if ignores(kind):
        experts = kind.__name__
        raise AdapterError(
            f"it has LoRA on the routed experts of {name}, which vLLM runs with {experts}. LoRA "
            f"would be ignored there. {experts} is for {IGNORING[experts]}."
        )
