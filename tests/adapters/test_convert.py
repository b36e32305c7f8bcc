"""convert and inspect: round trips bit for bit, merges against oracles of their own."""

from __future__ import annotations

import json
import os
import stat
from xml.etree import ElementTree

import layouts
import pytest
import torch
from safetensors.torch import load_file
from test_recognition import worst

from vllm_moe_lora import cli
from vllm_moe_lora.adapters.offline.convert import read
from vllm_moe_lora.fitting.stage import Slots, stage
from vllm_moe_lora.tiny import adapters, models, oracle

FORMS = ("per-expert", "peft-fused", "packed")
ATTENTION = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(4, 128),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(128, 4),
}


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def convert(src, dst, *args):
    return cli.main(["convert", str(src), str(dst), *args])


@pytest.fixture
def truth():
    return layouts.Truth(seed=1)


@pytest.fixture
def per_expert(tmp_path, truth):
    tensors = {**layouts.per_expert(truth), **ATTENTION}
    return layouts.save(tmp_path / "src", tensors, truth)


def delta_error(folder, truth):
    adapter = read(folder)
    slots = Slots(range(8), False, adapter.dims, torch.float32, 16)
    staged = [stage(one, slots) for one in sorted(adapter.experts, key=lambda e: e.prefix)]
    return worst(staged, truth, False, False)


@pytest.mark.parametrize("form", FORMS)
def test_round_trip_is_bit_exact(tmp_path, truth, per_expert, form):
    assert convert(per_expert, tmp_path / "there", "--to", form) == 0
    assert delta_error(tmp_path / "there", truth) < 1e-5
    assert convert(tmp_path / "there", tmp_path / "back", "--to", "per-expert") == 0
    same(per_expert, tmp_path / "back")
    for other in FORMS:
        assert convert(tmp_path / "there", tmp_path / other, "--to", other) == 0
        assert delta_error(tmp_path / other, truth) < 1e-5


def test_fused_is_what_peft_writes(tmp_path, truth, per_expert):
    assert convert(per_expert, tmp_path / "out", "--to", "peft-fused") == 0
    want = {**layouts.flat(truth), **ATTENTION}
    got = tensors_of(tmp_path / "out")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_modules"] == ["q_proj"]


def test_gate_and_up_apart_take_twice_the_rank_and_come_back(tmp_path):
    truth = layouts.Truth(seed=2, tied=False)
    src = layouts.save(tmp_path / "src", layouts.per_expert(truth), truth)
    assert convert(src, tmp_path / "fused", "--to", "peft-fused") == 0
    config = json.loads((tmp_path / "fused" / "adapter_config.json").read_text())
    assert list(config["rank_pattern"].values()) == [8]
    assert list(config["alpha_pattern"].values()) == [16]
    assert delta_error(tmp_path / "fused", truth) < 1e-5
    assert convert(tmp_path / "fused", tmp_path / "back", "--to", "per-expert") == 0
    same(src, tmp_path / "back")


def test_patterns_of_the_source_do_not_leak(tmp_path):
    """A pattern on down_proj is for the shared expert as well; the routed experts keep theirs."""
    truth = layouts.Truth(seed=2)
    raw = {"rank_pattern": {"down_proj": 4}, "alpha_pattern": {"down_proj": 4.0}}
    for layer in truth.layers:
        layer["down_proj"] = [(a, b / 2) for a, b in layer["down_proj"]]
    tensors = {
        k: t * 2 if "down_proj.lora_B" in k else t for k, t in layouts.per_expert(truth).items()
    }
    shared = "base_model.model.model.layers.0.mlp.shared_expert.down_proj"
    tensors[f"{shared}.lora_A.weight"] = torch.randn(4, 96)
    tensors[f"{shared}.lora_B.weight"] = torch.randn(128, 4)
    src = layouts.save(tmp_path / "src", tensors, truth, **raw)
    for form in FORMS:
        assert convert(src, tmp_path / form, "--to", form) == 0
        assert delta_error(tmp_path / form, truth) < 1e-5
        scale, rank = read(tmp_path / form).config.scale(f"{shared}"[17:], 4)
        assert (scale, rank) == (1.0, 4)


