"""`vllm-moe-lora convert`: writes an adapter in another layout, or merges it into a model.

Merging is the way out for adapters that vLLM cannot serve, for example with DoRA.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_moe_lora.adapters.names import LAYOUTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", type=Path, help="folder of the adapter")
    parser.add_argument("dst", type=Path, help="folder to write to")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", choices=LAYOUTS, help="new layout of the routed experts")
    what.add_argument(
        "--merge-into",
        type=Path,
        metavar="MODEL",
        help="write the unquantised MODEL with the adapter merged into its weights",
    )
    parser.add_argument(
        "--base", type=Path, help="folder of the model; only its config.json is read"
    )
    parser.add_argument("--dry-run", action="store_true", help="write nothing; say what would be")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Convert or merge; return the exit code."""
    from vllm_moe_lora.adapters.errors import AdapterError
    from vllm_moe_lora.adapters.offline import merge
    from vllm_moe_lora.adapters.offline.convert import convert, read, save

    if args.dst.exists() and not args.force and not args.dry_run:
        cure = "choose another name, or add --force to replace it"
        print(f"✗ {args.dst} exists. Cure: {cure}.", file=sys.stderr)
        return 1
    try:
        adapter = read(args.src, args.base or args.merge_into)
        if args.merge_into:
            plan = merge.Plan(adapter, args.merge_into)
            result: dict[str, Any] = {"weights": len(plan.changes), "notes": adapter.notes}
            if not args.dry_run:
                plan.write(args.dst, _progress)
        else:
            written, config = convert(adapter, args.to, _progress)
            result = {
                "tensors": len(written.tensors),
                "bytes": sum(t.numel() * t.element_size() for t in written.tensors.values()),
                "notes": sorted(written.notes),
            }
            if not args.dry_run:
                save(args.dst, written.tensors, config)
    except AdapterError as error:
        print(f"✗ {error}", file=sys.stderr)
        return 1
    for note in result["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        did = "would write" if args.dry_run else "wrote"
        what = ", ".join(f"{n} {key}" for key, n in result.items() if key != "notes")
        print(f"✓ {did} {args.dst}: {what}")
    return 0


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    """Yield ``items``, with a progress bar titled ``what`` if stderr is a terminal."""
    if not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return items
    return track(list(items), description=what, console=Console(stderr=True), transient=True)
