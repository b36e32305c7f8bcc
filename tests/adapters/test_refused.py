"""Strict accounting: what is not consumed, not whole or not finite is refused, by name."""

from __future__ import annotations

import json
from unittest import mock

import layouts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_recognition import staged, worst

from vllm_moe_lora.adapters.config import Config
from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.adapters.folder import tensors as read_tensors

EXPERT_3 = "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_A.weight"


def _without(tensors):
    del tensors[EXPERT_3]


def _narrow(tensors):
    tensors[EXPERT_3] = tensors[EXPERT_3][:, :-1]


def _wide(tensors):
    tensors[EXPERT_3] = torch.cat([tensors[EXPERT_3]] * 2, 1)


def _nan(tensors):
    tensors[EXPERT_3] = tensors[EXPERT_3] * float("nan")


def _infinite(tensors):
    tensors[EXPERT_3][2, 7] = float("inf")


def _rank(tensors):
    tensors[EXPERT_3] = tensors[EXPERT_3][:3]


def _higher_rank(tensors):
    other = EXPERT_3.replace("lora_A", "lora_B")
    tensors[EXPERT_3] = torch.cat([tensors[EXPERT_3]] * 2)
    tensors[other] = torch.cat([tensors[other]] * 2, 1)


def _no_rank(tensors):
    other = EXPERT_3.replace("lora_A", "lora_B")
    tensors[EXPERT_3], tensors[other] = tensors[EXPERT_3][:0], tensors[other][:, :0]


def _swapped(tensors):
    other = EXPERT_3.replace("lora_A", "lora_B")
    tensors[EXPERT_3], tensors[other] = tensors[other], tensors[EXPERT_3]


def _far(tensors):
    for side in ("A", "B"):
        key = EXPERT_3.replace("lora_A", f"lora_{side}")
        tensors[key.replace("experts.3", "experts.8")] = tensors[key]


def _twice(tensors):
    tensors[EXPERT_3.replace("base_model.model.", "")] = tensors[EXPERT_3]


def _two_names(tensors):
    key = EXPERT_3.replace("up_proj", "w3")
    tensors[key] = tensors[EXPERT_3]


def _unknown(tensors):
    for side in ("A", "B"):
        tensors[f"model.layers.0.mlp.experts.3.sideways_proj.lora_{side}.weight"] = torch.ones(4, 4)


def _stack_too(tensors):
    tensors["model.layers.1.mlp.experts.up_proj.lora_A"] = torch.ones(1, 4, 128)


def _fused_too(tensors):
    for side, shape in (("A", (4, 128)), ("B", (2 * layouts.INNER, 4))):
        name = f"model.layers.1.mlp.experts.3.gate_up_proj.lora_{side}.weight"
        tensors[name] = torch.ones(shape)


def _dora(tensors):
    name = EXPERT_3.replace("lora_A.weight", "lora_magnitude_vector")
    tensors[name] = torch.ones(layouts.INNER)


def _bias(tensors):
    tensors[EXPERT_3.replace("lora_A.weight", "lora_B.bias")] = torch.ones(layouts.INNER)


def _whole_module(tensors):
    tensors["base_model.model.model.layers.0.mlp.gate.weight"] = torch.ones(8, 128)


def _adapters(tensors):
    for side in ("A", "B"):
        key = EXPERT_3.replace("lora_A", f"lora_{side}")
        tensors[key.replace(".weight", ".other.weight")] = tensors.pop(key)


