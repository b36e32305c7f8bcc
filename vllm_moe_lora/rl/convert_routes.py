"""Routes in the forms that trainers read: verl, Megatron, SGLang, ART, SkyRL; exact both ways.

Routes are what vLLM returns as `CompletionOutput.routed_experts`: a numpy array
[prompt + generated - 1, layers, top_k], uint8 if the model has at most 256 experts, else uint16.
There is no row for the last token, because it was never fed to the model. Layers without experts
are zeros. Each ``to_x`` has a ``from_x`` that gives the same array back, bit for bit.

Every function raises ValueError if the routes do not fit the form; the text says which row, layer
or number does not.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Routes = npt.NDArray[Any]

# ART 0.5.23, art/vllm_route_transport.py: the frame, then each choice's routes.
_ART_MAGIC = b"ARTRTE2\0"
_ART_HEADER = struct.Struct("<8sQII")  # magic, bytes of JSON, arrays, experts
_ART_ARRAY = struct.Struct("<IB3xQQQ")  # choice, dtype, tokens, layers, top_k
_ART_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<u2")}

# SkyRL 0.4.0, skyrl/backends/skyrl_train/utils/routed_experts.py.
_SKYRL_DTYPES: dict[np.dtype[Any], int] = {
    np.dtype("u1"): 2**8,
    np.dtype("i2"): 2**15,
    np.dtype("i4"): 2**31,
}


def dtype_of(num_experts: int) -> np.dtype[Any]:
    """The dtype of vLLM's routes, from 0.31 on."""
    if not 1 <= num_experts <= 65536:
        raise ValueError(f"a model has 1 to 65536 experts here, not {num_experts}")
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def checked(routes: Any, num_experts: int | None = None) -> Routes:
    """Return ``routes`` as a C-contiguous array of their own dtype, if they are routes."""
    found = np.ascontiguousarray(routes)
    if found.ndim != 3 or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            "routes are integers [tokens, layers, top_k], and these are "
            f"{found.dtype} {list(found.shape)}"
        )
    low, high = int(found.min(initial=0)), int(found.max(initial=0))
    limit = num_experts if num_experts is not None else 65536
    if low < 0 or high >= limit:
        row, layer, _ = np.argwhere((found < 0) | (found >= limit))[0]
        raise ValueError(
            f"row {row}, layer {layer}: experts {found[row, layer].tolist()}; "
            f"the model has experts 0 to {limit - 1}"
        )
    return found


def _native(routes: Any, num_experts: int) -> Routes:
    """Return ``routes`` in vLLM's dtype."""
    return checked(routes, num_experts).astype(dtype_of(num_experts))


# -- vLLM over HTTP --------------------------------------------------------------------------------


def to_base64(routes: Any) -> str:
    """The text that vLLM's server sends as ``routed_experts``: base64 of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, checked(routes), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_base64(text: str) -> Routes:
    """The routes in a text of `to_base64`, or of vLLM's server."""
    try:
        data = base64.b64decode(text, validate=True)
        found = np.load(io.BytesIO(data), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError, OSError) as error:
        raise ValueError(f"these routes are not base64 of a .npy file: {error}") from None
    return checked(found)


# -- verl ------------------------------------------------------------------------------------------


def to_verl(routes: Any, tokens: int) -> torch.Tensor:
    """Routes in line with a sequence's tokens, as verl 0.9.1 trains on them.

    Args:
        routes: [rows, layers, top_k].
        tokens: of prompt and answer, at least ``rows``.

    Returns:
        [tokens, layers, top_k] int16. The rows that nobody routed, at the end, are zeros; verl's
        replay mask leaves them out. (verl/experimental/agent_loop/agent_loop.py)
    """
    found = _rows_within(routes, tokens)
    if int(found.max(initial=0)) >= 2**15:
        raise ValueError(f"verl's routes are int16, and there is expert {int(found.max())}")
    aligned = torch.zeros(tokens, *found.shape[1:], dtype=torch.int16)
    aligned[: len(found)] = torch.from_numpy(found.astype(np.int16))
    return aligned


def from_verl(aligned: torch.Tensor, rows: int, num_experts: int) -> Routes:
    """Take the first ``rows`` rows of `to_verl` back: one fewer than tokens for one answer."""
    if aligned.dtype != torch.int16 or not 0 <= rows <= len(aligned):
        raise ValueError(
            f"verl's routes are int16 with at least {rows} rows; these are "
            f"{aligned.dtype} {list(aligned.shape)}"
        )
    return _native(aligned[:rows].cpu().numpy(), num_experts)


