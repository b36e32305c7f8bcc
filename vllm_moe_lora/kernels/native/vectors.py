"""The innermost loops of the native CPU kernels, written as LLVM vector code.

numba compiles what stands here for the CPU it runs on. The vectors have a fixed number of lanes
(`LANES`), so a sum always has the same order: the result of a row does not depend on the rows that
are computed with it. All sums are in fp32. bf16 is widened by a shift of its 16 bits, and narrowed
by rounding to nearest even.

Only loops.py and what imports it import this module, because it needs numba.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32 = ir.FloatType()
_CPU = llvmlite.binding.get_host_cpu_features()
X86 = "sse2" in _CPU

LANES = 16 if _CPU.get("avx512bw") else 8
# Rows of x that `dot` and `expand` treat at once, so that a loaded factor is used several times.
# The accumulators (ROWS * RANKS vectors) have to fit into the registers: 32 of 64 bytes with
# AVX-512, 16 of 32 bytes with AVX2, 32 of 16 bytes on Arm.
ROWS = 4 if LANES == 16 else 2
RANKS = 4  # rows of lora_a that `dot` treats at once
COLUMNS = 2 * LANES  # columns of y that `expand` treats at once

_VF, _VI32, _VI16 = (ir.VectorType(t, LANES) for t in (_F32, _I32, _I16))

BF16, FP32 = 0, 1  # the dtypes of activations and factors
ITEMSIZE = (2, 4)


def supported() -> bool:
    """Return whether this CPU has fused multiply-add, which all kernels use."""
    return not X86 or bool(_CPU.get("fma"))


def _pointer(builder: Any, address: Any, element: Any, offset: Any) -> Any:
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [offset])


def _load(builder: Any, pointer: Any, kind: Any) -> Any:
    """Load a vector or scalar from a pointer of any alignment."""
    value = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    value.align = 2
    return value


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 2


def _constant(kind: Any, value: Any) -> Any:
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [value] * LANES)
    return ir.Constant(kind, value)


def _widen(builder: Any, bits: Any) -> Any:
    """bf16 bits, a vector or a scalar -> fp32."""
    vector = isinstance(bits.type, ir.VectorType)
    wide, real = (_VI32, _VF) if vector else (_I32, _F32)
    return builder.bitcast(builder.shl(builder.zext(bits, wide), _constant(wide, 16)), real)


def _narrow(builder: Any, value: Any) -> Any:
    """fp32, a vector or a scalar -> bf16 bits, to nearest even; NaN stays NaN."""
    vector = isinstance(value.type, ir.VectorType)
    wide, short = (_VI32, _VI16) if vector else (_I32, _I16)
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, _constant(wide, 16)), _constant(wide, 1))
    rounded = builder.add(bits, builder.add(odd, _constant(wide, 0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(nan, _constant(wide, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(chosen, _constant(wide, 16)), short)


def _read(builder: Any, address: Any, index: Any, dtype: int, vector: bool) -> Any:
    """Read fp32 from element ``index`` on: one, or LANES."""
    if dtype == BF16:
        pointer = _pointer(builder, address, _I16, index)
        return _widen(builder, _load(builder, pointer, _VI16 if vector else _I16))
    return _load(builder, _pointer(builder, address, _F32, index), _VF if vector else _F32)


def _write(builder: Any, value: Any, address: Any, index: Any, dtype: int) -> None:
    if dtype == BF16:
        _store(builder, _narrow(builder, value), _pointer(builder, address, _I16, index))
    else:
        _store(builder, value, _pointer(builder, address, _F32, index))


def _pairs(builder: Any, address: Any, index: Any, dtype: int) -> list[Any]:
    """Read 2 * LANES elements as two vectors; for bf16 the even and the odd ones."""
    if dtype == FP32:
        high = builder.add(index, ir.Constant(_I64, LANES))
        return [_read(builder, address, i, FP32, True) for i in (index, high)]
    both = _load(builder, _pointer(builder, address, _I16, index), _VI32)
    low = builder.shl(both, _constant(_VI32, 16))
    high = builder.and_(both, _constant(_VI32, 0xFFFF0000))
    return [builder.bitcast(v, _VF) for v in (low, high)]


def _sum(builder: Any, vector: Any) -> Any:
    """Add up the lanes of a vector: halves, then quarters, and so on."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        halves = []
        for start in (0, lanes):
            chosen = [ir.Constant(_I32, start + i) for i in range(lanes)]
            mask = ir.Constant(ir.VectorType(_I32, lanes), chosen)
            halves.append(builder.shuffle_vector(vector, undefined, mask))
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _fma(builder: Any) -> Any:
    kind = ir.FunctionType(_VF, [_VF] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")


def _splat(builder: Any, value: Any) -> Any:
    single = builder.insert_element(ir.Constant(_VF, ir.Undefined), value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(single, ir.Constant(_VF, ir.Undefined), zeros)


def _literals(*given: Any) -> list[int] | None:
    """Return the values of compile-time integers, or None to ask numba for them as literals."""
    if all(isinstance(t, types.IntegerLiteral) for t in given):
        return [t.literal_value for t in given]
    return None


@intrinsic(prefer_literal=True)
def dot(typingctx: Any, dtype: Any, rows: Any, ranks: Any, x: Any, a: Any, a_stride: Any,
        width: Any, z: Any, z_stride: Any) -> Any:  # fmt: skip
    """z[i * z_stride + j] = sum over k of x[i][k] * a[j * a_stride + k].

    Args:
        dtype, rows, ranks: literals: the dtype of x and a, how many i, how many j.
        x: address of ``rows`` addresses (int64), one for each row of x.
        a: address of the first row of lora_a. a_stride: elements from row to row.
        width: elements of a row.
        z: address of fp32. z_stride: elements from row to row.
    """
    values = _literals(dtype, rows, ranks)
    if values is None:
        return None
    kind, m, n = values
    sig = types.void(dtype, rows, ranks, *[types.int64] * 6)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        x, a, a_stride, width, z, z_stride = args[3:]
        fma = _fma(builder)
        count = [ir.Constant(_I64, i) for i in range(max(m, n) + 1)]
        xs = [_load(builder, _pointer(builder, x, _I64, count[i]), _I64) for i in range(m)]
        size = ir.Constant(_I64, ITEMSIZE[kind])
        step = builder.mul(a_stride, size)
        as_ = [builder.add(a, builder.mul(step, count[j])) for j in range(n)]
        sums = [[cgutils.alloca_once(builder, _VF) for _ in range(n)] for _ in range(m)]
        for cell in [c for row in sums for c in row]:
            builder.store(_constant(_VF, 0.0), cell)
        block = ir.Constant(_I64, 2 * LANES)
        whole = builder.mul(builder.sdiv(width, block), block)
        with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), whole, block, _I64) as (k, _):
            left = [_pairs(builder, row, k, kind) for row in xs]
            for j in range(n):
                right = _pairs(builder, as_[j], k, kind)
                for i in range(m):
                    total = builder.load(sums[i][j])
                    for u, v in zip(left[i], right, strict=True):
                        total = builder.call(fma, [u, v, total])
                    builder.store(total, sums[i][j])
        for i in range(m):
            for j in range(n):
                cell = cgutils.alloca_once(builder, _F32)
                builder.store(_sum(builder, builder.load(sums[i][j])), cell)
                with cgutils.for_range_slice(builder, whole, width, count[1], _I64) as (k, _):
                    u, v = (_read(builder, p, k, kind, False) for p in (xs[i], as_[j]))
                    builder.store(builder.fadd(builder.load(cell), builder.fmul(u, v)), cell)
                place = builder.add(builder.mul(z_stride, count[i]), count[j])
                _store(builder, builder.load(cell), _pointer(builder, z, _F32, place))

    return sig, codegen


