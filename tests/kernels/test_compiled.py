"""Every kernel that config.py can choose, compiled for parts that are not here.

Registers are held to what they were when the sizes were chosen, so that a change that makes a
kernel spill, lose its 16-byte loads or leave the one family of tensor-core instructions fails
here and not on a GPU.
"""

from __future__ import annotations

import itertools
import os
import re

import ahead
import pytest
import torch
import triton

from vllm_moe_lora.kernels.paged_stack import PAGE_RANKS
from vllm_moe_lora.kernels.triton import base, config, expand, routing, shrink

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET makes kernels that cannot be compiled"
)

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
SPILLED_BYTES = 32  # ptxas leaves a few stray bytes where it could do without
# With factors in pages, a kernel may take so many registers more than its limit below.
PAGED_REGISTERS, PAGED_AMD_REGISTERS = 2, 4
ELEMENT = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
PLAN = ("order", "tile_segment", "tile_start", "tile_rows", "ranks", "pages0", "pages1")
PLAN = dict.fromkeys(PLAN, "*i32")

# (kernel, bytes of an element, rows of a tile, ranks of a tile) -> most registers on any part of
# NVIDIA's, as Triton 3.9.0 and its ptxas made them. On another Triton only spills count:
# PYTHONPATH=/where/3.6.0/is/unpacked pytest tests/kernels/test_compiled.py
REGISTERS = {
    ("shrink", 2, 16, 16): 102,
    ("shrink", 2, 16, 32): 80,
    ("shrink", 2, 16, 64): 138,
    ("shrink", 2, 32, 16): 107,
    ("shrink", 2, 32, 32): 174,
    ("shrink", 2, 32, 64): 104,
    ("shrink", 4, 16, 16): 94,
    ("shrink", 4, 16, 32): 102,
    ("expand", 2, 16, 16): 96,
    ("expand", 2, 16, 32): 116,
    ("expand", 2, 16, 64): 194,
    ("expand", 2, 32, 16): 88,
    ("expand", 2, 32, 32): 102,
    ("expand", 2, 32, 64): 138,
    ("expand", 4, 16, 16): 86,
    ("expand", 4, 16, 32): 114,
    ("base", 2, 16): 155,
    ("base", 2, 32): 204,
    ("base", 2, 64): 204,
    ("base", 2, 128): 220,
    ("base", 4, 16): 96,
    ("base", 4, 32): 166,
    "rank_kernel": 116,
    "count_kernel": 15,
    "scan_kernel": 92,
    "place_kernel": 32,
}
# Of vectors, on gfx942.
AMD_REGISTERS = {
    ("shrink", 2, 16, 16): 90,
    ("shrink", 2, 16, 32): 136,
    ("shrink", 2, 16, 64): 90,
    ("shrink", 2, 32, 16): 102,
    ("shrink", 2, 32, 32): 92,
    ("shrink", 2, 32, 64): 78,
    ("shrink", 4, 16, 16): 80,
    ("shrink", 4, 16, 32): 108,
    ("expand", 2, 16, 16): 61,
    ("expand", 2, 16, 32): 80,
    ("expand", 2, 16, 64): 114,
    ("expand", 2, 32, 16): 74,
    ("expand", 2, 32, 32): 92,
    ("expand", 2, 32, 64): 126,
    ("expand", 4, 16, 16): 46,
    ("expand", 4, 16, 32): 58,
    ("base", 2, 16): 138,
    ("base", 2, 32): 118,
    ("base", 2, 64): 96,
    ("base", 2, 128): 98,
    ("base", 4, 16): 76,
    ("base", 4, 32): 142,
    "rank_kernel": 50,
    "count_kernel": 8,
    "scan_kernel": 72,
    "place_kernel": 11,
}
# ci/test.sh --all compiles every variant. Else fp16 is left out, which differs from bf16 by one
# conversion, and parts other than this one get the larger variants only: two slices, added. So
# does each part where another Triton asks for some parts (test_other_triton.py).
EVERY = "sm_90" if "MOE_LORA_ARCHES" not in os.environ else ""
ALL = os.environ.get("MOE_LORA_ALL") == "1"
ARCHES = [one for one in config.ARCHES if one in os.environ.get("MOE_LORA_ARCHES", one)]


def wanted(arch, dtype, larger):
    return ALL or (dtype != torch.float16 and (larger or arch == EVERY))


