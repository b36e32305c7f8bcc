"""Passes AWQ's zero points to Marlin, in vLLM 0.11.1 to 0.21.

There `MarlinExperts` assumes that INT4 weights have no zero points. AWQ's have, so the experts
compute wrong results. `MarlinExperts.apply` calls `fused_marlin_moe`, which does support zero
points: the hooks in hooks/fused_moe_marlin.py add them to that call.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The arguments that are added to the calls of `fused_marlin_moe` by the experts that are running.
_more: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "moe_lora_zeros", default=None
)


def has_zero_points(experts: Any) -> bool:
    """Return whether `MarlinExperts` have INT4 weights with zero points."""
    return experts.quant_config.use_int4_w4a16 and experts.quant_config.w1_zp is not None


@contextmanager
def passing(experts: Any) -> Iterator[None]:
    """Inside the block, `arguments` returns the zero points of ``experts``."""
    config, zeros = experts.quant_config, None
    if has_zero_points(experts):
        zeros = {"w1_zeros": config.w1_zp, "w2_zeros": config.w2_zp}
    token = _more.set(zeros)
    try:
        yield
    finally:
        _more.reset(token)


def arguments() -> dict[str, Any]:
    """Return the keyword arguments to add to a call of `fused_marlin_moe`; may be empty."""
    return _more.get() or {}


def quant_type_id() -> int:
    """Return the id of vLLM's scalar type for INT4 weights with zero points."""
    from vllm.scalar_type import scalar_types

    return int(scalar_types.uint4.id)