@intrinsic(prefer_literal=True)
def transpose(typingctx: Any, dtype: Any, b: Any, b_stride: Any, tile: Any) -> Any:
    """tile[j * COLUMNS + n] = b[n * b_stride + j] for all n, j < LANES, in fp32.

    Args:
        dtype: literal, of b.
        b: address of the first of LANES rows of lora_b, at the first of LANES columns.
        b_stride: elements from row to row.
        tile: address of fp32 [LANES, COLUMNS]; its first or second half is written.
    """
    values = _literals(dtype)
    if values is None:
        return None
    kind = values[0]
    sig = types.void(dtype, types.int64, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        _, b, b_stride, tile = args
        rows = []
        for n in range(LANES):
            offset = builder.mul(b_stride, ir.Constant(_I64, n))
            rows.append(_read(builder, b, offset, kind, True))
        # Recursive transposition: swap the off-diagonal blocks of size half, then quarter, ...
        half = LANES // 2
        while half:
            done = list(rows)
            for n in range(LANES):
                if n & half:
                    continue
                low, high = rows[n], rows[n + half]
                first, second = [], []
                for lane in range(LANES):
                    if lane & half:
                        first.append(LANES + lane - half)
                        second.append(LANES + lane)
                    else:
                        first.append(lane)
                        second.append(lane + half)
                for target, chosen in ((n, first), (n + half, second)):
                    mask = ir.Constant(_VI32, chosen)
                    done[target] = builder.shuffle_vector(low, high, mask)
            rows = done
            half //= 2
        for j in range(LANES):
            place = ir.Constant(_I64, j * COLUMNS)
            _store(builder, rows[j], _pointer(builder, tile, _F32, place))

    return sig, codegen


@intrinsic(prefer_literal=True)
def expand(typingctx: Any, dtype: Any, rows: Any, z: Any, scales: Any, tile: Any, rank: Any,
           y: Any, start: Any) -> Any:  # fmt: skip
    """y[i][start + n] += scales[i] * sum over j of z[i][j] * tile[j * COLUMNS + n], rounded once.

    Args:
        dtype, rows: literals: the dtype of y, how many i.
        z: address of ``rows`` addresses (int64), each of fp32 [rank].
        scales: address of fp32 [rows].
        tile: address of fp32 [rank, COLUMNS].
        rank: how many j.
        y: address of ``rows`` addresses (int64), one for each row of y.
        start: the first of COLUMNS elements of a row of y.
    """
    values = _literals(dtype, rows)
    if values is None:
        return None
    kind, m = values
    sig = types.void(dtype, rows, *[types.int64] * 6)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        z, scales, tile, rank, y, start = args[2:]
        fma = _fma(builder)
        number = [ir.Constant(_I64, i) for i in range(max(m, 2))]
        zs = [_load(builder, _pointer(builder, z, _I64, number[i]), _I64) for i in range(m)]
        ys = [_load(builder, _pointer(builder, y, _I64, number[i]), _I64) for i in range(m)]
        sums = [[cgutils.alloca_once(builder, _VF) for _ in range(2)] for _ in range(m)]
        for cell in [c for row in sums for c in row]:
            builder.store(_constant(_VF, 0.0), cell)
        lanes = ir.Constant(_I64, LANES)
        with cgutils.for_range(builder, rank, intp=_I64) as loop:
            left = builder.mul(loop.index, ir.Constant(_I64, COLUMNS))
            places = left, builder.add(left, lanes)
            columns = [_read(builder, tile, place, FP32, True) for place in places]
            for i in range(m):
                factor = _splat(builder, _read(builder, zs[i], loop.index, FP32, False))
                for cell, column in zip(sums[i], columns, strict=True):
                    builder.store(builder.call(fma, [factor, column, builder.load(cell)]), cell)
        for i in range(m):
            scale = _splat(builder, _read(builder, scales, number[i], FP32, False))
            for cell, place in zip(sums[i], (start, builder.add(start, lanes)), strict=True):
                before = _read(builder, ys[i], place, kind, True)
                after = builder.call(fma, [scale, builder.load(cell), before])
                _write(builder, after, ys[i], place, kind)

    return sig, codegen


@intrinsic(prefer_literal=True)
def add_scaled(typingctx: Any, dtype: Any, y: Any, x: Any, scale: Any) -> Any:
    """y[n] += scale * x[n] for n < LANES, in fp32.

    Args:
        dtype: literal, of x.
        y: address of fp32. x: address.
        scale: float32.
    """
    values = _literals(dtype)
    if values is None:
        return None
    kind = values[0]
    sig = types.void(dtype, types.int64, types.int64, types.float32)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        _, y, x, scale = args
        zero = ir.Constant(_I64, 0)
        before = _read(builder, y, zero, FP32, True)
        change = _read(builder, x, zero, kind, True)
        after = builder.call(_fma(builder), [_splat(builder, scale), change, before])
        _write(builder, after, y, zero, FP32)

    return sig, codegen


@intrinsic(prefer_literal=True)
def narrow(typingctx: Any, dtype: Any, x: Any, y: Any) -> Any:
    """y[n] = x[n] for n < LANES, from fp32 to the literal ``dtype``; x and y are addresses."""
    values = _literals(dtype)
    if values is None:
        return None
    sig = types.void(dtype, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        zero = ir.Constant(_I64, 0)
        _write(builder, _read(builder, args[1], zero, FP32, True), args[2], zero, values[0])

    return sig, codegen


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
    values = _literals(dtype)
    if values is None:
        return None
    sig = types.float32(dtype, types.int64, types.int64)
    return sig, lambda _, builder, __, args: _read(builder, args[1], args[2], values[0], False)


@intrinsic(prefer_literal=True)
def write(typingctx: Any, dtype: Any, value: Any, address: Any, index: Any) -> Any:
    """Write a float32 to element ``index``, rounded to the literal ``dtype``."""
    values = _literals(dtype)
    if values is None:
        return None
    sig = types.void(dtype, types.float32, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        _write(builder, args[1], args[2], args[3], values[0])

    return sig, codegen


@intrinsic
def get(typingctx: Any, address: Any, index: Any) -> Any:
    """Return int64 number ``index`` of a table."""
    sig = types.int64(types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return _load(builder, _pointer(builder, args[0], _I64, args[1]), _I64)

    return sig, codegen


@intrinsic
def put(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Write int64 number ``index`` of a table."""
    sig = types.void(types.int64, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        _store(builder, args[2], _pointer(builder, args[0], _I64, args[1]))

    return sig, codegen


@intrinsic
def take(typingctx: Any, address: Any, index: Any, amount: Any) -> Any:
    """Add ``amount`` to int64 number ``index`` of a table, atomically; return the old number."""
    sig = types.int64(types.int64, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], _I64, args[1])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return sig, codegen


@intrinsic
def address_of(typingctx: Any, array: Any) -> Any:
    """Return the address of a numpy array's data."""
    sig = types.int64(array)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.ptrtoint(made.data, _I64)

    return sig, codegen


@intrinsic
def get32(typingctx: Any, address: Any, index: Any) -> Any:
    """Return int32 number ``index`` of a table, as int64."""
    sig = types.int64(types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.sext(_load(builder, _pointer(builder, args[0], _I32, args[1]), _I32), _I64)

    return sig, codegen


@intrinsic
def put32(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Write int32 number ``index`` of a table."""
    sig = types.void(types.int64, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        _store(builder, builder.trunc(args[2], _I32), _pointer(builder, args[0], _I32, args[1]))

    return sig, codegen
