"""vllm/model_executor/layers/fused_moe/experts/trtllm_lora_moe.py: TRT-LLM experts on Blackwell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_FILE = "vllm.model_executor.layers.fused_moe.experts.trtllm_lora_moe"


def _invoke_routed_moe(original: Callable[..., Any]) -> Callable[..., Any]:
    def invoke_routed_moe(self: Any, *, gemm1_lora_delta: Any, **more: Any) -> Any:
        from ..layers.gpu import trtllm

        delta = trtllm.swap_gate_up(self, gemm1_lora_delta)
        return original(self, gemm1_lora_delta=delta, **more)

    return invoke_routed_moe


def _batch_has_no_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    def _batch_has_no_lora(lora_context: Any) -> bool:
        # The original asks for the tokens of this device only. local_token_lora_mapping is set if
        # tokens of other devices were gathered.
        return lora_context.local_token_lora_mapping is None and bool(original(lora_context))

    return _batch_has_no_lora


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, *, topk_ids: Any, expert_map: Any, **more: Any) -> Any:
        from ..layers.gpu import trtllm

        ids, own = trtllm.renumber(self, topk_ids, expert_map)
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
        why="on Blackwell the LoRA of gate is added to up, and that of up to gate, in models whose "
        "gate_up is fused (Qwen3.5-MoE and others)",
        until="upstream swaps gate and up of a fused slice, as TrtLlmMxfp4LoRAExperts does",
        **_COMMON,
    ),
    Hook(
        feature="gpu-experts",
        target=f"{_FILE}:_TrtLlmLoRAExpertsBase._batch_has_no_lora",
        make=_batch_has_no_lora,
        why="a device whose own tokens have no adapter adds no LoRA to the tokens that it gathered "
        "from other devices",
        until="upstream also asks for the adapters of the gathered tokens",
        **_COMMON,
    ),
    Hook(
        feature="parallel-experts",
        target=f"{_FILE}:_TrtLlmLoRAExpertsBase.apply",
        make=_apply,
        why="with expert parallelism, tokens run through the wrong experts if the number of "
        "experts is not divisible by the ranks, or with round_robin placement",
        until="upstream tells the kernel the number of the first expert of each rank",
        **_COMMON,
    ),
)