def check(name, arch, dtype, tiles, built, more=0):
    size = (tiles.block_m,) if name == "base" else (tiles.tile_rows, tiles.block_r)
    assert built.spilled <= SPILLED_BYTES, f"{built.spilled} bytes spilled"
    assert built.shared <= SHARED_LIMIT[arch]
    assert_registers(arch, built, (name, dtype.itemsize, *size), more)
    (check_nvidia if arch.startswith("sm_") else check_amd)(name, dtype, built)


def assert_registers(arch, built, key, more=0):
    if not triton.__version__.startswith("3.9."):
        return  # another compiler: only that nothing spills
    limits = REGISTERS if arch.startswith("sm_") else AMD_REGISTERS
    assert built.registers <= limits[key] + more, (key, built.registers)


def check_nvidia(name, dtype, built):
    loads = re.findall(r"ld\.global\S*", built.text)
    assert loads, "the pattern no longer finds loads"
    assert not [one for one in loads if re.search(r"\.[bus](8|16)$", one)], "a 2-byte load"
    copied = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?\], (0x\w+)", built.text)
    assert all(int(size, 16) == 16 for size in copied), "a copy narrower than 16 bytes"
    vectors = [one for one in loads if re.search(r"v4\.[bfus]32$|v8\.|v2\.[bfus]64$", one)]
    assert copied or vectors, "no 16-byte load"
    if name != "base":
        # One family of instructions at every row tile, or a batch's size would show in the bits.
        assert not re.search(r"wgmma|tcgen05", built.text)
        assert ("mma.sync" in built.text) == (dtype.itemsize == 2)
    assert not re.search(r"\b(atom|red)\.", built.text), "a sum whose order varies"


def check_amd(name, dtype, built):
    loads = re.findall(r"\b(?:global|buffer)_load_\w+", built.text)
    assert loads, "the pattern no longer finds loads"
    assert not [one for one in loads if re.search(r"byte|short|d16", one)], "a 2-byte load"
    assert [one for one in loads if one.endswith("dwordx4")], "no 16-byte load"
    matrices = set(re.findall(r"v_mfma_f32_(\d+x\d+)", built.text))
    assert matrices
    # One shape at every row tile, or a batch's size could show in the bits.
    assert name == "base" or matrices == {"16x16"}
    assert not re.search(r"\b(global|buffer)_atomic", built.text), "a sum whose order varies"


@pytest.mark.parametrize("arch", ARCHES)
def test_shrink(arch):
    for dtype, tiles, slices, by_pair in config.shrink_variants(arch):
        if not wanted(arch, dtype, slices == 2 and not by_pair):
            continue
        constants = {
            "SLICES": slices,
            "BY_PAIR": by_pair,
            "TILE_ROWS": tiles.tile_rows,
            "BLOCK_R": tiles.block_r,
            "BLOCK_K": tiles.block_k,
            "PAGE": 0,
        }
        pointers = dict.fromkeys(("x", "a0", "a1"), ELEMENT[dtype]) | PLAN | {"z": "*fp32"}
        options = config.shrink_options(arch, tiles)
        built = ahead.build(shrink.shrink_kernel, arch, pointers, constants, **options)
        check("shrink", arch, dtype, tiles, built)


@pytest.mark.parametrize("arch", ARCHES)
def test_expand(arch):
    for dtype, tiles, slices, parts, weighted, added in config.expand_variants(arch):
        if not wanted(arch, dtype, slices == 2 and added):
            continue
        constants = {
            "SLICES": slices,
            "PARTS": parts,
            "WEIGHTED": weighted,
            "ADDED": added,
            "TILE_ROWS": tiles.tile_rows,
            "BLOCK_R": tiles.block_r,
            "BLOCK_N": tiles.block_n,
            "PAGE": 0,
        }
        pointers = dict.fromkeys(("y", "b0", "b1"), ELEMENT[dtype]) | PLAN
        pointers |= {"z": "*fp32", "topk_weights": "*fp32"}
        options = config.expand_options(arch, tiles)
        built = ahead.build(expand.expand_kernel, arch, pointers, constants, **options)
        check("expand", arch, dtype, tiles, built)


def base_options(tiles):
    return {"num_warps": tiles.warps, "num_stages": tiles.stages}


