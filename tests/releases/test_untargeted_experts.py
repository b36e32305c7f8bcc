"""Experts that no adapter may target, in every release's own model code and managers.

They are built as without LoRA and not wrapped; an adapter that targets them is refused by name.
"""

from __future__ import annotations

import re

import pytest
import torch
import unpacked
from packaging.version import Version
from test_adapters import ask

from vllm_moe_lora.tiny import adapters, models

RELEASES = unpacked.available()
WITH_FLAG = Version("0.19")
FLAG = ["q_proj", "qkv_proj"]  # 0.19 wants the packed module's name, later ones take either
LAYERS = [f"model.layers.{i}.mlp.experts" for i in range(2)]


# Refused at the start, but not if the flag leaves experts out.
REFUSED = {
    "twins": r"NotImplementedError: model\.layers\.0\.mlp\.experts: vLLM chose the CPU MoE experts "
    r"\w+, which do not support LoRA\. .* Without LoRA vLLM runs these experts\. .*"
    r"--lora-target-modules .*",
    "modular": r"NotImplementedError: model\.layers\.0\.mlp\.experts: Monolithic kernels are not "
    r"supported for Fused MoE LoRA\. .*--lora-target-modules .*",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, an adapter without experts and one with."""
    folder = tmp_path_factory.mktemp("untargeted")
    model = models.build("qwen2_moe", folder / "model")
    keep = {"queries": lambda name: name.endswith("q_proj"), "all": lambda name: True}
    found = {n: str(adapters.write(model, folder / n, keep=k)) for n, k in keep.items()}
    return str(model), found


def _jobs(made, release):
    """The ways to leave experts out that the release has, and engines with and without LoRA."""
    model, paths = made
    both = {"model": model, "adapters": paths}
    jobs = {
        "plain": {**both, "options": {"enable_lora": False}},
        "whole": {**both, "adapters": {"queries": paths["queries"]}},
        "declared": {**both, "cli": {"queries": paths["queries"]}},
        "declared-all": {**both, "cli": paths},
    }
    if Version(release) >= WITH_FLAG:
        without_experts = {"options": {"lora_target_modules": FLAG}}
        jobs["flag"] = {**both, **without_experts}
    if Version(release) >= Version("0.20"):  # before, the flag takes no whole names
        jobs["one layer"] = {**both, "options": {"lora_target_modules": [*FLAG, LAYERS[1]]}}
    # What takes no LoRA: from 0.30 on the CPU's experts, made so; from 0.28 on monolithic kernels.
    for without, since in (("twins", "0.30"), ("modular", "0.28")):
        if Version(release) >= Version(since):
            jobs[without] = {"model": model, "adapters": {}, "without": without}
            jobs[f"{without}, left out"] = {**jobs[without], **without_experts}
    return jobs


@pytest.mark.parametrize("release", RELEASES)
def test_experts_that_no_adapter_may_target(release, made, tmp_path):
    jobs = _jobs(made, release)
    found = ask(unpacked.tree(release), (jobs,), tmp_path, plugin=True)
    assert found["status"]["untargeted-experts"] == "on"
    plain = found["plain"]["experts"]
    assert list(plain) == LAYERS
    assert [one[:2] for one in plain.values()] == [(False, False)] * 2
    for way in set(jobs) & {"flag", "declared"}:
        assert found[way]["experts"] == plain, way
        _demand_queries(found[way]["adapters"]["queries"], made[1]["queries"])
        refused = found[way]["adapters"]["all"]
        assert isinstance(refused, str), way
        assert "LoRA adapter 2: " in refused
        flag = "--lora-target-modules" if way == "flag" else "--lora-modules"
        assert flag in refused
        assert "Nothing was loaded" in refused
    for way in ("whole", "declared-all"):
        assert [one[:2] for one in found[way]["experts"].values()] == [(True, True)] * 2
    assert isinstance(found["declared-all"]["adapters"]["all"], dict)
    if "one layer" in jobs:
        first, second = found["one layer"]["experts"].values()
        assert (first, second[:2]) == (plain[LAYERS[0]], (True, True))
        assert LAYERS[0] in found["one layer"]["adapters"]["all"]
    for without in set(jobs) & set(REFUSED):
        assert re.fullmatch(REFUSED[without], found[without]["error"])
        assert found[f"{without}, left out"]["experts"] == plain


def _demand_queries(got, folder):
    """The slot holds the file's factors."""
    from safetensors.torch import load_file

    tensors = load_file(f"{folder}/adapter_model.safetensors")
    assert isinstance(got, dict), got
    seen = 0
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
        b, a = tensors[f"{name}_B.weight"], tensors[f"{name}_A.weight"]
        slots = got[f"model.layers.{layer}.self_attn.qkv_proj"]
        have = slots["lora_b_stacked"][0][0].double() @ slots["lora_a_stacked"][0][0].double()
        assert torch.allclose(have, 2 * b.double() @ a.double(), atol=1e-5)
        seen += 1
    assert seen == 2


@pytest.mark.parametrize("release", [r for r in RELEASES if Version(r) >= WITH_FLAG])
def test_bare_vllm_builds_them_for_lora(release, made, tmp_path):
    """So that the test above is known to be able to fail."""
    jobs = {k: j for k, j in _jobs(made, release).items() if k == "flag"}
    found = ask(unpacked.tree(release), (jobs,), tmp_path, plugin=False)
    experts = found["flag"]["experts"].values()
    assert [one[:2] for one in experts] == [(True, False)] * 2
    assert isinstance(found["flag"]["adapters"]["all"], dict), "upstream ignores it"
