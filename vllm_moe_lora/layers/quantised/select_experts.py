"""Chooses the experts class for a quantised MoE layer with LoRA, in vLLM 0.12 to 0.27.

There vLLM's LoRA layer (`FusedMoEWithLoRA`) asks the layer's quantisation method for experts, by
`select_gemm_impl`. Some methods do not implement it and raise an error, though vLLM has an experts
class that supports LoRA on their weights. `make_experts` makes it.

`explained` is used with every release from 0.12 on: where no experts class supports LoRA, it turns
upstream's error into one that names the layer and says what to do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...targets import target_modules
from . import marlin, weight_names

OLD_STYLE = "Old-style modular kernel"  # how upstream says: no modular kernel (0.28 and later)
SUPPORTED = (
    "LoRA works with unquantised, FP8 and INT4 checkpoints (GPTQ, AWQ, compressed-tensors): serve "
    "one of those, or without --enable-lora."
)


def _routed(layer: Any) -> Any:
    """Return the module that has the weights.

    Up to 0.23 it is the module that LoRA wraps. From 0.24 on LoRA wraps a `MoERunner`, which has it
    as ``routed_experts``.
    """
    return getattr(layer, "routed_experts", layer)


def prepare(layer: Any) -> None:
    """Add what upstream's LoRA layer reads of ``layer`` and what INT4 layers do not have.

    These are the names ``w13_weight`` and ``w2_weight``, and in vLLM 0.12 a quantisation config for
    GPTQ and AWQ.

    Args:
        layer: the module that LoRA wraps.

    Raises:
        NotImplementedError: see `marlin.make_quant_config`.
    """
    routed = _routed(layer)
    for which in ("w13", "w2"):
        weight_names.alias(routed, which)
    method = routed.quant_method
    if type(method).__name__ not in marlin.METHODS or method.moe_quant_config is not None:
        return
    if method.get_fused_moe_quant_config(routed) is None:
        method.moe_quant_config = marlin.make_quant_config(routed, method)


def _triton(layer: Any, method: Any) -> Any:
    """Make the Triton experts for INT4 and INT8 weights that are not packed for Marlin."""
    try:
        from vllm.model_executor.layers.fused_moe.experts import triton_moe
    except ImportError:  # up to 0.20
        from vllm.model_executor.layers.fused_moe import fused_moe as triton_moe
    # Up to 0.13 there is no TritonWNA16Experts; TritonExperts supports these weights.
    kind = getattr(triton_moe, "TritonWNA16Experts", None) or triton_moe.TritonExperts
    more = {"moe_config": method.moe} if "moe_config" in inspect.signature(kind).parameters else {}
    return kind(quant_config=method.moe_quant_config, **more)


# Name of the quantisation method -> the function that makes its experts.
CHOICES: dict[str, Callable[[Any, Any], Any]] = {
    "MoeWNA16Method": _triton,
    "CompressedTensorsWNA16MoEMethod": _triton,
    **dict.fromkeys(marlin.METHODS, marlin.make_experts),
}


def make_experts(method: Any, layer: Any, upstream: Callable[[], Any]) -> Any:
    """Make the experts for a layer whose quantisation method has no `select_gemm_impl` of its own.

    Args:
        method: the quantisation method.
        layer: the module that has the weights.
        upstream: the inherited `select_gemm_impl`. It is called if LoRA is off, and for methods
            that are not in `CHOICES`.
    """
    choice = CHOICES.get(type(method).__name__)
    if choice is None or not method.moe.is_lora_enabled:
        return upstream()
    return choice(layer, method)


@contextmanager
def explained(layer: Any) -> Iterator[None]:
    """Turn upstream's errors for experts without LoRA into one that says what to do.

    The block is upstream's constructor of a LoRA layer. It fails with an AssertionError without a
    text, or with what the quantisation method raises.

    Args:
        layer: the module that LoRA wraps.

    Raises:
        NotImplementedError: in place of those; the text names the layer, the reason and the cure.
            Errors that have a cure already, and other RuntimeErrors, are passed on unchanged.
    """
    try:
        yield
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        says = str(error)
        if "--enable-lora" in says or (type(error) is RuntimeError and OLD_STYLE not in says):
            raise
        routed = _routed(layer)
        name, method = getattr(routed, "layer_name", ""), type(routed.quant_method).__name__
        name = name or type(routed).__name__
        cure = target_modules.cure(getattr(routed, "moe_config", None))
        if isinstance(error, AssertionError) and says:
            raise NotImplementedError(f"{name}: {says.rstrip('. ')}. {cure}") from error
        raise NotImplementedError(
            f"{name}: this vLLM release has no experts for {method} that support LoRA "
            f"({says or 'an assertion on their class failed'}). {cure} {SUPPORTED}"
        ) from error
