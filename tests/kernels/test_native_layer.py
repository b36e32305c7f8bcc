"""A layer of routed experts on the CPU, with vLLM's own operator: native kernels and torch's form.

The oracle merges each adapter into the experts' weights, in fp64.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_moe_lora.kernels.slot_stack import SlotStack

pytestmark = pytest.mark.cpu_engine

EXPERTS, TOP_K, HIDDEN, INNER, RANKS = (
    6,
    2,
    64,
    96,
    (8, 0, 5),
)  # the adapter in slot 1: no LoRA here


def _experts():
    from vllm import _custom_ops as ops

    from vllm_moe_lora.layers.cpu.unquantized import WidenedCPUExperts

    class Upstream:
        """What `WidenedCPUExperts` uses of vLLM's `CPUUnquantizedExperts`."""

        isa, w1_bias, w2_bias = "vec", None, None
        moe_config = SimpleNamespace(moe_parallel_config=SimpleNamespace(use_ep=False, dp_size=1))

        def process_weights_after_loading(self, layer):
            for weight in (layer.w13_weight, layer.w2_weight):
                weight.data = ops.cpu_prepack_moe_weight(weight.data, self.isa)

        def apply(self, output, x, w1, w2, weights, ids, act, *rest):
            given = (None, None, weights, ids, act.value, self.isa, rest[-1])
            ops.cpu_fused_moe(output, x, w1, w2, *given)

    class Experts(WidenedCPUExperts, Upstream):
        def _interleaved(self):
            return False

    return Experts()


class Layer:
    """Weights, adapters and experts of one layer; all values differ."""

    def __init__(self, dtype):
        g = torch.Generator().manual_seed(0)

        def random(*shape):
            return (torch.randn(*shape, generator=g) / 6).to(dtype)

        self.w13, self.w2 = random(EXPERTS, 2 * INNER, HIDDEN), random(EXPERTS, HIDDEN, INNER)
        slots, rank = len(RANKS), max(RANKS)
        shapes = [(rank, HIDDEN)] * 2 + [(INNER, rank)] * 2 + [(rank, INNER), (HIDDEN, rank)]
        factors = [torch.zeros(slots, EXPERTS, *shape, dtype=dtype) for shape in shapes]
        for slot, own in enumerate(RANKS):
            for factor, (rows, columns) in zip(factors, shapes, strict=True):
                rows, columns = (own if n == rank else n for n in (rows, columns))
                factor[slot, :, :rows, :columns] = 3 * random(EXPERTS, rows, columns)
        self.a, self.b, (self.a2, self.b2) = factors[:2], factors[2:4], factors[4:]
        self.module = torch.nn.Module()
        for name in ("w13", "w2"):
            weight = torch.nn.Parameter(getattr(self, name).clone(), requires_grad=False)
            setattr(self.module, f"{name}_weight", weight)
        self.punica = SimpleNamespace()
        self.experts = _experts()
        self.experts.process_weights_after_loading(self.module)
        stacks_a, stacks_b = (
            [SlotStack.of(f, RANKS, i) for f in fs] for i, fs in ((1, self.a), (2, self.b))
        )
        context = SimpleNamespace(
            local_token_lora_mapping=None,
            punica_wrapper=self.punica,
            max_loras=slots,
            local_num_experts=EXPERTS,
            w13_lora_a_stacked=tuple(stacks_a),
            w13_lora_b_stacked=tuple(stacks_b),
            w2_lora_a_stacked=(SlotStack.of(self.a2, RANKS, 1),),
            w2_lora_b_stacked=(SlotStack.of(self.b2, RANKS, 2),),
        )
        self.experts.set_lora_context(context)
        wrapper = SimpleNamespace(**vars(context), intermediate_size_per_partition=INNER)
        for slot, own in enumerate(RANKS):
            if own:
                self.experts.slot_written(wrapper, slot, own)

    def run(self, x, slots, weights, ids):
        self.punica.token_lora_indices = slots
        out = torch.full_like(x, torch.nan)
        w13, w2 = self.module.w13_weight, self.module.w2_weight
        rest = (SimpleNamespace(value="silu"), EXPERTS, *[None] * 6, False)
        self.experts.compute(out, x, w13, w2, weights.clone(), ids, *rest)
        return out

    def want(self, x, slots, weights, ids):
        out = torch.zeros(x.shape, dtype=torch.float64)
        for row, slot in enumerate(slots.tolist()):
            for k, e in enumerate(ids[row].tolist()):
                w13, w2 = self.w13[e].double(), self.w2[e].double()
                if slot >= 0:
                    deltas = [
                        b[slot, e].double() @ a[slot, e].double()
                        for a, b in zip(self.a, self.b, strict=True)
                    ]
                    w13 = w13 + torch.cat(deltas)
                    w2 = w2 + self.b2[slot, e].double() @ self.a2[slot, e].double()
                gate, up = (w13 @ x[row].double()).chunk(2)
                h = torch.nn.functional.silu(gate) * up
                out[row] += weights[row, k].double() * (w2 @ h)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
def test_merged(dtype, native, monkeypatch):
    layer = Layer(dtype)
    if not native:
        monkeypatch.setattr(layer.experts, "native_pairs", lambda *args: None, raising=False)
    used = []
    real = layer.experts.apply_native
    layer.experts.apply_native = lambda *args: used.append(real(*args)) or used[-1]
    g = torch.Generator().manual_seed(1)
    for tokens in (1, 4, 40):
        x = torch.randn(tokens, HIDDEN, generator=g).to(dtype)
        slots = torch.arange(tokens) % 4 - 1 if tokens > 1 else torch.tensor([2])
        weights = torch.rand(tokens, TOP_K, generator=g)
        ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(tokens)])
        ids = ids.to(torch.int32)
        got, want = layer.run(x, slots, weights, ids), layer.want(x, slots, weights, ids)
        base = layer.want(x, torch.full_like(slots, -1), weights, ids)
        limit = 1e-5 if dtype == torch.float32 else 0.03
        errors, effects = (got.double() - want).abs(), (want - base).abs()
        assert errors.mean() <= limit * want.abs().mean()
        for slot in {0, 2} & set(slots.tolist()):
            rows = slots == slot
            assert errors[rows].mean() <= 0.05 * effects[rows].mean(), slot
    assert used == ([True] * 3 if native else [])
