"""`vllm-moe-lora tune` in the interpreter: wrong numbers are found, and records choose kernels.

Times are invented. Upstream's kernels need a GPU and do not run here.
"""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from vllm_moe_lora import records
from vllm_moe_lora.kernels import reference
from vllm_moe_lora.kernels.triton import config, grouped, launch
from vllm_moe_lora.layers.gpu import base_product, choose, moe_kernels
from vllm_moe_lora.records import Choice, LayerShape, Record
from vllm_moe_lora.tuning import cases, numbers, session, sides
from vllm_moe_lora.tuning.clock import StubClock

SHAPE = LayerShape(4, 2, 64, 32, 2, 2, 3, 8, "float32")
SHAPES = {
    "gate and up": SHAPE,
    "fused": dataclasses.replace(SHAPE, slices=1),
    "no gate": dataclasses.replace(SHAPE, slices=1, fused=1),
    "bf16": dataclasses.replace(SHAPE, dtype="bfloat16"),
    "one expert, one slot": dataclasses.replace(SHAPE, experts=1, top_k=1, slots=1),
    "experts elsewhere": dataclasses.replace(SHAPE, experts=3, absent=3),
    "shared factors": dataclasses.replace(SHAPE, shared=True),
}


class UnquantizedFusedMoEMethod:
    """Of which records know the name."""

    experts_cls = type("TritonExperts", (), {})


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MOE_LORA_TUNED", str(tmp_path))
    monkeypatch.setenv("VLLM_MOE_LORA_KERNELS", "auto")
    choose._record.cache_clear()
    config._tuned.clear()
    yield
    choose._record.cache_clear()
    config._tuned.clear()


