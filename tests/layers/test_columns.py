"""The columns that adapter slots get in the widened CPU weights (layers/cpu/columns.py)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_lora.layers.cpu.columns import ColumnAllocator


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=40))
def test_columns_never_overlap_and_are_reused(steps):
    columns, widest = ColumnAllocator(), 0
    for slot, width in steps:
        columns.release(slot)
        before = columns.capacity
        first, grows = columns.take(slot, width)
        assert grows == (columns.capacity > before)
        regions = sorted(columns.regions.values())
        for (a, n), (b, _) in itertools.pairwise(regions):
            assert a + n <= b
        assert first + width <= columns.capacity
        assert columns.capacity % columns.granule == 0
        widest = max(widest, sum(n for _, n in regions))
    assert columns.capacity >= widest
    with pytest.raises(ValueError, match="already holds"):
        columns.take(0, 1) if 0 in columns.regions else (columns.take(0, 1), columns.take(0, 1))
