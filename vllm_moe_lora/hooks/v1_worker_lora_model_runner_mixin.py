"""vllm/v1/worker/lora_model_runner_mixin.py: refuses model classes that declare no LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _load_lora_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_lora_model(self: Any, model: Any, *args: Any, **more: Any) -> Any:
        from ..models.declare import declare

        declare(model)
        return original(self, model, *args, **more)

    return load_lora_model


HOOKS = (
    Hook(
        feature="model-classes",
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model",
        make=_load_lora_model,
        releases=">=0.11.1,<0.34",
        why="MoE classes that could serve adapters, such as Kimi K2.5's, do not declare LoRA, and "
        "other classes declare only a part of their merged modules, so that ordinary adapters are "
        "refused",
        upstream="https://github.com/vllm-project/vllm/issues/43840",
        until="upstream's classes declare LoRA completely: see models/rows.py",
    ),
)
