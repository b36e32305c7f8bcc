"""Which adapter is in which slot, on all ranks of a data-parallel group.

With data parallelism the experts of a rank compute tokens of all ranks, and a token comes with the
number of its adapter's slot. So a slot has to hold the same adapter on every rank whenever a token
of it may arrive. The front end knows all unfinished requests. It decides here, and has all ranks
carry it out (`loading/admit.py`, `loading/assigned.py`):

- An adapter gets a slot on all ranks before its first request is scheduled on one of them.
- It loses the slot only after its last request has ended. Others wait for that.
- Several front ends do not know each other's requests. Then the slot of an adapter never changes:
  it is its id minus 1, so there are no more adapters than slots.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from ..adapters.errors import AdapterError


class GroupSlots:
    """The slots of a group, as its front end gives them out.

    Args:
        number: how many slots a rank has (max_loras).
        fixed: whether several front ends give out the slots.
    """

    def __init__(self, number: int, fixed: bool = False) -> None:
        self._number, self._fixed = number, fixed
        self._held: OrderedDict[int, int] = (
            OrderedDict()
        )  # adapter id -> slot, longest unused first
        # Adapters that give up their slot when their requests have ended; new ones have to wait.
        self._retiring: dict[int, int] = {}
        self._queue: list[int] = []  # ids that wait for a slot, in order

    def find(self, lora_id: int) -> int | None:
        """The slot of an adapter, which counts as just used; None if it has none."""
        if lora_id in self._held:
            self._held.move_to_end(lora_id)
        return self._held.get(lora_id)

    @contextmanager
    def queued(self, lora_id: int) -> Iterator[None]:
        """Wait in line for a slot, inside the block."""
        self._queue.append(lora_id)
        try:
            yield
        finally:
            self._queue.remove(lora_id)

    def take(self, lora_id: int, busy: Mapping[int, int], pinned: Collection[int]) -> int | None:
        """Give a slot to an adapter that is `queued`.

        Args:
            lora_id: the adapter's id.
            busy: adapter id -> number of unfinished requests.
            pinned: ids of adapters that keep their slot.

        Returns:
            The slot; None if others are first, or no slot is free.

        Raises:
            AdapterError: with several front ends there is no slot for this id.
        """
        if self._fixed:
            if lora_id > self._number:
                raise AdapterError(
                    f"LoRA adapter {lora_id}: several API servers share the engines of a "
                    f"data-parallel group, so only ids 1 to {self._number} have a slot. Raise "
                    "--max-loras to the number of adapters, or start with --api-server-count 1."
                )
            slot: int | None = lora_id - 1
        elif self._queue[0] != lora_id:
            return None
        elif lora_id in self._retiring:
            slot = self._retiring.pop(lora_id)
        else:
            slot = self._free(busy, pinned)
        if slot is not None:
            self._held[lora_id] = slot
        return slot

    def _free(self, busy: Mapping[int, int], pinned: Collection[int]) -> int | None:
        taken = {*self._held.values(), *self._retiring.values()}
        for slot in range(self._number):
            if slot not in taken:
                return slot
        for where in (self._retiring, self._held):
            for lora_id in where:
                if not busy.get(lora_id) and lora_id not in pinned:
                    return where.pop(lora_id)
        return None

    def retire(self, pinned: Collection[int]) -> None:
        """Let the adapter that was used longest ago take no new requests until it had no slot.

        Without this, steady traffic for other adapters would keep those in the queue out for ever.
        """
        if not self._retiring:
            lora_id = next((i for i in self._held if i not in pinned), None)
            if lora_id is not None:
                self._retiring[lora_id] = self._held.pop(lora_id)

    def forget(self, lora_id: int) -> None:
        """Free the slot of an adapter that has no requests."""
        self._held.pop(lora_id, None)
        self._retiring.pop(lora_id, None)
