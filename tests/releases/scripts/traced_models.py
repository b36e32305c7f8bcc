"""Child: what torch.compile would trace of a release's MoE model with LoRA on a GPU; prints JSON.

`world.build` makes the release's own model and LoRA layers, with our hooks as on a GPU. Replaced
are the question for the platform in the MoE layer, punica's wrapper by the GPU's, and the product
of a linear layer, which is an operator of its own on a CPU. Dynamo traces with fake tensors, as one
graph; nothing is computed.

For each model: "error", or "operators", how often each operator of vLLM is in the graph, "ours",
the functions of this package that Dynamo went into, and "layers", how many LoRA layers of each
class the model has.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from unittest import mock

import packages
import stage
import world
from packaging.version import Version


class Captured(Exception):
    """The graph is there; it is not to be run."""


def main(*checkpoints):
    import torch
    import vllm

    import vllm_moe_lora
    from vllm_moe_lora.layers.cpu import torch_experts

    os.environ["VLLM_MOE_LORA"] = "1"
    torch_experts.is_monolithic = lambda runner: False  # 0.24 to 0.27 on a CPU
    with stage.as_cuda():
        vllm_moe_lora.register()
    results = {"release": Version(vllm.__version__).base_version, "models": {}}
    results["status"] = vllm_moe_lora.status()
    for checkpoint in checkpoints:
        found = stage.attempted(lambda c=checkpoint: traced(torch, c), checkpoint)
        results["models"][Path(checkpoint).name] = found
    print(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


def traced(torch, checkpoint):
    model, worker = world.build(checkpoint, {"compilation_config": {"custom_ops": ["none"]}})
    modules = worker._adapter_manager.modules
    graphs, ours = [], set()

    def backend(graph, inputs):
        graphs.append(graph)
        raise Captured

    inner = model.model
    ids = torch.arange(5, dtype=torch.int64)
    torch._dynamo.reset()
    stopped = contextlib.suppress(torch._dynamo.exc.BackendCompilerFailed)
    with as_on_a_gpu(torch, model, modules), watching(ours), stopped:
        torch.compile(type(inner).forward, fullgraph=True, backend=backend)(inner, ids, ids.clone())
    (graph,) = graphs
    operators = collections.Counter(
        str(node.target) for node in graph.graph.nodes if str(node.target).startswith("vllm")
    )
    layers = collections.Counter(type(module).__name__ for module in modules.values())
    return {"operators": operators, "ours": sorted(ours), "layers": layers}


@contextlib.contextmanager
def as_on_a_gpu(torch, model, modules):
    from vllm.lora.layers import FusedMoEWithLoRA, LoRAMapping
    from vllm.lora.punica_wrapper import punica_gpu
    from vllm.utils import torch_utils

    to_device = getattr(torch_utils, "async_tensor_h2d", None)
    if to_device is not None and to_device.__defaults__:  # 0.22 and 0.23 pin memory
        to_device.__defaults__ = tuple(
            False if one is True else one for one in to_device.__defaults__
        )

    triton_ops = importlib.import_module("vllm.lora.ops.triton_ops")
    for name in triton_ops.__all__:  # they are there where Triton finds a GPU
        setattr(punica_gpu, name, getattr(triton_ops, name))
    config = world.CONFIGS[-1].lora_config
    punica = punica_gpu.PunicaWrapperGPU(32, 32, "cpu", lora_config=config, max_loras=1)
    ids = (1, 0, 1, 1, 0)
    wanted = {"vocab_size": 512, "extra_vocab_size": 0}
    known = inspect.signature(punica.update_metadata).parameters
    more = {name: value for name, value in wanted.items() if name in known}
    punica.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [1], 1, **more)
    for module in modules.values():
        if not isinstance(module, FusedMoEWithLoRA):  # all that it calls is opaque
            module.set_mapping(punica)

    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.platforms import current_platform

    def apply(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.weight, bias)

    def no_cpu(self):
        return False

    with (
        mock.patch.object(UnquantizedLinearMethod, "apply", apply),
        mock.patch.object(type(current_platform), "is_cpu", no_cpu),
    ):
        for module in model.modules():
            call_as_on_a_gpu(torch, module)
        yield


def call_as_on_a_gpu(torch, module):
    """Have a MoE layer choose its forward function again, which it does when it is made."""
    runner = getattr(module, "runner", module)  # up to 0.20 it is no module
    if hasattr(runner, "_forward_entry"):
        runner._forward_entry = runner._select_forward()
    elif hasattr(runner, "_select_forward"):  # 0.19
        runner.moe_forward = runner._select_forward(module)
    elif hasattr(runner, "moe_forward"):  # 0.17 and 0.18 choose in the constructor
        shared = "" if runner.shared_experts is None else "_shared"
        runner.moe_forward = getattr(torch.ops.vllm, f"moe_forward{shared}")


@contextlib.contextmanager
def watching(ours):
    """Add to ``ours`` each function of our package that Dynamo goes into, "module.function"."""
    from torch._dynamo.symbolic_convert import InliningInstructionTranslator as Translator

    import vllm_moe_lora

    home, real = str(Path(vllm_moe_lora.__file__).parent), Translator.inline_call_

    def inline_call_(self):
        if self.f_code.co_filename.startswith(home):
            ours.add(f"{Path(self.f_code.co_filename).stem}.{self.f_code.co_name}")
        return real(self)

    with mock.patch.object(Translator, "inline_call_", inline_call_):
        yield


if __name__ == "__main__":
    packages.install()
    main(*sys.argv[1:])
