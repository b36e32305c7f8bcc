"""patches/upstream/v0.11.1 alone, without the plugin: `ci/upstream.sh 0.11.1` runs this.

As in test_int4_numbers.py, the layers are real and the operators of CUDA and Triton are torch.
"""

from __future__ import annotations

import os

import pytest
import quantised
import test_int4_numbers as numbers
import torch

pytestmark = [
    pytest.mark.legacy,
    pytest.mark.skipif("MOE_LORA_UPSTREAM" not in os.environ, reason="ci/upstream.sh 0.11.1"),
]
# Checkpoints that the patches support; the others are refused by name.
KINDS = ["gptq", "gptq act-order", "gptq channel", "ct", "ct channel", "ct-triton", "moe_wna16"]
EVERY = range(quantised.EXPERTS)


@pytest.mark.parametrize("kind", KINDS)
def test_int4_experts(kind, config, cuda, monkeypatch):
    """Base and two adapters side by side: the numbers of merged, dequantised weights."""
    torch.manual_seed(1)
    shared = numbers.Shared()
    layer = quantised.layer(kind, monkeypatch, torch.float16, shared)
    made = quantised.Numbers(kind)
    made.load(layer)
    adapters = [numbers.Adapter(8, EVERY, 1), numbers.Adapter(3, EVERY, 2)]
    punica = cuda.PunicaInTorch(256, max_batches=256, device="cpu")
    wrapper = numbers._wrap(layer, shared, adapters, punica)
    for tokens in (1, 40):
        x = torch.randn(tokens, quantised.HIDDEN).half()
        logits = torch.randn(tokens, quantised.EXPERTS).half()
        slots = [(i + 1) % 3 - 1 for i in range(tokens)]
        have = numbers._ask(wrapper, config, punica, x, logits, slots)
        want = numbers._reference(x, logits, slots, made, shared, adapters)
        base = numbers._reference(x, logits, [-1] * tokens, made, shared, adapters)
        # On the CPU, dense LoRA of this release gives base tokens the last slot's adapter: the
        # plugin repairs that, GPUs do not have it, and these patches are not about it.
        adapted = [i for i, slot in enumerate(slots) if slot >= 0]
        for which, rows in ((0, adapted), (1, list(range(tokens)))):
            most = want[which].abs().max()
            assert (have[which] - want[which])[rows].abs().max() <= numbers.LIMIT * most
            assert (base[which] - want[which])[rows].abs().max() >= 20 * numbers.LIMIT * most


def test_awq_is_refused_by_name(config, cuda, monkeypatch):
    from vllm.lora.layers.fused_moe import FusedMoEWithLoRA

    layer = quantised.layer("awq", monkeypatch, torch.float16)
    with pytest.raises(NotImplementedError, match="AWQMoEMethod does not support LoRA"):
        FusedMoEWithLoRA(layer)


def test_shared_experts_and_gates(config, monkeypatch):
    """The modules that the forward pass reaches hold the adapter's factors after activation."""
    from transformers import Qwen2MoeConfig
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_weights import LoRALayerWeights
    from vllm.lora.models import LoRAModel, LoRAModelManager
    from vllm.model_executor.models.interfaces import SupportsLoRA
    from vllm.model_executor.models.qwen2_moe import Qwen2MoeSparseMoeBlock

    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    made = Qwen2MoeConfig(num_experts=4, num_experts_per_tok=2, **sizes)

    class Model(torch.nn.Module, SupportsLoRA):
        is_3d_moe_weight = False

        def __init__(self):
            super().__init__()
            self.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
            self.embedding_modules, self.embedding_padding_modules = {}, []
            self.config = made
            self.mlp = Qwen2MoeSparseMoeBlock(made, None, prefix="mlp")

        def get_expert_mapping(self):
            from vllm.model_executor.layers.fused_moe import FusedMoE

            names = ("gate_proj", "down_proj", "up_proj")
            return FusedMoE.make_expert_params_mapping(*names, num_experts=4)

    model = Model()
    experts = model.mlp.experts
    lora = LoRAConfig(max_lora_rank=8, max_loras=1, lora_dtype=torch.float32)
    manager = LoRAModelManager(model, 1, 64, 512, lora, torch.device("cpu"))

    def pair(name, rows, columns):
        return LoRALayerWeights(name, 8, 8, torch.ones(8, columns), torch.ones(rows, 8))

    factors = {
        name: pair(name, *shape)
        for name, shape in {
            "mlp.shared_expert.gate_proj": (32, 64),
            "mlp.shared_expert.up_proj": (32, 64),
            "mlp.shared_expert.down_proj": (64, 32),
            "mlp.shared_expert_gate": (1, 64),
            "mlp.gate": (4, 64),
        }.items()
    }
    manager.add_adapter(LoRAModel(1, 8, factors))
    manager.activate_adapter(1)
    reached = experts._shared_experts
    for module in (
        reached.gate_up_proj,
        reached.down_proj,
        reached.expert_gate,
        model.mlp.gate,
    ):
        assert module.lora_a_stacked[0].any()
        assert module.lora_b_stacked[0].any()
