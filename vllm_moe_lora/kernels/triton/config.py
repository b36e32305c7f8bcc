"""Which tiles the kernels use: data by device, dtype and rank, and the rules for shapes.

What decides the bits of a sum (the steps along x, the number of parts) depends on the layer
only, never on the batch, so a request gets the same bits alone and in a batch. Row tiles stay
below 64, where tensor cores take the same `mma.sync` path on every part.

Nothing here was measured on a GPU yet: the sizes were chosen from registers, spills and shared
memory of compiled kernels, and tests/kernels/test_compiled.py holds them to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

# Up to here the pairs are ranked against each other in one launch instead of counted in three.
RANKED_PAIRS = 2048
RANK_BLOCK, RANK_AGAINST, RANK_WARPS = 32, 128, 4
COUNT_BLOCK, COUNT_WARPS = 256, 4
SCAN_BLOCK, SCAN_WARPS = 2048, 8

# Up to here tiles alone do not fill a GPU: small row tiles, and every part of a sum its program.
FEW_PAIRS = 1024
PARTS = 4
PARTS_FROM_WIDTH = 1024  # narrower sums are one part

ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
AMD_STAGES = 2  # the compiler's own default there: 64 KB of shared memory hold no more
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch options of one shrink and its expand."""

    tile_rows: int
    block_r: int
    block_k: int
    shrink_warps: int
    shrink_stages: int
    block_n: int
    expand_warps: int


@dataclass(frozen=True)
class BaseTiles:
    """Tile sizes and launch options of the base's product with LoRA as its tail."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    warps: int
    stages: int
    block_r: int  # ranks that the tail takes at a time


# By bytes of an element; a batch's block_m is that of the base's order.
_BASE = {
    2: (
        BaseTiles(16, 128, 128, 1, 4, 3, 16),
        BaseTiles(32, 128, 64, 8, 4, 3, 16),
        # 4 warps, or 128 columns for 128 rows, spill in the tail on sm_80 (Triton 3.9.0).
        BaseTiles(64, 128, 64, 8, 8, 3, 16),
        BaseTiles(128, 64, 64, 8, 8, 3, 16),
    ),
    4: (
        BaseTiles(16, 64, 32, 1, 4, 3, 16),
        BaseTiles(32, 64, 32, 8, 4, 3, 16),
    ),
}

# By bytes of an element. fp32 runs without tensor cores: 16 rows and 32 ranks fill its registers.
_DEFAULT = {
    2: (
        Tiles(16, 16, 128, 4, 4, 128, 4),
        Tiles(16, 32, 128, 4, 3, 128, 4),
        Tiles(16, 64, 64, 4, 4, 128, 4),
        Tiles(32, 16, 128, 4, 4, 128, 8),
        Tiles(32, 32, 128, 8, 3, 128, 8),
        Tiles(32, 64, 64, 8, 4, 128, 8),
    ),
    4: (
        Tiles(16, 16, 64, 4, 3, 64, 4),
        Tiles(16, 32, 32, 4, 3, 64, 4),
    ),
}
# A part that was measured gets its own table here; the others run the default's.
_MEASURED: dict[str, dict[int, tuple[Tiles, ...]]] = {}


def measured(arch: str) -> bool:
    """Whether the kernels were measured on this part, and found to be worth it."""
    return arch in _MEASURED


def table(arch: str, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """Every choice there is for a device and a dtype."""
    found = _MEASURED.get(arch, _DEFAULT)[dtype.itemsize]
    if arch in _MEASURED or not arch.startswith("gfx"):
        return found
    return tuple(replace(one, shrink_stages=min(one.shrink_stages, AMD_STAGES)) for one in found)


def tile_rows(arch: str, dtype: torch.dtype, num_pairs: int) -> int:
    """Rows of a tile: the smallest of the table for few pairs, else the largest."""
    rows = {tiles.tile_rows for tiles in table(arch, dtype)}
    return min(rows) if num_pairs <= FEW_PAIRS else max(rows)


def tiles_for(arch: str, dtype: torch.dtype, rows: int, max_rank: int) -> Tiles:
    """The narrowest rank tile that holds ``max_rank``, or the widest there is."""
    fitting = [tiles for tiles in table(arch, dtype) if tiles.tile_rows == rows]
    fitting.sort(key=lambda tiles: tiles.block_r)
    return next((tiles for tiles in fitting if tiles.block_r >= max_rank), fitting[-1])


def base_table(arch: str, dtype: torch.dtype) -> tuple[BaseTiles, ...]:
    """Every choice there is for the base's product."""
    found = _BASE[dtype.itemsize]
    if not arch.startswith("gfx"):
        return found
    return tuple(replace(one, stages=min(one.stages, AMD_STAGES)) for one in found)


def base_tiles(arch: str, dtype: torch.dtype, block_m: int) -> BaseTiles | None:
    """Tiles of the base's product for an order in blocks of ``block_m`` rows, if there are any."""
    fitting = [tiles for tiles in base_table(arch, dtype) if tiles.block_m == block_m]
    return fitting[0] if fitting else None


def parts_for(width: int) -> int:
    """Parts that a sum over ``width`` elements is cut into."""
    return PARTS if width >= PARTS_FROM_WIDTH else 1


def splits(num_pairs: int) -> bool:
    """Whether the parts of a sum are programs of their own."""
    return num_pairs <= FEW_PAIRS


def max_tiles(num_pairs: int, num_segments: int, rows: int) -> int:
    """Tiles that a batch of ``num_pairs`` can need, however it is routed."""
    segments = min(num_pairs, num_segments)
    return min(num_pairs, (num_pairs + segments * (rows - 1)) // rows)


def _variants(arch: str) -> Iterator[tuple[torch.dtype, Tiles, int]]:
    for dtype in DTYPES:
        for tiles in table(arch, dtype):
            for slices in (1, 2):
                yield dtype, tiles, slices


def shrink_variants(arch: str) -> Iterator[tuple[torch.dtype, Tiles, int, bool]]:
    """Every (dtype, tiles, slices, by pair) the shrink can be compiled for."""
    for variant in _variants(arch):
        for by_pair in (False, True):
            yield *variant, by_pair


def expand_variants(arch: str) -> Iterator[tuple[torch.dtype, Tiles, int, int, bool, bool]]:
    """Every (dtype, tiles, slices, parts, weighted, added) the expand can be compiled for."""
    for dtype, tiles, slices in _variants(arch):
        few = tiles.tile_rows == tile_rows(arch, dtype, FEW_PAIRS)
        for parts in (1, PARTS) if few else (1,):
            for weighted in (False, True):
                for added in (False, True):
                    yield dtype, tiles, slices, parts, weighted, added


def base_variants(
    arch: str,
) -> Iterator[tuple[torch.dtype, BaseTiles, int, int, bool, bool, bool, bool]]:
    """Some (dtype, tiles, slices, parts, sorted, lora, weighted, even k) of the base's product.

    Not all it can be compiled for: for all tiles each switch once, as layers have them; few pairs,
    which are not sorted, come in the smallest blocks.
    """
    for dtype in DTYPES:
        for tiles in base_table(arch, dtype):
            yield dtype, tiles, 1, 1, True, False, True, True
            yield dtype, tiles, 2, PARTS, True, True, False, True
            yield dtype, tiles, 1, 1, True, True, True, False
            if tiles.block_m == 16:
                yield dtype, tiles, 2, PARTS, False, True, False, True
