"""The row of cpu_engine.py for what people take without vLLM: PEFT in transformers.

The same model, in bf16 with random weights, and an adapter of the same rank on the same modules.
PEFT adds LoRA to experts as `target_parameters`, since transformers keeps all experts of a layer in
one parameter. One adapter, static batches, transformers' own cache: no scheduler, no server.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

RANK = 16


def child(spec: dict[str, Any], cases: dict[str, tuple[int, int]], steps: int) -> None:
    """Answer as `cpu_engine.child` does: for each name of a case on stdin, print seconds a step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(spec["model"])
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    modules = [*attention, "gate_proj", "up_proj", "down_proj", "shared_expert_gate"]
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules, target_parameters=parameters)
    peft = get_peft_model(model, lora).eval()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)

    @torch.inference_mode()
    def run(batch: int, length: int, tokens: int) -> list[float]:
        given = torch.randint(0, config.vocab_size, (batch, length))
        cache, taken = None, []
        for _ in range(tokens):
            start = time.perf_counter()
            out = peft(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            given, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            taken.append(time.perf_counter() - start)
        return taken

    run(1, 16, 2)
    print("RESULT " + json.dumps(weights), flush=True)
    for line in sys.stdin:
        batch, length = cases[line.strip()]
        decode = length <= 16
        taken = run(batch, length, 1 + steps if decode else 1)
        print("RESULT " + json.dumps(taken[1:] if decode else taken), flush=True)
