"""--enable-return-routed-experts on the CPU's V1 runner: the routes are Hugging Face's."""

from __future__ import annotations

import pytest
from hf_routes import Truth
from routed_cases import LONG, NAMES, PROMPTS, case_of, request, run

pytestmark = pytest.mark.cpu_engine


def check(truth, asked, got):
    assert got["dtype"] == "uint8"
    ids = asked["prompt"] + got["tokens"][:-1]
    return truth.check(asked["adapter"], ids, got["routes"], asked.get("start", 0))


def test_every_way_a_token_is_computed(make_case):
    """Chunks, mixed batches, prefix hits, aborted requests, preempted ones: base and adapters."""
    case = case_of(make_case)
    mixed = [request(p, name) for p in PROMPTS for name in NAMES]
    # Prefix hits, on blocks of the same adapter only; one asks for a part.
    again = [request([*LONG[:70], 4, 4], name) for name in NAMES]
    partly = [request([*LONG[:70], 4, 4], "a", start=40)]
    # In the middle of a prompt's chunks, and while it generates.
    aborted = [
        request([*LONG[10:], 9], "a", abort=1),
        request([*LONG[20:], 9], "b"),
        request([8, 8, 8], None, max_tokens=40, abort=5),
        request([8, 8, 9], "a"),
    ]
    after = [request([*LONG[10:], 9], "a"), request([8, 8, 8], None)]
    many = [request([50 + i, *LONG[:60]], NAMES[i % 3], max_tokens=40) for i in range(8)]
    rounds = [mixed, again, partly, aborted, after, many]
    answers, preempted = run(
        case, rounds, max_num_batched_tokens=32, block_size=32, num_gpu_blocks_override=20
    )
    truth = Truth(case)
    seen = []
    for asked, got in zip(rounds, answers, strict=True):
        for one, answer in zip(asked, got, strict=True):
            if one.get("abort") is None:
                assert answer["finished"]
                want = check(truth, one, answer)
                seen.append((one, want))
            else:
                assert not answer["finished"]
    assert all(answer["cached"] >= 64 for answer in answers[1])
    assert preempted, "this round is here to preempt"
    # An adapter changes routes, so rows of the wrong adapter are noticed.
    base, a, b = (want for one, want in seen[6:9])
    n = len(PROMPTS[2])
    for one, other in ((base, a), (base, b), (a, b)):
        assert (one[:n].sort(-1).values != other[:n].sort(-1).values).any(-1).float().mean() > 0.2


def test_dense_layers_are_zeros(make_case):
    """GLM-4: layer 0 is dense; layer 1 routes by sigmoid, groups and a correction bias."""
    case = make_case("glm4_moe")
    case.add("a", seed=1)
    asked = [request(p, name) for p in PROMPTS for name in (None, "a")]
    answers, _ = run(case, [asked])
    truth = Truth(case)
    for one, answer in zip(asked, answers[0], strict=True):
        check(truth, one, answer)
        assert not answer["routes"][:, 0].any()
        assert answer["routes"][:, 1].any()
