"""Child: `vllm-moe-lora tune` on one release's own quantised layers; prints JSON.

In Triton's interpreter. The release's own are the layer, its quantisation method and what it does
to the weights, the wrapper, the modular kernel, the experts and `PunicaWrapperGPU`. Replaced are
the base's operators, by loops, and which backend the oracle chooses; upstream's LoRA kernels do not
run. For each case: "path", "experts", "dtype", "exact"; "refused" and "remarks" of the session;
"off", how far the layer's answer is from fp32 loops' over the unpacked weights, and "moved", how
far adapters move it; "wrong", what the session says of a layer with a fault (without MOE_LORA_ALL=1
of GPTQ's alone). ``argv``: "3.8" for gpt-oss' experts with that triton_kernels alone.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import types
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.path.insert(0, str(Path(__file__).parents[2]))

import bf16_exact  # noqa: F401
import fp8
import int4
import marlin
import oai
import one_method
import quantised_experts as layers
import stage
import torch

TOKENS = 7
INT4 = ("gptq", "awq", "ct", "moe_wna16", "moe_wna16-awq")
KINDS = (*INT4, *marlin.KINDS, "mxfp4-oai", "fp8", "bias")
OF_GPT_OSS = ("mxfp4-marlin", "mxfp4-oai", "bias")
# These get faults, and each kind of batch.
FAULTY = KINDS if os.environ.get("MOE_LORA_ALL") == "1" else ("gptq",)
ALL_KINDS = ("none", "one", "all", "skewed")


def runner_of(kind, number):
    """The release's layer; its weights have memory and no meaning."""
    if kind in INT4:
        layers.choose(kind)
        weights = int4.Weights(1, kind.endswith("awq"), inner=96)  # which Marlin pads
        return layers.layer_of(kind, number, weights)[0]
    if kind == "mxfp4-oai":
        oai.stand_in()
        return layer_of(kind, number, oai.Weights, oai.method())
    if kind == "bias":  # and not quantised
        return layer_of(kind, number, marlin.Biased, None)
    marlin.choose(kind)
    sizes, method, *_ = marlin.KINDS.get(kind, (marlin.Sizes, fp8.method))
    return layer_of(kind, number, sizes, method())


def layer_of(kind, number, sizes, method):
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory as factory

    torch.set_default_dtype(torch.bfloat16)
    try:
        return factory(
            num_experts=int4.EXPERTS,
            top_k=stage.TOP_K,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.inner,
            params_dtype=torch.bfloat16,
            quant_config=one_method.config(kind, method) if method is not None else None,
            prefix=f"model.layers.{number}.mlp.experts",
            **sizes.layer,
        )
    finally:
        torch.set_default_dtype(torch.float32)


def session_of(kind, number, config):
    from vllm_moe_lora.layers.gpu import choose
    from vllm_moe_lora.tuning import clock, served, session

    runner = runner_of(kind, number)
    dtype = runner.moe_config.in_dtype
    if elsewhere := kind in marlin.KINDS:  # one expert of the model is not here
        here = torch.tensor([1, -1, 0, *range(2, int4.EXPERTS)], dtype=torch.int32)
        runner.routed_experts._expert_map = here
        runner.moe_config.num_experts = len(here)
    config.lora_config.lora_dtype = dtype
    model = types.SimpleNamespace(architectures=["GptOssForCausalLM"])
    found = served.Served(runner, config, model, kind in OF_GPT_OSS)
    assert (found.shape.absent > 0) == elsewhere
    more = {"on_gpu": False, "checked": (TOKENS,), "sizes": (1,), "served": found}
    return session.Session(
        found.shape, choose.conditions("cpu"), clock.StubClock(), lambda *_: None, **more
    )


def run(kind, number, config):
    from vllm_moe_lora.tuning import cases

    one = session_of(kind, number, config)
    for of_batch in ALL_KINDS if kind in FAULTY else ("all",):
        # What `check` does, without our kernels alone: these are tested elsewhere.
        one._check_served(one.served, TOKENS, of_batch)
    one.measure(float("inf"))
    batch, keep = cases.batch(one.shape, TOKENS, "all", "cpu"), []
    one.served.call(batch, one.factors, None, keep)()
    want, plain = (loop(one.layer, batch, kind, slots) for slots in (batch.slots, [-1] * TOKENS))
    size = want.abs().max()
    record = one.record()
    found = {
        "path": one.shape.path,
        "experts": one.experts,
        "dtype": one.shape.dtype,
        "exact": one.served.exact,
        "refused": one.refused,
        "remarks": one.remarks,
        "kinds": sorted(record.choices[0].us),
        "base": record.base,
        "off": float((keep[0].float() - want).abs().max() / size),
        "moved": float((plain - want).abs().max() / size),
    }
    if kind in FAULTY:
        found["wrong"] = {name: wrong(one, fault) for name, fault in faults(one).items()}
    return found


