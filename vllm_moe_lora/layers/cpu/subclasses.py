"""Subclasses of vLLM's CPU experts classes that support LoRA, and how vLLM comes to choose them.

vLLM 0.30 to 0.33. Each upstream class has one subclass with LoRA support. hooks/
fused_moe_oracle_unquantized.py and hooks/fused_moe_oracle_int_wna16.py put it in the place of the
upstream class when vLLM selects a backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..without_lora import lora_off
from .int4 import Int4CPUExperts
from .unquantized import WidenedCPUExperts


@functools.cache
def with_lora(experts_cls: type[Any]) -> type[Any] | None:
    """Return the subclass of an upstream experts class that supports LoRA.

    Its name is upstream's with the suffix "WithLoRA", because vLLM logs the name.

    Returns:
        The subclass, or None if there is none.
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

    for base, mixin in (
        (cpu_moe.CPUUnquantizedExperts, WidenedCPUExperts),
        (cpu_moe.CPUExpertsInt4, Int4CPUExperts),
    ):
        if issubclass(experts_cls, base):
            # FusedMoEWithLoRA.set_mapping asserts isinstance(experts, LoRAExpertsMixin).
            bases = (mixin, experts_cls, LoRAExpertsMixin)
            name = f"{experts_cls.__name__}WithLoRA"
            return type(name, bases, {"__module__": __name__, "upstream_cls": experts_cls})
    return None


def upstream_of(experts_cls: type[Any]) -> type[Any] | None:
    """Return the upstream class of a subclass from `with_lora`; None for any other class."""
    return getattr(experts_cls, "upstream_cls", None)


def select_with_lora(
    select: Callable[..., tuple[Any, type[Any] | None]], config: Any, *args: Any, **kwargs: Any
) -> tuple[Any, type[Any] | None]:
    """Select the backend that vLLM uses without LoRA, and the subclass of its class with LoRA.

    Args:
        select: upstream's select function; called with ``args`` and ``kwargs``. It returns the
            backend and the experts class.
        config: the layer's `FusedMoEConfig`. Its ``is_lora_enabled`` is False during the call.

    Returns:
        The backend, and the subclass that supports LoRA.

    Raises:
        NotImplementedError: there is no such subclass for the selected experts class.
    """
    with lora_off(config):
        backend, experts_cls = select(*args, **kwargs)
    subclass = None if experts_cls is None else with_lora(experts_cls)  # type: ignore[arg-type]
    if subclass is None:
        name = getattr(experts_cls, "__name__", backend)
        raise NotImplementedError(
            f"vLLM chose the CPU MoE experts {name}, which do not support LoRA. Serve a bf16, "
            "fp16, fp32, GPTQ or compressed-tensors INT4 version of the model, or leave out "
            "--enable-lora."
        )
    return backend, subclass
