"""verl 0.9.1, unmodified: its files out of its wheel push adapters, each answers as merged."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import layouts
import pytest
import torch
import unpacked
from engine_cases import PROMPTS, TOP

from vllm_moe_lora.tiny import engine, oracle

pytestmark = [pytest.mark.cpu_engine, pytest.mark.verl]
SCRIPT = Path(__file__).with_name("verl_pushing.py")
LIMIT = 1e-4  # fp32
PUSHES = 20


def run(tmp_path, case, adapters, order, bad, env, **options):
    file = tmp_path / "pushed.pt"
    torch.save(adapters, file)
    job = {"model": str(case.model), "prompts": PROMPTS, "adapters": str(file), "order": order}
    job |= {"bad": bad, "options": options}
    env = {"VERL_RAY_JOB_ID": uuid.uuid4().hex, **env}  # names the socket; tests run side by side
    return engine.saved_by(SCRIPT, job, env, first=[str(unpacked.other("verl-0.9.1"))])[0]


def check(found, order, oracles, base):
    assert len(found["answers"]) == len(order)
    assert len(set(order)) > 3
    for name, answers in zip(order, found["answers"], strict=True):
        for have, want, plain in zip(answers, oracles[name], base, strict=True):
            top = want[-1].topk(TOP).indices
            assert (have - want[-1])[top].abs().max() <= LIMIT, name
            assert (plain[-1] - want[-1])[top].abs().max() >= 200 * LIMIT, name
    # Nobody resets the prefix cache: a new version finds nothing in it, then its own.
    assert {cached for cached, _ in found["cached"]} == {0}
    assert min(hits for _, hits in found["cached"]) > 0
    assert torch.equal(found["base"], found["base after"])
    assert found["opened"] == []
    for have, want in zip(found["base"], base, strict=True):
        assert (have - want[-1])[want[-1].topk(TOP).indices].abs().max() <= LIMIT


def test_qwen2_moe_with_shared_experts(make_case, tmp_path):
    """Megatron's names, one tensor an expert, on every linear layer.

    Routed experts have a lower rank than the config says: normalize_moe_lora divides it by top_k.
    """
    case = make_case("qwen2_moe")
    adapters, oracles = {}, {}
    for seed in range(1, 6):
        name = f"version {seed}"
        parts = [tmp_path / f"{seed}-{part}" for part in ("dense", "experts")]
        tensors, merged = {}, case.plain
        for part, rank in zip(parts, (8, 4), strict=True):
            experts = rank == 4
            case.adapters[part.name] = engine_adapter(case, part, rank, seed, experts)
            tensors |= oracle.load_tensors(part)
            merged = oracle.merge(merged, part, tmp_path / f"{part.name}-merged")
        assert any("shared_expert_gate" in key for key in tensors)
        oracles[name] = oracle.log_probs(merged, PROMPTS)
        plain = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
        adapters[name] = plain, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    tensors, config = adapters["version 1"]
    lost = {**tensors, "model.layers.0.mlp.experts.lost_proj.lora_A.weight": torch.ones(2, 2)}
    adapters["lost"] = lost, config
    order = [f"version {1 + step % 5}" for step in range(PUSHES)]
    found = run(tmp_path, case, adapters, order, ["lost"], {}, block_size=32)
    check(found, order, oracles, case.want(None))
    assert "lost_proj" in found["errors"]["lost"]


def engine_adapter(case, folder, rank, seed, experts):
    from vllm_moe_lora.tiny import adapters

    return adapters.write(
        case.plain, folder, keep=lambda n: (".experts." in n) == experts, rank=rank, seed=seed
    )


FORMS = {
    "Megatron, per expert": lambda truth: layouts.per_expert(truth, prefix=""),
    "Megatron, packed": layouts.packed,
    "FSDP, PEFT 0.19": layouts.flat,
    "FSDP, PEFT 0.18": lambda truth: layouts.flat(truth, transposed=True),
}


# Of both, the second has more kinds of layers.
FAMILIES = ["qwen3_moe", "qwen3_5_moe"] if os.environ.get("MOE_LORA_ALL") else ["qwen3_5_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_family(make_case, tmp_path, no_torchvision, family):
    more = {}
    if family == "qwen3_5_moe":  # vLLM's linear attention on the CPU is for bf16 only
        more = {"layer_types": ["full_attention"] * layouts.LAYERS}
    case = make_case(family, moe_intermediate_size=layouts.INNER, **more)
    adapters, oracles = {}, {}
    for seed in range(1, 4):
        truth = layouts.Truth(seed=seed)
        merged = layouts.merge(case.plain, truth, tmp_path / f"merged-{seed}")
        expected = oracle.log_probs(merged, PROMPTS)
        config = {"r": truth.rank, "lora_alpha": truth.alpha, "target_modules": "all-linear"}
        for form, tensors in FORMS.items():
            name = f"{form}, {seed}"
            adapters[name] = {k: t.contiguous() for k, t in tensors(truth).items()}, config
            oracles[name] = expected
    names = [f"{form}, {1 + (i + j) % 3}" for i in range(5) for j, form in enumerate(FORMS)]
    assert len(names) == PUSHES
    found = run(tmp_path, case, adapters, names, [], no_torchvision, block_size=32)
    check(found, names, oracles, case.want(None))
