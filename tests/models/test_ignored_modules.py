"""Modules whose LoRA vLLM would ignore or scale wrongly: its own functions, run on small tensors.

The functions are taken out of each release's source and run with stand-ins for what they call.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import unpacked

from vllm_moe_lora.models import declare, repair
from vllm_moe_lora.models.rows import ROWS

GPT_OSS = "vllm.model_executor.models.gpt_oss:MLPBlock.forward"
MUSE = "vllm.models.muse_spark.{}.model:MuseSpark1xMoE.fold_router_output_multiplier"


class Router:
    """A router with LoRA, as vLLM's LoRA layers are: `weight` and `bias` are the base layer's."""

    def __init__(self):
        torch.manual_seed(0)
        self.weight, self.bias = torch.randn(4, 8), torch.randn(4)
        self.lora = torch.randn(4, 8)

    def __call__(self, x):
        return x @ (self.weight + self.lora).t() + self.bias


class ReturnsPair(Router):
    def __call__(self, x):
        return super().__call__(x), None


@pytest.mark.parametrize("release", unpacked.available())
def test_router_of_gpt_oss_on_rocm(release, monkeypatch):
    router, x = Router(), torch.randn(3, 8)
    block = SimpleNamespace(
        router=router,
        hidden_size=8,
        is_sequence_parallel=False,
        experts=lambda hidden_states, router_logits: router_logits,
    )
    logits = {}
    if release in ("0.19.0", "0.19.1"):  # its router returns a pair
        router.__class__ = ReturnsPair
    for rocm in (False, True):
        forward = unpacked.function(
            unpacked.tree(release),
            GPT_OSS,
            torch=torch,
            current_platform=SimpleNamespace(is_rocm=lambda rocm=rocm: rocm),
            rocm_unquantized_gemm=lambda layer, x, weight, bias: x @ weight.t() + bias,
        )
        logits[rocm] = forward(block, x)
    assert torch.allclose(logits[False], Router.__call__(router, x))
    # Upstream ignores LoRA there. When this fails, the row can go.
    assert torch.allclose(logits[True], x @ router.weight.t() + router.bias)
    model = SimpleNamespace(moe_lora_row=row_of("GptOssForCausalLM"))
    for platform in ("cuda", "cpu", "rocm"):
        monkeypatch.setattr(declare, "_device_type", lambda platform=platform: platform)
        why = declare.why_ignored(model, "model.layers.0.mlp.router")
        assert bool(why) == (platform == "rocm")
        assert not declare.why_ignored(model, "model.layers.0.mlp.experts")


@pytest.mark.parametrize("release", [r for r in unpacked.available() if r == "0.33.0"])
@pytest.mark.parametrize("platform", ["nvidia", "amd"])
def test_router_of_muse_spark(release, platform):
    router, x, by = Router(), torch.randn(3, 8), 3.0
    want = by * router(x)
    moe = SimpleNamespace(
        router=router,
        router_output_multiplier=by,
        moe_router=SimpleNamespace(),
        _router_multiplier_folded=False,
    )
    router.bias = by * router.bias
    fold = unpacked.function(
        unpacked.tree(release),
        MUSE.format(platform),
        torch=torch,
        _supports_router_bf16x3_device=lambda: False,
    )
    fold(moe)
    assert moe.moe_router.router_output_multiplier is None  # nobody multiplies later
    assert not torch.allclose(router(x), want)
    router.lora *= by
    assert torch.allclose(router(x), want, atol=1e-5)
    config = SimpleNamespace(output_multiplier=by)
    row = row_of("MuseSparkForConditionalGeneration", platform)
    model = SimpleNamespace(moe_lora_row=row, config=config)
    assert "output_multiplier" in declare.why_ignored(model, "model.layers.1.feed_forward.router")
    config.output_multiplier = None
    ignored = declare.why_ignored(model, "model.layers.1.feed_forward.router")
    assert bool(ignored) == (platform == "amd")


def row_of(name, word=""):
    return next(row for row in ROWS if row.name == name and word in row.targets[0])


ERNIE = "vllm.model_executor.models.ernie45_vl_moe:Ernie4_5_VLMoeMoE.forward"


class Part(torch.nn.Module):
    """A gate or experts with LoRA, as vLLM computes it: row i gets the adapter of token i."""

    def __init__(self, adapters, factor, pair):
        super().__init__()
        self.adapters, self.factor, self.pair = adapters, factor, pair

    def forward(self, hidden_states, router_logits=None):
        found = (self.factor + self.adapters[: len(hidden_states)]) * hidden_states
        if router_logits is None:  # a gate
            return found, None
        routed = router_logits * hidden_states
        return (found, routed) if self.pair else found + routed


@pytest.mark.parametrize("release", unpacked.available())
def test_experts_of_ernie_vl(release):
    """In a step with images rows keep their adapters."""
    forward = unpacked.function(unpacked.tree(release), ERNIE, torch=torch)
    torch.manual_seed(0)
    tokens, adapters = torch.randn(5, 4), torch.randn(5, 1)
    # Up to 0.23 experts return two tensors.
    pair = any(name.startswith("final_shared_") for name in forward.__code__.co_varnames)
    parts = {
        f"{kind}_experts{suffix}": Part(adapters, factor, pair)
        for factor, (kind, suffix) in enumerate(
            (kind, suffix) for kind in ("text", "vision") for suffix in ("", "_gate")
        )
    }
    block = SimpleNamespace(hidden_size=4, has_shared_experts=True, tp_size=1, **parts)
    is_image = torch.tensor([[False], [True], [True], [False], [True]])
    model = torch.nn.Module()
    model.mlp = type("Ernie4_5_VLMoeMoE", (torch.nn.Module,), {"forward": forward})()
    vars(model.mlp).update(vars(block))
    for name in parts:
        model.mlp.add_module(name, vars(model.mlp).pop(name))
    assert repair.whole_batches(model) == repair.rename(model) == []  # without the row
    model.moe_lora_row = row_of("Ernie4_5_VLMoeForConditionalGeneration")
    assert repair.rename(model) == ["mlp"]
    for kind in ("text", "vision"):  # as vLLM's manager finds them, and wraps them
        moe = model.mlp.get_submodule(f"{kind}_moe")
        assert moe.experts is parts[f"{kind}_experts"]
        assert moe.gate is parts[f"{kind}_experts_gate"]
        assert not hasattr(model.mlp, f"{kind}_experts")
    assert repair.whole_batches(model) == ["mlp"]
    ours = model.mlp

    def alone(kind):
        logits, _ = parts[f"{kind}_experts_gate"](tokens)
        found = parts[f"{kind}_experts"](tokens, logits)
        return sum(found) if pair else found

    want = torch.where(is_image, alone("vision"), alone("text"))
    assert torch.allclose(ours(tokens, is_image), want)
    assert not torch.allclose(forward(block, tokens, is_image), want)  # else the repair can go
    for mask in (None, torch.zeros(5, 1, dtype=bool)):
        assert torch.allclose(ours(tokens, mask), alone("text"))
    assert torch.allclose(ours(tokens, torch.ones(5, 1, dtype=bool)), alone("vision"))
