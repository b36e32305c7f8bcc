"""Layers, adapters and batches for kernels_in_place.py, and what the layer is to answer in fp32."""

from __future__ import annotations

import dataclasses

import int4
import stage
import torch

EXPERTS, HIDDEN, INNER = int4.EXPERTS, int4.HIDDEN, int4.INNER
SLOTS, RANK, TOKENS, TOP_K = 3, 16, 9, stage.TOP_K
ABSENT = 2  # experts of another rank, in the cases with a map
NONE = [-1] * TOKENS
MIXED = [0, 1, -1, 2, 0, -1, 2, 1, 1]


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, the adapters in its slots and one batch.

    ``slots``: of the tokens. ``ranks``: of the adapters written, slot -> rank, in this order; a
    slot may come twice. ``twisted``: experts of an adapter have ranks of their own.
    """

    kind: str = "plain"
    dtype: torch.dtype = torch.float32
    ids: torch.dtype = torch.int32
    fused: bool = False
    gated: bool = True
    shared: bool = False
    mapped: bool = False
    experts: int = EXPERTS
    apart: bool = False  # the delta by itself, as on a second stream
    slots: tuple = tuple(MIXED)
    ranks: tuple = ((0, 16), (1, 3), (2, 8))
    cleared: tuple = ()
    dispatched: bool = False  # slots of tokens come with the tokens, as after a dispatch
    local: int = SLOTS - 1  # slot of all tokens of the batch, where others were dispatched

    @property
    def tokens(self):
        return len(self.slots)


CASES = {
    "plain": Case(),
    "bf16": Case(dtype=torch.bfloat16),
    "fp16, int64 ids": Case(dtype=torch.float16, ids=torch.int64),
    "fused gate_up": Case(fused=True),
    "not gated": Case(gated=False),
    "shared factors": Case(shared=True),
    "experts elsewhere": Case(mapped=True),
    "experts elsewhere, dispatched": Case(mapped=True, dispatched=True),
    "dispatched to a batch of the base": Case(mapped=True, dispatched=True, local=-1),
    # Which upstream does not sort.
    "few pairs": Case(experts=32, slots=(0, -1, 2, 1)),
    "few pairs, int64 ids": Case(experts=32, slots=(0, -1, 2, 1), ids=torch.int64),
    "second stream": Case(apart=True),
    "up before gate": Case(),
    "no adapter in the batch": Case(slots=tuple(NONE)),
    "one adapter": Case(slots=(1,) * TOKENS),
    "lower rank after higher": Case(ranks=((0, 16), (1, 16), (2, 16), (1, 2), (0, 8))),
    "higher rank after lower": Case(ranks=((0, 1), (1, 2), (2, 1), (0, 16))),
    "a slot cleared": Case(cleared=(1,)),
    "weights transposed": Case(),
    "Marlin": Case("gptq", torch.float16),
    "INT4 in Triton": Case("moe_wna16", torch.float16),
}
# With VLLM_MOE_LORA_KERNELS=tail: what is the tail of the base's product.
TAIL = {
    f"tail, {name}": CASES[name]
    for name in (
        "plain",
        "bf16",
        "fp16, int64 ids",
        "fused gate_up",
        "not gated",
        "shared factors",
        "experts elsewhere",
        "experts elsewhere, dispatched",
        "dispatched to a batch of the base",
        "few pairs",
        "few pairs, int64 ids",
        "no adapter in the batch",
        "lower rank after higher",
        "a slot cleared",
        "weights transposed",
    )
}
# And what is not, there: another order of slices, a second stream, quantised weights.
TAILLESS = {f"tail, {name}": CASES[name] for name in ("second stream", "INT4 in Triton")}
# What our kernels do not take: upstream's are called.
REFUSED = {
    "sharded in the rank": Case(),
    "rank 4 at most": Case(ranks=((0, 4), (1, 3), (2, 4))),
    "asked for upstream": Case(),
    "not measured": Case(),
}


def adapter(case, rank, seed):
    """{"w1", "w3", "w2" or "w13": (a, b)}, with [experts, rank, in] and [experts, out, rank]."""
    make = torch.Generator().manual_seed(seed)
    sizes = {"w1": (HIDDEN, INNER), "w2": (INNER, HIDDEN), "w3": (HIDDEN, INNER)}
    if case.fused:
        sizes = {"w13": (HIDDEN, 2 * INNER), "w2": (INNER, HIDDEN)}
    found = {}
    for number, (name, (inn, out)) in enumerate(sizes.items()):
        a = 0.2 * torch.randn(case.experts, rank, inn, generator=make)
        b = 0.2 * torch.randn(case.experts, out, rank, generator=make)
        if case.shared and name == "w2":
            b = b[:1].expand_as(b).contiguous()
        elif case.shared:
            a = a[:1].expand_as(a).contiguous()
        else:
            for expert in range(case.experts):  # each its own rank; absent, or B never trained
                own = (rank - (expert + number + seed) % 4) if rank > 4 else rank
                a[expert, own:], b[expert, :, own:] = 0, 0
            a[seed % case.experts], b[seed % case.experts] = 0, 0
            b[(seed + 1) % case.experts] = 0
            if name == "w2":
                a[(seed + 2) % case.experts] = 0
        found[name] = a, b
    return found


def loop(case, dense, x, weights, ids, adapters, here):
    """What the layer is to answer, in fp32; ``here`` maps experts to those of this rank."""
    out = torch.zeros(len(x), HIDDEN)
    for token, chosen in enumerate(ids.tolist()):
        for place, expert in enumerate(here[one] for one in chosen):
            if expert < 0:
                continue
            factors = adapters.get(case.slots[token], {})

            def delta(name, value, expert=expert, factors=factors):
                if name not in factors:
                    return 0.0
                a, b = factors[name]
                return b[expert] @ (a[expert] @ value)

            row = x[token].float()
            inner = dense["w13"][expert] @ row
            if case.gated:
                gate, up = inner.chunk(2)
                if case.fused:
                    more = delta("w13", row)
                    gate, up = (inner + more).chunk(2)
                else:
                    gate, up = gate + delta("w1", row), up + delta("w3", row)
                row = torch.nn.functional.silu(gate) * up
            else:
                row = torch.relu(inner + delta("w1", row)) ** 2
            row = dense["w2"][expert] @ row + delta("w2", row)
            out[token] += weights[token, place] * row
    return out
