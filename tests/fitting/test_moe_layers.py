"""What is read of a MoE LoRA wrapper: its base layer and its stacks, which any platform's has."""

from __future__ import annotations

import types

import pytest
import torch

from vllm_moe_lora.adapters.canonical import Dims
from vllm_moe_lora.fitting import fit
from vllm_moe_lora.targets import supports_lora


class Wrapper:
    """A platform's own: no `moe_config`, `_w13_slices`, `tp_size`, `_moe_kernel`."""

    def __init__(self, base_layer, slices, experts):
        self.base_layer = base_layer
        self.w13_lora_a_stacked = tuple(torch.zeros(2, experts, 4, 32) for _ in range(slices))
        self.w13_lora_b_stacked = tuple(torch.zeros(2, experts, 8, 4) for _ in range(slices))


def _wrapper(slices=2, experts=8, gated=True, tp=1, owned=None, unpadded=None):
    config = types.SimpleNamespace(
        num_experts=8,
        hidden_dim=32,
        hidden_dim_unpadded=None,
        intermediate_size_per_partition=8,
        intermediate_size_per_partition_unpadded=unpadded,
        is_act_and_mul=gated,
        moe_parallel_config=types.SimpleNamespace(tp_size=tp),
    )
    routed = types.SimpleNamespace(expert_map=owned)
    base = types.SimpleNamespace(moe_config=config, routed_experts=routed)
    return Wrapper(base, slices, experts)


def _manager(architecture="Qwen3MoeForCausalLM"):
    config = types.SimpleNamespace(architectures=[architecture])
    return types.SimpleNamespace(
        model=types.SimpleNamespace(config=config),
        lora_config=types.SimpleNamespace(lora_dtype=torch.float32, max_lora_rank=4),
    )


@pytest.mark.parametrize(
    ("slices", "gated", "fused"), [(2, True, False), (1, True, True), (1, False, False)]
)
def test_the_form_of_the_slots(slices, gated, fused):
    slots = fit.slots_of(_manager(), _wrapper(slices, gated=gated))
    assert slots.fused == fused
    assert slots.dims.gated == gated
    assert slots.local == list(range(8))
    assert not slots.shared


def test_sizes_are_the_models_not_the_ranks():
    wrapper = _wrapper(tp=2, unpadded=7)
    expected = Dims(experts=8, hidden=32, inner=14, gated=True, interleaved=True)
    assert fit.dims_of(_manager("GptOssForCausalLM"), wrapper) == expected


def test_experts_of_this_rank_in_the_order_of_its_weights():
    owned = torch.tensor([-1, 1, -1, 0, -1, 2, -1, -1])
    assert fit.slots_of(_manager(), _wrapper(experts=3, owned=owned)).local == [3, 1, 5]


def test_experts_of_a_platforms_own_are_not_doubted():
    assert fit.is_experts(_wrapper())
    supports_lora.check_adapter("model.layers.0.mlp.experts", _wrapper())
