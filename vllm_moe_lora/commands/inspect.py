"""`vllm-moe-lora inspect`: prints what an adapter contains. It reads no weights of a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument(
        "--base", type=Path, help="folder of the model; only its config.json is read"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table; return 1 if the adapter cannot be read."""
    from vllm_moe_lora.adapters.errors import AdapterError
    from vllm_moe_lora.adapters.offline.convert import read

    try:
        adapter = read(args.adapter, args.base)
    except AdapterError as error:
        if args.json:
            print(json.dumps({"error": str(error)}))
        print(f"✗ {error}", file=sys.stderr)
        return 1
    rows = [*_experts(adapter), *_dense(adapter)]
    if args.json:
        facts = {"rows": rows, "notes": adapter.notes, "rank": adapter.config.rank}
        print(json.dumps({**facts, "alpha": adapter.config.alpha}, indent=1))
        return 0
    _table(rows)
    for note in adapter.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _experts(adapter: Any) -> list[dict[str, Any]]:
    """Return one row per layer with LoRA on routed experts."""
    from vllm_moe_lora.adapters.canonical import describe

    return [{"module": found.prefix, **describe(found)} for found in adapter.experts]


def _dense(adapter: Any) -> list[dict[str, Any]]:
    """Return one row for all other modules of a name, such as "*.q_proj" for those of all layers.

    Tensors that are no LoRA factors get a row each.
    """
    rows: dict[str, dict[str, Any]] = {}
    for key, tensor in adapter.found.dense.items():
        module, _, side = key.rpartition(".lora_")
        name = module.rpartition(".")[2]
        row = rows.setdefault(
            name,
            {"module": f"*.{name}", "layout": "matrix", "experts": 0, "projections": []}
            | {"ranks": [], "scales": [], "bytes": 0, "modules": 0},
        )
        row["bytes"] += tensor.numel() * tensor.element_size()
        if side.startswith("A"):
            rank = tensor.shape[0]
            scale, _ = adapter.config.scale(module.removeprefix("base_model.model."), rank)
            row["modules"] += 1
            row["ranks"] = sorted({*row["ranks"], rank})
            row["scales"] = sorted({*row["scales"], scale})
    rest = {**adapter.found.full, **adapter.found.magnitude, **adapter.found.bias}
    for key, tensor in rest.items():
        rows[key] = {"module": key, "layout": "no LoRA factor", "experts": 0, "projections": []}
        rows[key] |= {"ranks": [], "scales": [], "bytes": tensor.numel() * tensor.element_size()}
    return list(rows.values())


def _table(rows: list[dict[str, Any]]) -> None:
    """Print ``rows`` in aligned columns."""
    heads = ("module", "layout", "experts", "projections", "ranks", "scales", "MiB")
    lines = [heads]
    for row in rows:
        count = f" x {row['modules']}" if row.get("modules", 1) > 1 else ""
        lines.append(
            (
                row["module"] + count,
                row["layout"],
                str(row["experts"] or ""),
                " ".join(row["projections"]),
                " ".join(map(str, row["ranks"])),
                " ".join(f"{scale:g}" for scale in row["scales"]),
                f"{row['bytes'] / 2**20:.2f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
