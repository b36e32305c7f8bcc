"""Reads the weights in an adapter's folder, without copying them.

The format of safetensors: https://github.com/huggingface/safetensors#format
"""

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
INDEX = f"{WEIGHTS}.index.json"
_PICKLES = ("adapter_model.bin", "adapter_model.pt")

# The dtypes that LoRA factors may have, by their names in a safetensors header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

# A larger header is refused. An adapter on all experts of Kimi-K2 has 141,000 tensors and a header
# of 21 MB; reading ten times as many tensors takes a minute.
MAX_HEADER_BYTES = 50_000_000


def files_state(path: str) -> tuple[Any, ...] | None:
    """A value that changes whenever the adapter's files change; None if there is no such folder.

    It is made of inode, size and times of each file. The files are opened for that, because a
    network file system may answer from its cache for a file that is not open.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        return None
    found: list[Any] = [str(folder)]
    shards = sorted(file.name for file in folder.glob("adapter_model-*.safetensors"))
    for name in ("adapter_config.json", WEIGHTS, INDEX, *_PICKLES, *shards):
        try:
            with (folder / name).open("rb") as file:
                now = os.fstat(file.fileno())
        except OSError as error:
            found.append((name, error.errno))
        else:
            found.append((name, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))
    return tuple(found)


def tensors_if_experts(folder: Path) -> dict[str, torch.Tensor] | None:
    """The adapter's `tensors` if it has LoRA on routed experts, else None.

    For None the caller lets vLLM read the adapter. None is also returned if the safetensors file
    is damaged or there is no file, because vLLM then raises its own error.

    Raises:
        AdapterError: the adapter has routed experts and a dtype not in `DTYPES`; a pickle is
            damaged; the header is larger than `MAX_HEADER_BYTES`.
    """
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        found = _sharded(folder)
        return found if touches_experts(found) else None
    if (folder / WEIGHTS).is_file():
        _check_header_size(folder / WEIGHTS)
        try:
            header, start = _header(folder / WEIGHTS)
        except AdapterError:
            return None  # vLLM's own error says what is wrong with the file
        return _views(folder / WEIGHTS, header, start) if touches_experts(header) else None
    if not any((folder / name).is_file() for name in _PICKLES):
        return None
    found = tensors(folder)
    return found if touches_experts(found) else None


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by name, on the CPU.

    Those of a safetensors file are views of the memory-mapped file and are read when they are first
    used. Copy what must stay valid after the file changes.

    Raises:
        AdapterError: there is no weights file, it is damaged or names a tensor twice, a dtype is
            not in `DTYPES`, the header is larger than `MAX_HEADER_BYTES`, or the adapter has
            embedding rows for new tokens.
    """
    for name in ("new_embeddings.safetensors", "new_embeddings.bin"):
        if (folder / name).is_file():
            raise AdapterError(
                f"{folder / name} holds embedding rows for new tokens. vLLM does not support them "
                "since 0.12, and vllm-moe-lora does not read them. Train without new tokens, or "
                "merge the adapter into the model."
            )
    file = folder / WEIGHTS
    if file.is_file():
        _check_header_size(file)
        return _views(file, *_header(file))
    if (folder / INDEX).is_file():
        return _sharded(folder)
    for name in _PICKLES:
        if (folder / name).is_file():
            try:
                found = torch.load(folder / name, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged pickle may raise anything
                raise AdapterError(f"{folder / name} cannot be read: {error}") from error
            if not isinstance(found, dict):
                raise AdapterError(f"{folder / name} does not hold a dictionary of tensors")
            for key, tensor in found.items():
                check_dtype(name, key, tensor)
            return found
    raise AdapterError(f"{folder} has no {WEIGHTS}: is this the folder of an adapter?")


def check_dtype(file: str, name: str, tensor: object) -> None:
    """Refuse what is no tensor, or has a dtype not in `DTYPES`. Raises AdapterError."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES.values():
        raise _wrong_dtype(file, name, getattr(tensor, "dtype", type(tensor).__name__))


def _wrong_dtype(file: str, name: str, kind: object) -> AdapterError:
    return AdapterError(
        f"{file}: {name} is {kind}, but LoRA factors must be float32, bfloat16 or float16. Save "
        "the adapter in one of these."
    )


def _sharded(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of several safetensors files, which an index lists as transformers writes it."""
    try:
        files = json.loads((folder / INDEX).read_text())["weight_map"]
        names = sorted(set(files.values()))
    except (OSError, RecursionError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{folder / INDEX} cannot be read as an index: {error!r}") from error
    out: dict[str, torch.Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise AdapterError(f"{INDEX} names {name!r}, which is no file of the adapter's folder")
        if not (folder / name).is_file():
            raise AdapterError(f"{folder / name} is missing, but {INDEX} lists tensors in it")
        _check_header_size(folder / name)
        for key, tensor in _views(folder / name, *_header(folder / name)).items():
            if files.get(key) != name:
                raise AdapterError(f"{name} has {key}, which {INDEX} does not list there")
            out[key] = tensor
    if missing := set(files) - set(out):
        raise AdapterError(f"{INDEX} lists {min(missing)}, which is in none of the files")
    return out


def _views(file: Path, header: dict[str, Any], start: int) -> dict[str, torch.Tensor]:
    """Memory-map the file and make each tensor a view of the mapping.

    Args:
        header: the parsed header.
        start: offset in bytes of the data in the file.
    """
    size = file.stat().st_size
    storage = torch.UntypedStorage.from_file(str(file), False, size)
    by_dtype: dict[str, torch.Tensor] = {}
    out: dict[str, torch.Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        code, shape, offset = entry["dtype"], entry["shape"], start + entry["data_offsets"][0]
        whole = by_dtype.get(code)
        if whole is None:
            whole = by_dtype[code] = _as_dtype(file, name, code, storage)
        offset, rest = divmod(offset, whole.itemsize)
        if rest:
            return _copied(file)
        if len(shape) == 2:  # the common case, and this is the fastest way
            out[name] = whole.as_strided(shape, (shape[1], 1), offset)
        else:
            numbers = math.prod(shape)
            out[name] = whole[offset : offset + numbers].view(shape)
    return out


def _as_dtype(file: Path, name: str, code: str, storage: torch.UntypedStorage) -> torch.Tensor:
    dtype = DTYPES.get(code)
    if dtype is None:
        raise _wrong_dtype(file.name, name, code)
    length = storage.nbytes() // dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(storage, 0, (length,))


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The parsed header of a safetensors file, and the offset in bytes where its data begins.

    Raises:
        AdapterError: safetensors itself does not accept the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # This checks sizes and offsets. Tensors must fill the file without gaps or overlaps, so it
        # also makes sure that json.loads does not drop a tensor whose name is there twice.
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length))
    except (SafetensorError, OSError, RecursionError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read as safetensors: {error}") from error
    return header, 8 + length


def _check_header_size(file: Path) -> None:
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
    if MAX_HEADER_BYTES < length < file.stat().st_size:
        raise AdapterError(
            f"{file} has a header of {length:,} bytes, above the limit of {MAX_HEADER_BYTES:,}. No "
            "model's adapter has that many tensors: the file is damaged or is not an adapter."
        )


def _copied(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors as copies, because their data is not aligned and cannot be viewed.

    safetensors writes aligned data, but its format does not require that.
    """
    from safetensors.torch import load_file

    return load_file(file)
