"""vllm/model_executor/layers/fused_moe/cpu_fused_moe.py (up to 0.27): keeps weights unpacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _check_grouped_gemm(original: Callable[..., Any]) -> Callable[..., Any]:
    def check_grouped_gemm(self: Any, layer: Any) -> tuple[bool, str]:
        if layer.moe_config.is_lora_enabled:
            return False, "none"
        found: tuple[bool, str] = original(self, layer)
        return found

    return check_grouped_gemm


class _Activations(dict[Any, Callable[[Any], Any]]):
    """A dict that can have the attribute `MARK`."""


def _activations(original: dict[Any, Callable[[Any], Any]]) -> _Activations:
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return _Activations({**original, MoEActivation.SILU: SiluAndMul.forward_native})


HOOKS = (
    Hook(
        feature="cpu-experts",
        target="vllm.model_executor.layers.fused_moe.cpu_fused_moe:_CPU_MOE_ACT_FN",
        make=_activations,
        releases=">=0.24,<0.25",
        platforms=("cpu",),
        why="unpacked experts stop the engine at the first forward, with and without LoRA: for "
        "SiLU it makes a custom operator there, which is allowed only while a model is built",
        upstream="https://github.com/vllm-project/vllm/blob/v0.25.0/vllm/model_executor/layers/"
        "fused_moe/cpu_fused_moe.py",
        until="0.25, which does not make one",
        hashed=False,
    ),
    Hook(
        feature="cpu-experts",
        target="vllm.model_executor.layers.fused_moe.cpu_fused_moe:CPUFusedMOE.check_grouped_gemm",
        make=_check_grouped_gemm,
        releases=">=0.24,<0.28",
        platforms=("cpu",),
        why="it decides to pack the experts' weights, but layers/cpu/torch_experts.py, which adds "
        "LoRA in these releases, needs unpacked weights",
        upstream="",
        until="0.28, which does not have this file any more",
    ),
)
