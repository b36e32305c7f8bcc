"""The real layers of vLLM 0.11.1 over real INT4 numbers, with adapters, against loops in fp64.

Everything runs that upstream has in Python: its loaders, its work after loading, its wrapper and
modular kernel, our choice of experts. Only the ops of CUDA and Triton are stand-ins in torch
(cuda_in_torch.py), which unpack what they are handed. Marlin's layout is the real one.
"""

from __future__ import annotations

import pytest
import quantised
import torch
from quantised import EXPERTS, HIDDEN, INNER, KINDS

pytestmark = pytest.mark.legacy

# Of the answer's largest number. Weights, factors and each stage are fp16 (2**-11, half an ulp);
# 1e-3 is what is found.
LIMIT = 2e-3
SLOTS, RANKS = 2, (8, 3)


class Shared(torch.nn.Module):
    """Shared experts as vLLM's models have them: its own merged and row-parallel layers."""

    def __init__(self):
        from vllm.model_executor.layers.activation import SiluAndMul
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

        super().__init__()
        how = {"bias": False, "params_dtype": torch.float16}
        self.gate_up_proj = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], **how)
        self.down_proj = RowParallelLinear(INNER, HIDDEN, reduce_results=False, **how)
        self.act = SiluAndMul()
        self.dense = {}
        for name, layer in (("gate_up", self.gate_up_proj), ("w2", self.down_proj)):
            layer.weight.data = torch.randn(layer.weight.shape).mul_(0.1).half()
            self.dense[name] = layer.weight.double()
            layer.quant_method.process_weights_after_loading(layer)
        self.dense["w1"], self.dense["w3"] = self.dense.pop("gate_up").chunk(2)

    def forward(self, x):
        return self.down_proj(self.act(self.gate_up_proj(x)[0]))[0]


class Adapter:
    """Factors of routed and shared experts, all different; ``experts`` are those that have any."""

    def __init__(self, rank, experts, seed):
        generator = torch.Generator().manual_seed(seed)

        def pair(name):
            rows, columns = (HIDDEN, INNER) if name == "w2" else (INNER, HIDDEN)
            a, b = (torch.randn(s, generator=generator) for s in ((rank, columns), (rows, rank)))
            return (a * 0.1).half(), (b * 0.2).half()

        def layer():
            return {name: pair(name) for name in ("w1", "w2", "w3")}

        self.routed = [layer() if e in experts else None for e in range(EXPERTS)]
        self.shared = layer()


def _merged(dense, pairs):
    if pairs is None:
        return dense
    return {
        name: w + pairs[name][1].double() @ pairs[name][0].double() for name, w in dense.items()
    }


def _mlp(x, w):
    gate, up = x @ w["w1"].t(), x @ w["w3"].t()
    return torch.nn.functional.silu(gate) * up @ w["w2"].t()


def _reference(x, logits, slots, numbers, shared, adapters):
    """Token by token, expert by expert, with merged weights: shared and routed answers."""
    outs = torch.zeros(2, *x.shape, dtype=torch.float64)
    for i, (token, slot) in enumerate(zip(x.double(), slots, strict=True)):
        adapter = adapters[slot] if slot >= 0 else None
        weights, ids = logits[i].double().softmax(-1).topk(2)
        for weight, e in zip(weights / weights.sum(), ids.tolist(), strict=True):
            w = _merged(numbers.dense[e], adapter and adapter.routed[e])
            outs[1, i] += weight * _mlp(token, w)
        outs[0, i] = _mlp(token, _merged(shared.dense, adapter and adapter.shared))
    return outs


def _wrap(layer, shared, adapters, punica):
    """Upstream's LoRA layers around routed and shared experts, the adapters in their slots."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.utils import from_layer

    lora = LoRAConfig(max_lora_rank=8, max_loras=SLOTS, lora_dtype=torch.float16)
    routed = from_layer(layer, SLOTS, lora, [], None)
    up = from_layer(shared.gate_up_proj, SLOTS, lora, ["gate_proj", "up_proj"], None)
    down = from_layer(shared.down_proj, SLOTS, lora, [], None)
    shared.gate_up_proj, shared.down_proj = up, down
    for one in (routed, up, down):
        one.set_mapping(punica)
    for slot, adapter in enumerate(adapters):
        flat = [e and e[name] for e in adapter.routed for name in ("w1", "w2", "w3")]
        sides = [[pair and pair[i] for pair in flat] for i in (0, 1)]
        routed.set_lora(slot, *sides, None)
        gate, upper, last = (adapter.shared[name] for name in ("w1", "w3", "w2"))
        up.set_lora(slot, [gate[0], upper[0]], [gate[1], upper[1]], None)
        down.set_lora(slot, *last, None)
    return routed


def _ask(wrapper, config, punica, x, logits, slots):
    from vllm.forward_context import set_forward_context
    from vllm.lora.layers import LoRAMapping

    ids = [slot + 1 for slot in slots]  # 0 is no adapter
    mapping = LoRAMapping(tuple(ids), tuple(ids), is_prefill=True)
    punica.update_metadata(mapping, [1, 2], SLOTS + 1, 512, 0)
    with set_forward_context(None, config, num_tokens=len(slots)), torch.inference_mode():
        return torch.stack(wrapper(x.clone(), logits.clone())).double()


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_is_merged(kind, ours, config, cuda, monkeypatch):
    """Routed and shared experts, base and two adapters side by side, few tokens and many."""
    torch.manual_seed(1)
    shared = Shared()
    layer = quantised.layer(kind, monkeypatch, torch.float16, shared)
    numbers = quantised.Numbers(kind)
    numbers.load(layer)
    some = range(0, EXPERTS, 2)
    adapters = [Adapter(RANKS[0], range(EXPERTS), 1), Adapter(RANKS[1], some, 2)]
    punica = cuda.PunicaInTorch(256, max_batches=256, device="cpu")
    punica.moe_lora = True  # as our manager's hook does
    if not ours:
        with pytest.raises(
            AttributeError, match="'SharedFusedMoE' object has no attribute 'w2_weight'"
        ):
            _wrap(layer, shared, adapters, punica)
        return
    # The last batch is more than a piece of upstream's.
    monkeypatch.setenv("VLLM_FUSED_MOE_CHUNK_SIZE", "64")
    quantised.on_a_gpu(monkeypatch)
    wrapper = _wrap(layer, shared, adapters, punica)
    for tokens in (1, 7, 100):
        x = torch.randn(tokens, HIDDEN).half()
        logits = torch.randn(tokens, EXPERTS).half()
        slots = [(i + 1) % 3 - 1 for i in range(tokens)]  # 0, 1, -1, ...
        have = _ask(wrapper, config, punica, x, logits, slots)
        want = _reference(x, logits, slots, numbers, shared, adapters)
        base = _reference(x, logits, [-1] * tokens, numbers, shared, adapters)
        for which, answer in enumerate(("shared", "routed")):
            most = want[which].abs().max()
            difference = (have[which] - want[which]).abs().max() / most
            effect = (base[which] - want[which]).abs().max() / most
            assert difference <= LIMIT, (answer, tokens)
            assert effect >= 20 * LIMIT, (answer, tokens)
