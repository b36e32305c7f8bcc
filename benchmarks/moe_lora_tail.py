#!/usr/bin/env python3
"""Both products of a bf16 MoE layer with LoRA on a GPU, three ways, and without LoRA, two ways.

    python benchmarks/moe_lora_tail.py --models qwen3 --tokens 1 32 512 4096 --ranks 16
    python benchmarks/moe_lora_tail.py --dry-run     # no GPU: one tiny case against loops

`vllm`: the Triton grouped product of the vLLM found, with the tiles it chooses. `base`: ours
(kernels/triton/base.py). Then with LoRA: `+upstream` and `+ours` add it to vLLM's product by
Punica's calls, without and with our hooks; `tail` is our product with LoRA in its accumulator.
The order by experts, which all share, and the activation are left out. Timed as
moe_lora_kernels.py times, and only where `tail` agrees with `+ours`. This decides whether the
tail is worth being wired into vLLM: it must beat `+ours` by more than `base` loses to `vllm`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import moe_lora_kernels as grid


def weights(case: grid.Case, given: grid.Inputs) -> tuple[Any, Any]:
    """w13 [experts, 2 * inner, hidden] and w2 [experts, hidden, inner]."""
    import torch

    experts, _, hidden, inner = grid.MODELS[case.model]

    def normal(*shape: int) -> Any:
        made = torch.randn(shape, dtype=given.x.dtype, device=given.x.device)
        return made.mul_(shape[2] ** -0.5)

    return normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)


def vllm_base(
    case: grid.Case, given: grid.Inputs, w13: Any, w2: Any
) -> tuple[Callable[[], None], Any]:
    """vLLM's own products, and the order that it made for them, as ours takes it."""
    from vllm.model_executor.layers.fused_moe.fused_moe import (
        _prepare_expert_assignment,
        invoke_fused_moe_triton_kernel,
        try_get_optimal_moe_config,
    )
    from vllm.triton_utils import tl

    from vllm_moe_lora.kernels.triton.grouped import Order

    experts, top_k, _, _ = grid.MODELS[case.model]
    tiles = try_get_optimal_moe_config(w13.shape, w2.shape, top_k, None, case.tokens)
    # Few pairs are not sorted.
    order = _prepare_expert_assignment(given.ids, tiles, case.tokens, top_k, experts, None)

    def product(x: Any, w: Any, y: Any, weighted: bool, per_row: int) -> None:
        invoke_fused_moe_triton_kernel(
            x, w, y, None, None, given.weights if weighted else None, *order, weighted, per_row,
            tiles, compute_type=tl.bfloat16, use_fp8_w8a8=False, use_int8_w8a8=False,
            use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False,
        )  # fmt: skip

    def call() -> None:
        product(given.x, w13, given.y13, False, top_k)
        product(given.act, w2, given.y2, True, 1)

    return call, Order(*order, tiles["BLOCK_SIZE_M"])


def our_base(
    case: grid.Case, given: grid.Inputs, w13: Any, w2: Any, order: Any, lora: bool
) -> Callable[[], None]:
    from vllm_moe_lora.kernels.triton.grouped import Lora, grouped_product
    from vllm_moe_lora.kernels.triton.route import route

    experts, top_k, hidden, inner = grid.MODELS[case.model]
    layer = grid.layer_of(case, given)
    kept = layer._moe_lora_factors

    def call() -> None:
        on13 = on2 = None
        if lora:
            routing = route(
                given.ids, given.slots, case.adapters, experts, given.x.dtype, active=kept.active
            )
            on13, on2 = (Lora(one, routing, given.slots) for one in (kept.w13, kept.w2))
        y13, y2 = given.y13.view(-1, 2 * inner), given.y2.view(-1, hidden)
        grouped_product(y13, given.x, w13, order, top_k, None, on13, 2)
        grouped_product(y2, given.act, w2, order, top_k, given.weights, on2)

    return call


