"""`vllm-moe-lora tune` as a command, without a GPU; its parts are tested in tests/kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from xml.etree import ElementTree

import forks
import pytest
import torch

from vllm_moe_lora import cli, probe, records
from vllm_moe_lora.commands import tune
from vllm_moe_lora.tiny import models
from vllm_moe_lora.tuning import served

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.build("qwen2_moe", tmp_path_factory.mktemp("model") / "m")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu(model, capsys):
    assert cli.main(["tune", str(model)]) == 2
    said = capsys.readouterr().err
    assert "sees no GPU" in said
    assert "--interpret" in said


def test_nothing_is_overwritten(model, tmp_path, capsys):
    (tmp_path / "report.txt").write_text("mine")
    args = ["tune", str(model), "--interpret", "--report", str(tmp_path / "report.txt")]
    assert cli.main(args) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "report.txt").read_text() == "mine"


def test_a_model_that_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    forked = types.SimpleNamespace(run=forks.launch, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(probe, "subprocess", forked)
    assert cli.main(["tune", str(tmp_path), "--interpret"]) == 2
    assert "vLLM refuses this model" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_the_layers_of_a_model(model_type, tmp_path, monkeypatch):
    folder = models.build(model_type, tmp_path / "m")
    forked = types.SimpleNamespace(run=forks.launch, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(probe, "subprocess", forked)
    found = probe.ask(probe.Question(str(folder), max_loras=3, max_lora_rank=8))
    config = json.loads((folder / "config.json").read_text())
    experts = config.get("num_experts", config.get("num_local_experts"))
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    fused = model_type == "gpt_oss"
    assert len(found.layers) == 1, "layers of one shape are one"
    one = found.layers[0]
    assert (one["experts"], one["inner"], one["hidden"]) == (experts, inner, config["hidden_size"])
    assert (one["top_k"], one["slots"], one["rank"]) == (config["num_experts_per_tok"], 3, 8)
    assert (one["slices"], one["fused"], one["base"]) == (1 if fused else 2, 2, not fused)


def test_an_int4_model_says_so_by_itself(tmp_path, monkeypatch):
    folder = models.build("qwen2_moe", tmp_path / "m", num_experts=32)
    config = json.loads((folder / "config.json").read_text())
    packed = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    config |= {"dtype": "bfloat16", "quantization_config": {**packed, "lm_head": False}}
    (folder / "config.json").write_text(json.dumps(config))
    forked = types.SimpleNamespace(run=forks.launch, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(probe, "subprocess", forked)
    [one] = probe.ask(probe.Question(str(folder))).layers
    assert "weight_bits 4, group_size 32" in one["path"]
    assert not one["base"]


SHAPE = records.LayerShape(4, 2, 64, 32, 2, 2, 3, 8, "bfloat16", path="MarlinExperts, SomeMethod")


class Layers:
    """Of a model, in the place of `ModelLayers`."""

    def __init__(self, what):
        self.what = what

    def served(self, shape):
        if isinstance(self.what, Exception):
            raise self.what
        return types.SimpleNamespace(exact=self.what, shape=shape)


@pytest.mark.parametrize(
    ("layers", "why", "said"),
    [
        (Layers(True), "", []),
        (Layers(False), "", ["only LoRA's numbers are compared with fp32"]),
        (Layers(torch.OutOfMemoryError("8 GiB")), "", ["are left out: OutOfMemoryError: 8 GiB"]),
        (None, "they need a GPU", ["MarlinExperts' base GEMMs are left out: they need a GPU"]),
    ],
)
def test_what_computes_the_base(layers, why, said):
    args = types.SimpleNamespace(interpret=False)
    base, more, remarks = tune._base_of(args, SHAPE, False, layers, why)
    assert not base
    assert ("served" in more) == (not said or "compared" in said[0])
    assert "not MarlinExperts'" in more["tailless"]
    assert all(text in remark for text, remark in zip(said, remarks, strict=True))


def test_layers_that_take_the_lora_as_an_input_are_not_served():
    method = types.SimpleNamespace(experts_cls=type("TrtLlmBf16LoRAExperts", (), {}))
    runner = types.SimpleNamespace(routed_experts=types.SimpleNamespace(quant_method=method))
    with pytest.raises(ValueError, match="TrtLlmBf16LoRAExperts take the LoRA as an input"):
        served.Served(runner, types.SimpleNamespace(lora_config=None), None, False)


def test_interpret(model, tmp_path):
    """The whole command in a process of its own: table, record, report without paths, plot."""
    names = {name: str(tmp_path / name) for name in ("out", "report.txt", "plot.svg")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm_moe_lora.cli", "tune", str(model), "--interpret"),
            *("--max-loras", "2", "--minutes", "0.02", "--out", names["out"]),
            *("--report", names["report.txt"], "--plot", names["plot.svg"]),
        ],
        env={**os.environ, "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the times are invented" in done.stdout
    [path] = (tmp_path / "out").iterdir()
    record = records.read(path)
    assert record.conditions.arch == "cpu", "no GPU ever matches it"
    assert (record.shape.slots, record.shape.slices) == (2, 2)
    report = (tmp_path / "report.txt").read_text()
    assert report.strip() == done.stdout.strip()
    assert str(tmp_path) not in report
    assert os.uname().nodename not in report
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert any(one.tag.endswith("polyline") for one in drawn.iter())
