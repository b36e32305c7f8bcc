"""vllm/v1/worker/gpu_model_runner.py: prompt log-probs, new weights, CUDA graphs with LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_CLASS = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"


def _get_prompt_logprobs_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_prompt_logprobs_dict(self: Any, hidden_states: Any, *args: Any, **more: Any) -> Any:
        if not self.num_prompt_logprobs or not self.lora_config:
            return original(self, hidden_states, *args, **more)
        from ..layers.prompt_logprobs import rows_of_prompts

        with rows_of_prompts(self, hidden_states):
            return original(self, hidden_states, *args, **more)

    return _get_prompt_logprobs_dict


def _reload_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    def reload_weights(self: Any, *args: Any, **more: Any) -> Any:
        if self.lora_config and self.model_config.is_moe:
            raise NotImplementedError(
                "reload_weights is not supported for MoE models with LoRA on a CPU: the experts' "
                "weights are packed, and vLLM would compute wrong answers after it. Start a new "
                "engine with the new weights."
            )
        return original(self, *args, **more)

    return reload_weights


def _determine_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def _determine_batch_execution_and_padding(self: Any, *args: Any, **more: Any) -> Any:
        from ..layers.gpu.data_parallel import wants_lora_graph

        if wants_lora_graph(self, more.get("force_has_lora")):
            more["force_has_lora"] = True
            more["force_num_active_loras"] = self.lora_config.max_loras + 1
        return original(self, *args, **more)

    return _determine_batch_execution_and_padding


HOOKS = (
    Hook(
        feature="isolation",
        target=f"{_CLASS}._get_prompt_logprobs_dict",
        make=_get_prompt_logprobs_dict,
        releases=">=0.29,<0.34",
        why="prompt log-probs of a request in a batch with an adapter on lm_head are computed with "
        "the adapters of other requests, or stop the engine",
        upstream="",
        until="upstream sets the LoRA mapping of lm_head for the rows of each prompt",
    ),
    Hook(
        feature="data-parallel-gpu",
        target=f"{_CLASS}._determine_batch_execution_and_padding",
        make=_determine_batch,
        releases=">=0.30,<0.34",
        platforms=("cuda",),
        layers=True,
        why="with data parallelism, a batch without adapters runs a CUDA graph without LoRA, which "
        "also computes tokens of other ranks",
        upstream="",
        until="all ranks agree on whether any of them has an adapter in its batch",
    ),
    Hook(
        feature="cpu-experts",
        target=f"{_CLASS}.reload_weights",
        make=_reload_weights,
        releases=">=0.30,<0.34",
        platforms=("cpu",),
        why="after reload_weights, MoE models give wrong answers on a CPU, also without LoRA, and "
        "adapters are lost",
        upstream="",
        until="upstream packs the CPU's experts again after it loads their weights",
    ),
)
