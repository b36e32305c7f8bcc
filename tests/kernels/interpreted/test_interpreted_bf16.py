"""bf16 in the interpreter is what a GPU computes: the other tests here rest on it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(a, b, c, summed, product, larger, cast, dotted, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    at = row[:, None] * SIZE + row[None, :]
    left, right = tl.load(a + at), tl.load(b + at)
    tl.store(summed + at, left + right)
    tl.store(product + at, left * right)
    tl.store(larger + at, left > right)
    tl.store(cast + at, tl.load(c + at).to(tl.bfloat16))
    tl.store(dotted + at, tl.dot(left, right))


def test_bf16_is_rounded_fp32():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=g).bfloat16() for _ in range(2))
    c = torch.randn(16, 16, generator=g)
    c[0, :4] = torch.tensor([float("nan"), float("inf"), 3.4e38, 2.0**-133])
    summed, product, cast = (torch.empty_like(a) for _ in range(3))
    larger, dotted = torch.empty(16, 16, dtype=torch.bool), torch.empty_like(c)
    _kernel[(1,)](a, b, c, summed, product, larger, cast, dotted, 16)
    assert torch.equal(summed, a + b)
    assert torch.equal(product, a * b)
    assert torch.equal(larger, a > b)
    assert torch.equal(cast.nan_to_num(7.0), c.bfloat16().nan_to_num(7.0))
    torch.testing.assert_close(dotted, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
