"""vllm/lora/model_manager.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_moe_lora.log import get_logger
from vllm_moe_lora.patching import Hook

logger = get_logger(__name__)


def _create_lora_modules(original: Callable[..., Any]) -> Callable[..., Any]:
    def _create_lora_modules(self: Any) -> None:
        if self._is_moe:
            for wrapper in self.punica_wrapper_mapping.values():
                wrapper.moe_lora = True  # read by hooks/lora_punica_cpu.py
        original(self)
        from vllm_moe_lora.layers.aliases import raw_references, rewire

        moved = rewire(self.model, self.modules)
        if moved:
            logger.debug("LoRA wrappers now also serve %d aliases: %s", len(moved), moved)
        self._moe_lora_unreachable = raw_references(self.model, self.modules)

    return _create_lora_modules


def _add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def _add_adapter(self: Any, lora: Any) -> None:
        for name in lora.loras:
            holder = self._moe_lora_unreachable.get(name)
            if holder is not None and not _is_zero(lora.loras[name]):
                raise ValueError(
                    f"LoRA adapter {lora.id}: {name} cannot take LoRA in vLLM: its weight is read "
                    f"raw by {holder}, so the adapter would be ignored there. Merge the adapter "
                    "into the model, or train without this module."
                )
        original(self, lora)

    return _add_adapter


def _is_zero(weights: Any) -> bool:
    """Whether a LoRA changes nothing (vLLM's own warm-up adapters are zeros)."""
    b = weights.lora_b
    return all(not part.any() for part in (b if isinstance(b, list) else [b]) if part is not None)


_COMMON: dict[str, Any] = {
    "feature": "aliases",
    "releases": ">=0.29,<0.34",
    "until": "upstream points every alias of a wrapped module at its wrapper",
}

HOOKS = (
    Hook(
        target="vllm.lora.model_manager:LoRAModelManager._create_lora_modules",
        make=_create_lora_modules,
        why="LoRA on shared_expert_gate, and on a router gate that the MoE layer owns, is "
        "silently ignored: the forward pass reaches the module by a name that is not rewired",
        upstream="",
        **_COMMON,
    ),
    Hook(
        target="vllm.lora.model_manager:LoRAModelManager._add_adapter",
        make=_add_adapter,
        why="LoRA on a module that attention absorbs (MLA's kv_b_proj) is accepted and ignored",
        upstream="",
        **_COMMON,
    ),
)
