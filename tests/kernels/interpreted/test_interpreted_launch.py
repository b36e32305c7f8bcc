"""What a call can know to be wrong is a Python error that says what, where and the cure."""

from __future__ import annotations

import pytest
import torch

from vllm_moe_lora.kernels.triton import config, launch
from vllm_moe_lora.kernels.triton.checks import arch_of
from vllm_moe_lora.kernels.triton.factors import Factors, active_segments
from vllm_moe_lora.kernels.triton.launch import add_lora
from vllm_moe_lora.kernels.triton.route import route

SLOTS, EXPERTS, RANK, WIDTH, OUT, TOKENS, TOP_K = 3, 4, 16, 24, 40, 5, 2


def factor(*shape, dtype=torch.bfloat16):
    return torch.ones(shape, dtype=dtype)


def parts():
    """Good arguments of Factors: two slices."""
    a = [factor(SLOTS, EXPERTS, RANK, WIDTH) for _ in range(2)]
    b = [factor(SLOTS, EXPERTS, OUT, RANK) for _ in range(2)]
    return a, b


def call():
    """Good arguments of add_lora, by name."""
    factors = Factors(*parts(), EXPERTS)
    factors.set_ranks(1, RANK)
    ids = torch.zeros(TOKENS, TOP_K, dtype=torch.int32)
    slots = torch.ones(TOKENS, dtype=torch.int64)
    return {
        "y": torch.zeros(TOKENS, TOP_K, 2 * OUT, dtype=torch.bfloat16),
        "x": factor(TOKENS, WIDTH),
        "factors": factors,
        "routing": route(ids, slots, SLOTS, EXPERTS, torch.bfloat16),
    }