@pytest.mark.parametrize("arch", ARCHES)
def test_base(arch):
    for dtype, tiles, slices, parts, ids, lora, weighted, even in config.base_variants(arch):
        if not wanted(arch, dtype, lora):
            continue
        constants = {
            "SLICES": slices,
            "PARTS": parts,
            "SORTED": ids,
            "LORA": lora,
            "WEIGHTED": weighted,
            "EVEN_K": even,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "GROUP_M": tiles.group_m,
            "BLOCK_R": tiles.block_r,
            "PAGE": 0,
        }
        pointers = dict.fromkeys(("x", "weight", "y", "b0", "b1"), ELEMENT[dtype])
        tables = ("ranks", "token_slots", "sorted_ids", "expert_ids", "num_padded")
        tables += ("pages0", "pages1")
        pointers |= dict.fromkeys(tables, "*i32") | {"z": "*fp32", "topk_weights": "*fp32"}
        built = ahead.build(base.base_kernel, arch, pointers, constants, **base_options(tiles))
        check("base", arch, dtype, tiles, built)


def paged(name, arch, dtype, tiles, kernel, pointers, constants, options):
    """Compile a kernel that reads factors in pages, and hold it to the limits of tensors."""
    pointers |= {"z": "*fp32", "pages0": "*i32", "pages1": "*i32"}
    constants |= {"SLICES": 2, "PAGE": PAGE_RANKS}
    built = ahead.build(kernel, arch, pointers, constants, **options)
    more = PAGED_REGISTERS if arch.startswith("sm_") else PAGED_AMD_REGISTERS
    check(name, arch, dtype, tiles, built, more)


@pytest.mark.parametrize("arch", ARCHES if ALL else [one for one in ARCHES if one == "sm_90"])
def test_factors_in_pages(arch):
    """By default the smallest tiles on one GPU only."""
    for dtype in config.DTYPES if ALL else (torch.bfloat16,):
        element = ELEMENT[dtype]
        for tiles in config.table(arch, dtype)[: None if ALL else 1]:
            sizes = {"TILE_ROWS": tiles.tile_rows, "BLOCK_R": tiles.block_r}
            pointers = PLAN | dict.fromkeys(("x", "a0", "a1"), element)
            constants = sizes | {"BY_PAIR": False, "BLOCK_K": tiles.block_k}
            kernel, options = shrink.shrink_kernel, config.shrink_options(arch, tiles)
            paged("shrink", arch, dtype, tiles, kernel, pointers, constants, options)
            parts = config.PARTS if tiles.tile_rows == 16 else 1
            pointers = PLAN | dict.fromkeys(("y", "b0", "b1"), element)
            pointers |= {"topk_weights": "*fp32"}
            constants = sizes | {"PARTS": parts, "WEIGHTED": True, "ADDED": True}
            constants |= {"BLOCK_N": tiles.block_n}
            kernel, options = expand.expand_kernel, config.expand_options(arch, tiles)
            paged("expand", arch, dtype, tiles, kernel, pointers, constants, options)
        for tiles in config.base_table(arch, dtype)[: None if ALL else 1]:
            pointers = dict.fromkeys(("x", "weight", "y", "b0", "b1"), element)
            tables = ("ranks", "token_slots", "sorted_ids", "expert_ids", "num_padded")
            pointers |= dict.fromkeys(tables, "*i32") | {"topk_weights": "*fp32"}
            constants = {"PARTS": config.PARTS, "SORTED": True, "LORA": True, "WEIGHTED": False}
            constants |= {"EVEN_K": True, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
            constants |= {"BLOCK_K": tiles.block_k, "GROUP_M": tiles.group_m}
            constants |= {"BLOCK_R": tiles.block_r}
            kernel, options = base.base_kernel, base_options(tiles)
            paged("base", arch, dtype, tiles, kernel, pointers, constants, options)


def searched(arch, part):
    """What `vllm-moe-lora tune` may choose: (dtype, tiles, slices).

    In fp16, which INT4 models have, too, and for fused gate and up (gpt-oss).
    """
    for dtype, slices in itertools.product(config.DTYPES, (2, 1)):
        for rank in (16, 32, 64):
            for entry in config.search_space(arch, dtype, rank)[part]:
                yield from ((dtype, tiles, slices) for tiles in entry)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHES)
