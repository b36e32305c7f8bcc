"""Base weights that are loaded again, with and without adapters loaded: as a fresh engine."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from engine_cases import PROMPTS, Case, compare_fp32, compare_low_precision
from safetensors.torch import save_file

from vllm_moe_lora.tiny import engine, models, oracle, quantise

pytestmark = pytest.mark.cpu_engine
SCRIPT = Path(__file__).with_name("reload.py")


def run(model, case, rounds, folder, dtype="float32"):
    """One tensor [names, prompts, vocab] for each round of reload.py; adapters are copied first."""
    job = {"model": str(model), "dtype": dtype, "prompts": PROMPTS}
    job["adapters"] = {
        name: shutil.copytree(path, tempfile.mkdtemp(dir=folder), dirs_exist_ok=True)
        for name, path in case.adapters.items()
    }
    job["rounds"] = [(way, str(folder), names) for way, folder, names in rounds]
    found, _ = engine.saved_by(SCRIPT, job)
    return [one.view(-1, len(PROMPTS), one.shape[-1]) for one in found]


def spliced(base, other, folder, of_other):
    """A checkpoint with the tensors of ``base``, and those of ``other`` whose names fit."""
    folder.mkdir()
    for file in base.glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    first, second = oracle.load_tensors(base), oracle.load_tensors(other)
    tensors = {name: (second if of_other(name) else first)[name] for name in first}
    assert sum(map(of_other, tensors)) > 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_layer_1(name):
    return ".layers.1." in name


def test_unquantised(make_case, tmp_path):
    case = make_case("qwen2_moe")
    case.add("a", seed=1)
    case.add("b", seed=2, rank=12)
    other = Case(tmp_path, *2 * [models.build("qwen2_moe", tmp_path / "other", seed=7)])
    other.adapters = dict(case.adapters)
    # What the engine has at the end: `other`, with layer 1 and one expert of layer 0 from `case`.
    end = spliced(
        other.model,
        case.model,
        tmp_path / "end",
        lambda name: in_layer_1(name) or ".layers.0.mlp.experts.3." in name,
    )
    names = [None, "a", "b"]
    rounds = [
        ("nothing", case.model, [None]),
        ("whole", other.model, names),  # no adapter was loaded before
        ("slept", case.model, names),
        ("without_files", other.model, names),
        ("live", case.model, names),
        ("half", case.model, names),
        ("named", case.model, names),
    ]
    found = run(case.model, case, rounds, tmp_path)
    for again, truth in ((found[1], other), (found[2], case), (found[3], other)):
        for name, rows in zip(names, again, strict=True):
            compare_fp32(list(rows), truth, name)
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[3], found[4]), "one expert of layer 1 does something"
    (fresh,) = run(end, case, [("nothing", end, names)], tmp_path)
    assert torch.equal(found[-1], fresh)
    assert (found[-1] - found[3]).abs().amax(2).min() > 0.02


def test_int4(make_case, tmp_path):
    case = make_case("qwen2_moe", ("gptq", 64, True))
    case.add("a", seed=1)
    full = models.build("qwen2_moe", tmp_path / "full", seed=7)
    other = Case(tmp_path, tmp_path / "int4", tmp_path / "dequantised")
    quantise.quantise(full, other.model, other.plain, "gptq", 64, True)
    other.adapters = dict(case.adapters)
    end = spliced(other.model, case.model, tmp_path / "end", in_layer_1)
    names = [None, "a"]
    rounds = [
        ("nothing", case.model, [None]),
        ("whole", other.model, names),
        ("half", case.model, names),
    ]
    found = run(case.model, case, rounds, tmp_path, "bfloat16")
    compare_low_precision(list(found[1][1]), other, "a")
    (fresh,) = run(end, case, [("nothing", end, names)], tmp_path, "bfloat16")
    assert torch.equal(found[-1], fresh)
    assert (found[-1] - found[1]).abs().amax(2).min() > 0.02


UNPACK = """
import torch
import vllm._custom_ops
from vllm_moe_lora.layers.cpu.packing import pack, unpack
isas = ["vec", *(["amx"] if torch.cpu._is_amx_tile_supported() else [])]
for isa, dtype in [(i, d) for i in isas for d in (torch.float32, torch.bfloat16, torch.float16)]:
    if isa == "amx" and dtype != torch.bfloat16:
        continue
    w = torch.randn(3, 64, 96).to(dtype)
    assert not torch.equal(pack(w, isa), w)
    assert torch.equal(unpack(pack(w, isa), isa), w), (isa, dtype)
print("unpacked")
"""


def test_packing_is_undone():
    done = engine.launch(
        [sys.executable, "-c", UNPACK],
        env={**os.environ, **engine.SETTINGS},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "unpacked" in done.stdout, done.stderr[-2000:]
