#!/usr/bin/env python3
"""What the worker's memory is at each step of an adapter's life, in a real vLLM engine on a CPU.

    python benchmarks/cpu_memory.py [--max-loras 16] [--max-lora-rank 64] [--ranks 8 16 64]

A model of cpu_engine.py's shape. Prints the resident memory (RSS) in MiB after the start, after
adapters of the given ranks were loaded and used by one batch, and after they were removed.
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

from cpu_engine import config, write_adapter


def resident() -> float:
    """Return this process's memory in MiB, without what was read from files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def child(spec: dict[str, str | int | list[str]]) -> None:
    """One engine; prints a line for each step."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folders = list(spec["adapters"])
    llm = LLM(
        spec["model"],
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=bool(spec["eager"]),
        max_model_len=256,
        max_num_seqs=16,
        enable_lora=True,
        max_loras=spec["max_loras"],
        max_lora_rank=spec["max_rank"],
        max_cpu_loras=max(int(spec["max_loras"]), len(folders)),
    )
    show, start = {}, resident()

    def note(step: str) -> None:
        gc.collect()
        show[step] = round(resident() - start)

    llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=2), use_tqdm=False)
    show["after start"] = round(resident())
    start = resident()
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
        spec = {
            "model": str(model),
            "adapters": list(map(str, adapters)),
            "max_loras": args.max_loras,
            "max_rank": args.max_lora_rank,
            "eager": args.eager,
        }
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        command = [sys.executable, __file__, "--child", json.dumps(spec)]
        done = subprocess.run(
            command,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        line = next((x for x in done.stdout.splitlines() if x.startswith("MEMORY")), None)
        if line is None:
            sys.exit(done.stdout[-3000:])
        found = json.loads(line.removeprefix("MEMORY "))
        print(f"files of the adapters: {size / 2**20:.0f} MiB")
        for step, value in found.items():
            print(f"{step}: {value} MiB")


if __name__ == "__main__":
    main()
