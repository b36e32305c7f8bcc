"""Slots of unquantised experts on a CPU have their adapter's own rank, vLLM 0.24 to 0.27.

cpu_slots.py runs the release's own model, LoRA manager and experts, which are torch's operators
there. The answers are compared with loops over the experts of the checkpoint that has the adapter
merged into its weights; both are fp32.
"""

from __future__ import annotations

import json
import sys

import forks
import pytest
import torch
import unpacked
from packaging.specifiers import SpecifierSet

from vllm_moe_lora.tiny import adapters, models, oracle

RELEASES = [r for r in unpacked.available() if r in SpecifierSet(">=0.24,<0.28")]
RANKS = {"a": 2, "b": 8, "c": 3}
FAMILIES = {"qwen3_moe": "2-D, gate and up apart", "gpt_oss": "3-D, gate and up fused, biases"}
HIDDEN, INNER, EXPERTS, TOP_K = 128, 128, 8, 2
LIMIT = 1e-4


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The job's models, and the weights of each adapter's merged checkpoint; None: without one."""
    folder = tmp_path_factory.mktemp("cpu-slots")
    jobs, weights = {}, {}
    for family in FAMILIES:
        model = models.build(family, folder / family)
        paths, weights[family] = {}, {None: oracle.load_tensors(model)}
        for seed, (name, rank) in enumerate(RANKS.items()):
            fused = family == "gpt_oss"
            paths[name] = adapters.write(
                model,
                folder / f"{family}-{name}",
                lambda module: ".experts" in module,
                rank=rank,
                seed=seed,
                in_first=fused,
            )
            merged = oracle.merge(model, paths[name], folder / f"{family}-{name}-merged")
            weights[family][name] = oracle.load_tensors(merged)
        jobs[family] = {"model": str(model), "adapters": {n: str(p) for n, p in paths.items()}}
    return jobs, weights


@pytest.fixture(scope="module", params=RELEASES)
def answer(request, cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    job = {"models": cases[0], "out": str(folder / "out.pt")}
    (folder / "job.json").write_text(json.dumps(job))
    env = unpacked.environment(str(unpacked.tree(request.param)))
    script = unpacked.HERE / "scripts" / "cpu_slots.py"
    done = forks.launch([sys.executable, str(script), str(folder / "job.json")], env, 600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(folder / "out.pt")
    assert found["status"]["cpu-experts"] == "on"
    return found["models"]


def _gate_up(weights, layer, expert):
    prefix = f"{layer}.{expert}"
    if f"{layer}.gate_up_proj" not in weights:
        return weights[f"{prefix}.gate_proj.weight"], weights[f"{prefix}.up_proj.weight"]
    both = weights[f"{layer}.gate_up_proj"][expert].T
    return both[::2], both[1::2]


def _expert(weights, layer, expert, x):
    gate, up = (w.double() @ x for w in _gate_up(weights, layer, expert))
    if f"{layer}.gate_up_proj" not in weights:
        hidden = torch.nn.functional.silu(gate) * up
        return weights[f"{layer}.{expert}.down_proj.weight"].double() @ hidden
    bias = weights[f"{layer}.gate_up_proj_bias"][expert].double()
    gate = (gate + bias[::2]).clamp(max=7.0)
    up = (up + bias[1::2]).clamp(-7.0, 7.0)
    hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    out = weights[f"{layer}.down_proj"][expert].T.double() @ hidden
    return out + weights[f"{layer}.down_proj_bias"][expert]


def _loops(weights, layer, batch, x, logits):
    """[tokens, hidden]: each token by the experts of its own adapter's checkpoint."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, name in enumerate(batch):
        top = logits[token].double().topk(TOP_K)
        shares = logits[token].double().softmax(0)[top.indices]
        if f"{layer}.gate_up_proj" in weights[None]:  # gpt-oss: of the chosen alone
            shares = top.values.softmax(0)
        for share, expert in zip(shares, top.indices.tolist(), strict=True):
            out[token] += share * _expert(weights[name], layer, expert, x[token].double())
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_own_rank(answer, cases, family):
    weights, steps = cases[1][family], answer[family]
    slices = 1 if family == "gpt_oss" else 2
    of_rank = slices * HIDDEN + 2 * INNER + INNER + HIDDEN
    of_rank *= models.LAYERS * EXPERTS * 4  # bytes
    loaded = [[], ["a"], ["a", "b"], ["b", "c"], ["a", "c"], ["a"]]
    assert [one["dense"] for one in steps] == [0] * len(steps)
    for found, names in zip(steps, loaded, strict=True):
        assert set(found["batch"]) == {None, *names}
        assert found["bytes"] == found["held"] == of_rank * sum(RANKS[name] for name in names)
        for layer, have in found["out"].items():
            given = layer, found["batch"], found["x"], found["logits"]
            want = _loops(weights, *given)
            assert (have - want).abs().max() <= LIMIT, layer
            if names:
                base = _loops(dict.fromkeys(weights, weights[None]), *given)
                own = [name is not None for name in found["batch"]]
                assert (have - base)[own].abs().amax(1).min() >= 20 * LIMIT
