"""Routes that a request brings: log-probs of base and adapters are Hugging Face's with the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_routes import Truth
from routed_cases import NAMES, PROMPTS, case_of, request, run

from vllm_moe_lora.rl.convert_routes import to_base64

pytestmark = pytest.mark.cpu_engine
LONG = PROMPTS[2]
LIMIT = 1e-4  # fp32 against fp32


def _random(rows, seed, experts=8, layers=2, top_k=2):
    """Routes that no router would take."""
    scores = np.random.default_rng(seed).random((rows, layers, experts))
    return scores.argsort(-1)[..., :top_k].astype(np.uint8)


def test_log_probs_under_forced_routes(make_case):
    case, names, answer = case_of(make_case), NAMES, 5

    def ask(prompt, name, routes, like="answer", **more):
        text = None if routes is None else to_base64(routes)
        return request(prompt, name, answer, routes=text, like=like, **more)

    whole = {name: _random(len(LONG) + answer - 1, seed) for seed, name in enumerate(names)}
    wrong = whole["a"].copy()
    wrong[50, 0] = [e for e in range(8) if e not in wrong[50, 0]][:2]
    bad = {
        "at most 5 more; expected 69 to 74 rows": whole["a"][:60],
        "expected 69 to 74 rows": _random(75, 0),
        "1 layers with 2 experts for each token; the model has 2": whole["a"][:, :1],
        "2 layers with 3 experts": _random(72, 0, top_k=3),
        "experts 0 to 7": _random(72, 0, experts=9),
        "row 0, layer 0 has an expert twice": np.ones_like(whole["a"]),
    }
    first = [ask(LONG, name, whole[name], "prompt") for name in names]
    # One batch: forced ones, some to the end of the prompt only, and others. The prompts' blocks
    # are in the cache by then, under their own routes.
    plain = [ask(LONG, name, None) for name in names]
    second = [
        *plain,
        *(ask(LONG, name, whole[name]) for name in names),
        ask(LONG, "a", whole["a"][: len(LONG)]),
        ask(LONG, "a", wrong),
    ]
    refused = [ask(LONG, "a", routes) for routes in bad.values()]
    refused += [{**ask(LONG, None, None), "routes": "nothing"}]
    rounds = [first, second, refused, plain]
    answers, _ = run(
        case,
        rounds,
        {"VLLM_MOE_LORA_REPLAY": "1"},
        max_num_batched_tokens=32,
        block_size=32,
    )
    models = Truth(case).models

    def compare(name, got, routes, like="answer"):
        """The largest difference to Hugging Face, which is told the same routes."""
        ids, n = LONG + got["tokens"][:-1], len(LONG)
        if routes is None:
            want, natural = models[name](ids)
            assert torch.equal(got["routes"].sort(-1).values, natural.sort(-1).values)
        else:
            want, _ = models[name](ids, routes)
            assert torch.equal(got["routes"][: len(routes)], torch.from_numpy(routes).long())
        differ = (got["logprobs"] - want[n - 1 :]).abs().max().item()
        if like == "prompt":
            rest = (got["prompt_logprobs"][1:] - want[: n - 1]).abs().max().item()
            differ = max(differ, rest)
        return differ

    for name, got in zip(names, answers[0], strict=True):
        assert compare(name, got, whole[name], "prompt") <= LIMIT
        free, _ = models[name](LONG)
        effect = (got["prompt_logprobs"][1:] - free[:-1]).abs().mean().item()
        assert effect > 100 * LIMIT, "routes matter"
    for i, name in enumerate(names):
        assert compare(name, answers[1][i], None) <= LIMIT
        hit = answers[1][3 + i]
        assert hit["cached"] == 64, "its own blocks are met"
        assert compare(name, hit, whole[name]) <= LIMIT
        assert hit["tokens"] == answers[0][i]["tokens"]
    assert answers[1][0]["cached"] == 0, "nobody else's are"
    part, changed = answers[1][6:]
    n, ids = len(LONG), LONG + part["tokens"][:-1]
    assert part["cached"] == 0
    assert torch.equal(part["routes"][:n], torch.from_numpy(whole["a"][:n]).long())
    want, _ = models["a"](ids, part["routes"])
    assert (part["logprobs"] - want[n - 1 :]).abs().max() <= LIMIT
    # The answer's rows are the model's own choice: those of HF given what came before.
    assert compare("a", changed, wrong) <= LIMIT
    ids = LONG + changed["tokens"][:-1]
    differ = (changed["logprobs"] - models["a"](ids, whole["a"])[0][n - 1 :]).abs().max()
    assert differ > 10 * LIMIT, "one row of one layer is noticed"
    for says, got in zip([*bad, "not base64 of a .npy file"], answers[2], strict=True):
        assert says in got["error"]
        assert got["error"].startswith("routed_experts: ")
    for have, want in zip(answers[3], answers[1][:3], strict=True):
        assert have["tokens"] == want["tokens"]
        assert (have["logprobs"] - want["logprobs"]).abs().max() <= 1e-5


def test_off_unless_asked_for(make_case):
    case = make_case("qwen3_moe")
    asked = [request([1, 2, 3], None, 1, routes=to_base64(_random(3, 0))), request([1, 2, 3])]
    answers, _ = run(case, [asked])
    assert "VLLM_MOE_LORA_REPLAY=1" in answers[0][0]["error"]
    assert answers[0][1]["finished"]
