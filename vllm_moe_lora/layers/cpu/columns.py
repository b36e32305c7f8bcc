"""Which columns of a widened weight belong to which adapter slot; see unquantized.py."""

from __future__ import annotations


class ColumnAllocator:
    """Gives each adapter slot a range of columns, first-fit. The number of columns grows as needed.

    A range is as wide as the adapter's own rank needs, not `max_lora_rank`. So columns that no
    adapter uses are neither stored nor multiplied.

    Attributes:
        granule: the capacity is a multiple of it.
        capacity: the number of columns that the weight needs to have. It never shrinks.
        regions: slot -> (first column, number of columns).
    """

    def __init__(self, granule: int = 32) -> None:
        self.granule = granule
        self.capacity = 0
        self.regions: dict[int, tuple[int, int]] = {}

    def take(self, slot: int, width: int) -> tuple[int, bool]:
        """Reserve ``width`` columns for ``slot``.

        Returns:
            The first column, and whether the capacity grew.

        Raises:
            ValueError: the slot has columns already.
        """
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
        """Free a slot's columns, if it has any.

        Returns:
            The range that it had: (first column, number of columns), or None.
        """
        return self.regions.pop(slot, None)