def session_of(shape=SHAPE, base=True, clock=None, said=None):
    here = choose.conditions("cpu")
    say = (lambda *what: said.append(what)) if said is not None else lambda *_: None
    more = {"on_gpu": False, "base": base, "checked": (1, 9), "sizes": (1, 2, 8)}
    return session.Session(shape, here, clock or StubClock(), say, **more)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_expected_is_the_reference(name, kind):
    """What numbers are held against is kernels/reference.py, and fp32 loops for the base."""
    shape = SHAPES[name]
    layer, batch = cases.layer(shape, "cpu", base=True), cases.batch(shape, 9, kind, "cpu")
    expected = numbers.Expected(layer, batch)
    slots, weights = batch.slots, batch.weights
    for index, (x, a, b, w) in enumerate(
        [(batch.x, layer.a13, layer.b13, None), (batch.act, layer.a2, layer.b2, weights)]
    ):
        y = torch.zeros(9, shape.top_k, sum(one.shape[2] for one in b))
        ranks = layer.ranks[None].expand(len(a), -1, -1)
        here = batch.ids if layer.expert_map is None else layer.expert_map[batch.ids.long()]
        a, b = ([one.expand(-1, shape.experts, -1, -1) for one in stack] for stack in (a, b))
        reference.add_lora(y, x, a, b, ranks, slots, here, w)
        torch.testing.assert_close(expected.lora[index], y.flatten(0, 1), rtol=1e-5, atol=1e-5)
        weight = layer.w13 if w is None else layer.w2
        for pair, expert in enumerate(here.flatten().tolist()):
            if expert < 0:
                assert not expected.base[index][pair].any()
                continue
            row = x[pair // shape.top_k if x.shape[0] == 9 else pair].float()
            want = weight[expert].float() @ row * (1 if w is None else w.flatten()[pair])
            torch.testing.assert_close(expected.base[index][pair], want, rtol=1e-4, atol=1e-4)
    assert (kind == "none") == (not any(one.any() for one in expected.touched))


@pytest.mark.parametrize("name", SHAPES)
def test_right_kernels_are_not_refused(name):
    one = session_of(SHAPES[name])
    one.check()
    assert one.refused == {}


def _last_number(y, *args, **more):
    real_add(y, *args, **more)
    y.view(-1)[-1] += 0.02 * y.abs().max()


def _keeps_poison(y, x, factors, routing, weights=None, add_inputs=True):
    real_add(y[:-1], x, factors, routing, weights, add_inputs)


def _forgets_weights(y, x, factors, routing, weights=None, add_inputs=True):
    real_add(y, x, factors, routing, None, add_inputs)


def _touches_base_rows(y, *args, **more):
    real_add(y, *args, **more)
    y.nan_to_num_(0.0)


def _fails(*_, **__):
    raise RuntimeError("out of shared memory")


real_add, real_product = launch.add_lora, grouped.grouped_product
MUTANTS = {
    "the last number": (_last_number, "w13"),
    "an exception": (_keeps_poison, "Error"),
    "router weights": (_forgets_weights, "w2"),
    "rows of base tokens": (_touches_base_rows, "w13"),
    "a kernel that cannot start": (_fails, "out of shared memory"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_one_wrong_number_refuses_ours(name, monkeypatch):
    mutant, named = MUTANTS[name]
    monkeypatch.setattr(launch, "add_lora", mutant)
    one = session_of(base=False)
    one.check()
    assert named in one.refused["ours"]
    one.measure(deadline=float("inf"))
    made = one.record()
    assert made.kinds == {"upstream"}
    assert "ours" not in made.choices[0].us


def test_one_wrong_number_refuses_the_tail_alone(monkeypatch):
    def without_lora(y, x, weight, order, top_k, weights=None, lora=None, slices=1):
        real_product(y, x, weight, order, top_k, weights, None, slices)

    monkeypatch.setattr(grouped, "grouped_product", without_lora)
    one = session_of()
    one.check()
    assert "w13" in one.refused["tail"]
    assert "ours" not in one.refused


def test_tail_is_left_out_without_base_weights():
    assert "unquantised base weights" in session_of(base=False).refused["tail"]


class Prefers:
    """A clock by which one kind wins, and smaller steps along x."""

    def __init__(self, kind):
        self.kind, self.seen = kind, []

    def time(self, calls, what):
        self.seen.append(what)
        for call in calls.values():
            call()
        slow = 5.0 if ", 32, " in what else 10.0
        return {n: ((1.0,) * 3 if n == self.kind else (slow,) * 3) for n in calls}


@pytest.mark.parametrize("kind", records.KINDS)
def test_the_clock_decides(kind):
    one = session_of(clock=Prefers(kind))
    one.measure(deadline=float("inf"))
    assert {choice.winner for choice in one.record().choices} == {kind}


def test_close_calls_are_upstreams():
    times = {"upstream": (10.0, 9.0, 11.0), "ours": (9.8, 8.0, 11.0)}
    assert session._winner(times) == "upstream"
    assert session._winner({**times, "ours": (9.5, 9.0, 10.0)}) == "upstream"
    assert session._winner({**times, "ours": (8.0, 7.0, 9.0)}) == "ours"


def test_time_is_up():
    said = []
    one = session_of(said=said)
    one.check()
    one.search(deadline=0.0)
    one.measure(deadline=0.0)
    assert list(one.times) == [1], "at least one size"
    assert any("time was up" in remark for remark in one.remarks)
    assert one.record().choices[-1].tokens == 1
    shares = [share for _, share in said]
    assert shares == sorted(shares)


def test_nothing_measured_is_no_record():
    assert session_of().record() is None


def test_search_keeps_what_is_faster_and_right(monkeypatch):
    default = tuple(config.tiles_for("cpu", torch.float32, n, 8) for n in (16,))
    fast, wrong = (tuple(dataclasses.replace(one, block_k=k) for one in default) for k in (32, 8))
    space = ((default, wrong, fast), (default,))
    monkeypatch.setattr(config, "search_space", lambda *_: space)

    def wrong_in_small_steps(y, x, factors, routing, *args, **more):
        real_add(y, x, factors, routing, *args, **more)
        if config.tiles_for("cpu", torch.float32, 16, 8).block_k == 8:
            y.add_(1.0)

    monkeypatch.setattr(launch, "add_lora", wrong_in_small_steps)
    one = session_of(base=False, clock=Prefers("nobody"))
    one.search(deadline=float("inf"))
    assert one.tiles == fast
    assert config.tiles_for("cpu", torch.float32, 16, 8) == fast[0]
    assert "ours" not in one.refused
    one.measure(deadline=float("inf"))
    assert one.record().tiles == tuple(tuple(dataclasses.asdict(t).values()) for t in fast)


# What auto does in an engine's layer.


def layer_and_batch(tokens):
    layer, batch = cases.layer(SHAPE, "cpu", base=True), cases.batch(SHAPE, tokens, "all", "cpu")
    vllms = layer.as_vllm()
    vllms.quant_method = UnquantizedFusedMoEMethod()
    for slot in range(SHAPE.slots):
        moe_kernels.slot_written(vllms, slot)
    return layer, vllms, batch


def run_layer(layer, vllms, batch):
    """The kinds of kernels that ran for w13 and w2, as upstream's experts call them."""
    out, ran = sides.Outputs.of(layer, batch), []
    meta = types.SimpleNamespace(
        meta_args=lambda *_: (batch.slots, None, None, None, None, torch.tensor([False]), None)
    )
    lora_config = types.SimpleNamespace(specialize_active_lora=False)
    punica = types.SimpleNamespace(token_mapping_meta=meta, lora_config=lora_config)
    order, (y13, y2) = sides.plain_order(layer, batch), out.flat()
    experts = types.SimpleNamespace(
        _lora_context=types.SimpleNamespace(
            aux_stream=None,
            w13_lora_a_stacked=vllms.w13_lora_a_stacked,
            w13_lora_b_stacked=vllms.w13_lora_b_stacked,
        )
    )

    def base(y, x, weight, weights):
        def product():
            ran.append("base")
            real_product(y, x, weight, order, SHAPE.top_k, weights, None, 1)

        if base_product.is_deferring():
            given = {"A": x, "B": weight, "C": y, "sorted_token_ids": order.sorted_ids}
            given |= {"expert_ids": order.expert_ids, "num_tokens_post_padded": order.num_padded}
            given |= {"A_scale": None, "B_scale": None, "B_bias": None, "top_k": SHAPE.top_k}
            given |= {"config": {"BLOCK_SIZE_M": 16}, "topk_weights": weights}
            given["mul_routed_weight"] = weights is not None
            assert base_product.defer(product, given)
        else:
            product()

    with moe_kernels.deferring(experts):
        base(y13, batch.x, layer.w13, None)
        found = moe_kernels.add_w13(
            punica, out.y13, batch.x, vllms.w13_lora_a_stacked, vllms.w13_lora_b_stacked,
            batch.ids, batch.weights, None, batch.tokens, True, None,
        )  # fmt: skip
        if found is None:
            base_product.flush()  # as the hook does
            ran.append("upstream")
        base(y2, batch.act, layer.w2, batch.weights)
        if found is None:
            base_product.flush()
        else:
            moe_kernels.add_w2(found[0], out.y2, batch.act, batch.weights, True)
    expected = numbers.Expected(layer, batch)
    if found is not None:
        nothing = [torch.zeros_like(y) for y in out.flat()]
        assert numbers.wrong(out.flat(), expected, nothing, "base") == ""
    return ran


def write_record(*winners, shape=SHAPE, **more):
    us = {"upstream": (2.0, 2.0, 2.0)}
    choices = tuple(Choice(tokens, winner, us) for tokens, winner in winners)
    made = Record(choose.conditions("cpu"), shape, choices, **more)
    return records.write(made)


@pytest.mark.parametrize(
    ("tokens", "ran"),
    [
        (1, []),  # tail: neither upstream's base nor its LoRA
        (2, ["base", "base"]),  # ours, after upstream's base
        (4, ["base", "base"]),
        (5, ["base", "upstream", "base"]),
        (9, []),
    ],
)
def test_auto_takes_the_winner_of_the_batch(tokens, ran):
    write_record((1, "tail"), (4, "ours"), (8, "upstream"), (16, "tail"))
    assert run_layer(*layer_and_batch(tokens)) == ran


def test_auto_without_a_record_is_upstream(caplog, tmp_path):
    layer, vllms, batch = layer_and_batch(3)
    assert run_layer(layer, vllms, batch) == ["base", "upstream", "base"]
    assert moe_kernels._factors_of(vllms) is None


def test_auto_with_a_stale_record_is_upstream():
    path = write_record((8, "ours"))
    path.write_text(path.read_text().replace('"triton": "3', '"triton": "2'))
    assert run_layer(*layer_and_batch(3)) == ["base", "upstream", "base"]


def test_a_record_of_upstream_alone_costs_nothing():
    write_record((8, "upstream"))
    layer, vllms, batch = layer_and_batch(3)
    assert moe_kernels._factors_of(vllms) is None
    assert run_layer(layer, vllms, batch) == ["base", "upstream", "base"]


def test_a_records_tiles_are_used():
    tiles = config.Tiles(16, 16, 32, 4, 2, 64, 8)
    write_record((8, "ours"), tiles=(tuple(dataclasses.asdict(tiles).values()),))
    assert run_layer(*layer_and_batch(3)) == ["base", "base"]
    assert config.tiles_for("cpu", torch.float32, 16, 8) == tiles


@pytest.mark.parametrize(
    "other",
    [
        {"path": "MarlinExperts, AutoGPTQMoEMethod, weight_bits 4"},
        {"path": f"{records.UNQUANTISED}, bias"},
        {"absent": 4},
        {"shared": True},
    ],
)
def test_a_record_of_another_path_is_not_read(other):
    """INT4, a bias, experts on other devices: the same sizes, but another base, or fewer pairs."""
    write_record((8, "ours"), shape=dataclasses.replace(SHAPE, **other))
    vllms = cases.layer(SHAPE, "cpu").as_vllm()
    vllms.quant_method = UnquantizedFusedMoEMethod()
    assert choose.record_for(vllms, "cpu") is None
    write_record((8, "ours"))
    choose._record.cache_clear()
    assert choose.record_for(vllms, "cpu").shape == SHAPE


def test_tiles_of_other_rows_fall_back_to_upstream():
    tiles = config.Tiles(64, 16, 32, 4, 2, 64, 8)
    write_record((8, "ours"), tiles=(tuple(dataclasses.asdict(tiles).values()),))
    assert run_layer(*layer_and_batch(3)) == ["base", "upstream", "base"]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_use_rank_0s_record(rank, monkeypatch):
    """Rank 0 says tail; this rank's own file says ours."""
    path = write_record((8, "tail"))
    of_rank_0 = records.read(path)
    write_record((8, "ours"))

    class Group:
        world_size = 2

        def broadcast_object(self, value, src):
            assert src == 0
            return (of_rank_0, "") if rank else value

    from vllm.distributed import parallel_state

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "get_tp_group", Group)
    assert run_layer(*layer_and_batch(3)) == ([] if rank else ["base", "base"])
