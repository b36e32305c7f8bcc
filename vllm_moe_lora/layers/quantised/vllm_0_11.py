"""vLLM 0.11.1 and 0.11.2: what `FusedMoEWithLoRA` needs of a quantised MoE layer, and of a CPU.

There the wrapper always runs `TritonExperts` over ``w13_weight`` and ``w2_weight``. Layers of INT4
weights have other names, and some of them other kernels.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import marlin

# The experts that the wrapper being built is to run instead of `TritonExperts`.
_experts: contextvars.ContextVar[Any] = contextvars.ContextVar("moe_lora_experts", default=None)


def _marlin(layer: Any, method: Any) -> Any:
    method.moe_quant_config = marlin.make_quant_config(layer, method)
    return marlin.make_experts(layer, method)


def _own_choice(layer: Any, method: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP

    if method.num_bits != 4:
        raise NotImplementedError(
            "compressed-tensors' Marlin experts take LoRA with 4-bit weights only: serve a 4-bit "
            "checkpoint, or without --enable-lora."
        )
    layer.ensure_moe_quant_config_init()
    return method.select_gemm_impl(MoEPrepareAndFinalizeNoEP(), layer)


# Method -> what makes its experts; others run `TritonExperts`, which also take the INT4 and INT8
# weights of MoeWNA16Method and CompressedTensorsWNA16MoEMethod.
CHOICES: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(marlin.METHODS, _marlin),
    "CompressedTensorsWNA16MarlinMoEMethod": _own_choice,
}


def on_cpu(wrapper: Any) -> bool:
    """Whether cpu_plain.py serves this `FusedMoEWithLoRA`."""
    return bool(wrapper.device.type == "cpu")


@contextmanager
def chosen(layer: Any) -> Iterator[None]:
    """While this lasts, `kernel` gives the one for ``layer``, whose weights have their aliases.

    Raises:
        NotImplementedError: the quantisation is not one that takes LoRA; the text has the cure.
    """
    choice = CHOICES.get(type(layer.quant_method).__name__)
    token = _experts.set(choice(layer, layer.quant_method) if choice else None)
    try:
        yield
    finally:
        _experts.reset(token)


def in_one_piece(layer: Any) -> None:
    """Have the wrapped layer's experts get a batch whole.

    The modular kernel hands them VLLM_FUSED_MOE_CHUNK_SIZE tokens at a time (32,768 by default),
    while upstream's wrapper adds the factors of all the batch's tokens to each piece.
    """
    layer.quant_method.fused_experts.fused_experts.supports_chunking = lambda: False


def kernel(shared_experts: Any) -> Any:
    """The modular kernel of the layer that `chosen` is for; None where upstream's own is right."""
    experts = _experts.get()
    if experts is None:
        return None
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP

    return modular_kernel.FusedMoEModularKernel(
        MoEPrepareAndFinalizeNoEP(), experts, shared_experts
    )
