"""A real engine on a CUDA GPU with each choice of kernels; ci/gpu.sh runs this.

Run on the CPU engine only so far, where all kernels are its own.
"""

from __future__ import annotations

import gpu
import pytest
import torch
from engine_cases import PROMPTS, SHARE, TOP

from vllm_moe_lora.tiny import engine

pytestmark = gpu.MARKS
STEPS = 4
NAMES = (None, "a", "b")
FORMS = {
    "unquantised": ("qwen3_moe", None),
    "shared experts": ("qwen2_moe", None),
    "gpt-oss": ("gpt_oss", None),
    "GPTQ INT4": ("qwen2_moe", ("gptq", 128, True)),
}


@pytest.fixture(scope="module", params=FORMS)
def case(request, make_case):
    case = make_case(*FORMS[request.param])
    for seed, name in enumerate(NAMES[1:], start=1):
        case.add(name, seed=seed, rank=8 * seed, in_first=request.param == "gpt-oss")
    return case


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("kernels", ["upstream", "ours", "tail"])
def test_the_adapter_is_the_merged_checkpoint(case, kernels, eager):
    """Base, a and b side by side, prompt and decode; then a batch of the base alone."""
    mixed = [(prompt, name) for prompt in PROMPTS for name in NAMES]
    base = [(prompt, None) for prompt in PROMPTS]
    paths = {name: str(path) for name, path in case.adapters.items()}
    options = {"dtype": "bfloat16", "enforce_eager": eager, "gpu_memory_utilization": 0.3}
    job = engine.Job(
        str(case.model), paths, [mixed, base], max_tokens=STEPS, options=options, import_plugin=True
    )  # the package may be there without its entry point
    answers, _, _ = engine.run(job, {"VLLM_MOE_LORA": "1", "VLLM_MOE_LORA_KERNELS": kernels})
    off, effect = {name: [] for name in NAMES}, []
    for (prompt, name), (tokens, have) in zip(mixed + base, answers[0] + answers[1], strict=True):
        want, plain = (case.forced(one, prompt, tokens) for one in (name, None))
        for step in range(STEPS):
            top = want[step].topk(TOP).indices
            off[name].append((have[step] - want[step])[top].abs().mean())
            if name is not None:
                effect.append((plain[step] - want[step])[top].abs().mean())
    size = torch.stack(effect).mean()
    for name, found in off.items():
        assert torch.stack(found).mean() <= SHARE * size, name
