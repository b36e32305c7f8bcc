"""Which layers' experts an adapter may target, and what an adapter hears that targets others."""

from __future__ import annotations

import argparse
import json
import types

import pytest
import torch
from safetensors.torch import save_file

from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.fitting import strict
from vllm_moe_lora.targets import server_adapters, target_modules

LAYER = "model.layers.3.mlp.experts"


def config(targets_=None, lora=True, **more):
    one = types.SimpleNamespace(target_modules=targets_)
    return types.SimpleNamespace(lora_config=one if lora else None, additional_config=more)


@pytest.mark.parametrize(
    ("flag", "layer", "may"),
    [
        (None, LAYER, True),
        (["experts"], LAYER, True),
        (["q_proj", LAYER], LAYER, True),
        (["q_proj", "model.layers.30.mlp.experts"], LAYER, False),
        (["layers.3.mlp.experts"], LAYER, True),
        (["language_model.model.layers.3.mlp.experts"], LAYER, True),
        # What vLLM calls the parts of the packed module "experts".
        (["experts.0.gate_proj"], LAYER, True),
        # As vLLM reads its flag: suffixes of modules, and a MoE layer is one module.
        (["gate_proj", "up_proj", "down_proj"], LAYER, False),
        (["w1", "w2", "w3"], LAYER, False),
        (["all-linear"], LAYER, False),
        (["gate", "shared_expert_gate", "shared_expert"], LAYER, False),
        ([], LAYER, False),
        (["q_proj"], "", True),
        (["experts"], "model.layers.3.ffn", True),
        (["block_sparse_moe"], "model.layers.3.block_sparse_moe", True),
        (["q_proj"], "model.layers.3.block_sparse_moe", False),
    ],
)
def test_by_the_flag(flag, layer, may):
    assert target_modules.may_target(config(flag), layer) is may


def test_without_lora():
    assert not target_modules.may_target(config(lora=False), LAYER)


def test_a_release_without_the_flag():
    one = types.SimpleNamespace(lora_config=types.SimpleNamespace(), additional_config={})
    assert target_modules.may_target(one, LAYER)


def test_by_the_declared_adapters():
    assert not target_modules.may_target(config(**{target_modules.NO_EXPERTS_KEY: True}), LAYER)
    # Not called "experts": nothing was asked about its name.
    assert target_modules.may_target(
        config(**{target_modules.NO_EXPERTS_KEY: True}), "model.layers.3.block_sparse_moe"
    )
    # The flag is the user's own word.
    assert target_modules.may_target(
        config(["experts"], **{target_modules.NO_EXPERTS_KEY: True}), LAYER
    )


PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("flag", "name", "out"),
    [
        (None, "layers.0.self_attn.o_proj", False),
        (["q_proj"], "layers.0.self_attn.o_proj", True),
        (["o_proj"], "layers.0.self_attn.o_proj", False),
        (["layers.0.self_attn.o_proj"], "layers.0.self_attn.o_proj", False),
        # One part of a packed module brings in the module.
        (["qkv_proj"], "layers.0.self_attn.k_proj", False),
        (["q_proj"], "layers.0.self_attn.qkv_proj", False),
        (["q_proj"], "layers.0.self_attn.k_proj", False),
    ],
)
def test_what_the_flag_leaves_out(flag, name, out):
    found = target_modules.leaves_out(types.SimpleNamespace(target_modules=flag), name, PACKED)
    assert found is out


def test_a_dense_module_outside_the_flag_is_refused(monkeypatch):
    weights = types.SimpleNamespace(lora_a=torch.ones(2, 4), lora_b=torch.ones(4, 2))
    lora = types.SimpleNamespace(loras={"layers.0.self_attn.o_proj": weights})
    one = types.SimpleNamespace(target_modules=["q_proj"], max_lora_rank=8)
    manager = types.SimpleNamespace(lora_config=one, packed_modules_mapping=PACKED)
    manager.modules, manager.model = {}, torch.nn.Module()
    # Even where some layers are on other ranks.
    monkeypatch.setattr(strict, "is_pipeline_parallel", lambda: True)
    with pytest.raises(AdapterError) as found:
        strict.check(manager, lora, {"layers.0.self_attn.q_proj": None})
    assert "layers.0.self_attn.o_proj" in str(found.value)
    assert "--lora-target-modules o_proj q_proj, or without" in str(found.value)


