"""vllm/config/model.py: whether a model's class declares LoRA, before any weight is read."""

from __future__ import annotations

from typing import Any

from ..patching import Hook


def _is_lora_supported(original: property) -> property:
    def is_lora_supported(self: Any) -> bool:
        from ..models.declare import named

        get = original.fget
        assert get is not None
        row = named(self._model_info.architecture)
        return bool(get(self)) or (row is not None and not row.refused)

    return property(is_lora_supported)


HOOKS = (
    Hook(
        feature="model-classes",
        target="vllm.config.model:ModelConfig.is_lora_supported",
        make=_is_lora_supported,
        releases=">=0.33,<0.34",
        why="MoE classes that could serve adapters do not declare LoRA, and the engine then does "
        "not start with --enable-lora",
        upstream="https://github.com/vllm-project/vllm/issues/43840",
        until="upstream's classes declare LoRA completely: see models/rows.py",
    ),
)
