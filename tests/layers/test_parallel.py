"""Cases under parallelism that the simulated ranks of tests/releases do not reach."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_lora.hooks import fused_moe_modular_method
from vllm_moe_lora.layers.cpu import expert_parallel, torch_experts
from vllm_moe_lora.layers.gpu import router_weights_on_input

TOKENS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
WEIGHTS = torch.tensor([[0.5], [0.25]])


class Kernel(torch.nn.Module):
    """A kernel of 0.12 to 0.16: it calls the shared experts with its own tokens."""

    def __init__(self):
        super().__init__()
        self.shared_experts = torch.nn.Linear(2, 2)
        self.seen = []

    def forward(self, hidden_states, topk_weights, apply_router_weight_on_input):
        assert apply_router_weight_on_input
        self.seen.append(topk_weights)
        return hidden_states, self.shared_experts(hidden_states)


@pytest.mark.parametrize("on_input", [True, False])
def test_shared_experts_of_a_kernel_get_the_tokens_without_weights(on_input):
    kernel = Kernel()
    method = SimpleNamespace(fused_experts=kernel)
    layer = SimpleNamespace(quant_method=method, apply_router_weight_on_input=on_input)
    want = kernel.shared_experts(TOKENS)
    router_weights_on_input.install(layer)
    for _ in range(2):
        given = {"hidden_states": TOKENS.clone(), "topk_weights": WEIGHTS}
        tokens, shared = kernel(**given, apply_router_weight_on_input=True)
        assert torch.equal(shared, want)
        assert torch.equal(tokens, TOKENS * WEIGHTS if on_input else TOKENS)
        assert torch.equal(kernel.seen.pop(), torch.ones(2, 1) if on_input else WEIGHTS)
    assert list(dict(kernel.named_parameters())) == ["shared_experts.weight", "shared_experts.bias"]


@pytest.mark.parametrize(
    ("on_input", "context", "weights", "moves"),
    [
        (True, object(), WEIGHTS, True),
        (False, object(), WEIGHTS, False),
        (True, None, WEIGHTS, False),
        (True, object(), WEIGHTS.expand(2, 2), False),  # upstream refuses it
    ],
)
def test_tokens_are_multiplied_first(on_input, context, weights, moves):
    experts = SimpleNamespace(_lora_context=context)
    method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=experts))
    layer = SimpleNamespace(apply_router_weight_on_input=on_input)

    def upstream(self, layer, x, topk_weights, topk_ids, shared_experts_input):
        return x, topk_weights, shared_experts_input

    hook = next(one for one in fused_moe_modular_method.HOOKS if one.feature == "gpu-experts")
    apply = hook.make(upstream)
    given = {"x": TOKENS, "topk_weights": weights, "topk_ids": None, "shared_experts_input": None}
    x, found, shared = apply(method, layer=layer, **given)
    assert torch.equal(x, TOKENS * WEIGHTS if moves else TOKENS)
    assert torch.equal(found, torch.ones_like(weights) if moves else weights)
    assert shared is (TOKENS if moves else None)


def test_cpu_experts_of_0_27_refuse_expert_parallelism():
    config = SimpleNamespace(moe_parallel_config=SimpleNamespace(use_ep=True))
    with pytest.raises(NotImplementedError, match="without --enable-expert-parallel"):
        torch_experts.init_wrapper(None, SimpleNamespace(moe_config=config))


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 9), top_k=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_local_choices(tokens, top_k, seed):
    """Each token keeps its experts of this rank, in their order, and nothing else has weight."""
    g = torch.Generator().manual_seed(seed)
    expert_map = torch.tensor([-1, 0, -1, 1, 2, -1, 3], dtype=torch.int32)
    chosen = torch.stack([torch.randperm(7, generator=g)[:top_k] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, top_k, generator=g) + 0.1
    local = expert_parallel.local_ids(chosen, expert_map)
    assert local.dtype == chosen.dtype
    rows, kept, ids = expert_parallel.local_choices(weights, local)
    want = {
        t: [
            (int(expert_map[e]), float(w))
            for e, w in zip(chosen[t], weights[t], strict=True)
            if expert_map[e] >= 0
        ]
        for t in range(tokens)
    }
    assert rows.tolist() == [t for t, pairs in want.items() if pairs]
    for t, row_ids, row_weights in zip(rows.tolist(), ids.tolist(), kept.tolist(), strict=True):
        pairs = list(zip(row_ids, row_weights, strict=True))
        assert pairs[: len(want[t])] == want[t]
        assert all(pair == (want[t][0][0], 0) for pair in pairs[len(want[t]) :])
