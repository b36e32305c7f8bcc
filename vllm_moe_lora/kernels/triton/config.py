"""Tile sizes of the Triton kernels: tables by GPU architecture, dtype and rank, and how to choose.

The order in which a sum is added depends on the steps along x and on the number of parts. Both are
chosen from the layer's shape only, never from the batch. So a request gets the same bits alone and
in a batch. Tiles of the LoRA kernels have fewer than 64 rows: there NVIDIA's tensor cores use the
same `mma.sync` instructions on every GPU. On AMD `_matrix_options` asks for one.

No size was measured on a GPU yet. They were chosen by the registers, spills and shared memory of
the compiled kernels, and tests/kernels/test_compiled.py checks these. `vllm-moe-lora tune` measures
other sizes on the user's GPU (`search_space`), and its records replace them (`use`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

# Routing: up to this many pairs, one launch of `rank_kernel` sorts them instead of a counting sort
# in three launches. The other numbers are pairs or segments per program, and warps.
RANKED_PAIRS = 2048
RANK_BLOCK, RANK_AGAINST, RANK_WARPS = 32, 128, 4
COUNT_BLOCK, COUNT_WARPS = 256, 4
SCAN_BLOCK, SCAN_WARPS = 2048, 8

# Up to this many pairs, a batch has too few tiles to fill a GPU. Then tiles have fewer rows, and
# each part of a sum over x (split-K) is a program of its own.
FEW_PAIRS = 1024
PARTS = 4
PARTS_FROM_WIDTH = 1024  # a sum over a narrower x has one part

ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")  # the architectures that the tests compile for
AMD_STAGES = 2  # most pipeline stages on AMD: more do not fit into 64 KB of shared memory
AMD_WARPS = 4  # most warps of an expand on AMD: each of its 64 threads should load 16 bytes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # what the kernels compute in


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch options of a shrink and the expand after it.

    Attributes:
        tile_rows: pairs per tile, in both kernels.
        block_r: ranks per program of the shrink, and per step of the expand.
        block_k: elements of x per step of the shrink.
        shrink_warps, shrink_stages: warps and pipeline stages of the shrink.
        block_n: columns of y per program of the expand.
        expand_warps: warps of the expand.
    """

    tile_rows: int
    block_r: int
    block_k: int
    shrink_warps: int
    shrink_stages: int
    block_n: int
    expand_warps: int