def test_search_space(arch):
    """Registers and spills leave room, so that the search meets no tiles that cannot win."""
    bad = []
    for dtype, tiles, slices in dict.fromkeys(searched(arch, 0)):
        constants = {"SLICES": slices, "BY_PAIR": False, "TILE_ROWS": tiles.tile_rows}
        constants |= {"BLOCK_R": tiles.block_r, "BLOCK_K": tiles.block_k, "PAGE": 0}
        pointers = dict.fromkeys(("x", "a0", "a1"), ELEMENT[dtype]) | PLAN | {"z": "*fp32"}
        options = config.shrink_options(arch, tiles)
        built = ahead.build(shrink.shrink_kernel, arch, pointers, constants, **options)
        if built.spilled > SPILLED_BYTES or built.shared > SHARED_LIMIT[arch]:
            bad.append(("shrink", dtype, tiles, slices, built.spilled, built.shared))
    for dtype, tiles, slices in dict.fromkeys(searched(arch, 1)):
        constants = {"SLICES": slices, "PARTS": config.PARTS, "WEIGHTED": True, "ADDED": True}
        constants |= {"TILE_ROWS": tiles.tile_rows, "BLOCK_R": tiles.block_r}
        constants |= {"BLOCK_N": tiles.block_n, "PAGE": 0}
        pointers = dict.fromkeys(("y", "b0", "b1"), ELEMENT[dtype]) | PLAN
        pointers |= {"z": "*fp32", "topk_weights": "*fp32"}
        options = config.expand_options(arch, tiles)
        built = ahead.build(expand.expand_kernel, arch, pointers, constants, **options)
        if built.spilled > SPILLED_BYTES or built.shared > SHARED_LIMIT[arch]:
            bad.append(("expand", dtype, tiles, slices, built.spilled, built.shared))
    assert not bad


ROUTING = {
    "rank_kernel": (
        {"BLOCK": config.RANK_BLOCK, "AGAINST": config.RANK_AGAINST},
        config.RANK_WARPS,
    ),
    "count_kernel": ({"BLOCK": config.COUNT_BLOCK}, config.COUNT_WARPS),
    "scan_kernel": ({"BLOCK": config.SCAN_BLOCK}, config.SCAN_WARPS),
    "place_kernel": ({"BLOCK": config.COUNT_BLOCK}, config.COUNT_WARPS),
}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", ROUTING)
def test_routing(name, arch):
    kernel = getattr(routing, name)
    names = {one.name for one in kernel.params}
    ids = {"topk_ids": "*i32", "token_slots": "*i64", "expert_map": "*i32", "active": "*u8"}
    tables = ("order", "tile_segment", "tile_start", "tile_rows")
    tables += ("counts", "placed", "first_pair", "first_tile")
    pointers = {n: t for n, t in (ids | dict.fromkeys(tables, "*i32")).items() if n in names}
    sizes, warps = ROUTING[name]
    for rows in {tiles.tile_rows for d in config.DTYPES for tiles in config.table(arch, d)}:
        constants = sizes | {"HAS_MAP": True, "HAS_ACTIVE": True, "TILE_ROWS": rows}
        constants = {n: value for n, value in constants.items() if n in names}
        built = ahead.build(kernel, arch, pointers, constants, num_warps=warps, num_stages=3)
        assert built.spilled <= SPILLED_BYTES
        assert built.shared <= SHARED_LIMIT[arch]
        assert_registers(arch, built, name)
        assert not re.search(r"(atom|red)\S*\.f(16|32|64)|atomic_add_f", built.text)


KERNELS = [shrink.shrink_kernel, expand.expand_kernel, base.base_kernel] + [
    getattr(routing, n) for n in ROUTING
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda one: one.__name__)
def test_a_batch_makes_no_new_kernel(kernel):
    """No count and no place in memory is specialised on: a configuration is one kernel.

    Only the tensors that are read 16 bytes at a time are, and checks.py wants those aligned.
    """
    aligned = {"x", "y", "z", "a0", "a1", "b0", "b1", "weight"}
    rest = [one for one in kernel.params if not one.is_constexpr and one.name not in aligned]
    tensors = {"topk_ids", "token_slots", "expert_map", "active", "order", "tile_segment"}
    tensors |= {"tile_start", "tile_rows", "counts", "placed", "first_pair", "first_tile"}
    tensors |= {
        "pages0",
        "pages1",
        "ranks",
        "topk_weights",
        "sorted_ids",
        "expert_ids",
        "num_padded",
    }
    assert any(one.name not in tensors for one in rest)
    for one in rest:
        if one.name in tensors:
            assert one.do_not_specialize_on_alignment, one.name
        else:
            assert one.do_not_specialize, one.name
