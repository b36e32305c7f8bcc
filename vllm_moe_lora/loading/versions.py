"""Notices that adapters were replaced inside of workers, where the front end does not see it.

A trainer may load an adapter by a call to the workers (`collective_rpc`), as verl does. Requests
name it as before, so prefixes that were computed with the earlier version would be found. The
engine's core compares after each such call how often each adapter was loaded, and puts a number
into the keys of cached prefixes.
"""

from __future__ import annotations

from typing import Any

_replaced: dict[int, int] = {}  # in the engine's core: adapter id -> how often it was replaced


def count_load(manager: Any, lora_id: int) -> None:
    """Count that an adapter was loaded, in a worker.

    Args:
        manager: vLLM's `LoRAModelManager`.
        lora_id: the adapter's id.
    """
    if not hasattr(manager, "moe_lora_loads"):
        manager.moe_lora_loads = {}
    manager.moe_lora_loads[lora_id] = manager.moe_lora_loads.get(lora_id, 0) + 1


def loads(worker: Any) -> dict[int, int]:
    """Adapter id -> how often it was loaded; called on a worker.

    Args:
        worker: vLLM's worker, or its wrapper.
    """
    runner = getattr(getattr(worker, "worker", worker), "model_runner", None)
    manager = getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)
    return dict(getattr(manager, "moe_lora_loads", {}))


def compare(core: Any) -> None:
    """Ask the workers what was loaded, after a call to them.

    Args:
        core: vLLM's `EngineCore`.
    """
    before = getattr(core, "moe_lora_loads", {})
    now = core.model_executor.collective_rpc(loads)[0]
    for lora_id, count in now.items():
        if before.get(lora_id, 0) != count:
            _replaced[lora_id] = _replaced.get(lora_id, 0) + 1
    core.moe_lora_loads = now


def keys(lora_id: int) -> list[Any]:
    """What to add to the keys of prefixes that were computed with an adapter."""
    return [("lora version", _replaced[lora_id])] if lora_id in _replaced else []
