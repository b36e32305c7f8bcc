"""An adapter's folder: its tensors without a copy, its config."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from .errors import AdapterError
from .names import touches_experts

WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt")

# safetensors' names (its format documentation) for what a factor can be.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


# Kimi-K2's experts make 141,000 tensors and a header of 21 MB. Ten times as many take a minute.
MOST_BYTES = 50_000_000


def state(path: str) -> tuple[Any, ...] | None:
    """What tells one state of an adapter's files from another; None if there is no such folder.

    The files are opened: a network file system answers for a closed one from what it remembers.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        return None
    found: list[Any] = [str(folder)]
    for name in ("adapter_config.json", WEIGHTS, *_PICKLES):
        try:
            with (folder / name).open("rb") as file:
                now = os.fstat(file.fileno())
        except OSError as error:
            found.append((name, error.errno))
        else:
            found.append((name, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))
    return tuple(found)


def with_experts(folder: Path) -> dict[str, torch.Tensor] | None:
    """`tensors`, or None for an adapter that leaves routed experts alone or cannot be read.

    Raises:
        AdapterError: it has routed experts, and a dtype that is no factor's; a damaged pickle; a
            header above `MOST_BYTES`.
    """
    if (folder / WEIGHTS).is_file():
        _no_bomb(folder / WEIGHTS)
        try:
            header, start = _header(folder / WEIGHTS)
        except AdapterError:
            return None  # upstream's own error says what is wrong with the file
        return _views(folder / WEIGHTS, header, start) if touches_experts(header) else None
    if not any((folder / name).is_file() for name in _PICKLES):
        return None
    found = tensors(folder)
    return found if touches_experts(found) else None


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter: views of the mapped file, read when they are first touched.

    A view may not outlive the file's contents: copy what is kept.

    Raises:
        AdapterError: no file, a damaged file, a tensor twice, a dtype that is no factor's, or rows
            for a larger vocabulary.
    """
    for name in ("new_embeddings.safetensors", "new_embeddings.bin"):
        if (folder / name).is_file():
            raise AdapterError(
                f"{folder / name}: rows for new tokens, which vLLM dropped with 0.12 and we do not "
                "read. Train without new tokens, or merge the adapter into the model."
            )
    file = folder / WEIGHTS
    if file.is_file():
        _no_bomb(file)
        return _views(file, *_header(file))
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


def _views(file: Path, header: dict[str, Any], start: int) -> dict[str, torch.Tensor]:
    """Each tensor as a view of the mapped file."""
    size = file.stat().st_size
    storage = torch.UntypedStorage.from_file(str(file), False, size)
    flat: dict[str, torch.Tensor] = {}
    out: dict[str, torch.Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        code, shape, offset = entry["dtype"], entry["shape"], start + entry["data_offsets"][0]
        whole = flat.get(code)
        if whole is None:
            whole = flat[code] = _as_dtype(file, name, code, storage)
        offset, rest = divmod(offset, whole.itemsize)
        if rest:
            return _unaligned(file)
        if len(shape) == 2:  # all of them, nearly
            out[name] = whole.as_strided(shape, (shape[1], 1), offset)
        else:
            numbers = math.prod(shape)
            out[name] = whole[offset : offset + numbers].view(shape)
    return out


def _as_dtype(file: Path, name: str, code: str, storage: torch.UntypedStorage) -> torch.Tensor:
    dtype = DTYPES.get(code)
    if dtype is None:
        raise AdapterError(
            f"{file.name}: {name} is {code}; LoRA factors are float32, bfloat16 or float16. Save "
            "the adapter in one of them."
        )
    length = storage.nbytes() // dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(storage, 0, (length,))


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a file that safetensors accepts, and where its data begins."""
    from safetensors import SafetensorError, safe_open

    try:
        # Checks sizes and offsets; as tensors must fill the file without a gap or an overlap,
        # no name can be there twice.
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length))
    except (SafetensorError, OSError, RecursionError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read as safetensors: {error}") from error
    return header, 8 + length


def _no_bomb(file: Path) -> None:
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
    if MOST_BYTES < length < file.stat().st_size:
        raise AdapterError(
            f"{file} has a header of {length:,} bytes, above {MOST_BYTES:,}: more tensors than "
            "the adapters of any model have"
        )


def _unaligned(file: Path) -> dict[str, torch.Tensor]:
    """safetensors aligns data, but its format does not demand it: then every tensor is copied."""
    from safetensors.torch import load_file

    return load_file(file)
