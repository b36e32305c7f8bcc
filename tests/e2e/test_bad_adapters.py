"""Adapters that do not fit: an error that names tensor and limit, and an engine that goes on."""

from __future__ import annotations

import json
import shutil

import layouts
import pytest
import torch
from engine_cases import PROMPTS, compare_fp32
from safetensors.torch import load_file, save_file

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine


def _edit(case, name, change, **config):
    """A copy of adapter "good" with its tensors changed."""
    folder = case.folder / name
    shutil.copytree(case.adapters["good"], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    case.adapters[name] = folder


def _rename(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def _add(name, *shape):
    return lambda tensors: {
        **tensors,
        f"base_model.model.model.layers.1.mlp.{name}": torch.ones(shape),
    }


def _first_column_off(tensors):
    key = next(k for k in sorted(tensors) if "experts.3.up_proj.lora_A" in k)
    return {**tensors, key: tensors[key][:, :-1].contiguous()}


def test_refused_with_name_and_cure(make_case):
    case = make_case("qwen2_moe")
    case.add("good", seed=1)
    case.add("rank", seed=2, rank=24)
    case.add("flat-rank", seed=2)
    truth = layouts.Truth(rank=24, inner=128)
    shutil.rmtree(case.adapters["flat-rank"])
    layouts.save(case.adapters["flat-rank"], layouts.flat(truth), truth)
    _edit(case, "dora", _add("experts.3.up_proj.lora_magnitude_vector", 128), use_dora=True)
    _edit(case, "bias", _add("experts.3.up_proj.lora_B.bias", 128), lora_bias=True)
    _edit(case, "gate", _add("gate.weight", 8, 128), modules_to_save=["gate"])
    _edit(case, "nan", lambda t: {k: v / 0 if "q_proj" in k else v for k, v in t.items()})
    _edit(case, "layer", _rename("layers.1.", "layers.7."))
    _edit(case, "expert", _rename("experts.5.", "experts.55."))
    _edit(case, "path", _rename("mlp.experts", "sparse_block.experts"))
    _edit(case, "narrow", _first_column_off)
    expected = {
        "rank": ["lora_A", "rank 24", "max_lora_rank=16", "--max-lora-rank 24"],
        "flat-rank": ["mlp.experts.", "rank 24", "--max-lora-rank 24"],
        "dora": ["DoRA", "experts.3.up_proj", "--merge-into"],
        "bias": ["biases", "experts.3.up_proj", "--merge-into"],
        "gate": ["mlp.gate.weight", "--merge-into"],
        "nan": ["q_proj", "infinite"],
        "layer": ["model.layers.7.", "no module"],
        "expert": ["experts.55.", "experts 0 to 7"],
        "path": ["sparse_block.experts", "no routed experts"],
        "narrow": ["experts.3.up_proj", "127", "128"],
        "good": ["ok"],
    }
    job = engine.Job(
        str(case.model),
        {n: str(case.adapters[n]) for n in expected},
        [[(p, "good") for p in PROMPTS] + [(p, None) for p in PROMPTS]],
        options={"dtype": "float32"},
        load=list(expected),
    )
    answers, outcomes, _ = engine.run(job)
    for (name, words), outcome in zip(expected.items(), outcomes, strict=True):
        for word in words:
            assert word in outcome, f"{name}: {outcome}"
    for batch in answers:  # before and after each refusal, bit for bit
        for (_, have), (_, first) in zip(batch, answers[0], strict=True):
            assert torch.equal(have, first)
    compare_fp32([lp[-1] for _, lp in answers[-1][: len(PROMPTS)]], case, "good")
