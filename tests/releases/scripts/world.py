"""One release's real model code and LoRA manager, without kernels: ``python world.py JOB.json``.

The job: {"models": {name: {"model": folder of a checkpoint, "adapters": {name: folder}, "options":
of EngineArgs, "cli": {name: folder} of --lora-modules, if it is a server's, "without": see `ask`}},
"plugin": bool, "out": file}. Each adapter is loaded by the release's real worker manager into slot
0 and activated. The answer, by torch.save: "status" of the plugin, "keys" of
compiled artefacts by model, and "bare keys" without the plugin, and, for each model, "raw", the
references that still lead around a LoRA wrapper, "experts", for each layer of routed experts
whether it was built with LoRA, whether it is wrapped and what runs it, and "adapters", what each
one's modules hold in the slot, or its error.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import sys
import tempfile
import types
from unittest import mock

import packages

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


CONFIGS = []  # of the models, in the order they were built


def build(checkpoint, options=None, cli=None, monolithic=False, fill=lambda config, model: None):
    """The release's model and its LoRA manager; ``fill`` is called between the two."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()  # there no stand-ins are
    args = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": 16}
    args |= {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    args |= {"model": checkpoint, **(options or {})}
    if cli is None:
        made = EngineArgs(**args)
    else:
        modules = [types.SimpleNamespace(name=name, path=path) for name, path in cli.items()]
        made = EngineArgs.from_cli_args(argparse.Namespace(**args, lora_modules=modules))
    config = made.create_engine_config()
    CONFIGS.append(config)
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            place = tempfile.mktemp()
            init_distributed_environment(1, 0, f"file://{place}", 0, "gloo")
            initialize_model_parallel(1, 1)
        from vllm.model_executor.model_loader.utils import initialize_model

        torch.set_default_dtype(torch.float32)
        model = initialize_model(config)
        fill(config, model)
        if config.lora_config is None:
            return model, None
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

        wanted = inspect.signature(LRUCacheWorkerLoRAManager.__init__).parameters
        given = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "vocab_size": model.config.vocab_size,
            "lora_config": config.lora_config,
            "vllm_config": config,
            "device": torch.device("cpu"),
            "embedding_modules": getattr(model, "embedding_modules", {}),
            "embedding_padding_modules": getattr(model, "embedding_padding_modules", []),
            "max_position_embeddings": 256,
        }
        worker = LRUCacheWorkerLoRAManager(**{k: v for k, v in given.items() if k in wanted})
        with _no_kernels(monolithic):
            worker.create_lora_manager(model, **_given(worker.create_lora_manager, config))
    return model, worker


def _given(function, config):
    wanted = inspect.signature(function).parameters
    return {k: v for k, v in {"vllm_config": config}.items() if k in wanted}


def _no_kernels(monolithic):
    """The wrapper's choice of a kernel is another test's; here only its slots count."""
    from vllm.lora.layers import fused_moe

    if hasattr(fused_moe.FusedMoEWithLoRA, "_inject_lora_into_fused_moe"):  # up to 0.19
        return mock.patch.object(fused_moe.FusedMoEWithLoRA, "_inject_lora_into_fused_moe")
    upstream = fused_moe.FusedMoEWithLoRA.__init__

    def __init__(self, base_layer):
        method = mock.MagicMock(is_monolithic=monolithic, supports_internal_mk=True)
        implementation = getattr(fused_moe, "FusedMoEKernelModularImpl", object)
        method.moe_kernel.impl = implementation.__new__(implementation)
        if hasattr(fused_moe, "LoRAExpertsMixin"):
            kind = type("NoExperts", (fused_moe.LoRAExpertsMixin,), {})
            method.moe_kernel.fused_experts = kind()
        layer = getattr(base_layer, "routed_experts", base_layer)
        quiet = {"_ensure_moe_quant_config_init": lambda: None}
        quiet["ensure_moe_quant_config_init"] = quiet["_ensure_moe_quant_config_init"]
        for name, value in quiet.items():
            if hasattr(layer, name):
                object.__setattr__(layer, name, value)
        with (
            mock.patch.object(type(layer), "quant_method", method, create=True),
            mock.patch.object(type(base_layer), "_quant_method", method, create=True),
            mock.patch.object(type(base_layer), "_replace_quant_method"),
            mock.patch.object(fused_moe, "FusedMoEModularMethod", mock.MagicMock()),
        ):
            upstream(self, base_layer)

    return mock.patch.object(fused_moe.FusedMoEWithLoRA, "__init__", __init__)


