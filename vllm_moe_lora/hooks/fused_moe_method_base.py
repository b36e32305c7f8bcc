"""vllm/model_executor/layers/fused_moe/fused_moe_method_base.py: experts for quantised layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _select_gemm_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    def select_gemm_impl(self: Any, prepare_finalize: Any, layer: Any) -> Any:
        from ..layers.quantised import select_experts

        return select_experts.make_experts(
            self, layer, lambda: original(self, prepare_finalize, layer)
        )

    return select_gemm_impl


HOOKS = (
    Hook(
        feature="quantised-experts",
        target="vllm.model_executor.layers.fused_moe.fused_moe_method_base:"
        "FusedMoEMethodBase.select_gemm_impl",
        make=_select_gemm_impl,
        releases=">=0.12,<0.28",
        why="some quantisation methods do not provide experts for LoRA, so the start fails with a "
        "NotImplementedError or ValueError: MoeWNA16, up to 0.13 the WNA16 method of "
        "compressed_tensors, and in 0.12 GPTQ and AWQ",
        upstream="https://github.com/vllm-project/vllm/blob/v0.27.1/vllm/model_executor/layers/"
        "quantization/moe_wna16.py",
        until="0.28, which does not have this function any more",
        layers=True,
    ),
)
