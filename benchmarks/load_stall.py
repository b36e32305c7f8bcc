#!/usr/bin/env python3
"""How long the tokens of others wait while an adapter is loaded.

    python benchmarks/load_stall.py

One request streams from the base model of a real engine (`AsyncLLM`, engine core in its own
process) while adapters of 18,432 tensors are loaded. The table has the longest wait between two
tokens: with nothing being loaded; during a load as the package does it (staged in a thread, then
one slot write); during a load in one piece, as upstream does it (the same code without the
thread); and during a slot write alone, of an adapter that is in vLLM's CPU cache. The first load of
an engine is left out: on a CPU it widens the packed weights once.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

LAYERS, EXPERTS, HIDDEN, INNER, RANK = 12, 256, 512, 256, 16


def _build(folder: Path, adapters: int) -> None:
    import torch
    from safetensors.torch import save_file

    from vllm_moe_lora.tiny import models

    models.build(
        "qwen3_moe",
        folder / "model",
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        max_position_embeddings=4096,
    )
    shapes = {
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    for number in range(adapters):
        tensors: dict[str, Any] = {}
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                for name, (out, inn) in shapes.items():
                    key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                    tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inn).bfloat16()
                    tensors[f"{key}.lora_B.weight"] = torch.randn(out, RANK).bfloat16() * 0.01
        target = folder / f"adapter-{number}"
        target.mkdir()
        save_file(tensors, target / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": ["experts"]}
        (target / "adapter_config.json").write_text(json.dumps(config))


async def _measure(folder: Path, adapters: int) -> list[tuple[str, float, float]]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(folder / "model"),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=4096,
            enable_lora=True,
            max_loras=1,
            max_cpu_loras=adapters,
            max_lora_rank=RANK,
            disable_log_stats=True,
        )
    )
    sampling = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True, detokenize=False)
    stamps: list[float] = []

    async def stream() -> None:
        async for _ in llm.generate({"prompt_token_ids": [1, 2, 3]}, sampling, "base"):
            stamps.append(time.perf_counter())

    requests = [LoRARequest(str(n), n + 1, str(folder / f"adapter-{n}")) for n in range(adapters)]
    await llm.add_lora(requests[0])
    task = asyncio.create_task(stream())
    while len(stamps) < 20:
        await asyncio.sleep(0.05)

    async def during(act: Any) -> tuple[float, float]:
        """(longest wait for a token while ``act`` runs, how long it ran)"""
        first, start = len(stamps), time.perf_counter()
        await act
        took = time.perf_counter() - start
        await asyncio.sleep(0.3)
        here = stamps[max(0, first - 1) :]
        return max(b - a for a, b in itertools.pairwise(here)), took

    rows: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("nothing", "staged", "in one piece", "slot write alone")
    }
    rest = requests[1:]
    for one, two in zip(rest[::2], rest[1::2], strict=True):
        rows["nothing"].append(await during(asyncio.sleep(2)))
        rows["staged"].append(await during(llm.add_lora(one)))
        rows["in one piece"].append(await during(llm.engine_core.add_lora_async(two)))
        rows["slot write alone"].append(await during(llm.engine_core.add_lora_async(one)))
    task.cancel()
    llm.shutdown()
    return [
        (name, median(w for w, _ in found), median(t for _, t in found))
        for name, found in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    adapters = 1 + 2 * args.rounds
    with tempfile.TemporaryDirectory() as name:
        _build(Path(name), adapters)
        rows = asyncio.run(_measure(Path(name), adapters))
    print(f"{'loaded meanwhile':>18} {'longest wait, ms':>17} {'took, ms':>9}")
    for what, wait, took in rows:
        print(f"{what:>18} {1000 * wait:>17.0f} {1000 * took:>9.0f}")


if __name__ == "__main__":
    sys.exit(main())
