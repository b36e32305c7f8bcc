"""Adapters on one component only: each fails if that component alone is dropped."""

from __future__ import annotations

import pytest
from engine_cases import compare_fp32

from vllm_moe_lora.tiny import adapters

pytestmark = pytest.mark.cpu_engine

# Something that every prompt's last token is known to reach: routed experts are asked for the
# expert that the oracle's effect shows to be used.
ALWAYS = {
    "qwen2_moe": [
        "layers.0.mlp.gate",
        "layers.1.mlp.gate",
        "layers.0.mlp.shared_expert_gate",
        "layers.1.mlp.shared_expert_gate",
        "layers.0.mlp.shared_expert.gate_proj",
        "layers.1.mlp.shared_expert.up_proj",
        "layers.0.mlp.shared_expert.down_proj",
        "layers.1.self_attn.q_proj",
        "layers.0.self_attn.o_proj",
    ],
    "qwen3_moe": ["layers.0.mlp.gate", "layers.1.mlp.gate", "layers.0.self_attn.v_proj"],
    "glm4_moe": ["layers.1.mlp.gate", "layers.1.mlp.shared_experts.down_proj"],
}


@pytest.mark.parametrize("family", sorted(ALWAYS))
def test_gates_shared_experts_attention(make_case, family):
    case = make_case(family)
    for i, suffix in enumerate(ALWAYS[family]):
        case.add(
            suffix.replace(".", "-"),
            lambda name, s=suffix: name.endswith(s),
            seed=10 + i,
            size=0.4,
        )
    got = case.ask(*case.adapters, dtype="float32")
    for name, have in got.items():
        compare_fp32(have, case, name)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_one_expert_one_projection(make_case, family):
    """Partial adapters: upstream answers these with an AssertionError without text."""
    case = make_case(family)
    experts = sorted(n for n in adapters.targets(case.plain) if ".experts." in n)
    for i, target in enumerate(experts):
        case.add(target.replace(".", "-"), lambda name, t=target: name == t, seed=40 + i, size=0.6)
    # A prompt's last token passes two of eight experts a layer: keep the adapters that the oracle
    # says change every prompt's answer, and demand enough of them in each layer and projection.
    used = [name for name in case.adapters if _effect(case, name) > 0.05]
    for layer in ("layers-0", "layers-1"):
        for projection in {n.rsplit("-", 1)[-1] for n in used}:
            assert any(layer in n and n.endswith(projection) for n in used), (layer, projection)
    for name, have in case.ask(*used, dtype="float32").items():
        for i, got in enumerate(have):
            want = case.want(name)[i][-1]
            top = want.topk(40).indices
            assert (got - want)[top].abs().max() <= 1e-3, (name, i)


def _effect(case, name):
    """Largest effect of an adapter over the prompts, on the last token's log-probs."""
    return max(
        (a[-1] - b[-1]).abs().max().item()
        for a, b in zip(case.want(name), case.want(None), strict=True)
    )


def test_projections_and_ranks_that_differ(make_case):
    """down_proj only; gate and up only; half of the experts; a rank for each expert."""
    case = make_case("qwen3_moe")
    case.add("down", lambda n: n.endswith("down_proj") and ".experts." in n, seed=3)
    case.add("gate-up", lambda n: ".experts." in n and not n.endswith("down_proj"), seed=4)
    case.add("even", lambda n: ".experts." in n and int(n.split(".")[-2]) % 2 == 0, seed=5)
    case.add("ranks", lambda n: ".experts." in n, seed=6)
    _vary_ranks(case.adapters["ranks"])
    for name, have in case.ask(*case.adapters, dtype="float32").items():
        compare_fp32(have, case, name)


def _vary_ranks(folder):
    """Cut expert e's factors to rank 8 - e % 4; each keeps the adapter's own scale by alpha / r."""
    import json

    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors, ranks, alphas = load_file(file), {}, {}
    for key in list(tensors):
        expert = int(key.split(".experts.")[1].split(".")[0])
        rank = 8 - expert % 4
        name = key.removeprefix("base_model.model.").split(".lora_")[0]
        ranks[name], alphas[name] = rank, 16
        cut = tensors[key][:rank] if "lora_A" in key else tensors[key][:, :rank]
        tensors[key] = cut.contiguous()
    save_file(tensors, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    (folder / "adapter_config.json").write_text(json.dumps(config))
