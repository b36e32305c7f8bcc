#!/usr/bin/env python3
"""What it costs on a CPU when more adapters are in use than --max-loras has slots.

    python benchmarks/cpu_slots.py [--quant bf16 int4] [--layers 4] [--repeats 3] [--slots 2 1]

The model of cpu_engine.py, compiled, with four adapters of rank 16 that are all in CPU memory
(max_cpu_loras 4). The engine with max_loras 4 is there all the time; each other one is measured in
turns with it. Two cases:

  the batch  eight requests at once, two for each adapter, 16 tokens in and 64 out: with fewer slots
             the scheduler lets the other adapters' requests wait, so batches are smaller
  a swap     requests of one token in and one out, one after another, two for each adapter in turn.
             With fewer than four slots the first of the two finds its adapter in no slot: its step
             moves it into the slot of the adapter used longest ago. The second one's does not.
             "written" is vLLM's activate_adapter inside those steps. With four slots nothing moves.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path
from statistics import median
from typing import Any

import cpu_engine

REQUESTS, TOKENS, ROUNDS = 8, 64, 2


def child(spec: dict[str, Any]) -> None:
    """Answer as `cpu_engine.child` does; the cases are "batch" and "swap"."""
    from vllm.lora.model_manager import LRUCacheLoRAModelManager

    llm, requests = cpu_engine.build(spec)
    original: Any = LRUCacheLoRAModelManager.activate_adapter
    written: list[float] = []

    def activate_adapter(self: Any, lora_id: int, *args: Any, **more: Any) -> Any:
        before, start = lora_id in self._active_adapters, time.perf_counter()
        try:
            return original(self, lora_id, *args, **more)
        finally:
            if not before:
                written.append(time.perf_counter() - start)

    LRUCacheLoRAModelManager.activate_adapter = activate_adapter  # type: ignore[method-assign]

    def batch() -> dict[str, Any]:
        return {"s": sum(cpu_engine.steps(llm, REQUESTS, 16, TOKENS, requests))}

    def swap() -> dict[str, Any]:
        first, second = [], []
        for request in requests * ROUNDS:
            first.append(sum(cpu_engine.steps(llm, 1, 1, 1, [request])))
            second.append(sum(cpu_engine.steps(llm, 1, 1, 1, [request])))
        return {"first": first, "second": second}

    cases = {"batch": batch, "swap": swap}
    for case in cases.values():
        case()
    loaded = llm.llm_engine.list_loras()
    assert loaded == {request.lora_int_id for request in requests}, loaded
    print("RESULT 0", flush=True)
    for line in sys.stdin:
        written.clear()
        print("RESULT " + json.dumps({**cases[line.strip()](), "written": written}), flush=True)


def measure(folder: Path, quant: str, args: argparse.Namespace) -> dict[int, list[str]]:
    """Return for each number of slots the cells of the table."""
    model, adapters = cpu_engine.files(folder, quant, args.layers)

    def start(slots: int) -> cpu_engine.Engine:
        spec = {"by": "slots", "model": model, "adapters": adapters, "max_loras": slots}
        spec |= {"eager": False, "lift_amx": False}
        return cpu_engine.Engine(f"{quant}, max_loras {slots}", spec)

    four = start(4)
    batches: dict[int, list[Any]] = {n: [] for n in (4, *args.slots)}
    swaps: dict[int, list[Any]] = {n: [] for n in (4, *args.slots)}
    shares = {4: 1.0}
    for slots in args.slots:
        other = start(slots)
        turns = [(four.seconds("batch"), other.seconds("batch")) for _ in range(args.repeats)]
        batches[4] += [one for one, _ in turns]
        batches[slots] += [two for _, two in turns]
        taken = [median(found["s"] for found in side) for side in zip(*turns, strict=True)]
        shares[slots] = taken[0] / taken[1]
        for _ in range(args.repeats):
            swaps[4].append(four.seconds("swap"))
            swaps[slots].append(other.seconds("swap"))
        other.end()
        print(f"  {quant}, max_loras 4 and {slots}: {taken} s", file=sys.stderr, flush=True)
    four.end()
    rows = {}
    for slots in sorted(batches, reverse=True):
        took = median(one["s"] for one in batches[slots])
        moved = median(len(one["written"]) for one in batches[slots])
        first = [1e3 * t for one in swaps[slots] for t in one["first"]]
        second = [1e3 * t for one in swaps[slots] for t in one["second"]]
        written = [1e3 * t for one in swaps[slots] for t in one["written"]]
        if slots < len(adapters):
            assert len(written) == len(first), f"{len(written)} swaps in {len(first)} steps"
        rows[slots] = [
            f"{took:.2f}",
            f"{REQUESTS * TOKENS / took:.1f}",
            f"{shares[slots]:.2f}",
            f"{moved:.0f}",
            f"{median(second):.2f}",
            f"{median(first):.2f}",
            f"{median(first) - median(second):.2f}",
            f"{median(written):.2f} ({len(written)})" if written else "–",
        ]
    return rows


def machine() -> str:
    """Return the processor, the threads and the versions, in a line."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    vllm = packages_distributions()["vllm"][0]
    parts = [models[0] if models else platform.processor(), f"{torch.get_num_threads()} threads"]
    parts += [f"{name} {version(name)}" for name in (vllm, "torch", "numba")]
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quant", nargs="+", default=["bf16", "int4"], choices=["bf16", "int4"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slots", nargs="+", type=int, default=[2, 1], choices=[1, 2, 3])
    parser.add_argument("--folder", type=Path, help="keep model and adapters here for another run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moe-lora-bench-") as name:
        found = {q: measure(args.folder or Path(name), q, args) for q in args.quant}
    print(f"{machine()}, {args.layers} layers; medians, {args.repeats} repeats\n")
    print("| | max_loras | batch, s | tokens/s | share of 4 slots | swaps in the batch | step, ms |"
          " step with a swap, ms | the swap, ms | written, ms (count) |")  # fmt: skip
    print("|---" * 10 + "|")
    for quant, rows in found.items():
        for slots, cells in rows.items():
            print(f"| {quant} | {slots} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
