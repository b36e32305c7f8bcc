"""Compiles 0018's kernels for GPUs that are not here: ci/upstream_compiled.py TREE. A table.

TREE/vllm is vLLM 0.33.0 with the patches. Ends with 1 where a kernel spills registers, needs more
shared memory than the GPU has, or loads weights 2 bytes at a time. ci/upstream.sh --loops runs it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ.pop("TRITON_INTERPRET", None)
os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_PLUGINS": ""}
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "ci")]

import ahead  # noqa: E402

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
SPILLED = 32  # ptxas leaves a few stray bytes where it could do without


def kernels(op: Any, arch: str, pairs: int, rank: int) -> list[tuple[Any, ...]]:
    """(name, kernel, pointers, constants, launch options) of a batch of so many pairs, bf16."""
    config = op._get_config(pairs, rank, 2048)
    stages = 2 if arch.startswith("gfx") else config.shrink_stages
    both = {
        "RANK": rank,
        "NUM_SLICES": 2,
        "SPLIT_K": config.split_k,
        "TILE_ROWS": config.tile_rows,
        "BLOCK_R": config.block_r,
    }
    shrink = both | {"BLOCK_K": config.block_k}
    expand = both | {"BLOCK_N": config.block_n, "MUL_ROUTED_WEIGHT": True, "ADD_INPUTS": True}
    bf16 = dict.fromkeys(("x_ptr", "a0_ptr", "a1_ptr"), "*bf16")
    tables = dict.fromkeys(("order_ptr", "tiles_ptr"), "*i32") | {"z_ptr": "*fp32"}
    out = dict.fromkeys(("y_ptr", "b0_ptr", "b1_ptr"), "*bf16") | {"topk_weights_ptr": "*fp32"}
    made = [
        ("shrink", op._segmented_moe_lora_shrink_kernel, bf16 | tables, shrink),
        ("expand", op._segmented_moe_lora_expand_kernel, out | tables, expand),
    ]
    sort = {"HAS_MAP": True, "TILE_ROWS": config.tile_rows, "BLOCK": 32, "BLOCK_OTHERS": 128}
    ids = ("topk_ids_ptr", "token_lora_mapping_ptr", "adapter_enabled_ptr", "expert_map_ptr")
    ids_tables = dict.fromkeys((*ids, "order_ptr", "tiles_ptr"), "*i32")
    made.append(("sort", op._sort_pairs_kernel, ids_tables, sort))
    options = [(config.shrink_warps, stages), (config.expand_warps, 1), (4, 3)]
    names = "num_warps", "num_stages"
    return [(*one, dict(zip(names, o, strict=True))) for one, o in zip(made, options, strict=True)]


def main(tree: str) -> int:
    sys.path[:0] = [tree, str(Path(os.environ["SDISTS"], "site"))]
    import upstream_interpreted  # noqa: F401  vLLM finds Triton
    from triton.backends import backends
    from vllm.lora.ops.triton_ops import segmented_moe_lora_op as op

    del backends["cpu"]  # Triton has none

    bad = 0
    for arch in SHARED:
        for pairs in (op._FEW_PAIRS, op._FEW_PAIRS + 1):
            for rank in (8, 16, 32, 64, 128):
                for name, kernel, *rest, options in kernels(op, arch, pairs, rank):
                    # Widths, strides and slice sizes of models are multiples of 16.
                    built = ahead.build(kernel, arch, *rest, divisible=True, **options)
                    narrow = re.findall(r"ld\.global\S*\.[bus]16\b", built.text)
                    wrong = built.spilled > SPILLED or built.shared > SHARED[arch] or narrow
                    bad += bool(wrong)
                    said = f"{built.registers} registers, {built.spilled} bytes spilled"
                    said += f", {built.shared >> 10} KiB shared"
                    said += f", {len(narrow)} loads of 2 bytes" if narrow else ""
                    print("compiled", arch, f"{pairs} pairs, rank {rank}", name, said, flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
