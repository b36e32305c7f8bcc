"""vllm/model_executor/layers/quantization/mxfp4.py: MXFP4 experts in Triton."""

from __future__ import annotations

from typing import Any

from ..patching import Hook


def _is_monolithic(original: Any) -> property:
    def is_monolithic(self: Any) -> bool:
        return not self.moe.is_lora_enabled and bool(original.__get__(self))

    return property(is_monolithic)


HOOKS = (
    Hook(
        feature="quantised-experts",
        target="vllm.model_executor.layers.quantization.mxfp4:Mxfp4MoEMethod.is_monolithic",
        make=_is_monolithic,
        releases=">=0.15,<0.17",
        why="with VLLM_MXFP4_USE_MARLIN=0 the start fails with an AssertionError, because the "
        "method says that its experts are monolithic, which is not so with LoRA",
        upstream="https://github.com/vllm-project/vllm/blob/v0.17.0/vllm/model_executor/layers/"
        "quantization/mxfp4.py",
        until="0.17, where the property takes LoRA into account",
        layers=True,
    ),
)
