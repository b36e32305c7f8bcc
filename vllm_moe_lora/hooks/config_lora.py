"""vllm/config/lora.py: refuses a model whose class declares no LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook


def _verify_with_model_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def verify_with_model_config(self: Any, model_config: Any) -> None:
        from ..models.declare import named

        try:
            original(self, model_config)
        except ValueError as error:
            row = named(model_config._model_info.architecture)
            if row is None or not row.refused:
                raise
            raise ValueError(f"{error} The reason: {row.refused}") from error

    return verify_with_model_config


HOOKS = (
    Hook(
        feature="model-classes",
        target="vllm.config.lora:LoRAConfig.verify_with_model_config",
        make=_verify_with_model_config,
        releases=">=0.33,<0.34",
        why="the error for a MoE class that cannot serve adapters does not say why",
        upstream="",
        until="upstream says why, or no class is refused in models/rows.py",
    ),
)
