#!/usr/bin/env python3
"""The routed experts' LoRA kernels on a GPU: ours against upstream's, same inputs, same run.

    python benchmarks/moe_lora_kernels.py                      # the whole grid, 720 cases
    python benchmarks/moe_lora_kernels.py --models qwen3 --tokens 1 32 --ranks 16
    python benchmarks/moe_lora_kernels.py --vllm /path/to/unpacked/wheel --json out.json
    python benchmarks/moe_lora_kernels.py --dry-run            # no GPU: the grid and its floors

A case is all that LoRA adds to one MoE layer: routing, w13 and w2. Each side is captured in a CUDA
graph and replayed; the figure is the median of replays that events time, the L2 cache being
overwritten before each. Both sides are `PunicaWrapperGPU.add_lora_w13` and `add_lora_w2` of the
vLLM found, as its experts classes call them: upstream's as they are, ours behind our hooks, as
VLLM_MOE_LORA_KERNELS=ours has them. A case is timed only after both sides agreed on its numbers,
which also shows the hooks at work. The floor is the time to move each byte once: the factors in
use, and those with x and y.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import geometric_mean, median
from types import SimpleNamespace
from typing import Any

# name: experts, top_k, hidden, intermediate
MODELS = {
    "qwen3": (128, 8, 2048, 768),
    "qwen1.5-moe": (60, 4, 2048, 1408),
    "deepseek-v3": (256, 8, 7168, 2048),
    "kimi-k2": (384, 8, 7168, 2048),
    "mixtral": (8, 2, 4096, 14336),
    "gpt-oss": (128, 4, 2880, 2880),
}
TOKENS = (1, 8, 32, 128, 512, 4096)
RANKS = (8, 16, 32, 64)
ADAPTERS = (1, 8, 32)


@dataclass(frozen=True)
class Case:
    model: str
    tokens: int
    rank: int
    adapters: int
    skewed: bool  # half of the tokens on one adapter, half of the choices on a tenth of the experts

    def __str__(self) -> str:
        how = " skewed" if self.skewed else ""
        return f"{self.model} T{self.tokens} r{self.rank} L{self.adapters}{how}"


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for model in args.models:
        for tokens in args.tokens:
            for rank in args.ranks:
                for adapters in args.adapters:
                    for skewed in (False, True) if adapters > 1 else (False,):
                        yield Case(model, tokens, rank, adapters, skewed)


def batch(case: Case) -> tuple[Any, Any]:
    """topk_ids [tokens, top_k] int32, distinct in a row, and token_slots [tokens], on the CPU."""
    import torch

    experts, top_k, _, _ = MODELS[case.model]
    g = torch.Generator().manual_seed(0)
    odds, slot_odds = torch.ones(experts), torch.ones(case.adapters)
    if case.skewed:
        odds[: max(1, experts // 10)] = 9.0
        slot_odds[0] = max(1, case.adapters - 1)
    ids = torch.multinomial(odds.expand(case.tokens, -1), top_k, generator=g)
    slots = torch.multinomial(slot_odds, case.tokens, replacement=True, generator=g)
    return ids.int(), slots


def floors(case: Case, bandwidth: float) -> tuple[float, float]:
    """Microseconds at ``bandwidth`` TB/s: the factors in use, and those with x, act and both y."""
    ids, slots = batch(case)
    experts, top_k, hidden, inner = MODELS[case.model]
    segments = (slots[:, None] * experts + ids).unique().numel()
    factors = segments * case.rank * 3 * (hidden + inner) * 2
    pairs = case.tokens * top_k
    moved = 2 * (case.tokens * hidden + pairs * inner + 2 * pairs * (2 * inner + hidden))
    return factors / bandwidth / 1e6, (factors + moved) / bandwidth / 1e6


@dataclass
class Inputs:
    """What both sides get: stacks [adapters, experts, ...] as upstream allocates them."""

    x: Any
    act: Any
    y13: Any
    y2: Any
    a13: tuple[Any, ...]
    b13: tuple[Any, ...]
    a2: tuple[Any, ...]
    b2: tuple[Any, ...]
    ids: Any
    weights: Any
    slots: Any


def inputs(case: Case, device: str, dtype: Any = None) -> Inputs:
    """Random, in bf16 unless another dtype is asked for."""
    import torch

    experts, top_k, hidden, inner = MODELS[case.model]
    ids, slots = batch(case)
    torch.manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return torch.randn(shape, dtype=dtype or torch.bfloat16, device=device).mul_(scale)

    def stack(rows: int, columns: int, scale: float) -> Any:
        return normal(case.adapters, experts, rows, columns, scale=scale)

    return Inputs(
        normal(case.tokens, hidden),
        normal(case.tokens * top_k, inner),
        normal(case.tokens, top_k, 2 * inner),
        normal(case.tokens, top_k, hidden),
        tuple(stack(case.rank, hidden, hidden**-0.5) for _ in range(2)),
        tuple(stack(inner, case.rank, 1.0) for _ in range(2)),
        (stack(case.rank, inner, inner**-0.5),),
        (stack(hidden, case.rank, 1.0),),
        ids.to(device),
        torch.rand(case.tokens, top_k, device=device) + 0.5,
        slots.to(device),
    )


def layer_of(case: Case, given: Inputs) -> Any:
    """What the hooks see of vLLM's LoRA layer, its slots written."""
    import torch

    from vllm_moe_lora.layers.gpu import moe_kernels

    os.environ["VLLM_MOE_LORA_KERNELS"] = "ours"
    layer = SimpleNamespace(
        w13_lora_a_stacked=given.a13,
        w13_lora_b_stacked=given.b13,
        w2_lora_a_stacked=given.a2,
        w2_lora_b_stacked=given.b2,
        local_num_experts=MODELS[case.model][0],
        fully_sharded=False,
        adapter_enabled=torch.ones(case.adapters + 1, dtype=torch.int32, device=given.x.device),
    )
    for slot in range(case.adapters):
        moe_kernels.slot_written(layer, slot)
    return layer


