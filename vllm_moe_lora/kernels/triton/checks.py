"""What a call can know about its tensors without asking the device."""

from __future__ import annotations

import functools
from typing import NoReturn

import torch
import triton


def fail(error: type[Exception], what: str, why: str) -> NoReturn:
    raise error(f"MoE LoRA kernels: {what}: {why}")


@functools.cache
def _capability(index: int | None) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def arch_of(device: torch.device) -> str:
    """Name of the part in the tables of config.py, "sm_90" or "gfx942"; "cpu" under Triton's
    interpreter.

    Raises:
        TypeError: the device cannot run the kernels, or is not the current one.
    """
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return "cpu"
    if device.type != "cuda":
        fail(TypeError, "device", f"tensors are on {device}; a CUDA device is needed")
    if device.index is not None and device.index != torch.cuda.current_device():
        fail(TypeError, "device", f"{device} is not current; use torch.cuda.device({device.index})")
    return _capability(device.index)


def check_ids(
    what: str,
    tensor: torch.Tensor,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
) -> None:
    """Small contiguous tensors: ids, slots, router weights."""
    if tensor.device != device:
        fail(TypeError, what, f"on {tensor.device}, expected {device}")
    if tensor.dtype not in dtypes:
        fail(TypeError, what, f"{tensor.dtype}, expected one of {dtypes}")
    if tuple(tensor.shape) != shape:
        fail(ValueError, what, f"shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        fail(ValueError, what, "not contiguous; call .contiguous()")


def check_rows(
    what: str,
    tensor: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    rows: tuple[int, ...],
    width: int,
) -> None:
    """[rows, width] that the kernels read 16 bytes at a time."""
    if tensor.device != device:
        fail(TypeError, what, f"on {tensor.device}, the factors are on {device}")
    if tensor.dtype != dtype:
        fail(TypeError, what, f"{tensor.dtype}, the factors are {dtype}; cast one of them")
    if tensor.ndim != 2 or tensor.shape[0] not in rows or tensor.shape[1] != width:
        wanted = " or ".join(f"[{n}, {width}]" for n in dict.fromkeys(rows))
        fail(ValueError, what, f"shape {tuple(tensor.shape)}, expected {wanted}")
    check_aligned(what, tensor)


def check_aligned(what: str, tensor: torch.Tensor) -> None:
    """Last dimension dense, every row a multiple of 8 elements from an aligned start."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        fail(ValueError, what, "last dimension is not contiguous; call .contiguous()")
    steps = [s for n, s in zip(tensor.shape[:-1], tensor.stride(), strict=False) if n > 1]
    if any(step % 8 for step in steps) or tensor.shape[-1] % 8:
        fail(
            ValueError,
            what,
            f"shape {tuple(tensor.shape)}, strides {tensor.stride()}: rows must be multiples of "
            "8 elements; pad the buffer",
        )
    if tensor.data_ptr() % 16:
        fail(ValueError, what, "does not start at a multiple of 16 bytes; copy it")
