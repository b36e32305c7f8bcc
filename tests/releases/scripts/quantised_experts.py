"""Child: quantised layers of one release under `FusedMoEWithLoRA`, bare and with us; prints JSON.

For each kind of checkpoint and each of "bare" and "ours": "error", or the numbers "moved" (how far
an adapter moves the layer's answer) and "off" and "base_off" (how far the answers with and without
it are from a loop's), all relative to the largest number of the loop's answer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import sys

import fp8
import int4
import mxfp8
import one_method
import stage
import torch

DTYPE = torch.float16
TOKENS = 7
KINDS = ["gptq", "awq", "ct", "ct-triton", "moe_wna16", "moe_wna16-awq", "moe_wna16-8"]
OTHERS = {"fp8": fp8, "mxfp8": mxfp8}  # kinds that are not INT4
# A method without experts for LoRA, and one with experts that the wrapper does not accept.
REFUSED = ["moe_wna16-other", "moe_wna16-strange"]


def method_of(kind):
    """Makes the quantisation method of ``kind`` for a layer."""
    if kind in OTHERS:
        return OTHERS[kind].method()

    def found(*names):
        for name in names:
            module, _, attribute = name.rpartition(".")
            try:
                return getattr(
                    importlib.import_module(f"vllm.model_executor.layers.quantization.{module}"),
                    attribute,
                )
            except (ImportError, AttributeError):
                continue
        raise LookupError(names)

    if kind == "gptq":
        config = found("gptq_marlin.GPTQMarlinConfig", "auto_gptq.AutoGPTQConfig")
        method = found("gptq_marlin.GPTQMarlinMoEMethod", "auto_gptq.AutoGPTQMoEMethod")
        made = config.from_config({**int4.GPTQ, "quant_method": "gptq"})
        return lambda layer: method(made, layer.moe_config)
    if kind == "awq":
        config = found("awq_marlin.AWQMarlinConfig", "auto_awq.AutoAWQConfig")
        method = found(
            "awq_marlin.AWQMarlinMoEMethod", "awq_marlin.AWQMoEMethod", "auto_awq.AutoAWQMoEMethod"
        )
        made = config.from_config({**int4.AWQ, "quant_method": "awq"})
        return lambda layer: method(made, layer.moe_config)
    if kind.startswith("moe_wna16"):
        config = found("moe_wna16.MoeWNA16Config")
        method = found("moe_wna16.MoeWNA16Method")
        if kind in REFUSED:
            more = {"select_gemm_impl": _strange} if kind == "moe_wna16-strange" else {}
            method = type("OtherMoEMethod", (method,), more)
        gptq = {**int4.GPTQ, "bits": 8 if kind.endswith("8") else 4}
        text = {"awq": int4.AWQ} if kind.endswith("awq") else {"gptq": gptq}
        ((name, options),) = text.items()
        made = config.from_config({**options, "quant_method": name})
        return lambda layer: method(made, layer.moe_config)
    folder = "compressed_tensors."
    made = found(f"{folder}compressed_tensors.CompressedTensorsConfig").from_config(int4.CT)
    name = (
        "CompressedTensorsWNA16MarlinMoEMethod"
        if kind == "ct"
        else ("CompressedTensorsWNA16MoEMethod")
    )
    where = f"{folder}compressed_tensors_moe"
    file = "wna16_marlin" if kind == "ct" else "wna16"
    # From 0.27 on one method serves both.
    both = f"{where}.compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod"
    method = found(f"{where}.{name}", f"{where}.compressed_tensors_moe_{file}.{name}", both)
    scheme = made.target_scheme_map["Linear"]
    first = list(inspect.signature(method.__init__).parameters)[1]
    if first == "quant_config":
        return lambda layer: method(made, layer.moe_config)
    inputs = scheme.get("input_activations")
    return lambda layer: method(scheme["weights"], inputs, layer.moe_config)


def _strange(method, prepare_finalize, layer):
    """Experts as good as Triton's that are not of their class, as DeepGEMM's in 0.12."""
    from vllm.model_executor.layers.fused_moe.fused_moe import TritonExperts

    (base,) = TritonExperts.__bases__
    body = {name: one for name, one in vars(TritonExperts).items() if inspect.isroutine(one)}
    body |= {"__init__": lambda self, **more: base.__init__(self, **more)}
    body |= {n: p for n, p in vars(TritonExperts).items() if isinstance(p, property)}
    more = {"moe_config": method.moe} if "moe_config" in inspect.signature(base).parameters else {}
    return type("StrangeExperts", (base,), body)(quant_config=method.moe_quant_config, **more)


def layer_of(kind, number, weights):
    from vllm.model_executor.layers import fused_moe

    make = method_of(kind)

    factory = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
    torch.set_default_dtype(DTYPE)
    try:
        layer = factory(
            num_experts=int4.EXPERTS,
            top_k=stage.TOP_K,
            hidden_size=weights.hidden,
            intermediate_size=weights.inner,
            params_dtype=DTYPE,
            quant_config=one_method.config(kind, make),
            prefix=f"model.layers.{number}.mlp.experts",
            **weights.layer,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    return layer, getattr(layer, "routed_experts", layer)


@functools.cache  # as it is before we come
def _wanted(method):
    """What a method's `apply` takes."""
    return inspect.signature(method.apply).parameters