def test_a_pattern_for_another_module_does_not_change_the_number_of_experts(tmp_path, capsys):
    truth = layouts.Truth(seed=1)
    raw = {"rank_pattern": {"q_proj": 2}}
    for form, tensors in (("flat", layouts.flat(truth)), ("rows", layouts.rows(truth))):
        src = layouts.save(tmp_path / form, tensors, truth, **raw)
        adapter = read(src)
        assert (adapter.dims.experts, adapter.dims.hidden, adapter.dims.inner) == (8, 128, 96)
        assert delta_error(src, truth) < 1e-5
    wrong = layouts.save(
        tmp_path / "wrong", layouts.flat(truth), truth, rank_pattern={"down_proj": 2}
    )
    assert cli.main(["inspect", str(wrong)]) == 1
    assert "--base" in capsys.readouterr().err


def test_gaps_become_zeros_and_are_said(tmp_path, capsys):
    truth = layouts.Truth(seed=2)
    tensors = {k: t for k, t in layouts.per_expert(truth).items() if ".experts.3." not in k}
    src = layouts.save(tmp_path / "src", tensors, truth)
    assert convert(src, tmp_path / "out", "--to", "packed") == 0
    said = capsys.readouterr().err
    assert "zeros" in said
    assert "--base" in said
    truth.without(lambda layer, projection, expert: expert != 3)
    assert delta_error(tmp_path / "out", truth) < 1e-5


