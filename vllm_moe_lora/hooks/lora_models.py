"""vllm/lora/models.py (0.11 and 0.12)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

GATE = "shared_expert_gate"


def _create_lora_modules(original: Callable[..., Any]) -> Callable[..., Any]:
    def _create_lora_modules(self: Any) -> None:
        from ..layers.aliases import as_vllm_linear, once, rewire

        if as_vllm_linear(self.model, {GATE}) and GATE not in self.supported_lora_modules:
            self.supported_lora_modules.append(GATE)
        original(self)
        experts = (one for one in self.modules.values() if hasattr(one, "w2_lora_a_stacked"))
        if next(experts, None) is None:
            return  # a dense model keeps upstream's code
        self.punica_wrapper.moe_lora = True  # read by hooks/lora_punica_cpu.py
        once(self.modules)
        rewire(self.model, self.modules)

    return _create_lora_modules


HOOKS = (
    Hook(
        feature="one-wrapper",
        target="vllm.lora.models:LoRAModelManager._create_lora_modules",
        make=_create_lora_modules,
        releases=">=0.11.1,<0.12",
        why="shared experts are known by two names; LoRA is written under the first and wiped "
        "under the second. `shared_expert_gate` is a Linear of torch's, which LoRA cannot wrap",
        upstream="https://github.com/vllm-project/vllm/blob/v0.20.0/vllm/lora/model_manager.py",
        until="0.20, which wraps a module once",
        layers=True,
    ),
)