def together(*calls: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        for one in calls:
            one()

    return call


def measure(args: argparse.Namespace) -> bool:
    """Whether all cases agreed."""
    import torch
    import triton
    import vllm

    from vllm_moe_lora.kernels.triton import config

    print(f"{torch.cuda.get_device_name()}, vLLM {vllm.__version__}, triton {triton.__version__}")
    names = ("vllm", "base", "+upstream", "+ours", "tail")
    print(f"{'':32} {'rows':>4} " + " ".join(f"{name:>9}" for name in names) + "  us")
    fine = True
    for case in grid.cases(args):
        given = grid.inputs(case, "cuda")
        w13, w2 = weights(case, given)
        base, order = vllm_base(case, given, w13, w2)
        if config.base_tiles("", given.x.dtype, order.block_m) is None:
            print(f"{case!s:32} NOT TIMED: vLLM's blocks have {order.block_m} rows, ours do not")
            continue
        sides = (
            base,
            our_base(case, given, w13, w2, order, lora=False),
            together(base, grid.upstream(case, given)),
            together(base, grid.ours(case, given)),
            our_base(case, given, w13, w2, order, lora=True),
        )
        apart = grid.disagreement(given, sides[3], sides[4])
        if not apart < 0.02:
            print(f"{case!s:32} NOT TIMED: {apart:.1%} apart")
            fine = False
            continue
        times = [grid.graph_time(side, args.replays) for side in sides]
        print(f"{case!s:32} {order.block_m:4} " + " ".join(f"{one:9.1f}" for one in times))
        del given, w13, w2, sides, base, order
        torch.cuda.empty_cache()
    return fine


def dry_run() -> bool:
    """One tiny case on the interpreter against loops and kernels/reference.py."""
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    from vllm_moe_lora.kernels import reference
    from vllm_moe_lora.kernels.triton.grouped import Order

    grid.MODELS["tiny"] = (4, 2, 64, 32)
    case, block = grid.Case("tiny", 5, 8, 3, True), 16
    given = grid.inputs(case, "cpu", torch.float32)  # the interpreter is wrong in bf16
    w13, w2 = weights(case, given)
    flat, ids, blocks = given.ids.flatten().tolist(), [], []
    for expert in range(4):
        own = [pair for pair, one in enumerate(flat) if one == expert]
        ids += own + [len(flat)] * (-len(own) % block)
        blocks += [expert] * -(-len(own) // block)
    tensors = (torch.tensor(one, dtype=torch.int32) for one in (ids, blocks, [len(ids)]))
    ranks = torch.full((2, 3, 4), 8)

    def plain() -> None:
        for token in range(5):
            for k, expert in enumerate(given.ids[token].tolist()):
                given.y13[token, k] = w13[expert] @ given.x[token]
                given.y2[token, k] = w2[expert] @ given.act[2 * token + k]
        given.y2.mul_(given.weights[..., None])
        reference.add_lora(given.y13, given.x, given.a13, given.b13, ranks, given.slots, given.ids)
        reference.add_lora(
            given.y2, given.act, given.a2, given.b2, ranks[:1], given.slots, given.ids,
            given.weights,
        )  # fmt: skip

    tail = our_base(case, given, w13, w2, Order(*tensors, block), lora=True)
    apart = grid.disagreement(given, tail, plain)
    print(f"the tiny case is {apart:.1e} from loops and kernels/reference.py")
    return apart < 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=grid.MODELS, default=["qwen3", "mixtral"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(grid.TOKENS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--replays", type=int, default=51)
    parser.add_argument("--vllm", help="folder of an unpacked wheel, instead of the installed vLLM")
    parser.add_argument("--dry-run", action="store_true", help="needs no GPU")
    args = parser.parse_args()
    if args.vllm:
        sys.path.insert(0, args.vllm)
    if not (dry_run() if args.dry_run else measure(args)):
        sys.exit(1)


if __name__ == "__main__":
    main()
