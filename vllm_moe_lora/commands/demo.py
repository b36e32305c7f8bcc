"""`vllm-moe-lora demo`: shows on a tiny model that the plugin applies an adapter correctly.

It builds a random INT4 MoE model and an adapter, and runs them in vLLM twice: without the plugin,
which ends in an error, and with it. The expected log-probs (the "oracle") come from Hugging Face
transformers in fp32, with the adapter merged into the dequantised weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PROMPTS = [[1, 2, 3], [5, 9, 11, 300, 17, 44, 2, 8], list(range(20, 60))]
TOP = 40  # compare the log-probs of this many tokens: the oracle's likeliest
# vLLM runs INT4 in bf16, so it cannot be exact. The mean difference may be this share of the mean
# change that the adapter makes.
TOLERANCE = 0.10
NEXT = (
    "vllm-moe-lora inspect ADAPTER                  what the adapter contains",
    "vllm-moe-lora plan MODEL --adapter ADAPTER     whether it will load, in how much memory,",
    "                                               and the command that serves it",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--svg", type=Path, help="write the table as a picture here")
    parser.add_argument("--verbose", action="store_true", help="print vLLM's own output too")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its table; return 0 if the plugin's answers are right."""
    say = _Progress(args.verbose)
    with tempfile.TemporaryDirectory(prefix="vllm-moe-lora-demo-") as folder:
        rows, bare = _measure(Path(folder), say)
    right = all(row["right"] for row in rows)
    if args.json:
        print(json.dumps({"bare_vllm": bare, "rows": rows, "right": right}, indent=1))
    else:
        _table(bare, rows, right, args.svg)
    return 0 if right else 1


class _Progress:
    """Prints the demo's steps to stderr and, with --verbose, vLLM's own output."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose

    def __call__(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def log(self, text: str) -> None:
        if self.verbose:
            self(text)


def _measure(folder: Path, say: _Progress) -> tuple[list[dict[str, Any]], str]:
    """Build, run and compare.

    Returns:
        One row per prompt (see `_row`), and what vLLM without the plugin says.
    """
    from vllm_moe_lora.tiny import adapters, engine, models, oracle, quantise

    say("1/4 building a random Qwen2-MoE (GPTQ INT4, shared expert) and an adapter")
    full = models.build("qwen2_moe", folder / "full")
    packed, plain = folder / "int4", folder / "dequantised"
    quantise.quantise(full, packed, plain, form="gptq", group_size=64)
    adapter = adapters.write(plain, folder / "adapter")
    merged = oracle.merge(plain, adapter, folder / "merged")
    say("2/4 oracle: Hugging Face in fp32, adapter merged into the dequantised weights")
    base, expected = oracle.log_probs(plain, PROMPTS), oracle.log_probs(merged, PROMPTS)

    job = engine.Job(
        model=str(packed),
        adapters={"demo": str(adapter)},
        rounds=[[(p, name) for p in PROMPTS for name in (None, "demo")]],
        options={"dtype": "bfloat16"},
    )
    say("3/4 vLLM without the plugin")
    try:
        _, _, log = engine.run(job, {"VLLM_MOE_LORA": "0", "VLLM_PLUGINS": ""})
        bare = "started without error"
    except engine.EngineError as error:
        log, bare = error.log, str(error)
    say.log(log)
    say("4/4 vLLM with the plugin")
    answers, _, log = engine.run(job, {"VLLM_MOE_LORA": "1"})
    say.log(log)
    got = [logprobs[-1] for _, logprobs in answers[0]]
    rows = [
        _row(PROMPTS[i], got[2 * i], got[2 * i + 1], base[i][-1], expected[i][-1])
        for i in range(len(PROMPTS))
    ]
    return rows, bare


def _row(
    prompt: list[int],
    got_base: torch.Tensor,
    got: torch.Tensor,
    base: torch.Tensor,
    expected: torch.Tensor,
) -> dict[str, Any]:
    """Compare the next token's log-probs after one prompt.

    Args:
        prompt: token ids.
        got_base, got: [vocab] of vLLM, without and with the adapter.
        base, expected: [vocab] of the oracle, without and with the adapter.
    """
    top = expected.topk(TOP).indices
    difference, effect = (got - expected)[top].abs(), (base - expected)[top].abs()
    shown = top[:3].tolist()
    return {
        "prompt_tokens": len(prompt),
        "tokens": shown,
        "base": [round(got_base[t].item(), 3) for t in shown],
        "adapter": [round(got[t].item(), 3) for t in shown],
        "oracle": [round(expected[t].item(), 3) for t in shown],
        "max_difference": difference.max().item(),
        "mean_difference": difference.mean().item(),
        "mean_effect": effect.mean().item(),
        "right": bool(difference.mean() <= TOLERANCE * effect.mean()),
    }


def _table(bare: str, rows: list[dict[str, Any]], right: bool, svg: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    # A picture needs a fixed width; on a terminal the table takes what it needs.
    console = Console(record=True, width=110) if svg else Console()
    style = "red" if "rror" in bare else None
    console.print(f"\nvLLM without the plugin: {bare}\n", style=style, markup=False)
    table = Table(title="log-probs of the oracle's three likeliest tokens (vLLM bf16 / INT4, CPU)")
    for name in ("prompt", "base", "adapter", "merged oracle", "max diff", "mean diff / effect"):
        table.add_column(name)
    table.add_column("verdict")
    for row in rows:
        table.add_row(
            f"{row['prompt_tokens']} tokens",
            *(" ".join(f"{v:.2f}" for v in row[key]) for key in ("base", "adapter", "oracle")),
            f"{row['max_difference']:.3f}",
            f"{row['mean_difference']:.3f} / {row['mean_effect']:.3f}",
            "✓" if row["right"] else "✗",
        )
    console.print(table)
    console.print(
        f"{'✓ adapter == merged' if right else '✗ adapter differs from merged'} (mean difference "
        f"at most {TOLERANCE:.0%} of the adapter's effect, over the {TOP} likeliest tokens)"
    )
    if svg:
        console.save_svg(str(svg), title="vllm-moe-lora demo")
    print("\nNext, with your own model and adapter:\n    " + "\n    ".join(NEXT))
