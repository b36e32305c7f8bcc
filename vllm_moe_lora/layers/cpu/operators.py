"""LoRA as opaque operators of torch, for a model that torch.compile has compiled for the CPU.

vLLM traces a model once, and drops all guards. Whatever is traced is a constant from then on: which
adapters a batch has, which rank they have, and how large the experts' weights are. So nothing of
LoRA may be traced. The compiled code calls the operators of this file, which look everything up
when they run:

- `add_lora_linear` and `add_lora_embedding` add the LoRA of one dense layer,
- `routed_experts` computes the routed experts of one layer, with LoRA and without.

An operator gets the name of its layer. Like the layers of vLLM's own operators, an engine's LoRA
layers are in ``no_compile_layers`` of the forward context; layers/cpu/compiled.py puts them there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# In a patched vLLM this package has another name, and its operators have, too.
NAMESPACE = __name__.removesuffix(".layers.cpu.operators").replace(".", "_")
SUFFIX = ".moe_lora"  # of a layer's name: vLLM has the layer without LoRA under the name itself


# -- the operators -----------------------------------------------------------------------------


@functools.cache
def _context() -> Callable[[], Any]:
    from vllm.forward_context import get_forward_context

    return get_forward_context


def _layer(name: str) -> Any:
    return _context()().no_compile_layers[name]


def _idle(punica: Any) -> bool:
    """Return whether no token of the batch has an adapter; hooks/lora_punica_cpu.py knows."""
    return getattr(punica, "token_segments", None) == []


def _add_lora_linear(y: torch.Tensor, x: torch.Tensor, name: str) -> None:
    layer, punica, dense = _layer(name)
    if _idle(punica):
        return
    a, b, slices = layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices
    segments = getattr(punica, "token_segments", None)
    if segments is not None and dense.add(y, x, a, b, segments, 1.0, slices):
        return
    punica.add_lora_linear(y, x, a, b, 1.0, slices)


def _add_lora_embedding(y: torch.Tensor, x: torch.Tensor, name: str) -> None:
    layer, punica = _layer(name)
    if _idle(punica):
        return
    punica.add_lora_embedding(y, x, layer.lora_b_stacked, add_inputs=True)


def _routed_experts(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    name: str,
) -> None:
    layer, experts = _layer(name)
    nothing = output.new_empty(0)  # upstream's CPU experts have no workspaces
    experts.compute(
        output,
        hidden_states,
        layer.w13_weight,
        layer.w2_weight,
        topk_weights,
        topk_ids,
        layer.activation,
        layer.global_num_experts,
        layer.expert_map,
        None,
        experts.a2_scale,
        nothing,
        nothing,
        None,
        layer.apply_router_weight_on_input,
    )


def _nothing(*args: Any) -> None:
    """What an operator does to fake tensors: it changes no shape, and it returns nothing."""


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, _schema, _function in (
    ("add_lora_linear", "(Tensor(a!) y, Tensor x, str name) -> ()", _add_lora_linear),
    ("add_lora_embedding", "(Tensor(a!) y, Tensor x, str name) -> ()", _add_lora_embedding),
    (
        "routed_experts",
        "(Tensor(a!) output, Tensor hidden_states, Tensor topk_weights, Tensor topk_ids, str name)"
        " -> ()",
        _routed_experts,
    ),
):
    # The strides of y stay those that the layer gave it; the kernels rely on its last axis.
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _nothing, lib=_LIBRARY)

OPERATORS = getattr(torch.ops, NAMESPACE)


# -- who calls them ----------------------------------------------------------------------------


class LayerPunica:
    """The punica wrapper of one dense LoRA layer: calls the operators while it is traced.

    Args:
        punica: vLLM's punica wrapper, which all layers of the engine have in common.
        name: the layer's name, with `SUFFIX`.
    """

    def __init__(self, punica: Any, name: str) -> None:
        self.punica, self.name = punica, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.punica, name)

    def add_lora_linear(
        self, y: torch.Tensor, x: torch.Tensor, *args: Any, **more: Any
    ) -> torch.Tensor | None:
        """See `PunicaWrapperBase.add_lora_linear`. While it is traced, ``args`` are ignored."""
        if torch.compiler.is_compiling():
            OPERATORS.add_lora_linear(y, x, self.name)
            return None
        added: torch.Tensor | None = self.punica.add_lora_linear(y, x, *args, **more)
        return added

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, *args: Any, **more: Any
    ) -> torch.Tensor | None:
        """See `PunicaWrapperBase.add_lora_embedding`. While it is traced, ``args`` are ignored."""
        if torch.compiler.is_compiling():
            OPERATORS.add_lora_embedding(y, x, self.name)
            return None
        added: torch.Tensor | None = self.punica.add_lora_embedding(y, x, *args, **more)
        return added
