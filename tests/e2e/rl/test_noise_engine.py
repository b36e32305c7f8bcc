"""Noise in a real engine: log-probs are Hugging Face's with the same noise; clean ones return."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_routes import Model

from vllm_moe_lora.rl import noise
from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine
SCRIPT = Path(__file__).with_name("noised.py")
PROMPTS = [[(7 * i + 3) % 500 for i in range(70)], [1, 2, 3, 4, 5, 6]]
LIMIT = 1e-4  # fp32 against fp32
POST = {"norms": ["post_attention_layernorm"]}


def _run(case, steps, adapter=None, dtype="float32", **options):
    job = {"model": str(case.model), "adapter": adapter and str(case.adapters[adapter])}
    job |= {"steps": steps, "prompts": PROMPTS, "dtype": dtype, "options": options}
    return engine.saved_by(SCRIPT, job)[0]


def _noised(checkpoint, step, norms, compensated, offset=0.0, start=5e-2):
    """Hugging Face with the noise of a step of 100 in its norms."""
    model = Model(checkpoint)
    deviation = noise.sigma(step, 100, start)
    for i, layer in enumerate(model.model.model.layers):
        for name in norms:
            weight = getattr(layer, name).weight
            clean = weight.data.clone()
            drawn = noise.draw(0, step, f"model.layers.{i}.{name}", clean.numel(), deviation)
            weight.data = clean + drawn
            if compensated and name == "post_attention_layernorm":
                ratio = (offset + clean) / (offset + weight.data)
                layer.mlp.gate.register_forward_pre_hook(lambda m, x, ratio=ratio: (x[0] * ratio,))
    return model


def test_noise(make_case):
    case = make_case("qwen3_moe")
    case.add("a", seed=1)
    case.want("a")
    steps = [
        ["ask"],
        ["noise", 12, {}],
        ["ask"],
        ["noise", 12, {**POST}],
        ["ask"],
        ["noise", 12, {**POST, "router": "as-published"}],
        ["ask"],
        *(["noise", step, {}] for step in range(20, 40)),
        ["noise", 12, {}],
        ["ask"],
        ["noise", 5, {}],  # the first of ten stages: none
        ["ask"],
        ["noise", 12, {"seed": 1}],
        ["busy", 90],
        ["noise", 12, {"norms": ["no_such_norm"]}],
        ["noise", 12, {"router": "other"}],
        ["noise", -1, {}],
        ["ask"],
        ["clear"],
        ["ask"],
        ["noise", 12, {}],
        ["load", 1.5],
        ["clear"],
    ]
    found = _run(case, steps, "a")
    asked = [answer for (what, *_), (answer, _) in zip(steps, found, strict=True) if what == "ask"]
    after = [norms for _, norms in found]
    clean, both, post, published, again, none, seed1, cleared = asked
    merged = case.folder / "a-merged"
    for got, norms, compensated in (
        (both, noise.NORMS, True),
        (post, POST["norms"], True),
        (published, POST["norms"], False),
    ):
        for i, checkpoint in enumerate((case.plain, merged)):
            truth = _noised(checkpoint, 12, norms, compensated)
            for j, prompt in enumerate(PROMPTS):
                row, routes, cached = got[2 * i + j]
                want, wanted = truth(prompt)
                assert cached == 0, "blocks of other weights are not met"
                assert (row - want[-1]).abs().max() <= LIMIT
                assert torch.equal(routes.sort(-1).values, wanted.sort(-1).values)
                assert (row - clean[2 * i + j][0]).abs().mean() > 50 * LIMIT, "noise matters"
    # Behind a compensated router the first layer's routes are those without noise.
    routes = [torch.cat([one[1][:, 0] for one in got]).sort(-1).values for got in asked]
    assert torch.equal(routes[2], routes[0])
    assert (routes[3] != routes[0]).any()
    assert _same(again, both), "20 other steps left nothing"
    assert _same(none, clean)
    assert _same(cleared, clean)
    assert not _same(seed1, both)
    # Only the norms that were named, and they come back to the bit.
    pristine, noised, last = after[0], after[1], after[steps.index(["clear"])]
    for name, weight in pristine.items():
        moved = name.rpartition(".weight")[0].rpartition(".")[2] in noise.NORMS
        assert torch.equal(noised[name], weight) is not moved
        assert torch.equal(last[name], weight)
        # Weights that are loaded while there is noise are the clean ones from then on.
        assert torch.equal(after[-1][name], after[-2][name])
    errors = {what[0]: answer for what, (answer, _) in zip(steps, found, strict=True)}
    at = steps.index(["busy", 90])
    errors = [answer for answer, _ in found[at : at + 4]]
    for error, says in zip(
        errors,
        ("requests are running", "no norm named no_such_norm", "router='other'", "step -1 of 100"),
        strict=True,
    ):
        assert says in error
    for norms in after[at : at + 4]:
        assert all(torch.equal(norms[name], after[at - 1][name]) for name in norms)


def _same(one, other):
    return all(torch.equal(x[0], y[0]) for x, y in zip(one, other, strict=True))


def test_norms_of_gemma(make_case, no_torchvision, monkeypatch):
    """Qwen3-Next multiplies by 1 + weight. On a CPU it runs in bf16 only. Without an adapter."""
    for name, value in no_torchvision.items():
        monkeypatch.setenv(name, value)
    case, start = make_case("qwen3_next"), 0.3
    how = {**POST, "start": start}
    found = _run(case, [["ask"], ["noise", 12, how], ["ask"]], dtype="bfloat16")
    (clean, _), _, (noised, _) = found
    truth = _noised(case.plain, 12, POST["norms"], True, offset=1.0, start=start)
    for (row, routes, _), (before, old, _), prompt in zip(noised, clean, PROMPTS, strict=True):
        want, _ = truth(prompt)
        effect = (row - before).abs().mean()
        assert (row - want[-1]).abs().mean() <= 0.2 * effect
        # bf16 rounds a little differently.
        same = routes[:, 0].sort(-1).values == old[:, 0].sort(-1).values
        assert same.float().mean() >= 0.95