def ours(case: Case, given: Inputs) -> Callable[[], None]:
    """Upstream's two calls behind our hooks."""
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    from vllm_moe_lora.hooks import lora_punica_gpu

    class Hooked:
        """The two methods as the hooks make them; what they do not do themselves must not run."""

        def __init__(self, real: Any) -> None:
            self.token_mapping_meta, self.lora_config = real.token_mapping_meta, real.lora_config

    for hook in lora_punica_gpu.HOOKS:
        name = hook.target.rpartition(".")[2]
        assert hasattr(PunicaWrapperGPU, name), "another vLLM"
        setattr(Hooked, name, hook.make(_not_upstream))
    layer = layer_of(case, given)
    call = upstream(case, given, Hooked)

    def keeping() -> None:
        call()
        assert layer is not None  # its factors are found by address while it lives

    return keeping


def _not_upstream(*args: Any, **more: Any) -> None:
    raise AssertionError("upstream's kernels were called on our side")


def bare(case: Case, given: Inputs) -> Callable[[], None]:
    """Our kernels without vLLM around them."""
    layer = layer_of(case, given)
    from vllm_moe_lora.layers.gpu import moe_kernels

    class Meta:
        def meta_args(self, *args: Any) -> tuple[Any, ...]:
            import torch

            return given.slots, None, None, None, None, torch.tensor([False]), None

    punica = SimpleNamespace(
        token_mapping_meta=Meta(), lora_config=SimpleNamespace(specialize_active_lora=False)
    )

    def call() -> None:
        found = moe_kernels.add_w13(
            punica, given.y13, given.x, layer.w13_lora_a_stacked, given.b13, given.ids,
            given.weights, None, case.tokens, True, None,
        )  # fmt: skip
        assert found is not None
        moe_kernels.add_w2(found[0], given.y2, given.act, given.weights, True)

    return call


def upstream(case: Case, given: Inputs, around: Any = None) -> Callable[[], None]:
    """Upstream's two calls, of what ``around`` makes of its wrapper."""
    import torch
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    experts, top_k, hidden, inner = MODELS[case.model]
    config = LoRAConfig(max_loras=case.adapters, max_lora_rank=case.rank)
    wrapper = PunicaWrapperGPU(case.tokens, case.tokens, given.x.device, lora_config=config)
    names = [int(slot) + 1 for slot in given.slots.tolist()]
    mapping = LoRAMapping(tuple(names), tuple(names), is_prefill=case.tokens > 512)
    wrapper.update_metadata(mapping, list(range(1, case.adapters + 1)), case.adapters, 1024)
    wrapper = wrapper if around is None else around(wrapper)
    enabled = torch.ones(case.adapters + 1, dtype=torch.int32, device=given.x.device)
    # Only their shapes are asked for, to find the tuned configuration.
    w1 = torch.empty(experts, 2 * inner, hidden, dtype=torch.bfloat16, device="meta")
    w2 = torch.empty(experts, hidden, inner, dtype=torch.bfloat16, device="meta")
    same = {
        "w1": w1, "w2": w2, "num_tokens": case.tokens, "top_k_num": top_k, "top_k": top_k,
        "max_loras": case.adapters, "adapter_enabled": enabled, "fully_sharded": False,
        "use_tuned_config": False, "topk_weights": given.weights,
    }  # fmt: skip

    def call() -> None:
        sorted_ids, expert_ids, padded, mapped = wrapper.add_lora_w13(
            y=given.y13, x=given.x, lora_a_stacked=given.a13, lora_b_stacked=given.b13,
            topk_ids=given.ids, expert_map=None, local_num_experts=experts, num_slices=2, **same,
        )  # fmt: skip
        wrapper.add_lora_w2(
            y=given.y2, x=given.act, lora_a_stacked=given.a2, lora_b_stacked=given.b2,
            sorted_token_ids_lora=sorted_ids, expert_ids_lora=expert_ids,
            num_tokens_post_padded_lora=padded, token_lora_mapping=mapped, tp_rank=0, **same,
        )  # fmt: skip

    return call


