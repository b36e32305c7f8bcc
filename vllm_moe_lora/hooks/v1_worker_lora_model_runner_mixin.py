"""vllm/v1/worker/lora_model_runner_mixin.py: gives LoRA layers operators for compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _load_lora_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        from ..layers.cpu import compiled

        wrapped = original(self, model, vllm_config, device)
        compiled.prepare(vllm_config, wrapped, self.lora_manager._adapter_manager)
        return wrapped

    return load_lora_model


HOOKS = (
    Hook(
        feature="cpu-compile",
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model",
        make=_load_lora_model,
        releases=">=0.30,<0.34",
        why="the operators have to be there before the model is traced",
        upstream="",
        until="upstream's punica wrapper and experts are operators on the CPU, too",
    ),
)
