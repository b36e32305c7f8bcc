"""The drawing of cpu_engine.py: each row's speed as a share of vLLM's as started by default."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_moe_lora import report

NAMES = {
    "a": "bare vLLM, eager",
    "b": "LoRA enabled, no adapter loaded",
    "b'": "four loaded, none in the batch",
    "c1": "one adapter",
    "c4": "four adapters in the batch",
    "c1e": "one adapter, eager",
}


def svg(rows: dict[str, dict[str, float]], cases: Iterable[str]) -> str:
    """Return bars: the speed of each row as a share of vLLM's as started by default."""
    shown, left, width, line = [row for row in NAMES if row in rows], 200, 300, 16
    parts, y = (
        ['<text x="4" y="14">speed, as a share of bare vLLM as started by default</text>'],
        40,
    )
    for case in cases:
        parts.append(f'<text x="4" y="{y}" font-weight="bold">{case}</text>')
        for row in shown:
            y += line
            share = rows[row][f"{case} share"]
            bar = f'x="{left}" y="{y - 10}" width="{width * min(share, 1.1):.0f}" height="11"'
            colour = "#888888" if row == "a" else "#1f77b4"
            parts.append(f'<text x="16" y="{y}">{NAMES[row]}</text><rect {bar} fill="{colour}"/>')
            parts.append(f'<text x="{left + width * share + 6:.0f}" y="{y}">{share:.2f}</text>')
        y += 26
    one = left + width
    parts.append(f'<path d="M{one} 24 V{y - 20}" stroke="#000" stroke-dasharray="3"/>')
    return report.svg(parts, one + 60, y)
