"""Makes Triton's interpreter exact in bf16; import it after triton, under TRITON_INTERPRET=1.

The interpreter holds bf16 as the uint16 of its bits and computes on those, silently, and cuts
fp32 to bf16 where a GPU rounds to nearest even. Here arithmetic on bf16 is fp32 rounded once, as
on a GPU, and dot products sum in one order, whatever the row, so that bits can be compared.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_binary_op = InterpreterBuilder.binary_op
_unary_op = InterpreterBuilder.unary_op
_cast_impl = InterpreterBuilder.cast_impl


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _widen(data):
    return (data.astype(np.uint32) << 16).view(np.float32)


def _round(data):
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def _float(handle):
    return TensorHandle(_widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _back(handle):
    return TensorHandle(_round(handle.data), tl.bfloat16)


def binary_op(self, lhs, rhs, op):
    if not _is_bf16(lhs):
        return _binary_op(self, lhs, rhs, op)
    result = _binary_op(self, _float(lhs), _float(rhs), op)
    return result if result.data.dtype == np.bool_ else _back(result)


def unary_op(self, arg, op):
    return _back(_unary_op(self, _float(arg), op)) if _is_bf16(arg) else _unary_op(self, arg, op)


def cast_impl(self, src, dst_type):
    if _is_bf16(src):
        return cast_impl(self, _float(src), dst_type)
    if dst_type.scalar == tl.bfloat16:
        return _back(_cast_impl(self, src, tl.float32))
    return _cast_impl(self, src, dst_type)


def create_fp_to_fp(self, src, dst_type, rounding_mode):
    return cast_impl(self, src, dst_type)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    # Not np.matmul: BLAS picks its summation order by the row's place in the tile.
    a, b = _float(a).data.astype(np.float32), _float(b).data.astype(np.float32)
    out = d.data.astype(np.float32)
    for k in range(a.shape[1]):
        out = out + a[:, k, None] * b[None, k, :]
    return TensorHandle(out, d.dtype.scalar)


InterpreterBuilder.binary_op = binary_op
InterpreterBuilder.unary_op = unary_op
InterpreterBuilder.cast_impl = cast_impl
InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
InterpreterBuilder.create_dot = create_dot
