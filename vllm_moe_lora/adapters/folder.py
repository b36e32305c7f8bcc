"""An adapter's folder: its tensors without a copy, its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.adapters.names import touches_experts

WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt")

# safetensors' names (its format documentation) for what a factor can be.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def with_experts(folder: Path) -> dict[str, torch.Tensor] | None:
    """`tensors`, or None for an adapter that leaves routed experts alone or cannot be read.

    Raises:
        AdapterError: the adapter has routed experts, but its file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / WEIGHTS).is_file():
        if not any((folder / name).is_file() for name in _PICKLES):
            return None
        found = tensors(folder)
        return found if touches_experts(found) else None
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = file.keys()
    except (SafetensorError, OSError):
        return None  # upstream's own error says what is wrong with the file
    return tensors(folder) if touches_experts(names) else None


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter: views of the mapped file, read when they are first touched.

    A view may not outlive the file's contents: copy what is kept.

    Raises:
        AdapterError: no file, a damaged file, a tensor twice, or a dtype that is no factor's.
    """
    file = folder / WEIGHTS
    if file.is_file():
        return _mapped(file)
    for name in _PICKLES:
        if (folder / name).is_file():
            try:
                found = torch.load(folder / name, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged pickle may raise anything
                raise AdapterError(f"{folder / name} cannot be read: {error}") from error
            if not isinstance(found, dict):
                raise AdapterError(f"{folder / name} holds no table of tensors")
            return found
    raise AdapterError(f"{folder} has no {WEIGHTS}")


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    header, start = _header(file)
    size = file.stat().st_size
    storage = torch.UntypedStorage.from_file(str(file), False, size)
    flat: dict[torch.dtype, torch.Tensor] = {}
    out: dict[str, torch.Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise AdapterError(
                f"{file.name}: {name} is {entry['dtype']}; LoRA factors are float32, bfloat16 or "
                "float16. Save the adapter in one of them."
            )
        shape, (begin, _) = entry["shape"], entry["data_offsets"]
        if (start + begin) % dtype.itemsize:
            return _unaligned(file)
        if dtype not in flat:
            whole = torch.empty(0, dtype=dtype)
            flat[dtype] = whole.set_(storage, 0, (size // dtype.itemsize,))
        offset = (start + begin) // dtype.itemsize
        out[name] = flat[dtype].as_strided(shape, _strides(shape), offset)
    return out


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a file that safetensors accepts, and where its data begins."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):  # checks sizes, offsets and overlaps
            pass
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length), object_pairs_hook=_no_doubles)
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{file} cannot be read as safetensors: {error}") from error
    return header, 8 + length


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise AdapterError(f"{WEIGHTS}: {twice} is there twice")
    return table


def _unaligned(file: Path) -> dict[str, torch.Tensor]:
    """safetensors aligns data, but its format does not demand it: then every tensor is copied."""
    from safetensors.torch import load_file

    return load_file(file)


def _strides(shape: list[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]
