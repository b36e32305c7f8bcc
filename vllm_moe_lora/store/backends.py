"""Experts classes that say they take LoRA, and whose `apply` never looks at it (0.20 to 0.33).

They inherit `supports_lora` from `TritonExperts` and replace `apply`: factors on routed experts are
ignored without a word. An adapter with such factors is refused; others are served. Where a hook
has put LoRA into that `apply` (quantised-experts: INT4, INT8, Triton's MXFP8), it is like any
other.
"""

from __future__ import annotations

from typing import Any

from ..adapters.errors import AdapterError
from ..patching import MARK

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


def demand(name: str, wrapper: Any) -> None:
    """
    Raises:
        AdapterError: the experts behind ``wrapper`` (layer ``name``) would ignore an adapter.
    """
    kernel = getattr(wrapper, "_moe_kernel", None)
    kind = type(getattr(kernel, "fused_experts", None))
    if ignores(kind):
        experts = kind.__name__
        raise AdapterError(
            f"it has LoRA on the routed experts of {name}, which vLLM runs by {experts}: there it "
            f"would be ignored. {experts} is for {IGNORING[experts]}."
        )
