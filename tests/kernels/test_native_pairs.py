"""The native CPU kernels of token-expert pairs against plain loops in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import DTYPES, close

from vllm_moe_lora.kernels.native import pairs
from vllm_moe_lora.kernels.slot_stack import SlotStack


def _routed(dtype, tokens, top_k, experts, ranks, hidden, shared, foreign, seed):
    g = torch.Generator().manual_seed(seed)
    slots = torch.randint(-1, len(ranks), (tokens,), generator=g)
    ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)])
    if foreign:  # experts of another device
        ids += torch.randint(0, 2, ids.shape, generator=g) * experts
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    stack = (len(ranks), 1 if shared else experts)
    a = [(torch.randn(*stack, 16, hidden, generator=g) / hidden**0.5).to(dtype) for _ in range(2)]
    b = (torch.randn(*stack, hidden, 16, generator=g) / 4).to(dtype)
    weights = torch.rand(tokens, top_k, generator=g)
    return slots, ids, x, a, b, weights


def _columns(ranks, slices):
    """The first column of each slot, not in the order of slots, with gaps."""
    places, column = {}, 3
    for slot in reversed(range(len(ranks))):
        places[slot] = column
        column += slices * ranks[slot] + 2
    return [places[slot] for slot in range(len(ranks))], column + 4


def _through(found, ranks, x, a, b, weights, seed):
    """Run both kernels; return the wide rows before, those after (random), and the output."""
    hidden = x.shape[1]
    first, more = _columns(ranks, 2)
    before = torch.full((len(found), hidden + more), torch.nan).to(x.dtype)
    assert found.before(x, before, first, [SlotStack.of(f, ranks, 1) for f in a])
    second, more = _columns(ranks, 1)
    # What the base gives depends on the pair alone, so that rows can be compared between batches.
    rows = x[found.rows].repeat_interleave(len(found) // max(1, found.rows.numel()), 0)
    seeds = torch.cos(torch.arange(hidden + more).float() * (1 + found.ids))
    after = (seeds * rows.float().sum(1, keepdim=True)).to(x.dtype)
    out = torch.full_like(x, torch.nan)
    lora_b = SlotStack.of(b, ranks, 2)
    assert found.after(after, out, second, lora_b, max(ranks), weights)
    return before, after, out


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 90),
    top_k=st.integers(1, 4),
    ranks=st.lists(st.integers(0, 16), min_size=1, max_size=4),
    hidden=st.integers(1, 100),
    shared=st.booleans(),
    foreign=st.booleans(),
    weighted=st.booleans(),
    wide_ids=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_routed(dtype, tokens, top_k, ranks, hidden, shared, foreign, weighted, wide_ids, seed):
    experts = 6
    slots, ids, x, a, b, weights = _routed(
        dtype, tokens, top_k, experts, ranks, hidden, shared, foreign, seed
    )
    ids = ids if wide_ids else ids.to(torch.int32)
    found = pairs.make_pairs(slots, torch.tensor(ranks), ids, experts)
    rows = [i for i, s in enumerate(slots.tolist()) if s >= 0 and ranks[s]]
    assert found.rows.tolist() == rows
    assert len(found) == len(rows) * top_k
    if not rows:
        return
    given_weights = weights if weighted else None
    before, after, out = _through(found, ranks, x, a, b, given_weights, seed)
    first, second = _columns(ranks, 2)[0], _columns(ranks, 1)[0]
    for i, row in enumerate(rows):
        slot, want = int(slots[row]), torch.zeros(hidden, dtype=torch.float64)
        rank = ranks[slot]
        for k in range(top_k):
            pair, expert = i * top_k + k, int(ids[row, k])
            assert torch.equal(before[pair, :hidden], x[row])
            columns = torch.zeros(before.shape[1] - hidden, dtype=torch.float64)
            if 0 <= expert < experts:
                assert int(found.ids[pair]) == expert
                e = 0 if shared else expert
                for j, factor in enumerate(a):
                    start = first[slot] + j * rank
                    z = factor[slot, e, :rank].double() @ x[row].double()
                    columns[start : start + rank] = z
                y = after[pair].double()
                z = y[hidden + second[slot] :][:rank]
                y = y[:hidden] + b[slot, e, :, :rank].double() @ z
                want += y * (weights[row, k].double() if weighted else 1)
            assert close(before[pair, hidden:], columns)
        unit = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(out[row].double(), want, rtol=unit, atol=1e-4), row
    others = [row for row in range(tokens) if row not in rows]
    assert out[others].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_routed_alone_and_in_a_batch(dtype):
    ranks, tokens = [16, 7, 3], 150
    slots, ids, x, a, b, weights = _routed(dtype, tokens, 3, 8, ranks, 160, False, False, 0)

    def run(rows):
        found = pairs.make_pairs(slots[rows], torch.tensor(ranks), ids[rows], 8)
        before, _, out = _through(found, ranks, x[rows], a, b, weights[rows], 0)
        return before, out

    everything = torch.arange(tokens)
    before, out = run(everything)
    with_lora = everything[slots >= 0].tolist()
    for number in (0, 1, 30, len(with_lora) - 1):
        row = with_lora[number]
        alone = run(torch.tensor([row]))
        assert torch.equal(alone[0], before[number * 3 : number * 3 + 3])
        assert torch.equal(alone[1][0], out[row])


def test_routed_refuses():
    slots, ids, x, a, b, weights = _routed(torch.float32, 5, 2, 4, [4, 4], 32, False, False, 1)
    ranks = torch.tensor([4, 4])
    slots[:] = torch.tensor([0, 1, -1, 7, 0])  # 7 is not a slot here: like no adapter
    found = pairs.make_pairs(slots, ranks, ids, 4)
    assert found.rows.tolist() == [0, 1, 4]
    wide, few = torch.empty(6, 60), [SlotStack.of(f[:1], [4], 1) for f in a]
    a, b = [SlotStack.of(f, [4, 4], 1) for f in a], SlotStack.of(b, [4, 4], 2)
    assert not found.before(x.half(), wide, [0, 8], a)
    assert not found.before(x, wide.half(), [0, 8], a)
    assert not found.before(x, wide[:5], [0, 8], a)
    assert not found.before(x[:4], wide, [0, 8], a)
    assert not found.before(x, wide, [0, 8], few)
    assert not found.after(wide, x[:4], [0, 4], b, 4, weights)
    assert found.after(wide, x, [0, 4], b, 4, weights.double())
    assert pairs.make_pairs(slots[:4], ranks, ids, 4) is None
    assert pairs.make_pairs(slots, ranks.to(torch.int32), ids, 4) is None
    none = pairs.make_pairs(torch.full((5,), -1), ranks, ids, 4)
    assert len(none) == 0


@pytest.mark.parametrize("shared", [False, True])
def test_pairs_in_the_order_of_experts(shared):
    """What INT4 experts use: LoRA on sorted pairs, not inside of wide rows."""
    ranks = [16, 5, 16]
    slots, ids, x, a, b, _ = _routed(torch.float32, 40, 3, 6, ranks, 24, shared, True, 5)
    for factor in a:
        factor[1, :, 5:] = 0
    stacks_a = [SlotStack.of(f, ranks, 1) for f in a]
    stacks_b = [SlotStack.of(b, ranks, 2)] * 2
    found = pairs.make_pairs(slots, torch.tensor(ranks), ids, 6)
    order, segments = found.sorted()
    tokens = found.rows[order // 3]
    own = ids[tokens].gather(1, (order % 3)[:, None]).flatten()
    keys = [(int(e), int(slots[t])) for e, t in zip(own, tokens, strict=True)]
    assert keys == sorted(keys)
    assert len(keys) == sum(0 <= e < 6 for row in found.rows for e in ids[row].tolist())
    assert [k for s, e, start, stop in segments for k in [(e, s)] * (stop - start)] == keys
    covered = [i for _, start, stop in pairs.merge_experts(segments) for i in range(start, stop)]
    assert covered == list(range(len(keys)))
    merged = [expert for expert, _, _ in pairs.merge_experts(segments)]
    assert merged == sorted(set(own.tolist()))
    y = torch.randn(len(keys), 48)
    got, pairs_x = y.clone(), x[tokens]
    whole = pairs.dense_segments(segments, len(ranks))
    assert pairs.ExpertLora().add(got, pairs_x, stacks_a, stacks_b, whole)
    for i, (expert, slot) in enumerate(keys):
        e = 0 if shared else expert
        deltas = [b[slot, e].double() @ f[slot, e].double() @ pairs_x[i].double() for f in a]
        assert torch.allclose(got[i].double(), y[i] + torch.cat(deltas), atol=1e-5)
    for slot, expert, start, _ in segments[::7]:  # alone: the same bits
        alone = y[start : start + 1].clone()
        one = pairs.dense_segments([(slot, expert, 0, 1)], len(ranks))
        assert pairs.ExpertLora().add(alone, pairs_x[start : start + 1], stacks_a, stacks_b, one)
        assert torch.equal(alone[0], got[start]), start
    uneven = [SlotStack.of(f, [5, 5, 16], 1) for f in a]
    assert not pairs.ExpertLora().add(got, pairs_x, uneven, stacks_b, whole)
    half = [SlotStack.of(f.half(), ranks, 1) for f in a]
    assert not pairs.ExpertLora().add(got, pairs_x, half, stacks_b, whole)


def test_a_projection_is_called_again():
    """What it keeps between calls does not outlive a change of a slot, in the same stacks."""
    g, slots, experts, inner, out = torch.Generator().manual_seed(0), 2, 3, 24, 40
    a = SlotStack((slots, experts, 16, inner), torch.float32, 1)
    b = SlotStack((slots, experts, out, 16), torch.float32, 2)
    given, layer = ((a, a), (b, b)), pairs.ExpertLora()
    segments = pairs.dense_segments([(0, 1, 0, 2), (1, 2, 2, 3)], slots)
    for ranks in ((16, 4), (8, 16), (8, 8)):
        factors = []
        for slot, rank in enumerate(ranks):
            one = torch.randn(experts, rank, inner, generator=g)
            two = torch.randn(experts, out, rank, generator=g)
            a.write(slot, one)
            b.write(slot, two)
            factors.append((one.double(), two.double()))
        for _ in range(2):
            x = torch.randn(3, inner, generator=g)
            y = torch.randn(3, 2 * out, generator=g)
            want = y.double()
            for row, slot, expert in ((0, 0, 1), (1, 0, 1), (2, 1, 2)):
                one, two = (factor[expert] for factor in factors[slot])
                want[row] += (two @ one @ x[row].double()).repeat(2)
            assert layer.add(y, x, *given, segments)
            assert torch.allclose(y.double(), want, atol=1e-4), ranks