def misaligned(tensor):
    """The same values from an address that is no multiple of 16."""
    room = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
    skip = (16 - room.data_ptr() % 16) // tensor.itemsize % 8 + 1
    view = room[skip : skip + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def other_routing(tokens=TOKENS, slots=SLOTS, experts=EXPERTS):
    ids = torch.zeros(tokens, TOP_K, dtype=torch.int32)
    return route(ids, torch.zeros(tokens, dtype=torch.int64), slots, experts, torch.bfloat16)


def narrow_rows(tensor):
    """Rows 4 elements further apart than they are long."""
    shape = (*tensor.shape[:-1], tensor.shape[-1] + 4)
    return torch.zeros(shape, dtype=tensor.dtype)[..., : tensor.shape[-1]]


WRONG_CALLS = {
    "x of another dtype": (lambda c: {"x": c["x"].half()}, TypeError, "x is torch.float16"),
    "y of another dtype": (lambda c: {"y": c["y"].float()}, TypeError, "y is torch.float32"),
    "x on another device": (lambda c: {"x": c["x"].to("meta")}, TypeError, "x is on meta"),
    "y on another device": (lambda c: {"y": c["y"].to("meta")}, TypeError, "y is on meta"),
    "x too narrow": (lambda c: {"x": c["x"][:, :16]}, ValueError, "x has shape"),
    "x with too few rows": (lambda c: {"x": c["x"][1:]}, ValueError, "x has shape"),
    "y too narrow": (lambda c: {"y": c["y"][..., :40]}, ValueError, "y has shape"),
    "y of one slice too many": (lambda c: {"y": c["y"].repeat(1, 1, 2)}, ValueError, "y has shape"),
    "x transposed": (lambda c: {"x": c["x"].t().contiguous().t()}, ValueError, "last dimension"),
    "x misaligned": (lambda c: {"x": misaligned(c["x"])}, ValueError, "x does not start"),
    "y misaligned": (lambda c: {"y": misaligned(c["y"])}, ValueError, "y does not start"),
    "x with odd rows": (lambda c: {"x": narrow_rows(c["x"])}, ValueError, "x has .*multiples of 8"),
    "y with odd rows": (lambda c: {"y": narrow_rows(c["y"])}, ValueError, "y has .*multiples of 8"),
    "y with gaps": (
        lambda c: {"y": torch.zeros(TOKENS, 3, 2 * OUT, dtype=torch.bfloat16)[:, :2]},
        ValueError,
        "evenly spaced",
    ),
    "y of another top_k": (lambda c: {"y": c["y"].view(2, 5, -1)}, ValueError, "evenly spaced"),
    "routing of more tokens": (lambda c: {"routing": other_routing(6)}, ValueError, "shape"),
    "routing of more slots": (lambda c: {"routing": other_routing(slots=4)}, ValueError, "4 slots"),
    "routing of other experts": (
        lambda c: {"routing": other_routing(experts=5)},
        ValueError,
        "5 experts",
    ),
    "weights of another shape": (
        lambda c: {"topk_weights": torch.ones(TOKENS)},
        ValueError,
        "topk_weights has shape",
    ),
    "weights that are ids": (
        lambda c: {"topk_weights": torch.ones(TOKENS, TOP_K, dtype=torch.int32)},
        TypeError,
        "topk_weights is torch.int32",
    ),
    "weights not contiguous": (
        lambda c: {"topk_weights": torch.ones(TOP_K, TOKENS).t()},
        ValueError,
        "topk_weights is not contiguous",
    ),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_add_lora_refuses(name, monkeypatch):
    change, error, message = WRONG_CALLS[name]
    good = call()
    bad = good | change(good)
    monkeypatch.setattr(launch, "shrink_kernel", None)  # nothing may be launched
    with pytest.raises(error, match=message):
        add_lora(**bad)


def test_what_the_wrong_calls_start_from_is_right():
    good = call()
    add_lora(**good)
    assert (good["y"] == RANK * WIDTH).all()
    flat = call()
    flat["y"] = flat["y"].view(TOKENS * TOP_K, -1)
    add_lora(**flat)
    assert torch.equal(flat["y"].view(good["y"].shape), good["y"])
    empty = call() | {"routing": other_routing(0)}
    add_lora(empty["y"][:0], empty["x"][:0], empty["factors"], empty["routing"])


def _set(index, which, tensor):
    def change(a, b):
        (a, b)[which][index] = tensor((a, b)[which][index])

    return change


WRONG_FACTORS = {
    "a slice of another dtype": (
        _set(1, 0, lambda t: t.half()),
        TypeError,
        "lora_a is torch.float16",
    ),
    "B of another dtype": (_set(0, 1, lambda t: t.float()), TypeError, "lora_b is torch.float32"),
    "B on another device": (_set(0, 1, lambda t: t.to("meta")), TypeError, "lora_b is .* on meta"),
    "fewer experts": (_set(0, 0, lambda t: t[:, :3]), ValueError, "lora_a has shape"),
    "fewer slots": (_set(0, 1, lambda t: t[:2]), ValueError, "lora_b has shape"),
    "B of another rank": (_set(0, 1, lambda t: t[..., :8]), ValueError, "lora_b has shape"),
    "slices of other widths": (_set(1, 1, lambda t: t[:, :, :32]), ValueError, "lora_b has shape"),
    "slices with other strides": (
        _set(1, 0, lambda t: t.repeat(1, 1, 1, 2)[..., :WIDTH]),
        ValueError,
        "strides",
    ),
    "one slice shared": (_set(1, 0, lambda t: t[:, :1]), ValueError, "slices that differ"),
    "B misaligned": (_set(0, 1, misaligned), ValueError, "lora_b does not start"),
    "a slice missing": (lambda a, b: b.pop(), ValueError, "2 lora_a and 1 lora_b"),
    "three slices": (
        lambda a, b: (a.append(a[0]), b.append(b[0])),
        ValueError,
        "3 lora_a and 3 lora_b",
    ),
    "three dimensions": (_set(0, 0, lambda t: t[0]), ValueError, "tensors .slots"),
}


@pytest.mark.parametrize("name", WRONG_FACTORS)
def test_factors_refuse(name):
    change, error, message = WRONG_FACTORS[name]
    a, b = parts()
    change(a, b)
    with pytest.raises(error, match=message):
        Factors(a, b, EXPERTS)


def test_factors_refuse_what_cannot_be_read_in_groups():
    for rank, width, message in ((4, 24, "max_rank is 4"), (16, 20, "multiples of 8 elements")):
        a, b = factor(2, 3, rank, width), factor(2, 3, 40, rank)
        with pytest.raises(ValueError, match=message):
            Factors([a], [b], 3)
    with pytest.raises(ValueError, match="out = 20"):
        Factors([factor(2, 3, 16, 24)], [factor(2, 3, 20, 16)], 3)
    with pytest.raises(TypeError, match="float64"):
        Factors(*[[t.double() for t in ts] for ts in parts()], EXPERTS)


@pytest.mark.parametrize(
    ("slot", "ranks", "message"),
    [
        (-1, 8, "slot is -1"),
        (SLOTS, 8, "slot is 3, but there are 3"),
        (0, RANK + 1, "slot 0 are 17 to 17, but the buffers hold 0 to 16"),
        (0, -1, "-1 to -1"),
        (0, torch.full((2, EXPERTS), RANK).index_fill(1, torch.tensor([2]), 99), "16 to 99"),
        (0, torch.ones(EXPERTS, 2), "shape"),
    ],
)
def test_set_ranks_refuses(slot, ranks, message):
    factors = Factors(*parts(), EXPERTS)
    with pytest.raises(ValueError, match=message):
        factors.set_ranks(slot, ranks)
    assert not factors.ranks.any()


def test_active_segments():
    up, down = Factors(*parts(), EXPERTS), Factors(*parts(), EXPERTS)
    up.set_ranks(0, torch.tensor([[0, 0, 3, 0], [0, 1, 0, 0]]))
    down.set_ranks(2, torch.tensor([[0, 0, 0, 2], [0, 0, 0, 0]]))
    want = torch.zeros(SLOTS, EXPERTS, dtype=torch.bool)
    want[0, 1] = want[0, 2] = want[2, 3] = True
    assert torch.equal(active_segments(up, down), want)


IDS, TOKEN_SLOTS = torch.zeros(5, 2, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_ids": IDS[0]}, ValueError, "topk_ids has shape"),
        ({"topk_ids": IDS.float()}, TypeError, "topk_ids is torch.float32"),
        ({"topk_ids": torch.zeros(2, 5, dtype=torch.int32).t()}, ValueError, "not contiguous"),
        ({"token_slots": TOKEN_SLOTS[1:]}, ValueError, "token_slots has shape"),
        ({"token_slots": TOKEN_SLOTS.to("meta")}, TypeError, "token_slots is on meta"),
        ({"token_slots": torch.zeros(10, dtype=torch.int64)[::2]}, ValueError, "not contiguous"),
        ({"expert_map": torch.zeros(4)}, TypeError, "expert_map is torch.float32"),
        ({"active": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "active has shape"),
        ({"num_slots": 0}, ValueError, "at least 1"),
        ({"num_slots": 2**20, "num_experts": 2**11}, ValueError, "32 bits"),
        ({"dtype": torch.float64}, TypeError, "float64"),
    ],
)
def test_route_refuses(change, error, message):
    good = {"topk_ids": IDS, "token_slots": TOKEN_SLOTS, "num_slots": 3, "num_experts": 4}
    with pytest.raises(error, match=message):
        route(**(good | {"dtype": torch.bfloat16} | change))


def test_a_device_that_cannot_run_them(monkeypatch):
    with pytest.raises(TypeError, match="need a CUDA device"):
        arch_of(torch.device("meta"))
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(TypeError, match="need a CUDA device"):
        arch_of(torch.device("cpu"))


@pytest.mark.parametrize("arch", config.ARCHES)
def test_options_of_the_launch_are_those_that_were_compiled(arch, monkeypatch):
    launched = {}

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.update({self.name: options})

    monkeypatch.setattr(launch, "arch_of", lambda device: arch)
    for name in ("shrink", "expand"):
        monkeypatch.setattr(launch, f"{name}_kernel", Kernel(name))
    add_lora(**call())
    tiles = config.tiles_for(arch, torch.bfloat16, 16, RANK)
    more = {"matrix_instr_nonkdim": 16} if arch == "gfx942" else {}
    assert launched == {
        "shrink": {"num_warps": tiles.shrink_warps, "num_stages": tiles.shrink_stages, **more},
        "expand": {"num_warps": tiles.expand_warps, "num_stages": 1, **more},
    }


def test_tables_hold_every_choice():
    """Nothing that can be chosen is missing from what test_compiled.py compiles."""
    for arch in (*config.ARCHES, "sm_120"):
        for dtype in config.DTYPES:
            for pairs in (1, config.FEW_PAIRS, config.FEW_PAIRS + 1, 10**6):
                rows = config.tile_rows(arch, dtype, pairs)
                for rank in (8, 16, 24, 64, 128, 256):
                    tiles = config.tiles_for(arch, dtype, rows, rank)
                    assert tiles.tile_rows == rows
                    assert tiles in config.table(arch, dtype)
                    shrinks, expands = config.shrink_variants(arch), config.expand_variants(arch)
                    assert {(dtype, tiles, 2, by_pair) for by_pair in (False, True)} <= set(shrinks)
                    wanted = {
                        (dtype, tiles, 2, parts, True, added)
                        for parts in {config.PARTS if config.parts_are_programs(pairs) else 1, 1}
                        for added in (False, True)
                    }
                    assert wanted <= set(expands)
