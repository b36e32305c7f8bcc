"""Child side of test_repaired_layers.py: LoRA layers of one release, and models/repair.py."""

from __future__ import annotations

import json
import types

import stage
import torch

HIDDEN, HEADS, KV, SIZE, V_SIZE, RANK, TOKENS = 64, 4, 2, 32, 16, 8, 5


class Punica:
    """As vLLM's on a GPU: asserts equal dtypes, and writes slices side by side."""

    def add_lora_linear(self, y, x, lora_a, lora_b, scale, slices, **more):
        assert x.dtype == lora_a[0].dtype  # lora_shrink_op.py
        start = 0
        for a, b, size in zip(lora_a, lora_b, slices, strict=True):
            assert b.shape[-2] == size
            y[:, start : start + size] += (x @ a[0, 0].t() @ b[0, 0].t()).to(y.dtype)
            start += size
        assert start == y.shape[1]


def wrapped(layer, kind, packed, config):
    wrapper = kind(layer)
    wrapper.create_lora_weights(stage.SLOTS, config.lora_config, None)
    wrapper.punica_wrapper = Punica()
    return wrapper


def v_heads(config, resize_v):
    """Merged q, k and v whose v has smaller heads: right after the repair, and not before."""
    from vllm.lora.layers.column_parallel_linear import MergedQKVParallelLinearWithLoRA
    from vllm.model_executor.layers.linear import QKVParallelLinear

    layer = QKVParallelLinear(
        HIDDEN, SIZE, HEADS, KV, bias=False, v_head_size=V_SIZE, params_dtype=torch.bfloat16
    )
    wrapper = wrapped(layer, MergedQKVParallelLinearWithLoRA, ["q", "k", "v"], config)
    sizes = (HEADS * SIZE, KV * SIZE, KV * V_SIZE)
    assert tuple(wrapper.output_slices) != sizes, "upstream does it right: the repair can go"
    manager = types.SimpleNamespace(
        modules={"attn.qkv_proj": wrapper},
        lora_slots=stage.SLOTS,
        lora_config=config.lora_config,
        model=types.SimpleNamespace(config=None),
    )
    assert resize_v(manager) == ["attn.qkv_proj"]
    assert resize_v(manager) == []
    a = [torch.randn(RANK, HIDDEN).bfloat16() for _ in sizes]
    b = [torch.randn(size, RANK).bfloat16() for size in sizes]
    wrapper.set_lora(0, a, b)
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    y = torch.zeros(TOKENS, sum(sizes), dtype=torch.bfloat16)
    wrapper.punica_wrapper.add_lora_linear(
        y, x, wrapper.lora_a_stacked, wrapper.lora_b_stacked, 1.0, wrapper.output_slices
    )
    pairs = zip(a, b, strict=True)
    want = torch.cat([x.float() @ p.float().t() @ q.float().t() for p, q in pairs], 1)
    assert (y.float() - want).abs().max() <= 0.02 * want.abs().max()


def fp32_gate(config, cast_inputs):
    """A gate in fp32 that a bf16 model calls with fp32."""
    from vllm.lora.layers.replicated_linear import ReplicatedLinearWithLoRA
    from vllm.model_executor.layers.linear import ReplicatedLinear

    gate = ReplicatedLinear(HIDDEN, 8, bias=False, params_dtype=torch.float32)
    gate.weight.data.normal_()
    weight = gate.weight.data.clone()
    gate.quant_method.process_weights_after_loading(gate)
    wrapper = wrapped(gate, ReplicatedLinearWithLoRA, [], config)
    a, b = torch.randn(RANK, HIDDEN).bfloat16(), torch.randn(8, RANK).bfloat16()
    wrapper.set_lora(0, a, b)
    x = torch.randn(TOKENS, HIDDEN)
    try:
        wrapper(x)
    except AssertionError:
        pass
    else:
        raise SystemExit("the assertion was not tripped without the repair")
    row = types.SimpleNamespace(cast_inputs=("mlp.gate",))
    model = types.SimpleNamespace(moe_lora_row=row)
    assert cast_inputs(model, {"layers.0.mlp.gate": wrapper}) == ["layers.0.mlp.gate"]
    got, _ = wrapper(x)
    want = x @ weight.t() + x @ a.float().t() @ b.float().t()
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 0.02 * want.abs().max()


def main():
    config, release = stage.begin(torch.bfloat16)
    from vllm_moe_lora.models.repair import cast_inputs, resize_v

    torch.manual_seed(0)
    done = []
    for check, repair in ((v_heads, resize_v), (fp32_gate, cast_inputs)):
        check(config, repair)
        done.append(check.__name__)
    print(json.dumps({"release": release, "done": done}))


if __name__ == "__main__":
    main()
