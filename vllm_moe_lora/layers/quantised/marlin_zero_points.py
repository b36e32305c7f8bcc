"""Zero points in `MarlinExperts` (0.11.1 to 0.21).

There the class takes every INT4 weight for one without zero points, so that AWQ's weights are read
wrongly. The function it calls can do both.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The arguments with which the experts that are running complete upstream's own.
_more: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "moe_lora_zeros", default=None
)


def has(experts: Any) -> bool:
    return experts.quant_config.use_int4_w4a16 and experts.quant_config.w1_zp is not None


@contextmanager
def given(experts: Any) -> Iterator[None]:
    """While this lasts, `arguments` are those of ``experts``."""
    config = experts.quant_config
    zeros = {"w1_zeros": config.w1_zp, "w2_zeros": config.w2_zp} if has(experts) else None
    token = _more.set(zeros)
    try:
        yield
    finally:
        _more.reset(token)


def arguments() -> dict[str, Any]:
    return _more.get() or {}


def quant_type_id() -> int:
    """INT4 with zero points, as Marlin names it."""
    from vllm.scalar_type import scalar_types

    return int(scalar_types.uint4.id)
