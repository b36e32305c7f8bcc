"""vllm/lora/model_manager.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..log import get_logger
from ..patching import Hook

logger = get_logger(__name__)


def _create_lora_modules(original: Callable[..., Any]) -> Callable[..., Any]:
    def _create_lora_modules(self: Any) -> None:
        if not self._is_moe:
            return original(self)
        for wrapper in self.punica_wrapper_mapping.values():
            wrapper.moe_lora = True  # read by hooks/lora_punica_cpu.py
        original(self)
        from ..layers.aliases import raw_references, rewire

        moved = rewire(self.model, self.modules)
        if moved:
            logger.debug("LoRA wrappers now also serve %d aliases: %s", len(moved), moved)
        self.moe_lora_unreachable = raw_references(self.model, self.modules)

        return None

    return _create_lora_modules


def _add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def _add_adapter(self: Any, lora: Any) -> None:
        if self._is_moe or hasattr(lora, "moe_lora"):
            from ..store.fit import fit

            fit(self, lora)
        original(self, lora)

    return _add_adapter


def _activate_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def activate_adapter(self: Any, lora_id: int) -> Any:
        before = lora_id in self._active_adapters
        try:
            return original(self, lora_id)
        except Exception:
            if self._is_moe and not before:
                # Neither active nor known: its next request loads it again, and fails as loudly.
                self.deactivate_adapter(lora_id)
                self._registered_adapters.pop(lora_id, None)
            raise

    return activate_adapter


HOOKS = (
    Hook(
        feature="aliases",
        target="vllm.lora.model_manager:LoRAModelManager._create_lora_modules",
        make=_create_lora_modules,
        releases=">=0.29,<0.34",
        why="LoRA on shared_expert_gate, and on a router gate that the MoE layer owns, is "
        "silently ignored: the forward pass reaches the module by a name that is not rewired",
        upstream="",
        until="upstream points every alias of a wrapped module at its wrapper",
    ),
    Hook(
        feature="adapters",
        target="vllm.lora.model_manager:LoRAModelManager._add_adapter",
        make=_add_adapter,
        releases=">=0.29,<0.34",
        why="adapters on some experts, projections or with several ranks die with an "
        "AssertionError without text; tensors without a place in the model, of a wrong shape, or "
        "on a module that attention absorbs (MLA's kv_b_proj) are accepted and ignored",
        upstream="https://github.com/vllm-project/vllm/issues/55193",
        until="upstream accounts for every tensor of an adapter",
    ),
    Hook(
        feature="safe-loading",
        target="vllm.lora.model_manager:LoRAModelManager.activate_adapter",
        make=_activate_adapter,
        releases=">=0.29,<0.34",
        why="an adapter whose activation failed stays marked active, and later requests with its "
        "name silently run the base model",
        upstream="",
        until="upstream undoes a failed activation; 0.33 marks it active only at the end",
    ),
)