def _flat_too(tensors):
    for side in ("A", "B"):
        tensors[f"base_model.model.model.layers.1.mlp.experts.lora_{side}.weight"] = torch.ones(
            4, 4
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without, ["experts.3.up_proj.lora_B", "lora_A without lora_B"]),
        (_narrow, [EXPERT_3, "96 x 127", "96 x 128"]),
        (_wide, [EXPERT_3, "96 x 256"]),
        (_nan, [EXPERT_3, "NaN", "expert 3"]),
        (_infinite, [EXPERT_3, "infinite", "expert 3"]),
        (_rank, [EXPERT_3, "rank 3", "rank 4"]),
        (_higher_rank, [EXPERT_3, "rank 8", "rank 4", "damaged"]),
        (_no_rank, [EXPERT_3, "rank 0"]),
        (_swapped, [EXPERT_3]),
        (_far, ["experts.8.up_proj", "experts 0 to 7"]),
        (_twice, [EXPERT_3, "twice"]),
        (_two_names, ["w3", "up_proj", "twice"]),
        (_unknown, ["experts.3.sideways_proj", "experts.gate_up_proj"]),
        (_stack_too, ["experts.up_proj.lora_A", "twice"]),
        (_fused_too, ["gate_up_proj and also gate_proj"]),
        (_dora, ["DoRA", "experts.3.up_proj", "--merge-into"]),
        (_bias, ["biases", "experts.3.up_proj", "--merge-into"]),
        (_whole_module, ["mlp.gate.weight", "--merge-into"]),
        (_adapters, ["two adapters"]),
        (_flat_too, ["Two layouts in one layer"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_refused_by_name(change, words):
    truth = layouts.Truth(seed=2, tied=False)
    tensors = layouts.per_expert(truth)
    staged(dict(tensors), truth, {})
    change(tensors)
    if change is _higher_rank:
        words = [EXPERT_3, "rank 8", "says 4", "rank_pattern"]
    with pytest.raises(AdapterError) as error:
        staged(tensors, truth, {})
    for word in words:
        assert word in str(error.value)


def test_what_peft_stores_beside_the_factors_is_not_refused():
    """VeLoRA computes what LoRA computes; its vector is for the backward pass."""
    truth = layouts.Truth(seed=2, tied=False)
    tensors = layouts.per_expert(truth)
    tensors[EXPERT_3.replace("lora_A.weight", "lora_velora_embed")] = torch.ones(64)
    slots, _ = staged(tensors, truth, {})
    assert worst(slots, truth, False, False) < 1e-6


@pytest.mark.parametrize("name", ["flat", "packed", "stacked", "rows", "shared_outer"])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_tensor_of_every_layout_must_have_its_shape(name, axis):
    """One off in any axis of any tensor of the file: none is cut or padded."""
    truth = layouts.Truth(seed=3, one_a=True)
    tensors = getattr(layouts, name)(truth)
    for key, tensor in tensors.items():
        if "layers.1" not in key or (name == "shared_outer" and tensor.ndim == 3 and axis == 0):
            continue
        cut = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        with pytest.raises(AdapterError):
            staged({**tensors, key: cut}, truth, {})


@pytest.mark.parametrize("r", [2, 8, 16])
def test_another_number_of_experts_is_seen(r):
    """Rows are rank times experts: 4 experts of rank 8 have the shape of 8 experts of rank 4."""
    truth = layouts.Truth(seed=1)
    with pytest.raises(AdapterError, match="another number of experts"):
        staged(layouts.flat(truth), truth, {"r": r})


def test_a_smaller_rank_is_scaled_by_itself_and_said():
    truth = layouts.Truth(seed=2, alpha=8.0)
    with mock.patch("vllm_moe_lora.adapters.layouts.by_projection.warning_once") as said:
        slots, _ = staged(layouts.per_expert(truth), truth, {"r": 32})
    assert worst(slots, truth, False, False) < 1e-5
    assert "rank 4 where adapter_config.json says 32" in said.call_args[0][0]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_tensor_more_or_less_is_never_passed_over(data):
    """Drop, rename or add any tensor: an error, or every tensor that is left was consumed."""
    truth = layouts.Truth(seed=2, tied=False)
    tensors = layouts.per_expert(truth)
    key = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["drop", "rename", "add", "sub"]))
    tensor = tensors.pop(key)
    if kind == "rename":
        tensors[data.draw(st.text("abcexprtsw.0123_", min_size=1, max_size=30)) + ".lora_A"] = (
            tensor
        )
    elif kind == "add":
        tensors[key] = tensor
        tensors[key.replace("experts", "experts.experts")] = tensor
    elif kind == "sub":
        tensors[key.replace("mlp", "mlp2")] = tensor
    with pytest.raises(AdapterError):
        staged(tensors, truth, {})


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": None}, "r is None"),
        ({"r": 2.5}, "r is 2.5"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj"),
        ({"alpha_pattern": {"(": 4}}, "regex"),
        ({"moe_lora_layout": "sideways"}, "grouped-by-expert"),
        ({"lora_B_layout": "sideways"}, "lora_B_layout"),
        ({"moe_lora_gate_up": "sideways"}, "interleaved"),
        ({"moe_lora_layout": "peft-transposed"}, 'Correct "moe_lora_layout"'),
    ],
)
def test_config(raw, word):
    truth = layouts.Truth(seed=1)
    with pytest.raises(AdapterError, match=word.replace("(", r"\(")):
        staged(layouts.flat(truth), truth, raw)


def test_folder(tmp_path):
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        Config.from_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="not a JSON object"):
        Config.from_folder(tmp_path)
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        read_tensors(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"a.lora_A.weight": torch.ones(2, 2, dtype=torch.int8)}, file)
    with pytest.raises(AdapterError, match=r"a\.lora_A\.weight is I8"):
        read_tensors(tmp_path)
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, file)
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[:20], b"", b"\xff" * 64, whole + b"0"):
        file.write_bytes(broken)
        with pytest.raises(AdapterError, match="cannot be read as safetensors"):
            read_tensors(tmp_path)


def test_a_name_twice_in_the_header(tmp_path):
    entry = {"dtype": "F32", "shape": [1, 1]}
    first = json.dumps({**entry, "data_offsets": [0, 4]})
    second = json.dumps({**entry, "data_offsets": [4, 8]})
    header = f'{{"x.lora_A.weight":{first},"x.lora_A.weight":{second}}}'.encode()
    header += b" " * (-len(header) % 8)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(AdapterError, match="cannot be read"):
        read_tensors(tmp_path)
