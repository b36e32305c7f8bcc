"""vllm/v1/worker/gpu_model_runner.py: prompt log-probs, and reloading the base model's weights."""

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
            from ..rl.base_weights import suspend_experts

            suspend_experts(self.get_model())
        return original(self, *args, **more)

    return reload_weights


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
        feature="cpu-experts",
        target=f"{_CLASS}.reload_weights",
        make=_reload_weights,
        releases=">=0.30,<0.34",
        platforms=("cpu",),
        why="the CPU experts with LoRA have wider weights than those that are loaded, so "
        "reload_weights fails",
        upstream="",
        until="upstream's CPU experts support LoRA",
    ),
)