def forward(layer, routed, x, weights, ids):
    """The layer's method on given routes, as the layer calls it."""
    method = routed.quant_method
    if hasattr(layer, "_quant_method"):
        method = layer._quant_method
    wanted = _wanted(type(method))
    if "topk_ids" in wanted:
        more = {name: None for name in wanted if name.startswith("shared_experts")}
        return method.apply(layer=routed, x=x, topk_weights=weights, topk_ids=ids, **more)

    class Router:
        def select_experts(self, **more):
            return weights, ids

    logits = x.new_zeros(len(x), int4.EXPERTS)
    if "router" in wanted:
        return method.apply(routed, Router(), x, logits)
    routed.select_experts = lambda **more: (weights, ids, None)
    if "top_k" in wanted:
        names = ("activation", "apply_router_weight_on_input", "global_num_experts", "expert_map")
        more = {name: getattr(routed, name) for name in names if name in wanted}
        return method.apply(routed, x, logits, routed.top_k, True, **more)
    return method.apply(routed, x, logits)


def _loop(weights, x, topk_weights, ids, slots, lora):
    """What the layer is to answer, in fp32."""
    out = torch.zeros(len(x), weights.hidden)
    w13, w2 = weights.dense("w13"), weights.dense("w2")
    for token, expert_ids in enumerate(ids.tolist()):
        for place, expert in enumerate(expert_ids):

            def times(name, dense, value, expert=expert, token=token):
                slot = slots[token]
                if slot < 0 or lora is None:
                    return dense @ value
                a, b = lora[name]
                return dense @ value + b[slot, expert] @ (a[slot, expert] @ value)

            row = x[token].float()
            gate = times("w1", w13[expert, : weights.inner], row)
            up = times("w3", w13[expert, weights.inner :], row)
            row = times("w2", w2[expert], weights.act(gate, up))
            out[token] += topk_weights[token, place] * row
    return out


def _adapters(wrapper):
    """Random factors in every slot of ``wrapper``; the same as fp32."""
    make, found = torch.Generator().manual_seed(9), {}
    for name, a, b in (
        ("w1", wrapper.w13_lora_a_stacked[0], wrapper.w13_lora_b_stacked[0]),
        ("w3", wrapper.w13_lora_a_stacked[1], wrapper.w13_lora_b_stacked[1]),
        ("w2", wrapper.w2_lora_a_stacked[0], wrapper.w2_lora_b_stacked[0]),
    ):
        for stack in (a, b):
            stack.copy_(0.15 * torch.randn(stack.shape, generator=make))
        found[name] = (a.float(), b.float())
    wrapper.adapter_enabled.fill_(1)
    return found


