"""Chooses the experts class for a MoE layer with LoRA, in vLLM 0.11.1 and 0.11.2.

There vLLM's LoRA layer (`FusedMoEWithLoRA`) always runs `TritonExperts` over ``w13_weight`` and
``w2_weight``. That is wrong for INT4 weights that are packed for Marlin.

hooks/lora_layers_fused_moe.py calls `experts_for` around the LoRA layer's
`_inject_lora_into_fused_moe`. In it upstream calls `modular_triton_fused_moe`, whose hook calls
`make_kernel`.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import marlin

# The experts that the LoRA layer that is being built runs; None for upstream's `TritonExperts`.
_experts: contextvars.ContextVar[Any] = contextvars.ContextVar("moe_lora_experts", default=None)


def _marlin(layer: Any, method: Any) -> Any:
    """Make `MarlinExperts` for a GPTQ or AWQ layer, and the config that its method lacks."""
    method.moe_quant_config = marlin.make_quant_config(layer, method)
    return marlin.make_experts(layer, method)


def _compressed_tensors_marlin(layer: Any, method: Any) -> Any:
    """Make the experts that the method itself has for modular kernels."""
    from vllm.model_executor.layers.fused_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP

    if method.num_bits != 4:
        raise NotImplementedError(
            "MoE LoRA on compressed-tensors' Marlin experts supports only 4-bit weights: serve a "
            "4-bit checkpoint, or without --enable-lora."
        )
    layer.ensure_moe_quant_config_init()
    return method.select_gemm_impl(MoEPrepareAndFinalizeNoEP(), layer)


# Name of the quantisation method -> the function that makes its experts. Layers of other methods
# run `TritonExperts`. These also support the INT4 and INT8 weights of MoeWNA16Method and
# CompressedTensorsWNA16MoEMethod.
CHOICES: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(marlin.METHODS, _marlin),
    "CompressedTensorsWNA16MarlinMoEMethod": _compressed_tensors_marlin,
}


def on_cpu(wrapper: Any) -> bool:
    """Return whether a `FusedMoEWithLoRA` is on the CPU. cpu/torch_experts.py then adds LoRA."""
    return bool(wrapper.device.type == "cpu")


@contextmanager
def experts_for(layer: Any) -> Iterator[None]:
    """Inside the block, `make_kernel` makes the kernel for ``layer``.

    Args:
        layer: upstream's `FusedMoE`. `weight_names.alias_weights` was called for it.

    Raises:
        NotImplementedError: there are no experts with LoRA for its weights. The text says what to
            do.
    """
    choice = CHOICES.get(type(layer.quant_method).__name__)
    token = _experts.set(choice(layer, layer.quant_method) if choice else None)
    try:
        yield
    finally:
        _experts.reset(token)


def disable_chunking(layer: Any) -> None:
    """Make the modular kernel of a wrapped layer pass a whole batch to its experts.

    Without this it passes chunks of at most VLLM_FUSED_MOE_CHUNK_SIZE tokens (32,768 by default).
    But upstream's LoRA layer computes the LoRA of the whole batch and adds it to each chunk.
    """
    layer.quant_method.fused_experts.fused_experts.supports_chunking = lambda: False


def make_kernel(shared_experts: Any) -> Any:
    """Make the modular kernel for the layer of `experts_for`.

    Args:
        shared_experts: the layer's shared experts, or None.

    Returns:
        A `FusedMoEModularKernel`; None if upstream's own kernel is right.
    """
    experts = _experts.get()
    if experts is None:
        return None
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP

    return modular_kernel.FusedMoEModularKernel(
        MoEPrepareAndFinalizeNoEP(), experts, shared_experts
    )
