#!/usr/bin/env python3
"""What a push of an adapter from a trainer's memory costs, beside two copies of its bytes.

    python benchmarks/rl_push.py                    # Qwen3-30B-A3B, rank 16, bf16, per expert
    python benchmarks/rl_push.py --layers 12        # a quarter of it

Two processes, as in a server: this one has the tensors and offers them in shared memory
(`loading/memory.py`), the other reads, checks and stages them, and then swaps the version in the
slot of vLLM's own LoRA layers, whose model has no weights. "offer" and "stage" go on while requests
run; "swap" is what tokens wait for. "copy" is one copy of the same bytes into fresh memory, and
"slot" vLLM's write of an adapter into a slot without anything else. Medians of all rounds but the
first two, in which the worker gets memory from the system for the two versions that it holds while
one is staged. What must hold: push <= 2 copies + slot, and swap is about slot.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from types import SimpleNamespace
from typing import Any

from adapter_load import EXPERTS, HIDDEN, INNER, _manager

WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=8, help="rounds; at least 3")
    args = parser.parse_args()
    if args.repeats <= WARM_UP:
        parser.error(f"--repeats: the first {WARM_UP} rounds do not count")
    tensors = _tensors(args.layers, args.rank)
    size = sum(tensor.nbytes for tensor in tensors.values())
    config = {"peft_type": "LORA", "r": args.rank, "lora_alpha": 32, "target_modules": ["experts"]}
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=_worker, args=(there, args.layers, args.rank))
    worker.start()
    there.close()  # so that the end of the worker is seen
    here.recv()
    rows = [_round(here, tensors, config, size) for _ in range(args.repeats)]
    here.send(None)
    worker.join()
    counted = rows[WARM_UP:]
    median = {key: statistics.median(row[key] for row in counted) for key in rows[0]}
    print(
        f"{args.layers} layers x {EXPERTS} experts, rank {args.rank}, bf16: {len(tensors)} tensors,"
        f" {size / 2**20:.0f} MiB; seconds, median of {len(counted)}"
    )
    print(" ".join(f"{key:>7}" for key in median))
    print(" ".join(f"{value:>7.3f}" for value in median.values()))
    print("push, round by round: " + " ".join(f"{row['push']:.3f}" for row in rows))
    limit = 2 * median["copy"] + median["slot"]
    print(f"push / (2 copies + slot) = {median['push'] / limit:.2f}")
    print(f"swap / slot = {median['swap'] / median['slot']:.2f}")


def _tensors(layers: int, rank: int) -> dict[str, Any]:
    import torch

    shapes = {
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    pool, tensors = torch.randn(2**24).to(torch.bfloat16) * 0.01, {}
    for layer in range(layers):
        for expert in range(EXPERTS):
            for name, (out, inn) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = pool[: rank * inn].view(rank, inn).clone()
                tensors[f"{key}.lora_B.weight"] = pool[: out * rank].view(out, rank).clone()
    return tensors


def _round(here: Any, tensors: Any, config: Any, size: int) -> dict[str, float]:
    import torch

    from vllm_moe_lora.loading import memory

    source = torch.ones(size, dtype=torch.uint8)
    start = time.perf_counter()
    copied = source.clone()
    row = {"copy": time.perf_counter() - start}
    del source, copied
    start = time.perf_counter()
    with memory.offered("policy", tensors, config, local=False) as path:
        row["offer"] = time.perf_counter() - start
        here.send(path)
        row |= here.recv()
    row["push"] = time.perf_counter() - start
    here.send("slot")
    row["slot"] = here.recv()
    return row


def _worker(there: Any, layers: int, rank: int) -> None:
    import torch
    from vllm.lora.lora_model import LoRAModel

    import vllm_moe_lora
    from vllm_moe_lora.loading import memory

    vllm_moe_lora.register()
    memory.allow()
    manager = _manager(layers, rank, "per-expert")
    worker = SimpleNamespace(
        _adapter_manager=manager,
        lora_config=manager.lora_config,
        _lora_model_cls=LoRAModel,
        vocab_size=151936,
    )
    there.send("ready")
    with torch.inference_mode():
        while (path := there.recv()) is not None:
            start = time.perf_counter()
            if path == "slot":
                manager.deactivate_adapter(1)
                manager.activate_adapter(1)
                there.send(time.perf_counter() - start)
                continue
            lora = memory.load(worker, SimpleNamespace(lora_path=path, lora_int_id=1))
            staged = time.perf_counter()
            manager.remove_adapter(1)
            manager.add_adapter(lora)
            manager.activate_adapter(1)
            there.send({"stage": staged - start, "swap": time.perf_counter() - staged})


if __name__ == "__main__":
    main()
