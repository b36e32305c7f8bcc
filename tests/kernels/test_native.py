"""The native CPU kernels against plain loops in fp64, and against the forms in torch."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import DTYPES, close, threads_of

from vllm_moe_lora.kernels import cpu_dense
from vllm_moe_lora.kernels.native import build, calls, pairs


def _dense(dtype, tokens, widths, rank, inner, seed, slots=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inner, generator=g).to(dtype)
    y = torch.randn(tokens, sum(widths) + 3, generator=g).to(dtype)
    a = [(torch.randn(slots, 1, rank, inner, generator=g) / inner**0.5).to(dtype) for _ in widths]
    b = [(torch.randn(slots, 1, w, rank, generator=g) / rank**0.5).to(dtype) for w in widths]
    return y, x, tuple(a), tuple(b)


def _native(y, x, a, b, slots, scale, widths):
    got = y.clone()
    assert calls.DenseLora().add(got, x, a, b, cpu_dense.row_segments(slots), scale, widths)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_is_called_again(dtype):
    """What a layer keeps between calls does not outlive the factors, sizes and batches it is of."""
    widths, layer = (40, 24), calls.DenseLora()
    cases = [_dense(dtype, 90, widths, rank, 64, rank) for rank in (8, 20)]
    for tokens, case, columns in [
        (1, 0, 67), (90, 0, 67), (3, 0, 50), (90, 1, 67), (2, 1, 64), (2, 0, 64), (1, 1, 67),
    ]:  # fmt: skip
        y, x, a, b = cases[case]
        y, x, slots = y[:tokens, :columns].clone(), x[:tokens], (torch.arange(tokens) + 2) % 4 - 1
        segments, want, got = cpu_dense.row_segments(slots), y.clone(), y.clone()
        assert not layer.add(got.half(), x.half(), a, b, segments, 1.0, widths)
        assert layer.add(got, x, a, b, segments, 1.0, widths)
        start, want = 0, want.double()
        for one_a, one_b, width in zip(a, b, widths, strict=True):
            for row, slot in enumerate(slots.tolist()):
                own = min(width, columns - start)
                z = one_a[slot, 0].double() @ x[row].double()
                if slot >= 0:
                    want[row, start : start + own] += one_b[slot, 0, :own].double() @ z
            start += width
        assert close(got, want), (tokens, case, columns)
        a[0][1] *= -1.5  # another adapter is copied into a slot


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 150),
    widths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    rank=st.integers(1, 40),
    inner=st.integers(1, 200),
    own_rank=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_dense(dtype, tokens, widths, rank, inner, own_rank, seed):
    y, x, a, b = _dense(dtype, tokens, widths, rank, inner, seed)
    for factor in a:
        factor[1, :, own_rank:] = 0  # the adapter in slot 1 has a smaller rank than its slot
    slots = torch.randint(-1, 3, (tokens,), generator=torch.Generator().manual_seed(seed))
    got = _native(y, x, a, b, slots, 0.5, tuple(widths))
    want, start = y.double(), 0
    for one_a, one_b, width in zip(a, b, widths, strict=True):
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                z = one_a[slot, 0].double() @ x[row].double()
                want[row, start : start + width] += 0.5 * (one_b[slot, 0].double() @ z)
        start += width
    assert close(got, want)
    assert torch.equal(got[slots < 0], y[slots < 0])
    assert torch.equal(got[:, start:], y[:, start:])  # columns beyond the slices
    plain = y.clone()
    segments = cpu_dense.row_segments(slots)
    cpu_dense.add_lora_torch(plain, x, a, b, segments, 0.5, tuple(widths))
    assert torch.allclose(got.float(), plain.float(), atol=0.1 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_many_items_for_few_threads(threads):
    """A thread takes several items at once, the last time perhaps fewer."""
    widths, tokens = (600, 300), 25
    y, x, a, b = _dense(torch.float32, tokens, widths, 14, 64, 0, slots=tokens)
    with threads_of(threads):
        got = _native(y, x, a, b, torch.arange(tokens), 1.0, widths)
    want, start = y.double(), 0
    for one_a, one_b, width in zip(a, b, widths, strict=True):
        z = torch.einsum("trk,tk->tr", one_a[:, 0].double(), x.double())
        want[:, start : start + width] += torch.einsum("tnr,tr->tn", one_b[:, 0].double(), z)
        start += width
    assert close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_dense_alone_and_in_a_batch(dtype, threads):
    """A row has the same bits whatever is computed with it, by however many threads."""
    widths = (320, 77)
    y, x, a, b = _dense(dtype, 203, widths, 16, 1056, 0)
    slots = torch.arange(203) % 4 - 1
    with threads_of(threads):
        together = _native(y, x, a, b, slots, 1.0, widths)
    for row in (1, 2, 3, 66, 129, 202):
        alone = _native(y[row : row + 1], x[row : row + 1], a, b, slots[row : row + 1], 1.0, widths)
        assert torch.equal(alone[0], together[row]), row
    assert not torch.equal(together[1], y[1])


def test_dense_takes_views():
    """Rows of x and y may be wider than what is used; what is beside them is not touched."""
    y, x, a, b = _dense(torch.bfloat16, 9, (40,), 8, 64, 0)
    wide_x, wide_y = torch.full((9, 99), torch.nan), torch.full((9, 131), torch.nan)
    wide_x, wide_y = wide_x.bfloat16(), wide_y.bfloat16()
    wide_x[:, 5:69], wide_y[:, 7:47] = x, y[:, :40]
    slots = torch.tensor([0, -1, 1, 1, 2, 0, 0, 0, 2])
    want = _native(y[:, :40].contiguous(), x, a, b, slots, 1.0, (40,))
    view = wide_y[:, 7:47]
    segments = cpu_dense.row_segments(slots)
    assert calls.DenseLora().add(view, wide_x[:, 5:69], a, b, segments, 1.0, (40,))
    assert torch.equal(view, want)
    assert wide_y[:, :7].isnan().all()
    assert wide_y[:, 47:].isnan().all()


def test_dense_nan_and_infinity():
    y, x, a, b = _dense(torch.bfloat16, 3, (32,), 8, 64, 0)
    x[0, 3] = torch.nan
    x[1, 3] = torch.inf
    got = _native(y, x, a, b, torch.tensor([0, 0, 0]), 1.0, (32,))
    assert got[0, :32].isnan().all()
    assert not got[1, :32].isfinite().any()
    assert got[2].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda y, x, a, b: (y, x.half(), a, b),
        lambda y, x, a, b: (y.half(), x.half(), (a[0].half(),), (b[0].half(),)),
        lambda y, x, a, b: (y, x, (a[0].bfloat16(),), b),
        lambda y, x, a, b: (y, x.t().contiguous().t(), a, b),
        lambda y, x, a, b: (y.t().contiguous().t(), x, a, b),
        lambda y, x, a, b: (y, x, (a[0].transpose(2, 3).contiguous().transpose(2, 3),), b),
    ],
)
def test_dense_falls_back(change):
    """What the kernel does not take is computed by torch."""
    y, x, a, b = change(*_dense(torch.float32, 4, (8,), 4, 12, 0))
    segments = cpu_dense.row_segments(torch.tensor([0, 1, -1, 2]))
    got = y.clone()
    assert not calls.DenseLora().add(got, x, a, b, segments, 1.0, (8,))
    assert torch.equal(got, y)
    cpu_dense.add_lora(got, x, a, b, segments, 1.0, (8,))
    want = y.double()
    for row, slot in ((0, 0), (1, 1), (3, 2)):
        z = a[0][slot, 0].double() @ x[row].double()
        want[row, :8] += b[0][slot, 0].double() @ z
    assert torch.allclose(got.double(), want, atol=0.05 if got.dtype == torch.half else 1e-5)


def test_dense_checks_indices():
    y, x, a, b = _dense(torch.float32, 4, (8,), 4, 12, 0)
    with pytest.raises(IndexError, match="row 5 of 4 rows"):
        calls.DenseLora().add(y, x, a, b, calls.Segments([(0, torch.tensor([0, 5]))]), 1.0, (8,))
    assert not calls.DenseLora().add(
        y, x, a, b, calls.Segments([(3, None)]), 1.0, (8,)
    )  # slots: 0 to 2
    assert calls.DenseLora().add(y, x, a, b, calls.Segments(), 1.0, (8,))
    empty = y[:0], x[:0]
    assert calls.DenseLora().add(*empty, a, b, calls.Segments([(0, None)]), 1.0, (8,))
    # The same segments, for a batch of another size.
    segments = calls.Segments([(1, None)])
    for tokens in (2, 4, 1):
        got = y.clone()
        assert calls.DenseLora().add(got[:tokens], x[:tokens], a, b, segments, 1.0, (8,))
        assert (got != y)[:, :8].any(1).tolist() == [row < tokens for row in range(4)]


@pytest.mark.parametrize("how", ["missing", "fails"])
def test_without_numba(how, monkeypatch, caplog):
    """LoRA runs with torch then; one line in the log says so."""
    build.kernels.cache_clear()
    if how == "missing":
        monkeypatch.setitem(sys.modules, "numba", None)
        for name in ("memory", "vectors", "loops", "dense", "routed"):
            monkeypatch.delitem(sys.modules, f"{build.__package__}.{name}", raising=False)
            monkeypatch.delattr(f"{build.__package__}.{name}", raising=False)
    else:
        monkeypatch.setattr(build, "_compile", lambda: 1 / 0)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    try:
        y, x, a, b = _dense(torch.float32, 4, (8,), 4, 12, 0)
        segments = cpu_dense.row_segments(torch.tensor([0, 1, -1, 2]))
        got, want = y.clone(), y.clone()
        for _ in range(2):
            cpu_dense.add_lora(got, x, a, b, segments, 1.0, (8,))
            cpu_dense.add_lora_torch(want, x, a, b, segments, 1.0, (8,))
        assert torch.equal(got, want)
        assert (
            pairs.make_pairs(torch.tensor([0]), torch.tensor([4]), torch.tensor([[0]]), 1) is None
        )
    finally:
        build.kernels.cache_clear()
    said = [r.getMessage() for r in caplog.records if "native kernels" in r.getMessage()]
    assert len(said) == 1
    assert ("numba" if how == "missing" else "ZeroDivisionError") in said[0]


def test_folders(tmp_path, monkeypatch):
    """Machine code is kept in vLLM's cache, or in a folder that only this user can write."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    first, second = build._folders()
    assert first.parent == tmp_path / "cache" / "moe_lora"
    private = second.parent
    assert private.parent == tmp_path / "tmp"
    assert private.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))  # no folder can be made there
    assert list(build._folders()) == [second]
    private.chmod(0o777)  # others could have put code there
    assert list(build._folders()) == []
    second.rmdir()
    private.rmdir()
    private.symlink_to(tmp_path / "cache")
    assert list(build._folders()) == []


_TIMED = """
import time
from vllm_moe_lora.kernels.native import build
start = time.process_time()
assert build.kernels() is not None
print(time.process_time() - start)
"""


@pytest.mark.long
def test_code_is_kept(tmp_path):
    """Processes that start at once share a folder; one that starts later compiles nothing."""
    env = {**os.environ, "VLLM_CACHE_ROOT": str(tmp_path)}
    command = [sys.executable, "-c", _TIMED]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    cold = [float(one.communicate(timeout=300)[0]) for one in both]
    assert [one.returncode for one in both] == [0, 0]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < min(cold) / 2
    (folder,) = (tmp_path / "moe_lora").iterdir()
    assert sum(path.suffix == ".nbc" for path in folder.rglob("*")) == 4