def test_the_flag_of_0_19_must_name_the_packed_module():
    from torch import nn

    weights = types.SimpleNamespace(lora_a=torch.ones(2, 4), lora_b=torch.ones(4, 2))
    lora = types.SimpleNamespace(loras={"attn.q_proj": weights})
    one = types.SimpleNamespace(target_modules=["q_proj"], max_lora_rank=8)
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv_proj": nn.Linear(2, 2)})})
    manager = types.SimpleNamespace(
        lora_config=one, packed_modules_mapping=PACKED, modules={}, model=model
    )
    with pytest.raises(AdapterError, match="--lora-target-modules q_proj qkv_proj, or without"):
        strict.check(manager, lora, {})


EXPERTS = "base_model.model.model.layers.0.mlp.experts.0.gate_proj.lora_A.weight"
QUERIES = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapters(tmp_path):
    found = {}
    for name, key in (("experts", EXPERTS), ("queries", QUERIES)):
        found[name] = tmp_path / name
        found[name].mkdir()
        save_file({key: torch.ones(2, 2)}, found[name] / "adapter_model.safetensors")
        (found[name] / "adapter_config.json").write_text(json.dumps({"r": 2}))
    return found


def said(*paths, enable_lora=True, flag=None, mm=None, **args):
    """What `record_no_experts` writes for a server with these --lora-modules."""
    modules = [types.SimpleNamespace(name=str(i), path=str(p)) for i, p in enumerate(paths)]
    parsed = argparse.Namespace(lora_modules=modules or None, **args)
    made = types.SimpleNamespace(
        enable_lora=enable_lora, lora_target_modules=flag, additional_config={"other": 1}
    )
    made.default_mm_loras = mm
    server_adapters.record_no_experts(parsed, made)
    assert made.additional_config["other"] == 1
    return made.additional_config.get(target_modules.NO_EXPERTS_KEY, False)


@pytest.fixture
def closed(monkeypatch):
    envs = pytest.importorskip("vllm.envs", reason="asks vLLM's settings; vLLM is not installed")
    resolver = pytest.importorskip("vllm.lora.resolver", reason="vLLM is not installed")
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE", raising=False)
    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", raising=False)
    monkeypatch.setattr(resolver.LoRAResolverRegistry, "resolvers", {})
    return envs, resolver


def test_declared_adapters_without_experts(adapters, closed):
    assert said(adapters["queries"])
    assert said(adapters["queries"], nnodes=1, data_parallel_size=1, headless=False)


@pytest.mark.parametrize(
    "more",
    [
        {"enable_lora": False},
        {"flag": ["q_proj"]},
        {"nnodes": 2},
        {"data_parallel_size": 2},
        {"headless": True},
        {"mm": {"audio": "/nowhere"}},
    ],
    ids=lambda more: "".join(more),
)
def test_where_more_may_come_nothing_is_said(adapters, closed, more):
    assert not said(adapters["queries"], **more)


def test_none_declared_experts_declared_and_unreadable(adapters, closed, tmp_path):
    assert not said()
    assert not said(adapters["queries"], adapters["experts"])
    assert not said(adapters["queries"], tmp_path / "someone/on-the-hub")
    assert not said(adapters["queries"], mm={"audio": str(adapters["experts"])})


@pytest.mark.parametrize("name", ["VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE"])
def test_servers_that_can_be_given_adapters(adapters, closed, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not said(adapters["queries"])


def test_a_resolver_may_bring_any_adapter(adapters, closed):
    closed[1].LoRAResolverRegistry.resolvers["files"] = object()
    assert not said(adapters["queries"])
