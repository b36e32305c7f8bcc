"""Memory as the native CPU kernels see it: numbers at addresses, in any dtype.

The intrinsics here are written as LLVM code, which numba compiles for the CPU it runs on. bf16 is
widened to fp32 by a shift of its 16 bits, and narrowed by rounding to nearest even. Addresses may
have any alignment.

Only what numba compiles imports this module, and build.py: it needs numba.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
_CPU = llvmlite.binding.get_host_cpu_features()
X86 = "sse2" in _CPU

LANES = 16 if _CPU.get("avx512bw") else 8
# Rows of x that `dot` and `expand` treat at once, so that a loaded factor is used several times.
# The accumulators (ROWS * RANKS vectors) have to fit into the registers: 32 of 64 bytes with
# AVX-512, 16 of 32 bytes with AVX2, 32 of 16 bytes on Arm.
ROWS = 4 if LANES == 16 else 2
RANKS = 4  # rows of lora_a that `dot` treats at once
COLUMNS = 2 * LANES  # columns of y that `expand` treats at once

VF, VI32, VI16 = (ir.VectorType(t, LANES) for t in (F32, I32, I16))

BF16, FP32 = 0, 1  # the dtypes of activations and factors
ITEMSIZE = (2, 4)


def supported() -> bool:
    """Return whether this CPU has fused multiply-add, which all kernels use."""
    return not X86 or bool(_CPU.get("fma"))


def pointer(builder: Any, address: Any, element: Any, offset: Any) -> Any:
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [offset])


def load(builder: Any, pointer: Any, kind: Any) -> Any:
    """Load a vector or scalar from a pointer of any alignment."""
    value = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    value.align = 2
    return value


def store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 2


def constant(kind: Any, value: Any) -> Any:
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [value] * LANES)
    return ir.Constant(kind, value)


def _widen(builder: Any, bits: Any) -> Any:
    """bf16 bits, a vector or a scalar -> fp32."""
    vector = isinstance(bits.type, ir.VectorType)
    wide, real = (VI32, VF) if vector else (I32, F32)
    return builder.bitcast(builder.shl(builder.zext(bits, wide), constant(wide, 16)), real)


def _narrow(builder: Any, value: Any) -> Any:
    """fp32, a vector or a scalar -> bf16 bits, to nearest even; NaN stays NaN."""
    vector = isinstance(value.type, ir.VectorType)
    wide, short = (VI32, VI16) if vector else (I32, I16)
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, constant(wide, 16)), constant(wide, 1))
    rounded = builder.add(bits, builder.add(odd, constant(wide, 0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(nan, constant(wide, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(chosen, constant(wide, 16)), short)


def load_number(builder: Any, address: Any, index: Any, dtype: int, vector: bool) -> Any:
    """Read fp32 from element ``index`` on: one, or LANES."""
    if dtype == BF16:
        place = pointer(builder, address, I16, index)
        return _widen(builder, load(builder, place, VI16 if vector else I16))
    return load(builder, pointer(builder, address, F32, index), VF if vector else F32)


def store_number(builder: Any, value: Any, address: Any, index: Any, dtype: int) -> None:
    if dtype == BF16:
        store(builder, _narrow(builder, value), pointer(builder, address, I16, index))
    else:
        store(builder, value, pointer(builder, address, F32, index))


def literals(*given: Any) -> list[int] | None:
    """Return the values of compile-time integers, or None to ask numba for them as literals."""
    if all(isinstance(t, types.IntegerLiteral) for t in given):
        return [t.literal_value for t in given]
    return None


@intrinsic
def copy(typingctx: Any, source: Any, target: Any, count: Any) -> Any:
    """Copy ``count`` bytes from one address to another; they must not overlap."""
    sig = types.void(types.int64, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        start, end = (builder.inttoptr(a, ir.IntType(8).as_pointer()) for a in args[:2])
        cgutils.raw_memcpy(builder, end, start, args[2], 1)

    return sig, codegen


@intrinsic(prefer_literal=True)
def read(typingctx: Any, dtype: Any, address: Any, index: Any) -> Any:
    """Return element ``index`` (a literal ``dtype``) as float32."""
    values = literals(dtype)
    if values is None:
        return None
    sig = types.float32(dtype, types.int64, types.int64)
    return sig, lambda _, builder, __, args: load_number(
        builder, args[1], args[2], values[0], False
    )


@intrinsic(prefer_literal=True)
def write(typingctx: Any, dtype: Any, value: Any, address: Any, index: Any) -> Any:
    """Write a float32 to element ``index``, rounded to the literal ``dtype``."""
    values = literals(dtype)
    if values is None:
        return None
    sig = types.void(dtype, types.float32, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        store_number(builder, args[1], args[2], args[3], values[0])

    return sig, codegen


@intrinsic
def get(typingctx: Any, address: Any, index: Any) -> Any:
    """Return int64 number ``index`` of a table."""
    sig = types.int64(types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return load(builder, pointer(builder, args[0], I64, args[1]), I64)

    return sig, codegen


@intrinsic
def put(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Write int64 number ``index`` of a table."""
    sig = types.void(types.int64, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        store(builder, args[2], pointer(builder, args[0], I64, args[1]))

    return sig, codegen


@intrinsic
def take(typingctx: Any, address: Any, index: Any, amount: Any) -> Any:
    """Add ``amount`` to int64 number ``index`` of a table, atomically; return the old number."""
    sig = types.int64(types.int64, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        place = pointer(builder, args[0], I64, args[1])
        return builder.atomic_rmw("add", place, args[2], "seq_cst")

    return sig, codegen


@intrinsic
def peek(typingctx: Any, address: Any, index: Any) -> Any:
    """Return int64 number ``index`` of a table, which other threads change."""
    sig = types.int64(types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(builder, args[0], I64, args[1]), "acquire", 8)

    return sig, codegen


@intrinsic
def address_of(typingctx: Any, array: Any) -> Any:
    """Return the address of a numpy array's data."""
    sig = types.int64(array)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.ptrtoint(made.data, I64)

    return sig, codegen


@intrinsic
def get32(typingctx: Any, address: Any, index: Any) -> Any:
    """Return int32 number ``index`` of a table, as int64."""
    sig = types.int64(types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.sext(load(builder, pointer(builder, args[0], I32, args[1]), I32), I64)

    return sig, codegen


@intrinsic
def put32(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Write int32 number ``index`` of a table."""
    sig = types.void(types.int64, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        store(builder, builder.trunc(args[2], I32), pointer(builder, args[0], I32, args[1]))

    return sig, codegen
