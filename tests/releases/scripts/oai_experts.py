"""Child: gpt-oss' MXFP4 experts of one release on the package `triton_kernels`; prints JSON.

``argv[1]`` is the package's generation, see `oai.py`. For each of "bare" and "ours" and each case
("fused": gate and up in one factor; "slices": one for each; "ranks": fused, and some experts are
another rank's): "error", or the numbers that `quantised_experts.py` has. From 0.28 on also for
"kernels": ours with our Triton kernels in the interpreter, and how often they ran.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
os.environ["VLLM_MOE_LORA_KERNELS"] = "ours"
sys.path.insert(0, str(Path(__file__).parents[2]))

import bf16_exact  # noqa: F401
import oai
import one_method
import stage
import torch
from int4 import EXPERTS
from quantised_experts import forward

DTYPE, TOKENS = torch.bfloat16, 9
SLOT_OF = [0, 1, -1, 1, 0, -1, 0, 1, 1]
# Of three experts more in the model, which are another rank's.
LOCAL = torch.tensor([0, -1, 1, 2, -1, *range(3, EXPERTS), -1], dtype=torch.int32)


def _layer(number, weights):
    from vllm.model_executor.layers import fused_moe

    factory = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
    torch.set_default_dtype(DTYPE)
    try:
        layer = factory(
            num_experts=EXPERTS,
            top_k=stage.TOP_K,
            hidden_size=weights.hidden,
            intermediate_size=weights.inner,
            params_dtype=DTYPE,
            quant_config=one_method.config("mxfp4", oai.method()),
            prefix=f"model.layers.{number}.mlp.experts",
            **weights.layer,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    return layer, getattr(layer, "routed_experts", layer)


def _wrapper(kind, layer, config):
    from transformers import PretrainedConfig
    from vllm.lora.layers import fused_moe

    name = "FusedMoEWithLoRA" if kind == "slices" else "FusedMoE3DWithLoRA"
    made = getattr(fused_moe, name)(layer)
    model = PretrainedConfig(architectures=["GptOssForCausalLM"])
    made.create_lora_weights(stage.SLOTS, config.lora_config, model)
    return made


def _adapters(wrapper):
    """Random factors in every slot; the same as lists of one (A, B) for each slice, in fp32."""
    make, found = torch.Generator().manual_seed(9), {}
    for name in ("w13", "w2"):
        stacks = (getattr(wrapper, f"{name}_lora_{side}_stacked") for side in "ab")
        found[name] = []
        for a, b in zip(*stacks, strict=True):
            for stack in (a, b):
                stack.copy_(0.15 * torch.randn(stack.shape, generator=make))
            found[name].append((a.float(), b.float()))
    wrapper.adapter_enabled.fill_(1)
    return found


def _change(factors, slot, expert, value):
    """An adapter's change of one product's answer, gate's and up's numbers in turn."""
    parts = [b[slot, expert] @ (a[slot, expert] @ value) for a, b in factors]
    return parts[0] if len(parts) == 1 else torch.stack(parts, dim=-1).flatten()


def _truth(weights, x, topk_weights, ids, slots, lora):
    """What the layer is to answer, in fp32. ``ids``: of this rank's experts, -1 for another's."""
    out = torch.zeros(len(x), weights.hidden)
    w13, w2 = weights.dense("w13"), weights.dense("w2")
    for token, expert_ids in enumerate(ids.tolist()):
        slot = slots[token]
        for place, expert in enumerate(expert_ids):
            if expert < 0:
                continue
            row = x[token].float()
            both = w13[expert] @ row + weights.bias["w13"][expert].float()
            if slot >= 0:
                both = both + _change(lora["w13"], slot, expert, row)
            gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
            row = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            down = w2[expert] @ row + weights.bias["w2"][expert].float()
            if slot >= 0:
                down = down + _change(lora["w2"], slot, expert, row)
            out[token] += topk_weights[token, place] * down
    return out


def _run(kind, number, config, punica=stage.Punica):
    from vllm_moe_lora.kernels.triton import launch

    with mock.patch.object(launch, "add_lora", wraps=launch.add_lora) as ours:
        found = _answers(kind, number, config, punica)
    return found | {"calls": ours.call_count}


def _answers(kind, number, config, punica):
    from vllm.forward_context import set_forward_context

    from vllm_moe_lora.layers.gpu import moe_kernels

    weights = oai.Weights(3)
    layer, routed = _layer(number, weights)
    oai.fill(routed, weights)
    routed.quant_method.process_weights_after_loading(routed)
    make = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, weights.hidden, generator=make).to(DTYPE)
    experts = len(LOCAL) if kind == "ranks" else EXPERTS
    ids = torch.rand(TOKENS, experts, generator=make).topk(stage.TOP_K).indices
    # In bf16 they are the same.
    topk_weights = torch.rand(TOKENS, stage.TOP_K, generator=make).to(DTYPE).float()
    wrapper = _wrapper(kind, layer, config)
    wrapper.set_mapping(punica([-1] * TOKENS))
    given = (topk_weights, ids.to(torch.int32))
    if kind == "ranks":
        routed._expert_map, ids = LOCAL, LOCAL[ids]
    # Our kernels' own word of a slot that changes, which `set_lora` would pass on.
    told = range(stage.SLOTS if punica is not stage.Punica else 0)
    with set_forward_context(None, config), torch.inference_mode():
        for slot in told:
            moe_kernels.slot_written(wrapper, slot)
        base = forward(layer, routed, x.clone(), *given).float()
        lora = _adapters(wrapper)
        for slot in told:
            moe_kernels.slot_written(wrapper, slot)
        wrapper.set_mapping(punica(SLOT_OF))
        answer = forward(layer, routed, x.clone(), *given).float()
    want = _truth(weights, x, topk_weights, ids, SLOT_OF, lora)
    plain = _truth(weights, x, topk_weights, ids, [-1] * TOKENS, lora)
    size = want.abs().max()
    return {
        "moved": float((want - plain).abs().max() / size),
        "off": float((answer - want).abs().max() / size),
        "base_off": float((base - plain).abs().max() / plain.abs().max()),
    }


def main():
    oai.package(sys.argv[1])
    config, release = stage.begin(DTYPE)
    import vllm.lora.layers.fused_moe  # noqa: F401

    import vllm_moe_lora

    oai.stand_in()
    minor = int(release.split(".")[1])
    kinds = ["fused"] + ["slices"] * (minor >= 22) + ["ranks"] * (minor >= 21)
    results = {"release": release, "bare": {}, "ours": {}}
    # ci/upstream.sh asks for vLLM's own kernels alone: a patch there changes what our hooks change.
    if minor >= 28 and "MOE_LORA_BARE" not in os.environ:
        results["kernels"] = {}
    number, punica = 0, stage.Punica
    for who in list(results)[1:]:
        found = results[who]
        if who == "ours":
            os.environ["VLLM_MOE_LORA"] = "1"
            vllm_moe_lora.register()
        if who == "kernels":
            assert stage.hooks_of_a_gpu(release, "moe-kernels") == {"moe-kernels": "on"}
            punica = functools.partial(
                stage.punica_of_a_gpu, count=stage.SLOTS, lora_config=config.lora_config
            )
        for kind in kinds:
            number += 1
            asked = functools.partial(_run, kind, number, config, punica)
            found[kind] = stage.attempted(asked, who, kind)
    results["status"] = vllm_moe_lora.status()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
