"""Every layout of routed experts lands in the slots of every release's own LoRA layers.

The release's real model code and managers, without kernels: what its slots hold after a load is
multiplied out and compared with the adapter's own matrices. Both are fp32, so 1e-5 is rounding.
"""

from __future__ import annotations

import json
import sys

import forks
import layouts
import pytest
import torch
import unpacked
from safetensors.torch import load_file

from vllm_moe_lora.tiny import adapters, models

LIMIT = 1e-5
RELEASES = [r for r in unpacked.available() if r != "0.32.0"]  # which tests/e2e runs for real
INNER = {"moe_intermediate_size": layouts.INNER}
# qwen2_moe: dense modules, shared experts and gates; the others: routed experts in every layout.
MODELS = {
    "qwen2_moe": {},
    "qwen3_moe": INNER,
    "gpt_oss": {"intermediate_size": layouts.INNER},
}
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# What bare vLLM must get wrong, so that these tests are known to be able to fail.
FAILS_BARE = ("patterns", "packed", "tinker", "some")


def _some(truth):
    keep = truth.without(lambda layer, projection, expert: layer == 0 or expert % 2 == 0)
    tensors = layouts.per_expert(layouts.Truth(seed=5, tied=False))
    kept = {k: t for k, t in tensors.items() if "layers.0." in k or int(k.split(".")[-4]) % 2 == 0}
    return keep, kept, {}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Models, adapters in every layout, and the truth of each."""
    folder = tmp_path_factory.mktemp("layouts")
    truths, jobs = {}, {}
    for family, overrides in MODELS.items():
        model = models.build(family, folder / family, **overrides)
        paths = {}
        if family == "qwen2_moe":
            paths["all"] = adapters.write(model, folder / "all")
            truths[family] = {"all": load_file(folder / "all" / "adapter_model.safetensors")}
        else:
            forms = layouts.every(interleaved=family == "gpt_oss")
            forms["some"] = _some(layouts.Truth(seed=5, tied=False))
            for name, (truth, tensors, config) in forms.items():
                paths[name] = layouts.save(folder / family / name, tensors, truth, **config)
            truths[family] = {name: truth for name, (truth, _, _) in forms.items()}
            stray = layouts.Truth(seed=9)
            tensors = layouts.per_expert(stray)
            tensors |= {k.replace("layers.1.", "layers.7."): t for k, t in tensors.items()}
            paths["stray"] = layouts.save(folder / family / "stray", tensors, stray)
            wide = layouts.Truth(seed=9, rank=17)
            paths["wide"] = layouts.save(folder / family / "wide", layouts.per_expert(wide), wide)
        jobs[family] = {"model": str(model), "adapters": {n: str(p) for n, p in paths.items()}}
    return jobs, truths


def ask(tree, cases, folder, plugin):
    """What `world.py` finds on the release whose ``vllm/`` is in ``tree``."""
    out = folder / "out.pt"
    job = {"models": cases[0], "plugin": plugin, "out": str(out)}
    (folder / "job.json").write_text(json.dumps(job))
    env = unpacked.environment(str(tree)) | {"VLLM_MOE_LORA": "1" if plugin else "0"}
    script = unpacked.HERE / "scripts" / "world.py"
    done = forks.launch([sys.executable, str(script), str(folder / "job.json")], env, 600)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def _product(slots, side, position):
    """[experts, out, in] of one slice in a layer's slot."""
    a, b = slots[f"{side}_lora_a_stacked"][position], slots[f"{side}_lora_b_stacked"][position]
    return b.double() @ a.double()


def _routed(slots, interleaved):
    """projection -> [experts, out, in], whatever the release calls its stacks."""
    if "w1_lora_a_stacked" in slots:
        words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        return {word: _product(slots, side, 0) for word, side in words.items()}
    out = {"down_proj": _product(slots, "w2", 0)}
    if len(slots["w13_lora_a_stacked"]) == 2:
        return {**out, "gate_proj": _product(slots, "w13", 0), "up_proj": _product(slots, "w13", 1)}
    both = _product(slots, "w13", 0)
    gate, up = (both[:, ::2], both[:, 1::2]) if interleaved else both.chunk(2, 1)
    return {**out, "gate_proj": gate, "up_proj": up}


