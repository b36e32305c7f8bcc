"""Which columns of a widened weight belong to which adapter slot."""

from __future__ import annotations


class ColumnAllocator:
    """First-fit regions of a growing row of columns, one region a slot.

    A region is as wide as the adapter's own rank, not `max_lora_rank`: what no adapter uses is
    neither stored nor multiplied.
    """

    def __init__(self, granule: int = 32) -> None:
        self.granule = granule
        self.capacity = 0
        self.regions: dict[int, tuple[int, int]] = {}

    def take(self, slot: int, width: int) -> tuple[int, bool]:
        """Reserve ``width`` columns for ``slot``: (first column, whether capacity had to grow)."""
        if slot in self.regions:
            raise ValueError(f"adapter slot {slot} already holds columns {self.regions[slot]}")
        start = 0
        for first, taken in sorted(self.regions.values()):
            if first - start >= width:
                break
            start = first + taken
        self.regions[slot] = (start, width)
        grows = start + width > self.capacity
        if grows:
            self.capacity = -(-(start + width) // self.granule) * self.granule
        return start, grows

    def release(self, slot: int) -> tuple[int, int] | None:
        """Give a slot's columns back; returns what it held."""
        return self.regions.pop(slot, None)
