#!/usr/bin/env python3
"""What the worker's memory is at each step of an adapter's life, in a real vLLM engine on a CPU.

    python benchmarks/cpu_memory.py [--max-loras 16] [--max-lora-rank 64] [--ranks 8 16 64]

A model of cpu_engine.py's shape. Prints the resident memory (RSS) in MiB after the start, after
adapters of the given ranks were loaded and used by one batch, and after they were removed. Rows:
"own rank", as it is; "dense", with vLLM's stacks [slots, experts, max rank, in] for routed experts,
which are allocated at the start and into which adapters are copied; "no lora", without this package
and without LoRA. Each row is an engine of its own; the first run of a row fills its compile cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cpu_engine import config, write_adapter

ROWS = ("own rank", "dense", "no lora")


def resident() -> float:
    """Return this process's memory in MiB, without what was read from files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def dense() -> None:
    """Give the slots of routed experts the memory that vLLM's own stacks take."""
    import torch

    from vllm_moe_lora.kernels.slot_stack import SlotStack

    made = SlotStack.__init__

    def with_stack(self: SlotStack, *args: Any) -> None:
        made(self, *args)
        self.whole = torch.zeros(self.shape, dtype=self.dtype)

    def write(self: SlotStack, slot: int, factor: torch.Tensor) -> None:
        whole = self.whole[slot]
        whole.zero_()
        whole[:, : factor.shape[1], : factor.shape[2]].copy_(factor)
        self._put(slot, whole.narrow(self.rank_axis, 0, factor.shape[self.rank_axis]))

    SlotStack.__init__, SlotStack.write = with_stack, write


def child(spec: dict[str, Any]) -> None:
    """One engine; prints a line for each step."""
    if spec["row"] == "dense":
        dense()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folders = list(spec["adapters"])
    lora: dict[str, Any] = {}
    if spec["row"] != "no lora":
        lora = {"enable_lora": True, "max_loras": spec["max_loras"]}
        lora |= {"max_lora_rank": spec["max_rank"]}
        lora |= {"max_cpu_loras": max(spec["max_loras"], len(folders))}
    llm = LLM(
        spec["model"],
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=bool(spec["eager"]),
        max_model_len=256,
        max_num_seqs=16,
        **lora,
    )
    show, start = {}, resident()

    def note(step: str) -> None:
        gc.collect()
        show[step] = round(resident() - start)

    llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=2), use_tqdm=False)
    show["after start"] = round(resident())
    start = resident()
    if not lora:
        print("MEMORY", json.dumps(show))
        return
    requests = [LoRARequest(f"a{i}", i + 1, path) for i, path in enumerate(folders)]
    for request in requests:
        llm.llm_engine.add_lora(request)
    note("loaded")
    prompts = [{"prompt_token_ids": [1, 2, 3]}] * len(requests)
    ask = SamplingParams(max_tokens=2, detokenize=False)
    llm.generate(prompts, ask, lora_request=requests, use_tqdm=False)
    note("used")
    for request in requests:
        llm.llm_engine.remove_lora(request.lora_int_id)
    note("removed")
    print("MEMORY", json.dumps(show))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--max-loras", type=int, default=16)
    parser.add_argument("--max-lora-rank", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 64])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--quant", choices=["bf16", "int4"], default="bf16")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--runs", type=int, default=2, help="of each row (default: 2)")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config(args.layers, args.quant)))
        adapters = [Path(folder, f"a{number}") for number in range(len(args.ranks))]
        size = 0
        for number, rank in enumerate(args.ranks):
            write_adapter(adapters[number], args.layers, number, rank)
            size += (adapters[number] / "adapter_model.safetensors").stat().st_size
        print(f"files of the adapters: {size / 2**20:.0f} MiB")
        spec = {
            "model": str(model),
            "adapters": list(map(str, adapters)),
            "max_loras": args.max_loras,
            "max_rank": args.max_lora_rank,
            "eager": args.eager,
        }
        for row in args.rows:
            env = {
                "VLLM_MOE_LORA": "0" if row == "no lora" else "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CACHE_ROOT": str(Path(folder, row.replace(" ", "-"))),
                "HF_HUB_OFFLINE": "1",
            }
            for _ in range(args.runs):
                found = measured({**spec, "row": row}, env)
                print(f"{row}: {found}", flush=True)


def measured(spec: dict[str, Any], env: dict[str, str]) -> dict[str, int]:
    """Run `child` in a process of its own; MiB of each step."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(spec)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("MEMORY")), None)
    if line is None:
        sys.exit(done.stdout[-3000:])
    found: dict[str, int] = json.loads(line.removeprefix("MEMORY "))
    return found


if __name__ == "__main__":
    main()
