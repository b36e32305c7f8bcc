"""vllm/model_executor/layers/fused_moe/experts/trtllm_lora_moe.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.model_executor.layers.fused_moe.experts.trtllm_lora_moe"


def _invoke_routed_moe(original: Callable[..., Any]) -> Callable[..., Any]:
    def invoke_routed_moe(self: Any, *, gemm1_lora_delta: Any, **more: Any) -> Any:
        from ..layers.gpu import trtllm

        delta = trtllm.up_first(self, gemm1_lora_delta)
        return original(self, gemm1_lora_delta=delta, **more)

    return invoke_routed_moe


def _batch_has_no_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def _batch_has_no_lora(lora_context: Any) -> bool:
        # Where tokens were gathered, the flag is about this rank's own.
        return lora_context.local_token_lora_mapping is None and bool(original(lora_context))

    return _batch_has_no_lora


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, *, topk_ids: Any, expert_map: Any, **more: Any) -> Any:
        from ..layers.gpu import trtllm

        ids, own = trtllm.placed(self, topk_ids, expert_map)
        return original(self, topk_ids=ids, expert_map=own, **more)

    return apply


_COMMON: dict[str, Any] = {
    "releases": ">=0.26,<0.34",
    "upstream": "https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/model_executor/layers/"
    "fused_moe/experts/trtllm_lora_moe.py",
    "layers": True,
}

HOOKS = (
    Hook(
        feature="gpu-experts",
        target=f"{_FILE}:TrtLlmBf16LoRAExperts.invoke_routed_moe",
        make=_invoke_routed_moe,
        why="on Blackwell gate's change is added to up and up's to gate where both are one slice "
        "(Qwen3.5-MoE, Qwen3-VL-MoE)",
        until="upstream turns the halves of one slice as TrtLlmMxfp4LoRAExperts does",
        **_COMMON,
    ),
    Hook(
        feature="gpu-experts",
        target=f"{_FILE}:_TrtLlmLoRAExpertsBase._batch_has_no_lora",
        make=_batch_has_no_lora,
        why="a rank whose own batch has no adapter leaves out those of tokens gathered from others",
        until="upstream asks for the gathered tokens' adapters",
        **_COMMON,
    ),
    Hook(
        feature="parallel-experts",
        target=f"{_FILE}:_TrtLlmLoRAExpertsBase.apply",
        make=_apply,
        why="where experts are uneven or dealt round robin, other experts than a token's answer",
        until="upstream tells the kernel where a rank's experts begin",
        **_COMMON,
    ),
)