def test_manners(tmp_path, per_expert, capsys):
    assert convert(per_expert, tmp_path / "out", "--to", "packed", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert convert(per_expert, tmp_path / "out", "--to", "packed") == 1
    assert "--force" in capsys.readouterr().err
    assert convert(per_expert, tmp_path / "out", "--to", "packed", "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 10
    assert not list(tmp_path.glob(".*"))
    assert convert(tmp_path / "none", tmp_path / "x", "--to", "packed") == 1
    assert "not a folder" in capsys.readouterr().err


def test_a_failed_write_leaves_what_was_there(tmp_path, per_expert):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("here")
    broken = layouts.save(
        tmp_path / "broken", {"model.layers.0.mlp.experts.lora_A": torch.ones(2, 2)}, _Rank
    )
    assert convert(broken, tmp_path / "out", "--to", "packed", "--force") == 1
    assert (tmp_path / "out" / "precious").read_text() == "here"


class _Rank:
    rank, alpha = 4, 8.0


def test_inspect(tmp_path, per_expert, capsys):
    assert cli.main(["inspect", str(per_expert), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["layout"] for row in rows] == ["per-expert", "per-expert", "matrix"]
    assert rows[0]["experts"] == 8
    assert rows[0]["ranks"] == [4]
    assert rows[0]["scales"] == [2.0]
    assert rows[0]["bytes"] == 4 * 8 * (2 * 4 * (128 + 96) + 4 * (96 + 128))
    assert cli.main(["inspect", str(per_expert)]) == 0
    assert "per-expert" in capsys.readouterr().out
    (per_expert / "adapter_config.json").unlink()
    assert cli.main(["inspect", str(per_expert)]) == 1


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_merge_into_a_model(tmp_path, family):
    name = "intermediate_size" if family == "gpt_oss" else "moe_intermediate_size"
    model = models.build(family, tmp_path / "model", **{name: layouts.INNER})
    truth = layouts.Truth(seed=2)
    src = layouts.save(tmp_path / "src", layouts.per_expert(truth), truth)
    assert convert(src, tmp_path / "out", "--merge-into", str(model)) == 0
    want = load_file(layouts.merge(model, truth, tmp_path / "want") / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.keys()
    for key in want:
        assert torch.allclose(got[key], want[key], atol=1e-5), key
    changed = [key for key in want if "experts" in key]
    before = load_file(model / "model.safetensors")
    assert all(not torch.equal(got[key], before[key]) for key in changed if "bias" not in key)


def test_merge_of_dora_and_whole_modules_equals_peft(tmp_path):
    """What vLLM cannot serve: DoRA on attention, a replaced lm_head; the oracle is PEFT itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = models.build("qwen3_moe", tmp_path / "model")
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_dora=True,
        target_modules=["q_proj", "o_proj"],
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(hf, config)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    peft.save_pretrained(tmp_path / "src")
    peft.merge_and_unload().save_pretrained(tmp_path / "want")
    assert convert(tmp_path / "src", tmp_path / "out", "--merge-into", str(model)) == 0
    want = oracle.load_tensors(tmp_path / "want")
    got = oracle.load_tensors(tmp_path / "out")
    assert got.keys() == want.keys()
    for key in want:
        assert torch.allclose(got[key], want[key], atol=1e-5), key


def test_merge_refuses_what_has_no_weight(tmp_path, capsys):
    model = models.build("qwen3_moe", tmp_path / "model")
    src = adapters.write(model, tmp_path / "src", keep=lambda name: "q_proj" in name)
    file = src / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({k.replace("q_proj", "x_proj"): t for k, t in load_file(file).items()}, file)
    assert convert(src, tmp_path / "out", "--merge-into", str(model)) == 1
    assert "x_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for leaf in ("lora_magnitude_vector.weight", "lora_B.bias"):
        alone = {f"base_model.model.model.layers.0.self_attn.k_proj.{leaf}": torch.ones(64)}
        right = {k.replace("x_proj", "q_proj"): t for k, t in load_file(file).items()}
        save_file({**right, **alone}, file)
        assert convert(src, tmp_path / "out", "--merge-into", str(model)) == 1
        assert "k_proj" in capsys.readouterr().err
        save_file(right, file)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    assert convert(src, tmp_path / "out", "--merge-into", str(model)) == 1
    assert "quantised" in capsys.readouterr().err


def test_written_files_follow_the_umask(tmp_path, per_expert):
    before = os.umask(0o027)
    try:
        assert convert(per_expert, tmp_path / "out", "--to", "packed") == 0
    finally:
        os.umask(before)
    files = list((tmp_path / "out").iterdir())
    assert {file.name for file in files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


def test_inspect_in_three_lines(per_expert, capsys):
    assert cli.main(["inspect", str(per_expert)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("rank 4, alpha 8; ")
    assert "2 layers, 8 experts each, w1 w2 w3; ranks 4; scales 2" in lines[1]
    assert lines[2].startswith("other modules: ")
    assert cli.main(["inspect", str(per_expert), "--layers"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_inspect_draws_each_experts_delta(tmp_path, per_expert, capsys):
    picture = tmp_path / "norms.svg"
    assert cli.main(["inspect", str(per_expert), "--svg", str(picture)]) == 0
    titles = [one.text for one in ElementTree.parse(picture).iter() if one.tag.endswith("title")]
    assert len(titles) == 2 * 8
    tensors = load_file(per_expert / "adapter_model.safetensors")
    for layer in range(2):
        for expert in range(8):
            square = 0.0
            for word in ("gate_proj", "up_proj", "down_proj"):
                name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{word}"
                a, b = (tensors[f"{name}.lora_{side}.weight"].float() for side in "AB")
                square += float((2.0 * b @ a).square().sum())
            said = next(t for t in titles if t.startswith(f"layers.{layer}, expert {expert}: "))
            assert float(said.rpartition(" ")[2]) == pytest.approx(square**0.5, rel=1e-3)
    assert cli.main(["inspect", str(per_expert), "--svg", str(picture)]) == 1
    assert "--force" in capsys.readouterr().err
