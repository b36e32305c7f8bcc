"""Child: slots of unquantised experts on a CPU, in vLLM 0.24 to 0.27: ``cpu_slots.py JOB.json``.

The job: {"models": {name: {"model": folder of a checkpoint, "adapters": {name: folder}}}, "out":
file}. The release's own are the model, the weights' loading, the LoRA manager and the experts; no
compiled operator runs. At most two adapters are in memory. The answer, by torch.save: "status" of
the plugin and, for each model, a list of what was done and then found:

- "dense": the stacks of experts that are plain tensors.
- "bytes": of all slots. "held": of the tensors of the adapters that the manager has, which the
  slots should be. None counts twice.
- "batch": the name of each token's adapter.
- "out": {name of a layer: [tokens, hidden]}, what its experts give for "x" [tokens, hidden] and
  "logits" [tokens, experts].
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import packages
import world

WRAPPERS = ("FusedMoEWithLoRA", "FusedMoE3DWithLoRA")
STACKS = ("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked")
# (what is done, with which adapter)
STEPS = [("start", ""), ("load", "a"), ("load", "b"), ("load", "c"), ("load", "a"), ("remove", "c")]
TOKENS = 12


def main(job):
    import torch

    import vllm_moe_lora

    os.environ["VLLM_MOE_LORA"] = "1"
    vllm_moe_lora.register()
    world._no_kernels = lambda monolithic: contextlib.nullcontext()  # these experts need none
    answer = {name: ask(torch, **part) for name, part in job["models"].items()}
    torch.save({"status": vllm_moe_lora.status(), "models": answer}, job["out"])


def ask(torch, model, adapters):
    _, worker = world.build(
        model, {"max_loras": 2}, fill=lambda config, built: filled(torch, model, config, built)
    )
    wrapped = worker._adapter_manager.modules.items()
    layers = {name: m for name, m in wrapped if type(m).__name__ in WRAPPERS}
    return [step(torch, worker, layers, adapters, *one) for one in STEPS]


def filled(torch, checkpoint, config, network):
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    (file,) = Path(checkpoint).glob("*.safetensors")
    weights = load_file(file)
    with set_current_vllm_config(config):
        if config.model_config.hf_config.model_type == "gpt_oss":
            fill_fused(network, weights)  # its loader takes MXFP4 alone in 0.24
        else:
            network.load_weights(weights.items())
        process_weights_after_loading(network, config.model_config, torch.device("cpu"))


def fill_fused(network, weights):
    """Write the experts [experts, in, out] of gpt-oss into the model's [experts, out, in]."""
    own = dict(network.named_parameters())
    for name, weight in weights.items():
        prefix, _, which = name.rpartition(".")
        if not prefix.endswith(".experts"):
            continue
        part = "w13" if which.startswith("gate_up_proj") else "w2"
        bias = which.endswith("_bias")
        found = own[f"{prefix}.routed_experts.{part}_{'bias' if bias else 'weight'}"]
        found.data.copy_(weight if bias else weight.transpose(1, 2))


def step(torch, worker, layers, adapters, what, name):
    numbers = {name: number for number, name in enumerate(adapters, start=1)}
    if what == "load" and (said := world.error_of(worker, numbers[name], adapters[name])):
        raise RuntimeError(said)
    if what == "remove":
        assert worker.remove_adapter(numbers[name])
    loaded = worker.list_adapters()
    names = [None, *(name for name, number in numbers.items() if number in loaded)]
    batch = [names[token % len(names)] for token in range(TOKENS)]
    mapped(worker, [numbers.get(name, 0) for name in batch])
    held = {}
    for lora in worker._adapter_manager.list_adapters().values():
        for layer in layers:
            for factor in (*lora.loras[layer].lora_a, *lora.loras[layer].lora_b):
                held[factor.data_ptr()] = factor.numel() * factor.element_size()
    stacks = [one for layer in layers.values() for name in STACKS for one in getattr(layer, name)]
    make = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, layers_size(layers), generator=make)
    logits = torch.randn(TOKENS, 8, generator=make)
    with torch.inference_mode():
        out = {layer: experts(module, x, logits) for layer, module in layers.items()}
    return {
        "dense": sum(isinstance(one, torch.Tensor) for one in stacks),
        "bytes": sum(one.nbytes for one in stacks),
        "held": sum(held.values()),
        "batch": batch,
        "x": x,
        "logits": logits,
        "out": out,
    }


def layers_size(layers):
    return next(iter(layers.values())).hidden_size


def mapped(worker, ids):
    """Say which adapter each token has, 0 for none, as before a step."""
    from vllm.lora.layers import LoRAMapping

    worker._adapter_manager.set_adapter_mapping(LoRAMapping(tuple(ids), tuple(ids), True))


def experts(module, x, logits):
    layer = module.base_layer.routed_experts
    return layer.quant_method.apply_monolithic(layer, x, logits).clone()


if __name__ == "__main__":
    packages.install()
    with open(sys.argv[1]) as file:
        main(json.load(file))
    os._exit(0)
