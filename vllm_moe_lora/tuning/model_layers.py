"""The MoE layers of a model, as rank 0 of an engine has them, with random weights on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_moe_lora import meta_model, probe
from vllm_moe_lora.records import LayerShape, layer_shape
from vllm_moe_lora.tuning.served import Served

Serve = Callable[[LayerShape], Served]


@contextmanager
def built(question: probe.Question, device: str) -> Iterator[Serve]:
    """Build a model without memory. It changes vLLM's and torch's global state.

    Args:
        question: the model and its settings.
        device: where to put layers.

    Yields:
        A function that returns a layer of a shape; only this layer gets memory.
    """
    from vllm.plugins import load_general_plugins
    from vllm.v1.worker.workspace import init_workspace_manager

    load_general_plugins()
    config = probe.config_of(question)
    with meta_model.built(config) as model:
        torch.set_default_dtype(torch.float32)
        init_workspace_manager(torch.device(device))
        runners = {id(m.routed_experts): m for m in model.modules() if hasattr(m, "routed_experts")}
        layers = [
            (layer_shape(layer, packed, config), runners.get(id(layer)))
            for layer, packed in probe.moe_layers_of(model, config)
        ]

        def serve(shape: LayerShape) -> Served:
            runner: Any = next((one for found, one in layers if found == shape), None)
            if runner is None:
                raise LookupError("this process finds other layers in the model than the first one")
            materialise(runner.routed_experts, torch.device(device))
            return Served(runner, config, shape.slices < shape.fused)

        yield serve


def materialise(module: torch.nn.Module, device: torch.device) -> None:
    """Give memory on ``device`` to the parameters and buffers of a module that are on "meta".

    Parameters keep their class and attributes, which vLLM's loaders read. Others are moved there.
    """
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                made = torch.nn.Parameter(_real(parameter.data, device), requires_grad=False)
                made.__class__ = parameter.__class__
                made.__dict__.update(parameter.__dict__)
                one._parameters[name] = made
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = _real(buffer, device)


def _real(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
