"""Adapters that PEFT itself writes; the oracle is PEFT's own merge_and_unload in fp32."""

from __future__ import annotations

import pytest
import torch
from engine_cases import PROMPTS, compare_fp32

pytestmark = pytest.mark.cpu_engine

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# adapter -> LoraConfig
EVERYWHERE = {
    "params": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "gate-up": {"target_modules": [], "target_parameters": EXPERTS[:1]},
    "down": {"target_modules": [], "target_parameters": EXPERTS[1:]},
    "one-layer": {
        "target_modules": ["q_proj"],
        "target_parameters": [f"layers.1.{name}" for name in EXPERTS],
    },
    "rslora": {"target_modules": ATTENTION, "target_parameters": EXPERTS, "use_rslora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "target_parameters": EXPERTS,
        "rank_pattern": {"down_proj": 3, "layers.0.self_attn.q_proj": 5},
        "alpha_pattern": {"gate_up_proj": 11},
    },
}
# PEFT 0.21 rewrites these for the fused experts of transformers 5: gate_up of twice the rank.
REWRITTEN = {
    "classic": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
}
MIXTRAL = {"classic": {"target_modules": ["w1", "w2", "w3"]}}
ROUTER = {"router": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}}


@pytest.mark.parametrize(
    ("family", "adapters"),
    [
        ("qwen2_moe", {**EVERYWHERE, **ROUTER}),
        ("qwen3_moe", {**EVERYWHERE, **REWRITTEN, **ROUTER}),
        ("mixtral", {**EVERYWHERE, **REWRITTEN, **MIXTRAL}),
        ("gpt_oss", EVERYWHERE),
    ],
    ids=["qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss"],
)
def test_peft(make_case, family, adapters):
    case = make_case(family)
    for seed, (name, config) in enumerate(adapters.items()):
        case.adapters[name] = case.folder / name
        case.oracles[name] = _train(case.plain, case.folder / name, seed, config)
    for name, have in case.ask(*adapters, dtype="float32").items():
        compare_fp32(have, case, name)


def _train(checkpoint, folder, seed, config):
    """Save an adapter whose factors are all random, and return the merged model's log-probs."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    config = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(model, LoraConfig(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    merged = model.merge_and_unload().eval()
    with torch.no_grad():
        return [
            merged(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
            for ids in PROMPTS
        ]