def _run(kind, number, config):
    from vllm.forward_context import set_forward_context
    from vllm.lora.layers.fused_moe import FusedMoEWithLoRA

    seed = sum(map(ord, kind))
    if kind in OTHERS:
        weights = OTHERS[kind].Weights(seed)
        layer, routed = layer_of(kind, number, weights)
        OTHERS[kind].fill(routed, weights)
    else:
        bits = 8 if kind.endswith("8") else 4
        weights = int4.Weights(seed, zeros=kind.endswith("awq"), bits=bits)
        layer, routed = layer_of(kind, number, weights)
        int4.fill(routed, kind, weights)
    routed.quant_method.process_weights_after_loading(routed)
    make = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, weights.hidden, generator=make).to(DTYPE)
    ids = torch.rand(TOKENS, int4.EXPERTS, generator=make).topk(stage.TOP_K).indices
    topk_weights = torch.rand(TOKENS, stage.TOP_K, generator=make)
    slots = [0, 1, -1, 1, 0, -1, 0]
    wrapper = FusedMoEWithLoRA(layer)
    wrapper.create_lora_weights(stage.SLOTS, config.lora_config)
    wrapper.set_mapping(stage.Punica([-1] * TOKENS))
    given = (topk_weights, ids.to(torch.int32))
    with set_forward_context(None, config), torch.inference_mode():
        base = forward(layer, routed, x.clone(), *given).float()
        lora = _adapters(wrapper)
        wrapper.set_mapping(stage.Punica(slots))
        answer = forward(layer, routed, x.clone(), *given).float()
    want = _loop(weights, x, topk_weights, ids, slots, lora)
    plain = _loop(weights, x, topk_weights, ids, slots, None)
    size = want.abs().max()
    return {
        "moved": float((want - plain).abs().max() / size),
        "off": float((answer - want).abs().max() / size),
        "base_off": float((base - plain).abs().max() / plain.abs().max()),
        "experts": type(_experts(routed, layer)).__name__,
    }


def _experts(routed, layer):
    method = getattr(layer, "_quant_method", None) or routed.quant_method
    kernel = getattr(method, "moe_kernel", None) or getattr(method, "moe_mk", None)
    kernel = kernel or method.fused_experts
    return getattr(kernel, "impl", kernel).fused_experts


def choose(kind):
    """From 0.20 on methods ask an oracle, which looks at the GPU."""

    def first(*names):
        for name in names:
            try:
                return importlib.import_module(f"vllm.model_executor.layers.fused_moe.{name}")
            except ImportError:
                continue
        return None

    oracle = first("oracle.int_wna16")
    if oracle is None:
        return
    backend = oracle.WNA16MoEBackend
    found = (backend.MARLIN, first("experts.marlin_moe", "fused_marlin_moe").MarlinExperts)
    if hasattr(backend, "TRITON") and kind not in ("gptq", "awq", "ct"):
        found = (backend.TRITON, first("experts.triton_moe").TritonWNA16Experts)
    stage.everywhere("select_wna16_moe_backend", lambda *args, **more: found)


def main():
    config, release = stage.begin(DTYPE)
    import vllm.lora.layers.fused_moe  # noqa: F401

    import vllm_moe_lora

    kinds = sys.argv[1:] or KINDS
    minor = int(release.split(".")[1])
    if kinds is KINDS:
        # 0.24 put FP8 right; from 0.20 on experts say themselves that they take no LoRA, and from
        # 0.27 on all methods have experts.
        kinds = KINDS + ["fp8"] * (20 <= minor < 25) + ["mxfp8"] * (minor >= 24)
        kinds += REFUSED if minor < 20 else REFUSED[:1] if minor < 27 else []
    for kind in kinds:
        with contextlib.suppress(LookupError):  # imports what is to be replaced
            method_of(kind)
    int4.stand_in()
    for kind in set(kinds) & set(OTHERS):
        OTHERS[kind].stand_in()
    results = {"release": release, "bare": {}, "ours": {}}
    number = 0
    for who, found in (("bare", results["bare"]), ("ours", results["ours"])):
        if who == "ours":
            os.environ["VLLM_MOE_LORA"] = "1"
            vllm_moe_lora.register()
        for kind in kinds:
            choose(kind)
            number += 1
            asked = functools.partial(_run, kind, number, config)
            found[kind] = stage.attempted(asked, who, kind)
    results["status"] = vllm_moe_lora.status()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
