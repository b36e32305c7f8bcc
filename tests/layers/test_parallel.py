"""Cases under parallelism that the simulated ranks of tests/releases do not reach."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_moe_lora.hooks import fused_moe_modular_method
from vllm_moe_lora.layers.cpu import experts, torch_experts
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

    (hook,) = fused_moe_modular_method.HOOKS
    apply = hook.make(upstream)
    given = {"x": TOKENS, "topk_weights": weights, "topk_ids": None, "shared_experts_input": None}
    x, found, shared = apply(method, layer=layer, **given)
    assert torch.equal(x, TOKENS * WEIGHTS if moves else TOKENS)
    assert torch.equal(found, torch.ones_like(weights) if moves else weights)
    assert shared is (TOKENS if moves else None)


@pytest.mark.parametrize("use_ep", [True, False])
def test_cpu_experts_refuse_expert_parallelism(use_ep):
    made = experts.CPULoRAExperts()
    config = SimpleNamespace(moe_parallel_config=SimpleNamespace(use_ep=use_ep))
    made.moe_config = config
    if not use_ep:
        return made.set_lora_context("a context")
    with pytest.raises(NotImplementedError, match="without --enable-expert-parallel"):
        made.set_lora_context("a context")
    with pytest.raises(NotImplementedError, match="without --enable-expert-parallel"):
        torch_experts.init_wrapper(None, SimpleNamespace(moe_config=config))
    return None
