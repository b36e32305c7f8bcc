"""The MoE layers of a model, as rank 0 of an engine has them, with random weights on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_moe_lora import meta_model, probe
from vllm_moe_lora.records import LayerShape, layer_shape
from vllm_moe_lora.tuning.served import Served


class ModelLayers:
    """The MoE layers of a model, of which `served` gives one memory.

    Attributes:
        shapes: the distinct ones, in the model's order.
    """

    def __init__(self, model: Any, config: Any, device: torch.device) -> None:
        """Find the layers.

        Args:
            model: vLLM's, on the meta device.
            config: vLLM's.
            device: for the layers.
        """
        self._config, self._device = config, device
        runners = {id(m.routed_experts): m for m in model.modules() if hasattr(m, "routed_experts")}
        self._runners: dict[LayerShape, Any] = {}
        for layer, packed in probe.moe_layers_of(model, config):
            runner = runners.get(id(layer))
            if runner is not None:
                self._runners.setdefault(layer_shape(layer, packed, config), runner)
        self.shapes = tuple(self._runners)

    def served(self, shape: LayerShape) -> Served:
        """Return a layer with random weights.

        Args:
            shape: one of `shapes`; each only once.

        Raises:
            LookupError: there is none of this shape.
            packed.UnknownFormatError: of its weights.
        """
        runner = self._runners.pop(shape, None)
        if runner is None:
            raise LookupError("this process found other layers in the model than the first one")
        materialise(runner.routed_experts, self._device)
        model = self._config.model_config.hf_config
        return Served(runner, self._config, model, shape.slices < shape.fused)


@contextmanager
def built(question: probe.Question, device: str) -> Iterator[ModelLayers]:
    """Build a model without memory. It changes vLLM's and torch's global state.

    Args:
        question: the model and its settings.
        device: where to put layers.

    Yields:
        Its layers; vLLM's config is the current one inside the block.
    """
    from vllm.plugins import load_general_plugins
    from vllm.v1.worker.workspace import init_workspace_manager

    load_general_plugins()
    config = probe.config_of(question)
    with meta_model.built(config) as model:
        torch.set_default_dtype(torch.float32)
        init_workspace_manager(torch.device(device))
        yield ModelLayers(model, config, torch.device(device))


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