# -- Megatron --------------------------------------------------------------------------------------


def to_megatron(
    routes: Any, tokens: int, layers: Sequence[int] | None = None
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """What each of Megatron's routers is given by `RouterReplay.set_target_indices`.

    Args:
        routes: [rows, layers, top_k].
        tokens: of prompt and answer, at least ``rows``.
        layers: those with experts, from 0; None: those in which some number is not zero.

    Returns:
        Layer -> [tokens, top_k] int64, and the replay mask [tokens] bool: True where the router has
        to take these experts. Other rows are zeros, and the router chooses itself.
    """
    found = _rows_within(routes, tokens)
    if layers is None:
        layers = np.flatnonzero(found.any(axis=(0, 2))).tolist()
    for layer in layers:
        if not 0 <= layer < found.shape[1]:
            raise ValueError(f"there is no layer {layer} in routes of {found.shape[1]} layers")
    padded = torch.zeros(tokens, *found.shape[1:], dtype=torch.int64)
    padded[: len(found)] = torch.from_numpy(found.astype(np.int64))
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[: len(found)] = True
    return {layer: padded[:, layer].contiguous() for layer in layers}, mask


def from_megatron(
    by_layer: Mapping[int, torch.Tensor], mask: torch.Tensor, num_layers: int, num_experts: int
) -> Routes:
    """Put the targets of all routers of a sequence together again.

    Args:
        by_layer, mask: from `to_megatron`, or recorded by Megatron's routers.
        num_layers: of the model; those not in ``by_layer`` are zeros.
        num_experts: of the model.
    """
    rows = int(mask.sum())
    if mask.dtype != torch.bool or not bool(mask[:rows].all()):
        raise ValueError("the replay mask is bool, and True from the first row on without a gap")
    if not by_layer:
        raise ValueError("there is no layer with routes")
    top_k = next(iter(by_layer.values())).shape[-1]
    found = np.zeros((rows, num_layers, top_k), dtype=np.int64)
    for layer, ids in by_layer.items():
        if not 0 <= layer < num_layers or tuple(ids.shape) != (len(mask), top_k):
            raise ValueError(
                f"layer {layer}: routes {list(ids.shape)}; expected {[len(mask), top_k]} in one of "
                f"layers 0 to {num_layers - 1}"
            )
        found[:, layer] = ids[:rows].cpu().numpy()
    return _native(found, num_experts)


# -- SGLang ----------------------------------------------------------------------------------------


def to_sglang(routes: Any) -> str:
    """``meta_info["routed_experts"]`` of SGLang: base64 of flat int32 numbers, row by row."""
    flat = checked(routes).astype("<i4").reshape(-1)
    return base64.b64encode(flat.tobytes()).decode("ascii")


def from_sglang(text: str, num_layers: int, top_k: int, num_experts: int) -> Routes:
    """The routes in a text of SGLang; it does not say their shape."""
    try:
        flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"these routes are not base64 of int32 numbers: {error}") from None
    if flat.size % (num_layers * top_k):
        raise ValueError(
            f"{flat.size} numbers are not rows of {num_layers} layers with {top_k} experts each"
        )
    return _native(flat.reshape(-1, num_layers, top_k), num_experts)


# -- ART -------------------------------------------------------------------------------------------


def to_art(response: bytes, routes: Mapping[int, Any], num_experts: int) -> bytes:
    """The body that ART 0.5.23 reads: the JSON of a chat completion, and the choices' routes.

    Args:
        response: UTF-8 JSON of an OpenAI ChatCompletion.
        routes: the choice's index -> [rows, layers, top_k].
        num_experts: of the model.
    """
    parts = [_ART_HEADER.pack(_ART_MAGIC, len(response), len(routes), num_experts), response]
    wanted = dtype_of(num_experts)
    code = next(code for code, dtype in _ART_DTYPES.items() if dtype == wanted)
    for choice, one in routes.items():
        found = _native(one, num_experts)
        parts += [
            _ART_ARRAY.pack(choice, code, *found.shape),
            found.astype(_ART_DTYPES[code]).tobytes(),
        ]
    return b"".join(parts)