def disagreement(given: Inputs, first: Callable[[], None], second: Callable[[], None]) -> float:
    """How far the two are apart, as a share of what they add."""
    found = []
    for call in (first, second):
        for y in (given.y13, given.y2):
            y.zero_()
        call()
        found.append([y.float().clone() for y in (given.y13, given.y2)])
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(*found, strict=True)
    )


def graph_time(call: Callable[[], None], replays: int) -> float:
    """Median microseconds of a replay."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(replays):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return median(times)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch
    import triton
    import vllm

    print(f"{torch.cuda.get_device_name()}, vLLM {vllm.__version__}, triton {triton.__version__}")
    print(f"{'':32} {'ours':>9} {'upstream':>9} {'ratio':>6} {'factors':>9} {'all bytes':>9}  us")
    rows: list[dict[str, Any]] = []
    for case in cases(args):
        given = inputs(case, "cuda")
        sides = ours(case, given), upstream(case, given)
        apart = disagreement(given, *sides)
        if not apart < 0.02:
            print(f"{case!s:32} NOT TIMED: {apart:.1%} apart")
            rows.append({**asdict(case), "apart": apart})
            continue
        mine, theirs = (graph_time(side, args.replays) for side in sides)
        least, most = floors(case, args.bandwidth)
        figures = f"{mine:9.1f} {theirs:9.1f} {theirs / mine:6.2f} {least:9.1f} {most:9.1f}"
        print(f"{case!s:32} {figures}", flush=True)
        rows.append({**asdict(case), "ours": mine, "upstream": theirs, "apart": apart})
        del given, sides
        torch.cuda.empty_cache()
    return rows


def dry_run(args: argparse.Namespace) -> None:
    """The grid with its floors and launches, and one tiny case of ours on the interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    from vllm_moe_lora.kernels import reference
    from vllm_moe_lora.kernels.triton import config

    print(f"{'':32} {'factors':>9} {'all bytes':>9} us  {'tiles at most':>13} {'rows':>4}")
    count = 0
    for case in cases(args):
        experts, top_k, _, _ = MODELS[case.model]
        pairs = case.tokens * top_k
        rows = config.tile_rows("sm_90", torch.bfloat16, pairs)
        tiles = config.max_tiles(pairs, case.adapters * experts, rows)
        least, most = floors(case, args.bandwidth)
        print(f"{case!s:32} {least:9.1f} {most:9.1f}     {tiles:13} {rows:4}")
        count += 1
    MODELS["tiny"] = (4, 2, 64, 32)
    case = Case("tiny", 5, 8, 3, True)
    given = inputs(case, "cpu", torch.float32)  # the interpreter is wrong in bf16
    ranks = torch.full((2, 3, 4), 8)

    def plain() -> None:
        reference.add_lora(given.y13, given.x, given.a13, given.b13, ranks, given.slots, given.ids)
        reference.add_lora(
            given.y2, given.act, given.a2, given.b2, ranks[:1], given.slots, given.ids,
            given.weights,
        )  # fmt: skip

    apart = disagreement(given, bare(case, given), plain)
    print(f"{count} cases; the tiny one is {apart:.1e} from kernels/reference.py")
    if not apart < 1e-5:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--adapters", nargs="+", type=int, default=list(ADAPTERS))
    parser.add_argument("--replays", type=int, default=51)
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s that floors assume")
    parser.add_argument("--vllm", help="folder of an unpacked wheel, instead of the installed vLLM")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--dry-run", action="store_true", help="needs no GPU")
    args = parser.parse_args()
    if args.dry_run:
        dry_run(args)
        return
    if args.vllm:
        sys.path.insert(0, args.vllm)
    rows = measure(args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    timed = [row["upstream"] / row["ours"] for row in rows if "ours" in row]
    if timed:
        print(f"geometric mean {geometric_mean(timed):.2f}x, worst {min(timed):.2f}x")
    if len(timed) < len(rows) or math.isnan(sum(timed)):
        sys.exit(1)


if __name__ == "__main__":
    main()
