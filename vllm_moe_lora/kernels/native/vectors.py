"""The innermost loops of the native CPU kernels, written as LLVM vector code.

Vectors have a fixed number of lanes (`LANES`), so a sum always has the same order: the result of a
row does not depend on the rows that are computed with it. All sums are in fp32.

Only what numba compiles imports this module: it needs numba.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .memory import (
    COLUMNS,
    F32,
    FP32,
    I16,
    I32,
    I64,
    ITEMSIZE,
    LANES,
    VF,
    VI32,
    constant,
    literals,
    load,
    load_number,
    pointer,
    store,
    store_number,
)


def _pairs(builder: Any, address: Any, index: Any, dtype: int) -> list[Any]:
    """Read 2 * LANES elements as two vectors; for bf16 the even and the odd ones."""
    if dtype == FP32:
        high = builder.add(index, ir.Constant(I64, LANES))
        return [load_number(builder, address, i, FP32, True) for i in (index, high)]
    both = load(builder, pointer(builder, address, I16, index), VI32)
    low = builder.shl(both, constant(VI32, 16))
    high = builder.and_(both, constant(VI32, 0xFFFF0000))
    return [builder.bitcast(v, VF) for v in (low, high)]


def _sum(builder: Any, vector: Any) -> Any:
    """Add up the lanes of a vector: halves, then quarters, and so on."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        halves = []
        for start in (0, lanes):
            chosen = [ir.Constant(I32, start + i) for i in range(lanes)]
            mask = ir.Constant(ir.VectorType(I32, lanes), chosen)
            halves.append(builder.shuffle_vector(vector, undefined, mask))
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, ir.Constant(I32, 0))


def _fma(builder: Any) -> Any:
    kind = ir.FunctionType(VF, [VF] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")


def _splat(builder: Any, value: Any) -> Any:
    single = builder.insert_element(ir.Constant(VF, ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return builder.shuffle_vector(single, ir.Constant(VF, ir.Undefined), zeros)


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
    values = literals(dtype, rows, ranks)
    if values is None:
        return None
    kind, m, n = values
    sig = types.void(dtype, rows, ranks, *[types.int64] * 6)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        x, a, a_stride, width, z, z_stride = args[3:]
        fma = _fma(builder)
        count = [ir.Constant(I64, i) for i in range(max(m, n) + 1)]
        xs = [load(builder, pointer(builder, x, I64, count[i]), I64) for i in range(m)]
        size = ir.Constant(I64, ITEMSIZE[kind])
        step = builder.mul(a_stride, size)
        as_ = [builder.add(a, builder.mul(step, count[j])) for j in range(n)]
        sums = [[cgutils.alloca_once(builder, VF) for _ in range(n)] for _ in range(m)]
        for cell in [c for row in sums for c in row]:
            builder.store(constant(VF, 0.0), cell)
        block = ir.Constant(I64, 2 * LANES)
        whole = builder.mul(builder.sdiv(width, block), block)
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), whole, block, I64) as (k, _):
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
                cell = cgutils.alloca_once(builder, F32)
                builder.store(_sum(builder, builder.load(sums[i][j])), cell)
                with cgutils.for_range_slice(builder, whole, width, count[1], I64) as (k, _):
                    u, v = (load_number(builder, p, k, kind, False) for p in (xs[i], as_[j]))
                    builder.store(builder.fadd(builder.load(cell), builder.fmul(u, v)), cell)
                place = builder.add(builder.mul(z_stride, count[i]), count[j])
                store(builder, builder.load(cell), pointer(builder, z, F32, place))

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
    values = literals(dtype)
    if values is None:
        return None
    kind = values[0]
    sig = types.void(dtype, types.int64, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        _, b, b_stride, tile = args
        rows = []
        for n in range(LANES):
            offset = builder.mul(b_stride, ir.Constant(I64, n))
            rows.append(load_number(builder, b, offset, kind, True))
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
                    mask = ir.Constant(VI32, chosen)
                    done[target] = builder.shuffle_vector(low, high, mask)
            rows = done
            half //= 2
        for j in range(LANES):
            place = ir.Constant(I64, j * COLUMNS)
            store(builder, rows[j], pointer(builder, tile, F32, place))

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
    values = literals(dtype, rows)
    if values is None:
        return None
    kind, m = values
    sig = types.void(dtype, rows, *[types.int64] * 6)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        z, scales, tile, rank, y, start = args[2:]
        fma = _fma(builder)
        number = [ir.Constant(I64, i) for i in range(max(m, 2))]
        zs = [load(builder, pointer(builder, z, I64, number[i]), I64) for i in range(m)]
        ys = [load(builder, pointer(builder, y, I64, number[i]), I64) for i in range(m)]
        sums = [[cgutils.alloca_once(builder, VF) for _ in range(2)] for _ in range(m)]
        for cell in [c for row in sums for c in row]:
            builder.store(constant(VF, 0.0), cell)
        lanes = ir.Constant(I64, LANES)
        with cgutils.for_range(builder, rank, intp=I64) as loop:
            left = builder.mul(loop.index, ir.Constant(I64, COLUMNS))
            places = left, builder.add(left, lanes)
            columns = [load_number(builder, tile, place, FP32, True) for place in places]
            for i in range(m):
                factor = _splat(builder, load_number(builder, zs[i], loop.index, FP32, False))
                for cell, column in zip(sums[i], columns, strict=True):
                    builder.store(builder.call(fma, [factor, column, builder.load(cell)]), cell)
        for i in range(m):
            scale = _splat(builder, load_number(builder, scales, number[i], FP32, False))
            for cell, place in zip(sums[i], (start, builder.add(start, lanes)), strict=True):
                before = load_number(builder, ys[i], place, kind, True)
                after = builder.call(fma, [scale, builder.load(cell), before])
                store_number(builder, after, ys[i], place, kind)

    return sig, codegen


@intrinsic(prefer_literal=True)
def add_scaled(typingctx: Any, dtype: Any, y: Any, x: Any, scale: Any) -> Any:
    """y[n] += scale * x[n] for n < LANES, in fp32.

    Args:
        dtype: literal, of x.
        y: address of fp32. x: address.
        scale: float32.
    """
    values = literals(dtype)
    if values is None:
        return None
    kind = values[0]
    sig = types.void(dtype, types.int64, types.int64, types.float32)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        _, y, x, scale = args
        zero = ir.Constant(I64, 0)
        before = load_number(builder, y, zero, FP32, True)
        change = load_number(builder, x, zero, kind, True)
        after = builder.call(_fma(builder), [_splat(builder, scale), change, before])
        store_number(builder, after, y, zero, FP32)

    return sig, codegen


@intrinsic(prefer_literal=True)
def narrow(typingctx: Any, dtype: Any, x: Any, y: Any) -> Any:
    """y[n] = x[n] for n < LANES, from fp32 to the literal ``dtype``; x and y are addresses."""
    values = literals(dtype)
    if values is None:
        return None
    sig = types.void(dtype, types.int64, types.int64)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        zero = ir.Constant(I64, 0)
        store_number(
            builder, load_number(builder, args[1], zero, FP32, True), args[2], zero, values[0]
        )

    return sig, codegen