def from_art(body: bytes) -> tuple[bytes, dict[int, Routes], int]:
    """Take a body of `to_art` apart: the JSON, routes by choice, and the number of experts."""
    if len(body) < _ART_HEADER.size or not body.startswith(_ART_MAGIC):
        raise ValueError("this does not begin with the header of ART's routed experts")
    _, size, count, num_experts = _ART_HEADER.unpack_from(body)
    at = _ART_HEADER.size + size
    response, routes = body[_ART_HEADER.size : at], {}
    for _ in range(count):
        try:
            choice, code, *shape = _ART_ARRAY.unpack_from(body, at)
            at += _ART_ARRAY.size
            dtype = _ART_DTYPES[code]
            flat = np.frombuffer(body, dtype, count=math.prod(shape), offset=at)
        except (struct.error, KeyError, ValueError) as error:
            raise ValueError(f"ART's frame is cut short or damaged at byte {at}: {error}") from None
        at += flat.nbytes
        routes[choice] = _native(flat.reshape(shape), num_experts)
    if at != len(body) or len(routes) != count:
        raise ValueError(f"ART's frame ends at byte {at} of {len(body)}, or has a choice twice")
    return response, routes, num_experts


# -- SkyRL -----------------------------------------------------------------------------------------


def to_skyrl(routes: Any) -> dict[str, Any]:
    """The payload of SkyRL's /skyrl/v1/generate: {"data": base64, "shape", "dtype"}.

    The dtype is the first of uint8, int16 and int32 that holds the largest id.
    """
    found = checked(routes)
    dtype = _skyrl_dtype(found)
    return {
        "data": base64.b64encode(found.astype(dtype).tobytes()).decode("ascii"),
        "shape": list(found.shape),
        "dtype": dtype.name,
    }


def from_skyrl(payload: Mapping[str, Any], num_experts: int) -> Routes:
    """The routes in a payload of `to_skyrl`, or of SkyRL's server."""
    known = {dtype.name: dtype for dtype in _SKYRL_DTYPES}
    try:
        dtype, shape = known[payload["dtype"]], tuple(payload["shape"])
        found = np.frombuffer(base64.b64decode(payload["data"], validate=True), dtype)
        return _native(found.reshape(shape), num_experts)
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"this is not a payload of SkyRL's routed experts: {error!r}") from None


def to_skyrl_batch(routes: Sequence[Any], tokens: Sequence[int]) -> torch.Tensor:
    """``rollout_expert_indices`` of a batch, padded on the left like SkyRL's sequences.

    Args:
        routes: of each sequence, [rows, layers, top_k].
        tokens: of prompt and answer of each sequence, at least its rows.

    Returns:
        [batch, longest sequence, layers, top_k], uint8, int16 or int32. Padding and rows that
        nobody routed have experts 0 to top_k - 1, because Megatron wants different experts there.
    """
    found = [_rows_within(one, count) for one, count in zip(routes, tokens, strict=True)]
    if len({one.shape[1:] for one in found}) != 1:
        raise ValueError("the sequences' routes differ in layers or top_k, or there are none")
    dtype = max((_skyrl_dtype(one) for one in found), key=lambda one: one.itemsize)
    layers, top_k = found[0].shape[1:]
    batch = np.empty((len(found), max(tokens), layers, top_k), dtype=dtype)
    batch[...] = np.arange(top_k, dtype=dtype)
    for one, row, count in zip(found, batch, tokens, strict=True):
        first = max(tokens) - count
        row[first : first + len(one)] = one
    return torch.from_numpy(batch)


def from_skyrl_batch(
    batch: torch.Tensor, tokens: Sequence[int], rows: Sequence[int], num_experts: int
) -> list[Routes]:
    """Take each sequence's routes out of `to_skyrl_batch`."""
    longest = batch.shape[1]
    return [
        _native(one[longest - count : longest - count + some].numpy(), num_experts)
        for one, count, some in zip(batch, tokens, rows, strict=True)
    ]


def _skyrl_dtype(routes: Routes) -> np.dtype[Any]:
    high = int(routes.max(initial=0))
    return next(dtype for dtype, limit in _SKYRL_DTYPES.items() if high < limit)


def _rows_within(routes: Any, tokens: int) -> Routes:
    found = checked(routes)
    if len(found) > tokens:
        raise ValueError(f"there are routes of {len(found)} tokens for a sequence of {tokens}")
    return found
