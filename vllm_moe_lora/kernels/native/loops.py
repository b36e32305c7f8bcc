"""What the native kernels share: rows times a factor, and a table of work that threads take from.

A kernel is a C function of one argument: the address of a table of int64. Every thread of the pool
runs it. The threads take numbered items of work from a counter in the table, so any number of
threads will do, one included. An item writes what no other item writes, and its sums have a fixed
order. So results depend neither on the number of threads nor on who computes what.

A thread takes several adjacent items at once. So threads pass the counter, and the cache lines that
adjacent items write, to each other less often.

Only `native.build` imports this module, because it needs numba.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .memory import (
    BF16,
    COLUMNS,
    FP32,
    LANES,
    RANKS,
    ROWS,
    get,
    peek,
    put,
    read,
    write,
)
from .vectors import (
    dot,
    expand,
    transpose,
)

# Without checks for division by zero, and without wrappers that Python could call.
compiled = njit(error_model="numpy", no_cpython_wrapper=True)


@compiled
def share(items, threads):
    """How many items a thread takes at once: enough are left to even out threads of other speed."""
    return max(1, items // (8 * threads))


@compiled
def wait(table, counter, value):
    """Wait until other threads have finished their items of the phase before."""
    while peek(table, counter) < value:
        pass


@compiled
def _dot(dtype, m, n, x, a, a_stride, width, z, z_stride):
    if dtype == BF16:
        if m == ROWS:
            if n == RANKS:
                dot(BF16, ROWS, RANKS, x, a, a_stride, width, z, z_stride)
            else:
                dot(BF16, ROWS, 1, x, a, a_stride, width, z, z_stride)
        elif n == RANKS:
            dot(BF16, 1, RANKS, x, a, a_stride, width, z, z_stride)
        else:
            dot(BF16, 1, 1, x, a, a_stride, width, z, z_stride)
    elif m == ROWS:
        if n == RANKS:
            dot(FP32, ROWS, RANKS, x, a, a_stride, width, z, z_stride)
        else:
            dot(FP32, ROWS, 1, x, a, a_stride, width, z, z_stride)
    elif n == RANKS:
        dot(FP32, 1, RANKS, x, a, a_stride, width, z, z_stride)
    else:
        dot(FP32, 1, 1, x, a, a_stride, width, z, z_stride)


@compiled
def shrink(dtype, xs, m, a, a_stride, ranks, width, z, z_stride):
    """z[i * z_stride + j] = x[i] . a[j] for i < m, j < ranks; ``xs`` holds m addresses."""
    i = 0
    while i < m:
        rows = ROWS if m - i >= ROWS else 1
        j = 0
        while j < ranks:
            n = RANKS if ranks - j >= RANKS else 1
            start = a + ((j * a_stride) << (1 if dtype == BF16 else 2))
            place = z + ((i * z_stride + j) << 2)
            _dot(dtype, rows, n, xs + (i << 3), start, a_stride, width, place, z_stride)
            j += n
        i += rows


@compiled
def turn(dtype, b, b_stride, columns, rank, tile):
    """tile[j * COLUMNS + n] = b[n, j] in fp32, for n < columns <= COLUMNS and j < rank; else 0."""
    shift = 1 if dtype == BF16 else 2
    for half in range(0, COLUMNS, LANES):
        place = tile + (half << 2)
        first = b + ((half * b_stride) << shift)
        j = 0
        if columns - half >= LANES:
            while j + LANES <= rank:
                target = place + ((j * COLUMNS) << 2)
                if dtype == BF16:
                    transpose(BF16, first + (j << shift), b_stride, target)
                else:
                    transpose(FP32, first + (j << shift), b_stride, target)
                j += LANES
        while j < rank:
            for n in range(LANES):
                value = np.float32(0.0)
                if half + n < columns:
                    if dtype == BF16:
                        value = read(BF16, first, n * b_stride + j)
                    else:
                        value = read(FP32, first, n * b_stride + j)
                write(FP32, value, place, j * COLUMNS + n)
            j += 1


@compiled
def expand_rows(dtype, m, zs, scales, tile, rank, ys, start, columns, edge):
    """y[i][start + n] += scales[i] * sum over j of z[i][j] tile[j, n], rounded once.

    For i < m and n < columns <= COLUMNS. zs and ys hold m addresses, scales m fp32. edge: the
    address of fp32 [COLUMNS], then an int64.
    """
    if columns == COLUMNS:
        i = 0
        while i < m:
            rows = ROWS if m - i >= ROWS else 1
            z, scale, y = zs + (i << 3), scales + (i << 2), ys + (i << 3)
            if dtype == BF16:
                if rows == ROWS:
                    expand(BF16, ROWS, z, scale, tile, rank, y, start)
                else:
                    expand(BF16, 1, z, scale, tile, rank, y, start)
            elif rows == ROWS:
                expand(FP32, ROWS, z, scale, tile, rank, y, start)
            else:
                expand(FP32, 1, z, scale, tile, rank, y, start)
            i += rows
        return
    # The last columns of a row: in fp32 beside it, then back.
    place = edge + (COLUMNS << 2)
    put(place, 0, edge)
    for i in range(m):
        y = get(ys, i)
        for n in range(COLUMNS):
            value = np.float32(0.0)
            if n < columns:
                value = read(BF16, y, start + n) if dtype == BF16 else read(FP32, y, start + n)
            write(FP32, value, edge, n)
        expand(FP32, 1, zs + (i << 3), scales + (i << 2), tile, rank, place, 0)
        for n in range(columns):
            if dtype == BF16:
                write(BF16, read(FP32, edge, n), y, start + n)
            else:
                write(FP32, read(FP32, edge, n), y, start + n)
