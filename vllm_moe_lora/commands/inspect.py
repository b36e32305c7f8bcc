"""`vllm-moe-lora inspect`: prints what an adapter contains, in a few lines or layer by layer.

It reads no weights of a model. --svg draws how far the adapter moves each expert.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_moe_lora import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument(
        "--base", type=Path, help="folder of the model; only its config.json is read"
    )
    parser.add_argument("--layers", action="store_true", help="print one line for each layer")
    parser.add_argument("--svg", type=Path, help="draw the norm of each expert's delta here")
    parser.add_argument("--force", action="store_true", help="overwrite --svg")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table; return 1 if the adapter cannot be read."""
    from vllm_moe_lora.adapters.errors import AdapterError
    from vllm_moe_lora.adapters.offline.convert import read

    if args.svg is not None and args.svg.exists() and not args.force:
        print(f"✗ {args.svg} exists. Cure: add --force to replace it.", file=sys.stderr)
        return 1
    try:
        adapter = read(args.adapter, args.base)
    except AdapterError as error:
        if args.json:
            print(json.dumps({"error": str(error)}))
        print(f"✗ {error}", file=sys.stderr)
        return 1
    rows = [*_experts(adapter), *_dense(adapter)]
    if args.svg is not None:
        args.svg.write_text(_heat_map(adapter.experts))
    if args.json:
        facts = {"rows": rows, "notes": adapter.notes, "rank": adapter.config.rank}
        print(json.dumps({**facts, "alpha": adapter.config.alpha}, indent=1))
        return 0
    if args.layers:
        _table(rows)
    else:
        print("\n".join(_summary(adapter, rows)))
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


def _summary(adapter: Any, rows: list[dict[str, Any]]) -> list[str]:
    """Return three lines: the whole adapter, its routed experts, its other modules."""
    found, config = adapter.found, adapter.config
    parts = (found.dense, found.full, found.magnitude, found.bias)
    count = sum(len(part) for part in parts)
    count += sum(len(sides) for group in found.experts.values() for sides in group.values())
    size = sum(row["bytes"] for row in rows) / 2**20
    lines = [f"rank {config.rank}, alpha {config.alpha:g}; {count:,} tensors, {size:,.1f} MiB"]
    experts = [row for row in rows if row["experts"]]
    if not experts:
        lines.append("routed experts: no LoRA")
    else:
        merged = {
            key: sorted({one for row in experts for one in row[key]})
            for key in ("projections", "ranks", "scales")
        }
        layouts = ", ".join(sorted({row["layout"] for row in experts}))
        counts = sorted({row["experts"] for row in experts})
        lines.append(
            f"routed experts: {layouts}; {len(experts)} layers, "
            f"{' or '.join(map(str, counts))} experts each, {' '.join(merged['projections'])}; "
            f"ranks {' '.join(map(str, merged['ranks']))}; "
            f"scales {' '.join(f'{scale:g}' for scale in merged['scales'])}"
        )
    others = [
        f"{row['module'].removeprefix('*.')} ({row['modules']})" for row in rows if "modules" in row
    ]
    odd = [row["module"] for row in rows if row["layout"] == "no LoRA factor"]
    others += [f"{len(odd)} tensors that are no LoRA factors, such as {odd[0]}"] if odd else []
    lines.append(f"other modules: {', '.join(others) or 'none'}")
    return lines


def _heat_map(layers: list[Any]) -> str:
    """Return an SVG: one row a layer, one cell an expert, dark where the delta's norm is large."""
    from vllm_moe_lora.adapters.offline.norms import delta_norms

    norms = [delta_norms(layer) for layer in layers]
    most = max((value for row in norms for value in row.values()), default=0.0) or 1.0
    columns = 1 + max((max(row, default=0) for row in norms), default=0)
    cell, left, top = 10, 90, 40
    parts = [f'<text x="4" y="16">norm of each expert&#39;s delta, 0 to {most:.3g}</text>']
    for number, (layer, row) in enumerate(zip(layers, norms, strict=True)):
        y = top + number * cell
        name = ".".join(layer.prefix.split(".")[1:3])
        parts.append(f'<text x="4" y="{y + cell - 1}">{name}</text>')
        for expert in range(columns):
            title = f"{name}, expert {expert}: {row.get(expert, 0.0):.4g}"
            style = f'fill="#08306b" fill-opacity="{row.get(expert, 0.0) / most:.3f}"'
            place = f'x="{left + expert * cell}" y="{y}" width="{cell - 1}" height="{cell - 1}"'
            parts.append(f"<rect {place} {style}><title>{title}</title></rect>")
    ticks = range(0, columns, max(1, columns // 8))
    parts += [f'<text x="{left + one * cell}" y="{top - 6}">{one}</text>' for one in ticks]
    width, height = left + columns * cell + 10, top + len(layers) * cell + 10
    return report.svg(parts, width, height, font_size=9)


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