def slots(module, index=0):
    """What one slot of a LoRA layer holds: name of the stack -> tensors."""
    out = {}
    for name, value in vars(module).items():
        if name.endswith(("lora_a_stacked", "lora_b_stacked")) and "moe" not in name:
            several = value if isinstance(value, tuple | list) else (value,)
            if name.startswith("lora_") and hasattr(module, "w2_lora_a_stacked"):
                continue  # views of the others
            out[name] = [one[index].clone() for one in several]
    return out


def raw_references(model, modules):
    """Names in the model that lead to a wrapped module not by way of its (first) wrapper."""
    wrappers = {id(m) for m in modules.values()}
    bases = {id(m.base_layer) for m in modules.values() if hasattr(m, "base_layer")}
    found = []
    for parent_name, parent in model.named_modules():
        for name, child in parent._modules.items():
            inside = id(getattr(child, "base_layer", None)) in bases
            if id(parent) in wrappers and name == "base_layer":
                continue
            if id(child) in bases or (inside and id(child) not in wrappers):
                found.append(f"{parent_name}.{name}")
    return found


def error_of(worker, number, path):
    """What loading and activating says, "" if nothing."""
    from vllm.lora.request import LoRARequest

    try:
        worker.add_adapter(LoRARequest(f"a{number}", number, path))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def load_failing(worker, adapters):
    """The errors of two requests with an adapter whose experts cannot be written, if they could."""
    modules = worker._adapter_manager.modules
    module = next((module for name, module in modules.items() if name.endswith("experts")), None)
    if module is None or not adapters:
        return []
    number, path = len(adapters) + 1, next(iter(adapters.values()))
    with mock.patch.object(module, "set_lora", side_effect=RuntimeError("no memory left")):
        return [error_of(worker, number, path) for _ in range(2)]


def load(worker, number, path):
    manager = worker._adapter_manager
    if said := error_of(worker, number, path):
        return said
    found = {name: slots(module) for name, module in manager.modules.items()}
    worker.remove_adapter(number)
    return found


def _no_twins():
    from vllm_moe_lora.layers.cpu import subclasses

    return mock.patch.object(subclasses, "with_lora", return_value=None)


def experts(model):
    """Name of a layer -> (built with LoRA, wrapped, what runs it)."""
    found = {}
    for name, module in model.named_modules():
        if {kind.__name__ for kind in type(module).__mro__}.isdisjoint(("FusedMoE", "MoERunner")):
            continue
        method = getattr(getattr(module, "routed_experts", module), "quant_method", None)
        if method is None:  # 0.21 to 0.23 have a runner inside the layer
            continue
        kind = getattr(method, "experts_cls", None) or type(method)
        inside = name.endswith(".base_layer")
        found[name.removesuffix(".base_layer")] = (
            module.moe_config.is_lora_enabled,
            inside,
            kind.__name__,
        )
    return found


def ask(model, adapters, options=None, cli=None, without=""):
    """``without``: what the CPU lacks for LoRA, "twins" of its experts or a "modular" kernel."""
    try:
        with _no_twins() if without == "twins" else contextlib.nullcontext():
            network, worker = build(model, options, cli, without == "modular")
    except (AssertionError, NotImplementedError) as error:
        if not without:
            raise
        return {"error": f"{type(error).__name__}: {error}"}
    if worker is None:
        return {"experts": experts(network)}
    paths = enumerate(adapters.items(), start=1)
    return {
        "experts": experts(network),
        "raw": raw_references(network, worker._adapter_manager.modules),
        "adapters": {name: load(worker, number, path) for number, (name, path) in paths},
        "failing": load_failing(worker, adapters),
        "registered": len(adapters) + 1 in worker.list_adapters(),
    }


def main(job):
    if job["plugin"]:
        import vllm_moe_lora

        vllm_moe_lora.register()
    import torch

    answer = {name: ask(**part) for name, part in job["models"].items()}
    answer["status"] = vllm_moe_lora.status() if job["plugin"] else {}
    # Keys of compiled artefacts, and the same without the plugin.
    answer["keys"] = [config.compute_hash() for config in CONFIGS]
    if job["plugin"]:
        vllm_moe_lora.revert()
        answer["bare keys"] = [config.compute_hash() for config in CONFIGS]
    torch.save(answer, job["out"])


if __name__ == "__main__":
    packages.install()
    with open(sys.argv[1]) as file:
        main(json.load(file))
    os._exit(0)  # process groups of old releases hang at exit