def loop(layer, batch, kind, slots):
    """What the layer is to answer, in fp32."""
    out = torch.zeros(batch.tokens, layer.shape.hidden)
    for token, ids in enumerate(batch.ids.tolist()):
        for place, of_model in enumerate(ids):
            expert = of_model if layer.expert_map is None else int(layer.expert_map[of_model])
            slot = int(slots[token])
            if expert < 0:
                continue

            def times(dense, bias, a, b, value, expert=expert, slot=slot):
                row = dense[expert] @ value
                row = row if bias is None else row + bias[expert].float()
                if slot < 0:
                    return row
                parts = zip(a, b, strict=True)
                more = [
                    y[slot, expert].float() @ (x[slot, expert].float() @ value) for x, y in parts
                ]
                return row + torch.cat(more)

            row = batch.x[token].float()
            row = times(layer.w13, layer.bias13, layer.a13, layer.b13, row)
            if kind in OF_GPT_OSS:
                gate, up = row[::2].clamp(max=7), row[1::2].clamp(-7, 7)
                row = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                gate, up = row.chunk(2)
                row = torch.nn.functional.silu(gate) * up
            row = times(layer.w2, layer.bias2, layer.a2, layer.b2, row)
            out[token] += batch.weights[token, place] * row
    return out


def faults(one):
    """Name -> what makes the layer wrong while it is entered."""
    from vllm import _custom_ops as ops

    from vllm_moe_lora.kernels.triton import launch

    real, gemm = launch.add_lora, ops.moe_wna16_marlin_gemm

    def one_number(y, *args, **more):
        real(y, *args, **more)
        y.view(-1)[-1] += 0.1 * y.nan_to_num().abs().max()

    def rows_of_base_tokens(y, *args, **more):
        real(y, *args, **more)
        y.nan_to_num_(0.0).add_(1e-3)

    def stored(y, x, factors, routing, weights=None, add_inputs=True):
        real(y, x, factors, routing, weights, add_inputs=False)

    def without_the_last(x, output, *args, **more):
        before = output.view(-1)[-1].clone()
        found = gemm(x, output, *args, **more)
        output.view(-1)[-1] = before
        return found

    unwritten = mock.patch.object(ops, "moe_wna16_marlin_gemm", without_the_last)
    return {
        "a number not written": unwritten,
        "a number of the LoRA": mock.patch.object(launch, "add_lora", one_number),
        "rows without LoRA": mock.patch.object(launch, "add_lora", rows_of_base_tokens),
        "no base": mock.patch.object(launch, "add_lora", stored),
        "a weight": Other(one.served._routed.w13_weight.data),
    }


class Other:
    """Weights that are not the ones that were packed, while it is entered: half of expert 0's."""

    def __init__(self, weights):
        if weights.dtype == fp8.FP8:
            weights = weights.view(torch.uint8)
        self.half, self.before = weights[0][: len(weights[0]) // 2], None

    def __enter__(self):
        self.before = self.half.clone()
        self.half.copy_(self.before * 2 if self.half.is_floating_point() else self.before ^ 1)

    def __exit__(self, *error):
        self.half.copy_(self.before)


def wrong(one, fault):
    one.refused, one.remarks, one.times = {"tail": "-"}, [], {}
    with fault:
        one._check_served(one.served, TOKENS, "all")
    one.measure(float("inf"))
    record = one.record()
    return {
        "refused": one.refused.get("ours", ""),
        "remarks": one.remarks,
        "kinds": sorted(record.kinds),
        "timed": sorted(record.choices[0].us),
    }


def main():
    # Of triton_kernels, for MXFP4 without Marlin.
    generation = "3.8" if "3.8" in sys.argv else "3.5.1"
    oai.package(generation)
    config, release = stage.begin(torch.float16)
    import vllm.lora.layers.fused_moe  # noqa: F401

    import vllm_moe_lora

    for kind in KINDS:
        if kind in INT4:
            layers.method_of(kind)
    marlin.stand_in()
    os.environ["VLLM_MOE_LORA"] = "1"
    with stage.as_cuda():
        vllm_moe_lora.register()
    results = {"release": release, "cases": {}, "status": vllm_moe_lora.status()}
    for number, kind in enumerate(["mxfp4-oai"] if generation == "3.8" else KINDS):
        asked = functools.partial(run, kind, number, config)
        results["cases"][kind] = stage.attempted(asked, kind)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
