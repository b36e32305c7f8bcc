"""What the tests of the native CPU kernels share."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from vllm_moe_lora.kernels.native import build

pytest.importorskip("numba", reason="the native kernels need numba: ci/install.sh")
# Here they have to compile: a failure must not look like a machine that cannot have them.
assert build.kernels() is not None

DTYPES = [torch.bfloat16, torch.float32]


def close(got, want):
    """Whether ``got`` is the fp64 ``want``, summed in fp32 and rounded once to got's dtype."""
    unit = 2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-21
    return bool(((got.double() - want).abs() <= unit * want.abs() + 2e-6).all())


@contextmanager
def threads_of(number):
    """Run kernels on so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