@dataclass(frozen=True)
class BaseTiles:
    """Tile sizes and launch options of the base experts' grouped GEMM with a LoRA tail (base.py).

    Attributes:
        block_m: rows (pairs) per program.
        block_n: columns of y per program.
        block_k: elements of x per step.
        group_m: row blocks whose programs run next to each other, to share a weight in the cache.
        warps, stages: warps and pipeline stages.
        block_r: ranks per step of the tail.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    warps: int
    stages: int
    block_r: int


# Bytes per element -> tiles. vLLM chooses block_m when it sorts the pairs of a batch.
_BASE = {
    2: (
        BaseTiles(16, 128, 128, 1, 4, 3, 16),
        BaseTiles(32, 128, 64, 8, 4, 3, 16),
        # On sm_80 the tail spills registers with 4 warps or 128 x 128 tiles (Triton 3.9.0).
        BaseTiles(64, 128, 64, 8, 8, 3, 16),
        BaseTiles(128, 64, 64, 8, 8, 3, 16),
    ),
    4: (
        BaseTiles(16, 64, 32, 1, 4, 3, 16),
        BaseTiles(32, 64, 32, 8, 4, 3, 16),
    ),
}

# Bytes per element -> tiles. fp32 does not use tensor cores; 16 rows, 32 ranks fill its registers.
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
# (architecture, dtype, rank of the buffers) -> tiles from a record of `vllm-moe-lora tune`.
_tuned: dict[tuple[str, torch.dtype, int], tuple[Tiles, ...]] = {}


def use(arch: str, dtype: torch.dtype, max_rank: int, tiles: tuple[Tiles, ...]) -> None:
    """Use ``tiles`` in this process for factors of ``dtype`` and ``max_rank``; () for the default.

    Args:
        arch: the architecture.
        dtype: of the factors.
        max_rank: of the buffers.
        tiles: one for each number of rows per tile that `table` has.

    Raises:
        ValueError: the rows per tile are others than those of `table`.
    """
    key = (arch, dtype, max_rank)
    rows = sorted(one.tile_rows for one in tiles)
    if tiles and rows != sorted({one.tile_rows for one in table(arch, dtype)}):
        raise ValueError(f"MoE LoRA kernels: tuned tiles have {rows} rows, unlike config.py's")
    _tuned.pop(key, None)
    if tiles:
        _tuned[key] = tiles


def table(arch: str, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """Return all tiles for an architecture and a dtype."""
    found = _DEFAULT[dtype.itemsize]
    if not arch.startswith("gfx"):
        return found
    return tuple(
        replace(
            one,
            shrink_stages=min(one.shrink_stages, AMD_STAGES),
            expand_warps=min(one.expand_warps, AMD_WARPS),
        )
        for one in found
    )


def shrink_options(arch: str, tiles: Tiles) -> dict[str, int]:
    """Return the launch options of a shrink."""
    options = {"num_warps": tiles.shrink_warps, "num_stages": tiles.shrink_stages}
    return options | _matrix_options(arch)


def expand_options(arch: str, tiles: Tiles) -> dict[str, int]:
    """Return the launch options of an expand."""
    return {"num_warps": tiles.expand_warps, "num_stages": 1} | _matrix_options(arch)


def _matrix_options(arch: str) -> dict[str, int]:
    """Return launch options that only AMD's compiler knows.

    Left to itself, it multiplies 16 x 16 tiles in a small batch and 32 x 32 ones in a large batch,
    whose instructions add 16 and 8 products. The large ones take up to 3.2 times the registers.
    """
    return {"matrix_instr_nonkdim": 16} if arch.startswith("gfx") else {}


def tile_rows(arch: str, dtype: torch.dtype, num_pairs: int) -> int:
    """Return the rows per tile: the fewest in the table for a small batch, else the most."""
    rows = {tiles.tile_rows for tiles in table(arch, dtype)}
    return min(rows) if num_pairs <= FEW_PAIRS else max(rows)


def tiles_for(arch: str, dtype: torch.dtype, rows: int, max_rank: int) -> Tiles:
    """Return the tiles with the smallest ``block_r`` that holds ``max_rank``, else the largest.

    Tiles that `use` has set for this rank come first.
    """
    for tiles in _tuned.get((arch, dtype, max_rank), ()):
        if tiles.tile_rows == rows:
            return tiles
    fitting = [tiles for tiles in table(arch, dtype) if tiles.tile_rows == rows]
    fitting.sort(key=lambda tiles: tiles.block_r)
    return next((tiles for tiles in fitting if tiles.block_r >= max_rank), fitting[-1])


def base_table(arch: str, dtype: torch.dtype) -> tuple[BaseTiles, ...]:
    """Return all tiles of base.py for an architecture and a dtype."""
    found = _BASE[dtype.itemsize]
    if not arch.startswith("gfx"):
        return found
    return tuple(replace(one, stages=min(one.stages, AMD_STAGES)) for one in found)


def base_tiles(arch: str, dtype: torch.dtype, block_m: int) -> BaseTiles | None:
    """Return the tiles of base.py with blocks of ``block_m`` rows; None if there are none."""
    fitting = [tiles for tiles in base_table(arch, dtype) if tiles.block_m == block_m]
    return fitting[0] if fitting else None


def parts_for(width: int) -> int:
    """Return the number of parts that a sum over ``width`` elements is split into."""
    return PARTS if width >= PARTS_FROM_WIDTH else 1


def parts_are_programs(num_pairs: int) -> bool:
    """Return whether each part of a sum is a program of its own, as in a small batch."""
    return num_pairs <= FEW_PAIRS


def max_tiles(num_pairs: int, num_segments: int, rows: int) -> int:
    """Return the most tiles of ``rows`` rows that ``num_pairs`` pairs can need, however routed."""
    segments = min(num_pairs, num_segments)
    return min(num_pairs, (num_pairs + segments * (rows - 1)) // rows)


def search_space(
    arch: str, dtype: torch.dtype, max_rank: int
) -> tuple[tuple[tuple[Tiles, ...], ...], tuple[tuple[Tiles, ...], ...]]:
    """Return the tiles that `vllm-moe-lora tune` tries in place of the default ones.

    The steps along x (``block_k``) are the same for all rows per tile in one entry, so that a
    request keeps its bits in any batch.

    Returns:
        Entries that differ from the default in the shrink, and entries that differ in the expand.
        Each entry is what `use` takes. Both have the default first.
    """
    rows = sorted({one.tile_rows for one in table(arch, dtype)})
    default = tuple(tiles_for(arch, dtype, one, max_rank) for one in rows)
    stages = AMD_STAGES if arch.startswith("gfx") else 4
    wide = default[0].block_r == 64 or dtype.itemsize == 4
    widest = 64 if wide else 128  # wider steps spill registers
    shrinks, expands = [default], [default]
    for block_k in (32, 64, 128):
        for warps in (4, 8):
            for depth in (2, 3, 4):
                if depth <= stages and block_k <= widest:
                    new = {"block_k": block_k, "shrink_warps": warps, "shrink_stages": depth}
                    shrinks.append(tuple(replace(one, **new) for one in default))
    for block_n in (64, 128):
        for warps in (4, 8):
            if dtype == torch.float16 and default[0].block_r == 64 and (block_n, warps) == (128, 4):
                continue  # spills registers on sm_90 (Triton 3.9.0)
            expands.append(tuple(replace(o, block_n=block_n, expand_warps=warps) for o in default))
    return tuple(dict.fromkeys(shrinks)), tuple(dict.fromkeys(expands))


def _variants(arch: str) -> Iterator[tuple[torch.dtype, Tiles, int]]:
    for dtype in DTYPES:
        for tiles in table(arch, dtype):
            for slices in (1, 2):
                yield dtype, tiles, slices


def shrink_variants(arch: str) -> Iterator[tuple[torch.dtype, Tiles, int, bool]]:
    """Yield (dtype, tiles, slices, by pair) of every variant of the shrink kernel.

    The tests compile them all.
    """
    for variant in _variants(arch):
        for by_pair in (False, True):
            yield *variant, by_pair


def expand_variants(arch: str) -> Iterator[tuple[torch.dtype, Tiles, int, int, bool, bool]]:
    """Yield (dtype, tiles, slices, parts, weighted, added) of every variant of the expand kernel.

    The tests compile them all.
    """
    for dtype, tiles, slices in _variants(arch):
        few = tiles.tile_rows == tile_rows(arch, dtype, FEW_PAIRS)
        for parts in (1, PARTS) if few else (1,):
            for weighted in (False, True):
                for added in (False, True):
                    yield dtype, tiles, slices, parts, weighted, added


def base_variants(
    arch: str,
) -> Iterator[tuple[torch.dtype, BaseTiles, int, int, bool, bool, bool, bool]]:
    """Yield (dtype, tiles, slices, parts, sorted, lora, weighted, even k) of some base.py variants.

    These are not all variants: every tile size comes with each switch once, in combinations that
    layers have. Unsorted pairs occur with the smallest blocks only.
    """
    for dtype in DTYPES:
        for tiles in base_table(arch, dtype):
            yield dtype, tiles, 1, 1, True, False, True, True
            yield dtype, tiles, 2, PARTS, True, True, False, True
            yield dtype, tiles, 1, 1, True, True, True, False
            if tiles.block_m == 16:
                yield dtype, tiles, 2, PARTS, False, True, False, True
