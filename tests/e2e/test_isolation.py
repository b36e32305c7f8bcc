"""An adapter that overflows hurts nobody: not in its batch, not by the KV blocks it leaves."""

from __future__ import annotations

import shutil

import pytest
import torch
from engine_cases import PROMPTS
from safetensors.torch import load_file, save_file

from vllm_moe_lora.tiny import engine

pytestmark = pytest.mark.cpu_engine

INT4 = ("gptq", 32, True)
BLOCKS = 24  # of the KV cache: every request gets blocks that another has left
SHORT, LONG = PROMPTS[0], list(range(100, 170))


def _scaled(case, name, factor, only):
    """A copy of adapter "a" with its B matrices made huge, and finite."""
    folder = case.folder / name
    shutil.copytree(case.adapters["a"], folder)
    file = folder / "adapter_model.safetensors"
    found = {
        key: value * factor if "lora_B" in key and only in key else value
        for key, value in load_file(file).items()
    }
    assert all(torch.isfinite(value).all() for value in found.values())
    save_file(found, file)
    case.adapters[name] = folder


@pytest.mark.parametrize(
    ("family", "quant", "dtype", "limit"),
    [
        ("qwen2_moe", None, "float32", 1e-4),  # other batch sizes round differently
        ("qwen2_moe", INT4, "bfloat16", 0.25),
        ("gpt_oss", None, "bfloat16", 0.25),  # a sliding window; log-probs of about -6 +- 1
    ],
    ids=["fp32", "int4", "gpt_oss"],
)
def test_overflow_stays_where_it_is(make_case, family, quant, dtype, limit):
    case = make_case(family, quant)
    case.add("a", seed=1)
    case.add("b", seed=2)
    _scaled(case, "all", 1e36, "")
    _scaled(case, "experts", 1e30, "experts")
    solo = [[(SHORT, None)], [(PROMPTS[1], "a")], [(LONG, "b")], [(LONG, None)]]
    row = [one for (one,) in solo]
    huge = [[*row, (LONG, name), (SHORT, name)] for name in ("all", "experts")]
    job = engine.Job(
        str(case.model),
        {name: str(path) for name, path in case.adapters.items()},
        [*solo, huge[0], *solo, huge[1], *solo],
        max_tokens=4,
        options={
            "dtype": dtype,
            "num_gpu_blocks_override": BLOCKS,
            "block_size": 32,
            "enable_prefix_caching": False,
        },
    )
    answers, _, _ = engine.run(job)
    alone = [answers[i][0] for i in range(4)]
    for batch in (answers[4], answers[9]):
        # Hidden states that are all NaN may also end as logits that are all the same.
        spread = batch[4][1].std()
        assert not spread > 1e-3, "it does not overflow: nothing is shown"
        for (tokens, have), (want_tokens, want) in zip(batch, alone, strict=False):
            same = sum(a == b for a, b in zip(tokens, want_tokens, strict=True))
            assert (have - want)[: same or 1].abs().max() <= limit
    for first in (5, 10):  # alone again, on recycled blocks
        for i, (tokens, want) in enumerate(alone):
            assert answers[first + i][0][0] == tokens
            assert torch.equal(answers[first + i][0][1], want), "bit for bit"
