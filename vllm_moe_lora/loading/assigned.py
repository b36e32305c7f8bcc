"""Puts an adapter into the slot that the front end gave it, in a worker of a data-parallel group.

The front end sends the slot with the adapter's path, as `SLOT_PREFIX` says (`loading/admit.py`).
The worker keeps it with the adapter's id, so later calls for this adapter find it, too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..adapters.errors import AdapterError
from ..fitting.moe_layers import in_group

SLOT_PREFIX = "vllm-moe-lora-slot-"  # before the slot, "/", and the path
_SLOT = re.compile(SLOT_PREFIX + r"(\d+)/(.*)", re.DOTALL)
_TAKEN = -1  # stands for an adapter in the slots that another one must not get; no adapter's id


def with_slot(request: Any, slot: int) -> Any:
    """A copy of a LoRARequest that tells the workers the slot of its adapter."""
    found = copy.copy(request)
    found.lora_path = f"{SLOT_PREFIX}{slot}/{request.lora_path}"
    return found


def note(manager: Any, request: Any) -> Any:
    """Note the slot of a LoRARequest, and make the slot free for it.

    Args:
        manager: the worker's `LoRAModelManager`.
        request: it may come from `with_slot`.

    Returns:
        The request with the adapter's own path.
    """
    match = _SLOT.fullmatch(request.lora_path)
    if match is None:
        return request
    slot, lora_id = int(match[1]), request.lora_int_id
    slots = vars(manager).setdefault("moe_lora_slots", {})
    slots[lora_id] = slot
    here = manager.lora_index_to_id
    for index, other in enumerate(here):
        if (other == lora_id) != (index == slot) and other is not None:
            manager.deactivate_adapter(other)
            if other != lora_id:
                slots.pop(other, None)
    # vLLM keeps the slots of the last batch's tokens, and compares batches by adapter ids only.
    manager._last_mapping = None
    plain = copy.copy(request)
    plain.lora_path = match[2]
    return plain


@contextmanager
def only_slot(manager: Any, lora_id: int) -> Iterator[None]:
    """Hide the free slots that an adapter must not get, while it is activated in the block.

    Without a slot from the front end all slots stay visible.

    Args:
        manager: the worker's `LoRAModelManager`, which takes the first free slot.
        lora_id: the adapter's id.
    """
    slot = getattr(manager, "moe_lora_slots", {}).get(lora_id)
    if slot is None:
        yield
        return
    ids = manager.lora_index_to_id
    hidden = [i for i, held in enumerate(ids) if held is None and i != slot]
    for index in hidden:
        ids[index] = _TAKEN
    try:
        yield
    finally:
        for index in hidden:
            ids[index] = None


def check(manager: Any, lora_id: int) -> None:
    """Refuse an adapter without a slot of the group, where experts get tokens of other ranks.

    A slot of this rank's own choice could hold another adapter on other ranks. Dummy adapters,
    which vLLM makes itself, are left alone.

    Args:
        manager: the worker's `LoRAModelManager`.
        lora_id: of an adapter that is about to be activated.

    Raises:
        AdapterError: the front end did not load it.
    """
    lora = manager._registered_adapters.get(lora_id)
    has_slot = lora_id in getattr(manager, "moe_lora_slots", {})
    if has_slot or not hasattr(lora, "moe_lora_path") or not in_group(manager):
        return
    raise AdapterError(
        f"LoRA adapter {lora_id}: with data parallelism it needs the same slot on all ranks, which "
        "the server gives it. Load it by the server's routes, --lora-modules, or AsyncLLM.add_lora."
    )


def forget(manager: Any, lora_id: int) -> None:
    """Forget the slot of an adapter that is removed."""
    getattr(manager, "moe_lora_slots", {}).pop(lora_id, None)
