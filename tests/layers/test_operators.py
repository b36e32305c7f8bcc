"""The opaque operators of compiled code: what torch is told of them is what they do."""

from __future__ import annotations

import types

import pytest
import torch

from vllm_moe_lora.layers.cpu import operators


class _Punica:
    """Adds twice the sum of x to y."""

    token_segments = None

    def add_lora_linear(self, y, x, lora_a, lora_b, scale, slices):
        assert (lora_a, lora_b, scale, slices) == ("a", "b", 1.0, (3,))
        y += 2 * x.sum(1, keepdim=True)

    def add_lora_embedding(self, y, x, lora_b, add_inputs):
        assert (lora_b, add_inputs) == ("b", True)
        y += 2 * x.sum(1, keepdim=True)


class _Experts:
    a2_scale = None

    def compute(self, output, x, w1, w2, weights, ids, *rest):
        assert (w1, w2, rest[0], rest[1], rest[2]) == ("w13", "w2", "silu", 8, None)
        assert rest[-1] is True
        output.copy_(x * weights.sum(1, keepdim=True) + ids.sum(1, keepdim=True))


class _Native:
    """The native kernel: here it takes nothing."""

    def add(self, *given):
        return False


DENSE = types.SimpleNamespace(lora_a_stacked="a", lora_b_stacked="b", output_slices=(3,))
ROUTED = types.SimpleNamespace(
    w13_weight="w13",
    w2_weight="w2",
    activation="silu",
    global_num_experts=8,
    expert_map=None,
    apply_router_weight_on_input=True,
)


@pytest.fixture
def layers(monkeypatch):
    found = {"dense": (DENSE, _Punica(), _Native()), "experts": (ROUTED, _Experts())}
    found["embedding"] = DENSE, found["dense"][1]
    monkeypatch.setattr(operators, "_layer", lambda name: found[name])
    return found


def _calls():
    y, x = torch.zeros(4, 3), torch.randn(4, 5)
    yield operators.OPERATORS.add_lora_linear, (y, x, "dense")
    yield operators.OPERATORS.add_lora_embedding, (y, x, "embedding")
    weights, ids = torch.rand(4, 2), torch.randint(8, (4, 2))
    yield operators.OPERATORS.routed_experts, (torch.zeros(4, 3), x[:, :3], weights, ids, "experts")


@pytest.mark.parametrize("operator", range(3))
def test_schema_and_fake(layers, operator):
    function, given = list(_calls())[operator]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(function.default, given, test_utils=checks)


@pytest.mark.parametrize("tokens", [1, 4])
def test_compiled_as_one_graph(layers, tokens):
    """Traced once with 4 tokens: another number, another layer behind the name, no adapter."""
    shared = _Punica()
    layer = operators.LayerPunica(shared, "dense")

    def forward(x):
        y = x[:, :3] + 1
        layer.add_lora_linear(y, x, "not", "traced", 1.0, (3,))
        return y * 3

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="eager")
    compiled(torch.randn(4, 5))
    x = torch.randn(tokens, 5)
    want = (x[:, :3] + 1 + 2 * x.sum(1, keepdim=True)) * 3
    torch.testing.assert_close(compiled(x), want)
    layers["dense"][1].token_segments = []
    torch.testing.assert_close(compiled(x), (x[:, :3] + 1) * 3)
    other = types.SimpleNamespace(add_lora_linear=lambda y, *rest: y.zero_())
    layers["dense"] = DENSE, other, _Native()
    assert (compiled(x) == 0).all()


def test_native_kernel_comes_first(layers):
    """It gets the layer's factors and the batch's segments; only if it refuses, punica is asked."""
    punica, seen = _Punica(), []
    native = types.SimpleNamespace(add=lambda y, x, *rest: seen.append(rest) or y.fill_(7) is y)
    layers["dense"] = DENSE, punica, native
    y, x = torch.zeros(4, 3), torch.randn(4, 5)
    operators.OPERATORS.add_lora_linear(y, x, "dense")
    assert not seen  # a wrapper without segments is upstream's
    punica.token_segments = [(0, None)]
    operators.OPERATORS.add_lora_linear(y, x, "dense")
    assert seen == [("a", "b", [(0, None)], 1.0, (3,))]
    assert (y == 7).all()


def test_uncompiled_calls_go_on(layers):
    y, x = torch.zeros(4, 3), torch.randn(4, 5)
    layer = operators.LayerPunica(_Punica(), "unknown")
    layer.add_lora_linear(y, x, "a", "b", 1.0, (3,))
    torch.testing.assert_close(y, 2 * x.sum(1, keepdim=True).expand(4, 3))
    assert layer.token_segments is None
