"""Every layout into the slots of 2-D, 3-D and interleaved wrappers, on one rank and on two."""

from __future__ import annotations

import json

import layouts
import pytest
import torch

from vllm_moe_lora.adapters.canonical import Dims
from vllm_moe_lora.adapters.config import Config
from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.adapters.group import group, refuse_what_is_not_lora
from vllm_moe_lora.adapters.layouts.recognise import resolve
from vllm_moe_lora.fitting.stage import Slots, stage


def staged(tensors, truth, raw, fused=False, interleaved=False, local=range(8), limit=16, **more):
    found = group(tensors)
    refuse_what_is_not_lora(found)
    assert not found.dense
    dims = Dims(layouts.EXPERTS, layouts.HIDDEN, truth.inner, True, interleaved)
    config = Config.from_dict({"r": truth.rank, "lora_alpha": truth.alpha, **raw})
    experts, notes = resolve(found.experts, dims, config)
    slots = Slots(list(local), fused, dims, torch.float32, limit, **more)
    return [stage(one, slots) for one in sorted(experts, key=lambda e: e.prefix)], notes


def worst(slots, truth, fused, interleaved, local=range(8)):
    """Largest difference of b @ a, any layer, projection and expert, from the truth."""
    error = 0.0
    for layer, (a, b) in enumerate(slots):
        for i, e in enumerate(local):
            names = ("gate_proj", "down_proj", "up_proj")
            want = [truth.delta(layer, name, e) for name in names]
            if fused:
                pair = [want[0], want[2]]
                joined = torch.stack(pair, 1).flatten(0, 1) if interleaved else torch.cat(pair)
                want = [joined, want[1]]
            for have, (x, y) in zip(want, zip(a, b, strict=True), strict=True):
                delta = y[i].double() @ x[i].double()
                error = max(error, (delta - have).abs().max().item())
    return error


@pytest.mark.parametrize(
    "local", [range(8), [2, 3, 4], [7, 0], [5]], ids=["all", "middle", "any", "one"]
)
@pytest.mark.parametrize("interleaved", [False, True], ids=["", "interleaved"])
@pytest.mark.parametrize("fused", [False, True], ids=["2-D", "3-D"])
@pytest.mark.parametrize("name", sorted(layouts.every()))
def test_layout(name, fused, interleaved, local):
    truth, tensors, raw = layouts.every(interleaved=interleaved)[name]
    slots, _ = staged(tensors, truth, raw, fused, interleaved, local)
    assert worst(slots, truth, fused, interleaved, local) < 1e-5


def test_the_wrong_order_would_be_seen():
    truth = layouts.Truth(seed=1)
    slots, _ = staged(layouts.flat(truth, b_grouped=True), truth, {})
    assert worst(slots, truth, False, False) > 0.5


def test_ranks_scales_and_gaps():
    """Other ranks and scales by expert, absent experts and projections: absent is zero."""
    truth = layouts.Truth(seed=4, tied=False)
    tensors = {
        k: t
        for k, t in layouts.per_expert(truth).items()
        if ".experts.3." not in k and not (".experts.5." in k and "up_proj" in k)
    }
    for key in [k for k in tensors if ".experts.1." in k]:
        tensors[key] = tensors[key][:3] if "lora_A" in key else tensors[key][:, :3]
    raw = {"rank_pattern": {r"experts\.1\..*": 3}, "alpha_pattern": {r"experts\.1\..*": 9.0}}
    for layer in truth.layers:
        for name, pairs in layer.items():
            a, b = pairs[1]
            pairs[1] = (a[:3], b[:, :3] * 1.5)  # 9 / 3 is 1.5 times 8 / 4
            for gone in (3, 5) if name == "up_proj" else (3,):
                pairs[gone] = (pairs[gone][0], torch.zeros_like(pairs[gone][1]))
    slots, _ = staged(tensors, truth, raw)
    assert worst(slots, truth, False, False) < 1e-5
    fused, _ = staged(tensors, truth, raw, fused=True)
    assert worst(fused, truth, True, False) < 1e-5


def test_twice_the_rank_fits_where_half_of_it_is_empty():
    truth = layouts.Truth(seed=2, tied=False)
    slots, _ = staged(layouts.flat_doubled(truth), truth, layouts.DOUBLED, limit=4)
    assert worst(slots, truth, False, False) < 1e-5
    with pytest.raises(AdapterError, match=r"rank 8.*--max-lora-rank 8"):
        staged(layouts.flat_doubled(truth), truth, layouts.DOUBLED, fused=True, limit=4)
    with pytest.raises(AdapterError, match="enable-mixed-moe-lora-format"):
        staged(layouts.per_expert(truth), truth, {}, fused=True, limit=4)


def test_factors_that_differ_need_room_for_each():
    truth = layouts.Truth(seed=1)
    with pytest.raises(AdapterError, match="--enable-moe-shared-loras"):
        staged(layouts.per_expert(truth), truth, {}, shared=True)
    outer = layouts.Truth(seed=3, one_a=True)
    slots, _ = staged(layouts.stacked(outer, shared=True), outer, {}, shared=True)
    assert worst(slots, outer, False, False) < 1e-5


@pytest.mark.parametrize("marked", [False, True])
def test_sizes_that_do_not_show_the_orientation(marked):
    """2 I == H: gate_up alone looks the same either way; today's PEFT is assumed, and said."""
    truth = layouts.Truth(seed=5, inner=layouts.HIDDEN // 2)
    tensors = {
        k.replace(".base_layer", ""): t
        for k, t in layouts.flat(truth, transposed=marked).items()
        if ".base_layer" in k
    }
    truth.without(lambda layer, projection, expert: projection != "down_proj")
    raw = {"moe_lora_layout": "peft-transposed"} if marked else {}
    slots, notes = staged(tensors, truth, raw)
    assert worst(slots, truth, False, False) < 1e-5
    assert bool(notes) != marked
    assert marked or "moe_lora_layout" in notes[0]


def test_bf16_slots_round_once():
    truth = layouts.Truth(seed=1, alpha=12.0)  # a scale of 3 rounds
    dims = Dims(8, layouts.HIDDEN, truth.inner)
    config = Config.from_dict({"r": 4, "lora_alpha": 12.0})
    experts, _ = resolve(group(layouts.per_expert(truth)).experts, dims, config)
    _, b = stage(experts[0], Slots(range(8), False, dims, torch.bfloat16, 16))
    want = torch.stack([pair[1] for pair in truth.layers[0]["gate_proj"]]) * 3
    assert torch.equal(b[0], want.bfloat16())


@pytest.mark.parametrize(("stamp", "swapped"), [("peft-0.18", True), ("peft-0.19.1", False)])
def test_nemo_says_the_orientation_in_a_file_of_its_own(tmp_path, stamp, swapped):
    truth = layouts.Truth(seed=5)
    folder = layouts.save(tmp_path / "nemo", layouts.flat(truth), truth)
    assert Config.from_folder(folder).transposed() is None
    marker = json.dumps({"paramwrapper_layout": stamp})
    (folder / "automodel_peft_config.json").write_text(marker)
    assert Config.from_folder(folder).transposed() is swapped
