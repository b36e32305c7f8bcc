"""vllm/model_executor/layers/fused_moe/modular_kernel.py: FP8 and INT8 tokens stay unquantised."""

from __future__ import annotations

from typing import Any

from ..patching import Hook


def _expects(original: Any) -> property:
    def expects_unquantized_inputs(self: Any) -> bool:
        from ..layers.quantised import unquantised_tokens

        return unquantised_tokens.needed(self) or bool(original.__get__(self))

    return property(expects_unquantized_inputs)


HOOKS = (
    Hook(
        feature="quantised-experts",
        target="vllm.model_executor.layers.fused_moe.modular_kernel:"
        "FusedMoEExpertsModular.expects_unquantized_inputs",
        make=_expects,
        releases=">=0.20,<0.24",
        why="FP8 and INT8 experts get quantised tokens, but LoRA on gate and up needs the "
        "unquantised ones",
        upstream="https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/model_executor/layers/"
        "fused_moe/experts/triton_moe.py",
        until="0.24, which keeps the unquantised tokens for LoRA",
        layers=True,
    ),
)
