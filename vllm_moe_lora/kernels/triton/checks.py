"""Checks of the arguments before a kernel is launched.

They look at shapes, strides, dtypes and devices only. None of them waits for the GPU.
"""

from __future__ import annotations

import functools
from typing import NoReturn

import torch
import triton


def fail(error: type[Exception], what: str, why: str) -> NoReturn:
    """Raise ``error`` with a sentence that ``what`` (an argument's name) begins, ``why`` ends."""
    raise error(f"MoE LoRA kernels: {what} {why}")


@functools.cache
def _capability(index: int | None) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def arch_of(device: torch.device) -> str:
    """Return the GPU's architecture, by which config.py chooses tiles: "sm_90", "gfx942", ...

    In Triton's interpreter, which the tests use, it is "cpu".

    Raises:
        TypeError: the device cannot run the kernels, or it is not torch's current device.
    """
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return "cpu"
    if device.type != "cuda":
        fail(TypeError, "tensors", f"are on {device}, but the kernels need a CUDA device")
    if device.index is not None and device.index != torch.cuda.current_device():
        fail(
            TypeError,
            "tensors",
            f"are on {device}, which is not the current device; call them inside of "
            f"`with torch.cuda.device({device.index}):`",
        )
    return _capability(device.index)


def check_ids(
    what: str,
    tensor: torch.Tensor,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
) -> None:
    """Check a tensor of ids, slots or router weights: device, dtype, shape, and contiguous.

    Raises:
        TypeError: wrong device or dtype.
        ValueError: wrong shape, or not contiguous.
    """
    if tensor.device != device:
        fail(TypeError, what, f"is on {tensor.device}, expected {device}")
    if tensor.dtype not in dtypes:
        fail(TypeError, what, f"is {tensor.dtype}, expected one of {dtypes}")
    if tuple(tensor.shape) != shape:
        fail(ValueError, what, f"has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        fail(ValueError, what, "is not contiguous; call .contiguous()")


def check_rows(
    what: str,
    tensor: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    rows: tuple[int, ...],
    width: int,
) -> None:
    """Check a matrix of activations: [one of ``rows``, width], and aligned as `check_aligned` says.

    Raises:
        TypeError: wrong device or dtype.
        ValueError: wrong shape or alignment.
    """
    if tensor.device != device:
        fail(TypeError, what, f"is on {tensor.device}, but the other tensors are on {device}")
    if tensor.dtype != dtype:
        fail(TypeError, what, f"is {tensor.dtype}, but the other tensors are {dtype}; cast it")
    if tensor.ndim != 2 or tensor.shape[0] not in rows or tensor.shape[1] != width:
        wanted = " or ".join(f"[{n}, {width}]" for n in dict.fromkeys(rows))
        fail(ValueError, what, f"has shape {tuple(tensor.shape)}, expected {wanted}")
    check_aligned(what, tensor)


def check_aligned(what: str, tensor: torch.Tensor) -> None:
    """Check that the kernels can read every row of ``tensor`` 16 bytes at a time.

    The last dimension must be contiguous, the length of a row and the distance of two rows
    multiples of 8 elements, and the address of the first element a multiple of 16 bytes.

    Raises:
        ValueError: one of these is not so.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        fail(ValueError, what, "is not contiguous in its last dimension; call .contiguous()")
    steps = [s for n, s in zip(tensor.shape[:-1], tensor.stride(), strict=False) if n > 1]
    if any(step % 8 for step in steps) or tensor.shape[-1] % 8:
        fail(
            ValueError,
            what,
            f"has shape {tuple(tensor.shape)} and strides {tensor.stride()}, but the length and "
            "the distance of rows must be multiples of 8 elements; pad the buffer",
        )
    if tensor.data_ptr() % 16:
        fail(ValueError, what, "does not start at a multiple of 16 bytes; copy it")
