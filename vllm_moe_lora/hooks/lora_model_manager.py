"""vllm/lora/model_manager.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..log import get_logger, say_waiting
from ..patching import Hook

logger = get_logger(__name__)
GATE = "shared_expert_gate"


def _create_lora_modules(original: Callable[..., Any]) -> Callable[..., Any]:
    def _create_lora_modules(self: Any) -> None:
        from ..fitting.moe_layers import serves_moe
        from ..layers.shared_experts import aliases, gates

        say_waiting()
        # Up to 0.13 it is torch's, which LoRA cannot wrap.
        if gates.as_vllm_linear(self.model, {GATE}) and GATE not in self.supported_lora_modules:
            self.supported_lora_modules.append(GATE)
        original(self)
        if not serves_moe(self):
            return
        for wrapper in _punica(self):
            wrapper.moe_lora = True  # read by hooks/lora_punica_cpu.py
        aliases.once(self.modules)
        moved = aliases.rewire(self.model, self.modules)
        if moved:
            logger.debug("LoRA wrappers now also serve %d aliases: %s", len(moved), moved)
        self.moe_lora_unreachable = aliases.raw_references(self.model, self.modules)

    return _create_lora_modules


def _punica(manager: Any) -> list[Any]:
    """One for each tower of a multimodal model since 0.14, one before."""
    several = getattr(manager, "punica_wrapper_mapping", None)
    return list(several.values()) if several is not None else [manager.punica_wrapper]


def _add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def _add_adapter(self: Any, lora: Any) -> None:
        from ..fitting.moe_layers import serves_moe

        if serves_moe(self) or hasattr(lora, "moe_lora"):
            from ..fitting.fit import fit

            fit(self, lora)
        original(self, lora)

    return _add_adapter


def _activate_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def activate_adapter(self: Any, lora_id: int) -> Any:
        before = lora_id in self._active_adapters
        try:
            return original(self, lora_id)
        except Exception:
            from ..fitting.moe_layers import serves_moe

            if serves_moe(self) and not before:
                # Neither active nor known: its next request loads it again, and fails as loudly.
                self.deactivate_adapter(lora_id)
                self._registered_adapters.pop(lora_id, None)
            raise

    return activate_adapter


HOOKS = (
    Hook(
        feature="shared-experts",
        target="vllm.lora.model_manager:LoRAModelManager._create_lora_modules",
        make=_create_lora_modules,
        releases=">=0.13,<0.34",
        why="LoRA on shared_expert_gate, and on a router gate that the MoE layer owns, is "
        "silently ignored: the forward pass reaches the module by a name that is not rewired. Up "
        "to 0.19 LoRA on shared experts is written under one of their names and wiped under the "
        "other",
        upstream="",
        until="upstream points every alias of a wrapped module at its wrapper",
    ),
    Hook(
        feature="adapters",
        target="vllm.lora.model_manager:LoRAModelManager._add_adapter",
        make=_add_adapter,
        releases=">=0.13,<0.34",
        why="adapters on some experts, projections or with several ranks die with an "
        "AssertionError without text; tensors without a place in the model, of a wrong shape, or "
        "on a module that attention absorbs (MLA's kv_b_proj) are accepted and ignored",
        upstream="https://github.com/vllm-project/vllm/issues/55193",
        until="upstream accounts for every tensor of an adapter",
    ),
    Hook(
        feature="adapters",
        target="vllm.lora.model_manager:LoRAModelManager.activate_adapter",
        make=_activate_adapter,
        releases=">=0.13,<0.34",
        why="an adapter whose activation failed stays marked active, and later requests with its "
        "name silently run the base model",
        upstream="",
        until="upstream undoes a failed activation; 0.33 marks it active only at the end",
    ),
)
