#!/usr/bin/env python3
"""The kernels for LoRA on routed experts on a GPU, at the shapes of known models.

    python benchmarks/moe_lora_kernels.py                      # all shapes, an hour
    python benchmarks/moe_lora_kernels.py --models qwen3 --ranks 16 --tokens 1 32 512
    python benchmarks/moe_lora_kernels.py --vllm /path/to/unpacked/wheel --json out.json
    python benchmarks/moe_lora_kernels.py --dry-run            # no GPU: the shapes and their floors

Each shape is checked and timed as `vllm-moe-lora tune` does it (docs/tune.md): upstream's kernels,
`ours` and, with --base, `tail`, in turn, in CUDA graphs, with a cold L2 cache. No tiles are
searched and no record is written. The floor is the time to move each byte of the factors once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from statistics import geometric_mean

# name: experts, top_k, hidden, inner
MODELS = {
    "qwen3": (128, 8, 2048, 768),
    "qwen1.5-moe": (60, 4, 2048, 1408),
    "deepseek-v3": (256, 8, 7168, 2048),
    "kimi-k2": (384, 8, 7168, 2048),
    "mixtral": (8, 2, 4096, 14336),
    "gpt-oss": (128, 4, 2880, 2880),
}


def shapes(args: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """Yield the name and the shape of each case."""
    from vllm_moe_lora.records import LayerShape

    for model in args.models:
        slices = 1 if model == "gpt-oss" else 2
        for rank in args.ranks:
            for slots in args.adapters:
                shape = LayerShape(*MODELS[model], slices, 2, slots, rank, "bfloat16")
                yield f"{model} r{rank} L{slots}", shape


def floor(shape, tokens: int, bandwidth: float) -> float:
    """Return the microseconds to read the factors in use at ``bandwidth`` TB/s."""
    from vllm_moe_lora.tuning import cases

    batch = cases.batch(shape, tokens, "all", "cpu")
    pairs = batch.slots.long()[:, None] * shape.experts + batch.ids
    segments = pairs[batch.slots >= 0].unique().numel()
    return segments * shape.rank * 3 * (shape.hidden + shape.inner) * 2 / bandwidth / 1e6


def session_of(shape, args: argparse.Namespace):
    from vllm_moe_lora.commands.tune import _conditions
    from vllm_moe_lora.tuning import clock, session

    more = {"checked": args.tokens, "sizes": args.tokens}
    timer = clock.GraphClock(args.repeats)
    return session.Session(shape, _conditions(), timer, lambda *_: None, base=args.base, **more)


def measure(args: argparse.Namespace) -> bool:
    """Print a table for each shape; return whether all numbers were right."""
    import torch

    from vllm_moe_lora.tuning import report

    rows, fine, ratios = [], True, []
    for name, shape in shapes(args):
        one = session_of(shape, args)
        one.check()
        one.measure(deadline=float("inf"))
        record = one.record()
        print(f"{name}\n{report.text(one, record)}")
        floors = (f"T{n} {floor(shape, n, args.bandwidth):.1f}" for n in args.tokens)
        print(f"floor at {args.bandwidth} TB/s, us: {', '.join(floors)}\n", flush=True)
        fine = fine and "ours" not in one.refused
        ratios += [c.us["upstream"][0] / c.us["ours"][0] for c in record.choices if "ours" in c.us]
        rows.append({"name": name, **asdict(record)})
        del one
        torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    if ratios:
        print(f"ours: geometric mean {geometric_mean(ratios):.2f}x, worst {min(ratios):.2f}x")
    return fine


def dry_run(args: argparse.Namespace) -> bool:
    """Print the cases with their floors and most tiles; they need no GPU."""
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    from vllm_moe_lora.kernels.triton import config

    for name, shape in shapes(args):
        for tokens in args.tokens:
            pairs = tokens * shape.top_k
            rows = config.tile_rows("sm_90", torch.bfloat16, pairs)
            tiles = config.max_tiles(pairs, shape.slots * shape.experts, rows)
            least = floor(shape, tokens, args.bandwidth)
            print(f"{name:24} T{tokens:<5} floor {least:9.1f} us  at most {tiles} tiles of {rows}")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512, 4096])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--base", action="store_true", help="also the base GEMMs, and `tail`")
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s that floors assume")
    parser.add_argument("--vllm", help="folder of an unpacked wheel, instead of the installed vLLM")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--dry-run", action="store_true", help="needs no GPU")
    args = parser.parse_args()
    if args.vllm:
        sys.path.insert(0, args.vllm)
    if not (dry_run(args) if args.dry_run else measure(args)):
        sys.exit(1)


if __name__ == "__main__":
    main()
