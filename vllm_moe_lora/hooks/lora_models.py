"""vllm/lora/models.py (0.11 and 0.12), which 0.13 split into model_manager.py and lora_model.py.

The hooks are those of the two later files, with another target.
"""

from __future__ import annotations

from dataclasses import replace

from ..patching import Hook
from . import lora_lora_model, lora_model_manager


def _earlier(hook: Hook) -> Hook:
    """Return the hook for 0.11.1 to 0.12."""
    name = hook.target.partition(":")[2]
    return replace(hook, target=f"vllm.lora.models:{name}", releases=">=0.11.1,<0.13")


_LATER = lora_lora_model.HOOKS + lora_model_manager.HOOKS
HOOKS = tuple(_earlier(hook) for hook in _LATER if hook.releases.startswith(">=0.13,"))
