"""Ranks of a data-parallel group without requests: they keep their adapters.

Such a rank runs a dummy batch of one token whenever another rank has a batch, because its experts
compute tokens of that one. Upstream loads dummy adapters for each of them, and then removes all
adapters of the rank, those of the other rank's tokens among them.
"""

from __future__ import annotations

from typing import Any


def has_adapters(runner: Any) -> bool:
    """Whether a model runner has adapters from files, which a dummy batch must leave alone.

    While vLLM warms up and captures CUDA graphs, there are only dummy adapters.
    """
    manager = getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)
    if manager is None:
        return False
    # hooks/lora_worker_manager.py sets the attribute.
    return any(hasattr(lora, "moe_lora_path") for lora in manager.list_adapters().values())
