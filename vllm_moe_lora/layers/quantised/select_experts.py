"""Which experts a quantised layer runs with LoRA, where its method does not say (0.12 to 0.27).

`FusedMoEWithLoRA` asks the quantisation method for experts that take LoRA. Methods that were never
taught to answer raise what reads like an error in vLLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...targets import target_modules
from . import marlin, weight_names

OLD_STYLE = "Old-style modular kernel"
TAKES = (
    "Unquantised, FP8 and INT4 checkpoints (GPTQ, AWQ, compressed-tensors) take LoRA: serve one of "
    "those, or without --enable-lora."
)


def _routed(layer: Any) -> Any:
    """The module that holds the weights: from 0.24 on the runner that is wrapped has it inside."""
    return getattr(layer, "routed_experts", layer)


def prepare(layer: Any) -> None:
    """Give ``layer`` what the wrapper and its method read and INT4 layers do not have: the names
    ``w13_weight`` and ``w2_weight``, and in 0.12 a quantisation config for GPTQ and AWQ.

    Raises:
        NotImplementedError: see `marlin_int4.make_quant_config`.
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
    """Triton's experts for INT4 and INT8 weights that are not packed for Marlin."""
    try:
        from vllm.model_executor.layers.fused_moe.experts import triton_moe
    except ImportError:  # up to 0.20
        from vllm.model_executor.layers.fused_moe import fused_moe as triton_moe
    # Up to 0.13 `TritonExperts` do both.
    kind = getattr(triton_moe, "TritonWNA16Experts", None) or triton_moe.TritonExperts
    more = {"moe_config": method.moe} if "moe_config" in inspect.signature(kind).parameters else {}
    return kind(quant_config=method.moe_quant_config, **more)


CHOICES: dict[str, Callable[[Any, Any], Any]] = {
    "MoeWNA16Method": _triton,
    "CompressedTensorsWNA16MoEMethod": _triton,
    **dict.fromkeys(marlin.METHODS, marlin.make_experts),
}


def experts(method: Any, layer: Any, otherwise: Callable[[], Any]) -> Any:
    """The experts for ``layer`` of a ``method`` that has no `select_gemm_impl` of its own.

    Args:
        otherwise: upstream's answer.
    """
    choice = CHOICES.get(type(method).__name__)
    if choice is None or not method.moe.is_lora_enabled:
        return otherwise()
    return choice(layer, method)


@contextmanager
def explained(layer: Any) -> Iterator[None]:
    """Let a wrapper that cannot be made say for which layer, why, and what to do.

    Raises:
        NotImplementedError: instead of a bare AssertionError, and of what methods without experts
            for LoRA raise.
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
            f"{name}: this vLLM has no experts for {method} that take LoRA "
            f"({says or 'an assertion on their class failed'}). {cure} {TAKES}"
        ) from error
