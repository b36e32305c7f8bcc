"""The real engine of vLLM 0.11.1 on the CPU: adapter == merged, shared experts are not wiped."""

from __future__ import annotations

import os

import layouts
import pytest
import torch

from vllm_moe_lora.tiny import adapters, engine, models, oracle

pytestmark = pytest.mark.legacy

PROMPTS = [list(range(3, 8)), list(range(40, 52)), list(range(100, 140))]
LIMIT = 1e-3  # fp32 against fp32, as in tests/e2e
KINDS = {
    "all": lambda name: True,
    "routed": lambda name: ".experts." in name,
    "shared": lambda name: ".shared_expert." in name,
    "gate": lambda name: name.endswith("mlp.gate"),
    "shared gate": lambda name: name.endswith("shared_expert_gate"),  # torch's Linear in 0.11
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("era-a")
    model = models.build("qwen2_moe", folder / "model")
    paths, want = {}, {None: oracle.log_probs(model, PROMPTS)}
    for seed, (name, keep) in enumerate(KINDS.items(), start=1):
        paths[name] = adapters.write(model, folder / name, keep=keep, seed=seed)
        merged = oracle.merge(model, paths[name], folder / f"{name}-merged")
        want[name] = oracle.log_probs(merged, PROMPTS)
    return model, paths, want


def _job(case, names):
    model, paths, _ = case
    rounds = [[(prompt, name) for prompt in PROMPTS] for name in names]
    options = {"dtype": "float32"}
    return engine.Job(str(model), {n: str(p) for n, p in paths.items()}, rounds, options=options)


def test_adapter_is_merged(case):
    names = [*KINDS, None]
    answers, _, log = engine.run(_job(case, names))
    # ci/patched.sh leaves the plugin out: there vLLM's own tree does it.
    assert ("vllm-moe-lora on vLLM 0.11." in log) == (os.environ.get("VLLM_PLUGINS") != "")
    for name, batch in zip(names, answers, strict=True):
        for i, (_, have) in enumerate(batch):
            want, base = case[2][name][i][-1], case[2][None][i][-1]
            top = want.topk(40).indices
            assert (have[-1] - want)[top].abs().max() <= LIMIT, (name, i)
            if name is not None:
                assert (base - want)[top].abs().max() >= 20 * LIMIT, (name, i)


def test_a_mixed_batch(case):
    """Base and two adapters side by side; each is its own oracle's."""
    model, paths, want = case
    requests = [(prompt, name) for prompt in PROMPTS for name in (None, "routed", "all")]
    job = engine.Job(
        str(model),
        {n: str(p) for n, p in paths.items()},
        [requests],
        options={"dtype": "float32", "max_loras": 2},  # no slot is empty
    )
    answers, _, _ = engine.run(job)
    for (prompt, name), (_, have) in zip(requests, answers[0], strict=True):
        expected = want[name][PROMPTS.index(prompt)][-1]
        top = expected.topk(40).indices
        assert (have[-1] - expected)[top].abs().max() <= LIMIT, name
        assert torch.isfinite(have).all()


def test_every_layout(tmp_path):
    """What trainers write, per expert or fused, scaled by rules that 0.11 does not know."""
    model = models.build("qwen3_moe", tmp_path / "model", moe_intermediate_size=layouts.INNER)
    paths, want = {}, {}
    base, merged = oracle.log_probs(model, PROMPTS), {}
    for name, (truth, tensors, config) in layouts.every().items():
        paths[name] = layouts.save(tmp_path / name, tensors, truth, **config)
        if id(truth) not in merged:
            folder = layouts.merge(model, truth, tmp_path / f"{name}-merged")
            merged[id(truth)] = oracle.log_probs(folder, PROMPTS)
        want[name] = merged[id(truth)]
    answers, _, _ = engine.run(_job((model, paths, None), list(paths)))
    for name, batch in zip(paths, answers, strict=True):
        for i, (_, have) in enumerate(batch):
            top = want[name][i][-1].topk(40).indices
            assert (have[-1] - want[name][i][-1])[top].abs().max() <= LIMIT, (name, i)
            if name != "identity":
                far = (base[i][-1] - want[name][i][-1])[top].abs().max()
                assert far >= 20 * LIMIT, (name, i)


def test_bare_vllm_cannot(case):
    with pytest.raises(engine.EngineError):
        engine.run(_job(case, ["all"]), {"VLLM_MOE_LORA": "0"})
