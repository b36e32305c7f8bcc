"""Routes in every trainer's form: bytes, shapes and dtypes as its reader wants them, and back.

`ci/route_consumers.py` asks the trainers' own code.
"""

from __future__ import annotations

import base64
import struct

import numpy as np
import pytest
import torch

from vllm_moe_lora.rl import convert_routes as c

SHAPES = [(1, 1, 1), (13, 2, 4), (7, 3, 8)]
EXPERTS = [8, 256, 257, 30000]


def _routes(shape, experts, seed=0):
    found = np.random.default_rng(seed).integers(0, experts, shape)
    found[0, 0, 0] = experts - 1  # the largest id is there
    return found.astype(np.uint8 if experts <= 256 else np.uint16)


def _same(have, want):
    assert have.dtype == want.dtype
    assert have.shape == want.shape
    assert (have == want).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_there_and_back(shape, experts):
    routes, (rows, layers, top_k) = _routes(shape, experts), shape
    _same(c.from_base64(c.to_base64(routes)), routes)
    for tokens in (rows, rows + 1, rows + 5):
        aligned = c.to_verl(routes, tokens)
        assert aligned.dtype == torch.int16
        assert aligned.shape == (tokens, layers, top_k)
        assert not aligned[rows:].any()
        _same(c.from_verl(aligned, rows, experts), routes)
        by_layer, mask = c.to_megatron(routes, tokens, range(layers))
        assert mask.tolist() == [True] * rows + [False] * (tokens - rows)
        assert [*by_layer] == [*range(layers)]
        for layer, ids in by_layer.items():
            assert ids.dtype == torch.int64
            assert (ids[:rows].numpy() == routes[:, layer]).all()
        _same(c.from_megatron(by_layer, mask, layers, experts), routes)
    text = c.to_sglang(routes)
    flat = np.frombuffer(base64.b64decode(text), np.int32)
    assert flat.tolist() == routes.reshape(-1).tolist()
    _same(c.from_sglang(text, layers, top_k, experts), routes)
    payload = c.to_skyrl(routes)
    assert payload["dtype"] == ("uint8" if experts <= 256 else "int16")
    _same(c.from_skyrl(payload, experts), routes)


@pytest.mark.parametrize("experts", EXPERTS)
def test_art(experts):
    first, second = _routes((5, 2, 4), experts), _routes((9, 2, 4), experts, seed=1)
    body = c.to_art(b'{"a": "\xc3\xa4"}', {0: first, 2: second}, experts)
    # By hand from the format: header, JSON, and for each choice a header and its numbers.
    width, code = (1, 1) if experts <= 256 else (2, 2)
    assert body[:24] == b"ARTRTE2\0" + struct.pack("<QII", 11, 2, experts)
    assert body[24:35] == b'{"a": "\xc3\xa4"}'
    assert body[35:67] == struct.pack("<IBBBBQQQ", 0, code, 0, 0, 0, 5, 2, 4)
    assert body[67 : 67 + 40 * width] == first.astype(f"<u{width}").tobytes()
    response, routes, found = c.from_art(body)
    assert (response, found) == (b'{"a": "\xc3\xa4"}', experts)
    _same(routes[0], first)
    _same(routes[2], second)


def test_dense_layers_have_no_router():
    routes = _routes((6, 3, 2), 8) | 1
    routes[:, 0] = 0
    by_layer, mask = c.to_megatron(routes, 7)
    assert [*by_layer] == [1, 2]
    _same(c.from_megatron(by_layer, mask, 3, 8), routes)


def test_skyrl_batch():
    some, tokens = [_routes((4, 2, 3), 8), _routes((7, 2, 3), 257, seed=1)], [5, 9]
    batch = c.to_skyrl_batch(some, tokens)
    assert (batch.dtype, batch.shape) == (torch.int16, (2, 9, 2, 3))
    pad = torch.arange(3, dtype=torch.int16).expand(2, 3)
    for row in (0, 3, 8):  # left of the first sequence, and its token without a route
        assert torch.equal(batch[0, row], pad)
    assert torch.equal(batch[0, 4:8], torch.from_numpy(some[0].astype(np.int16)))
    assert torch.equal(batch[1, 8], pad)
    back = c.from_skyrl_batch(batch, tokens, [4, 7], 257)
    _same(back[0], some[0].astype(np.uint16))
    _same(back[1], some[1])


GOOD = _routes((4, 2, 2), 8)
FRAME = c.to_art(b"{}", {0: GOOD}, 8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: c.checked(GOOD[0]), r"\[tokens, layers, top_k\].*\[2, 2\]"),
        (lambda: c.checked(GOOD.astype(float)), "float64"),
        (lambda: c.checked(GOOD, 7), r"row 0, layer 0: experts \[7, .*0 to 6"),
        (lambda: c.checked(GOOD.astype(int) - 9), "row 0, layer 0"),
        (lambda: c.from_base64("AAAA"), "not base64 of a .npy file"),
        (lambda: c.from_base64("%%"), "not base64 of a .npy file"),
        (lambda: c.to_verl(GOOD, 3), "routes of 4 tokens for a sequence of 3"),
        (lambda: c.to_verl(GOOD.astype(np.uint16) + 40000, 5), "int16.*expert 4000"),
        (lambda: c.from_verl(torch.zeros(3, 2, 2), 3, 8), "int16"),
        (lambda: c.from_verl(torch.zeros(3, 2, 2, dtype=torch.int16), 4, 8), "at least 4 rows"),
        (lambda: c.to_megatron(GOOD, 5, [2]), "no layer 2"),
        (lambda: c.from_megatron({5: torch.zeros(4, 2)}, torch.ones(4) > 0, 2, 8), "layer 5"),
        (lambda: c.from_megatron({}, torch.ones(4) > 0, 2, 8), "no layer with routes"),
        (lambda: c.from_megatron({0: GOOD}, torch.tensor([False, True]), 2, 8), "without a gap"),
        (lambda: c.from_sglang(c.to_sglang(GOOD), 3, 2, 8), "16 numbers are not rows of 3 layers"),
        (lambda: c.from_art(b"nothing"), "header"),
        (lambda: c.from_art(FRAME[:-1]), "cut short"),
        (lambda: c.from_art(FRAME + b"x"), "ends at byte"),
        (lambda: c.to_art(b"{}", {0: GOOD}, 4), "0 to 3"),
        (lambda: c.from_skyrl({"dtype": "int64"}, 8), "not a payload"),
        (lambda: c.from_skyrl({**c.to_skyrl(GOOD), "shape": [4, 2, 3]}, 8), "reshape"),
        (lambda: c.to_skyrl_batch([GOOD, GOOD[:, :1]], [5, 5]), "differ in layers"),
    ],
)
def test_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