def _wrong(got, truth, family):
    """What is wrong with one adapter of routed experts, "" if nothing."""
    if isinstance(got, str):
        return got
    for layer in range(layouts.LAYERS):
        slots = got[f"model.layers.{layer}.mlp.experts"]
        for projection, have in _routed(slots, family == "gpt_oss").items():
            for expert in range(layouts.EXPERTS):
                want = truth.delta(layer, projection, expert)
                rows, columns = want.shape
                far = (have[expert, :rows, :columns] - want).abs().max()
                if far > LIMIT:
                    return f"layer {layer}, {projection} of expert {expert}: {far:.3g} away"
    return ""


@pytest.mark.parametrize("release", RELEASES)
def test_every_layout_lands(release, cases, tmp_path):
    truths = cases[1]
    answer = ask(unpacked.tree(release), cases, tmp_path, plugin=True)
    assert answer["status"].get("adapters") == answer["status"].get("shared-experts") == "on"
    assert answer["status"]["compile-cache"] == "on"
    assert len(answer["keys"]) == len(MODELS)
    assert not set(answer["keys"]) & set(answer["bare keys"])
    for family in ("qwen3_moe", "gpt_oss"):
        got = answer[family]["adapters"]
        wrong = {name: _wrong(got[name], truth, family) for name, truth in truths[family].items()}
        assert not any(wrong.values()), {name: why for name, why in wrong.items() if why}
        assert "model.layers.7.mlp.experts" in got["stray"]
        assert "no routed experts of this model are called" in got["stray"]
        assert "rank 17" in got["wide"]
        assert "max-lora-rank" in got["wide"]
        assert answer[family]["raw"] == []
        assert answer[family]["failing"] == ["RuntimeError: no memory left"] * 2
        if release == "0.33.0":
            assert not answer[family]["registered"], "a third request would not read its files"
    _demand_dense(answer["qwen2_moe"], truths["qwen2_moe"]["all"])


def _demand_dense(answer, tensors):
    """Attention, shared experts, gates: each slice holds the file's matrices, and is in use."""
    assert answer["raw"] == [], "references around a LoRA wrapper"
    got = answer["adapters"]["all"]
    assert isinstance(got, dict), got
    seen = set()
    for module, slots in got.items():
        parent, _, word = module.rpartition(".")
        if word == "experts":
            continue
        for i, part in enumerate(MERGED.get(word, (word,))):
            name = f"base_model.model.{parent}.{part}"
            if f"{name}.lora_A.weight" not in tensors:
                continue
            b, a = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
            have = _dense(slots, i)
            assert (have - 2 * b.double() @ a.double()).abs().max() <= LIMIT, name
            seen |= {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
    left = {key for key in tensors if ".experts." not in key} - seen
    assert not left, left


def _dense(slots, i):
    return slots["lora_b_stacked"][i][0].double() @ slots["lora_a_stacked"][i][0].double()


@pytest.mark.parametrize("release", RELEASES)
def test_bare_vllm_is_caught(release, cases, tmp_path):
    """These tests see what is wrong without the plugin."""
    truths = cases[1]
    answer = ask(unpacked.tree(release), cases, tmp_path, plugin=False)
    got = answer["qwen3_moe"]["adapters"]
    fine = {"some", "patterns"} if release.startswith("0.11.") else set()
    for name in set(FAILS_BARE) - fine:
        assert _wrong(got[name], truths["qwen3_moe"][name], "qwen3_moe"), name
    again = answer["qwen3_moe"]["failing"][1]
    assert again if release == "0.33.0" else not again, "the second request runs the base model"
    if release == "0.33.0":
        assert answer["qwen3_moe"]["registered"]
    dense = answer["qwen2_moe"]
    with pytest.raises(AssertionError):
        _demand_dense(dense, truths["qwen2_moe"]["all"])
