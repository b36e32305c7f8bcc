"""vllm-ascend's real Python over stand_ins/npu, with adapters loaded: ``python ascend.py JOB``.

The job is a file of torch.save: {"models": {name: {"model": folder, "adapters": {name: folder},
"inputs": [tokens, hidden], "rows": the adapter of each token, or ""}}, "out": file}. The answer:
"status" of the plugin; "bare", what a model says without it, by name; "refused", what a layer's
check says with it; and for each model "adapters", what each one's slot holds, "outputs" of the MoE
block of each layer for those inputs, as a prompt and as single tokens, and "kinds", the classes
that compute.
"""

from __future__ import annotations

import os
import sys
import types

import packages
import torch
import torch_npu  # noqa: F401 - the stand-in
import world


def fill(config, model):
    """Fill the model as vLLM's loader does, which would want a device."""
    from safetensors.torch import load_file
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    model.load_weights(load_file(f"{config.model_config.model}/model.safetensors").items())
    process_weights_after_loading(model, config.model_config, torch.device("cpu"))


def built(part):
    options = {"max_loras": len(part["adapters"]), "max_cpu_loras": len(part["adapters"])}
    return world.build(part["model"], options, fill=fill)


def ask(part):
    from vllm.lora.request import LoRARequest

    model, worker = built(part)
    requests = {n: LoRARequest(n, i, p) for i, (n, p) in enumerate(part["adapters"].items(), 1)}
    manager = worker._adapter_manager
    found = {}
    for name, request in requests.items():
        worker.add_adapter(request)
        slot = manager.lora_index_to_id.index(request.lora_int_id)
        found[name] = {key: world.slots(one, slot) for key, one in manager.modules.items()}
    answer = {"adapters": found, "raw": world.raw_references(model, manager.modules)}
    if "inputs" in part:
        answer["outputs"] = [
            outputs(model, worker, part["inputs"], part["rows"], requests, prefill)
            for prefill in (True, False)
        ]
    layers = [one for name, one in manager.modules.items() if name.endswith("experts")]
    answer["kinds"] = sorted(
        {f"{type(one).__module__}, {type(one.base_layer).__qualname__}" for one in layers}
    )
    return answer


def outputs(model, worker, inputs, rows, requests, prefill):
    """[layers, tokens, hidden]"""
    from vllm.config import set_current_vllm_config
    from vllm.lora.layers import LoRAMapping
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.ascend_forward_context import set_ascend_forward_context
    from vllm_ascend.utils import set_weight_prefetch_method

    with set_current_vllm_config(world.CONFIGS[-1]):
        set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)  # as its runner
    ids = tuple(requests[row].lora_int_id if row else 0 for row in rows)
    used = {requests[row] for row in rows if row}
    worker.set_active_adapters(used, LoRAMapping(ids, ids, is_prefill=prefill))
    config = world.CONFIGS[-1]
    with torch.no_grad(), set_ascend_forward_context(None, config, num_tokens=len(rows)):
        return torch.stack([layer.mlp(inputs.clone()) for layer in model.model.layers])


def said(function, *args):
    """The error of a call, "" if none."""
    try:
        function(*args)
    except (AssertionError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals():
    """What the check says of a layer with shared experts and one thing more, by that thing."""
    from vllm_ascend.lora.fused_moe import _assert_ascend_moe_lora_supported
    from vllm_ascend.ops.fused_moe.fused_moe import AscendUnquantizedFusedMoEMethod as Plain

    plain = {"_shared_experts": object(), "quant_method": object.__new__(Plain)}
    assert said(_assert_ascend_moe_lora_supported, types.SimpleNamespace(**plain)) == ""
    more = {"quant_method": object(), "multistream_overlap_shared_expert": True}
    more |= {"use_ep": True, "multistream_overlap_gate": True}
    return {
        name: said(_assert_ascend_moe_lora_supported, types.SimpleNamespace(**plain | {name: one}))
        for name, one in more.items()
    }


def main(job):
    from vllm_ascend.utils import register_ascend_customop

    register_ascend_customop()  # as its worker does before it makes a model
    answer = {"bare": {name: said(built, part) for name, part in job["models"].items()}}
    import vllm_moe_lora  # which turns it on

    vllm_moe_lora.register()
    answer |= {"status": vllm_moe_lora.status(), "refused": refusals()}
    answer |= {name: ask(part) for name, part in job["models"].items()}
    torch.save(answer, job["out"])


if __name__ == "__main__":
    packages.install()
    main(torch.load(sys.argv[1]))
    os._exit(0)
