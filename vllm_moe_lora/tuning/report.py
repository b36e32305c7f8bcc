"""Shows what `vllm-moe-lora tune` has found: as text without paths or host names, and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_moe_lora import report
from vllm_moe_lora.records import KINDS, Record

if TYPE_CHECKING:
    from vllm_moe_lora.tuning.session import Session

COLOURS = {"upstream": "#888888", "ours": "#1f77b4", "tail": "#d62728"}


def text(session: Session, record: Record | None) -> str:
    """Return what one session has found, to read and to paste into an issue."""
    here = session.conditions
    lines = [
        f"layer: {session.shape}",
        f"{here.device} ({here.arch}), driver {here.driver or '-'}, triton {here.triton}, "
        f"vLLM {here.vllm}, kernels {here.kernels}",
    ]
    if not session.on_gpu:
        lines.append("Triton's interpreter: the numbers are checked, the times are invented")
    for kind, why in sorted(session.refused.items()):
        lines.append(f"not used: {kind}: {why}")
    lines += [f"note: {one}" for one in session.remarks]
    if record is None:
        return "\n".join([*lines, "nothing was timed"])
    lines.append(f"tiles: {record.tiles or 'as config.py has them'}")
    what = "LoRA and base GEMMs" if record.base else "LoRA"
    if session.experts:
        what = f"{session.experts} with LoRA, activation and sum,"
    lines.append(f"us for {what} of one layer: median (10th to 90th percentile), tokens per batch")
    lines.append(f"{'tokens':>6} " + " ".join(f"{kind:>24}" for kind in KINDS) + "  winner  saves")
    for choice in record.choices:
        cells = []
        for kind in KINDS:
            us = choice.us.get(kind)
            cells.append(f"{us[0]:.1f} ({us[1]:.1f} to {us[2]:.1f})" if us else "-")
        saved = choice.us["upstream"][0] - choice.us[choice.winner][0]
        row = " ".join(f"{cell:>24}" for cell in cells)
        lines.append(f"{choice.tokens:>6} {row}  {choice.winner:<8} {saved:.1f}")
    return "\n".join(lines)


def svg(records: Sequence[Record]) -> str:
    """Return a drawing of the times over the batch size, both logarithmic, one panel a shape."""
    from math import log10

    width, height, left, top = 560.0, 260.0, 60.0, 30.0
    panels = []
    for number, record in enumerate(records):
        tokens = [choice.tokens for choice in record.choices]
        times = [us[0] for choice in record.choices for us in choice.us.values()]
        low, high = log10(max(min(times), 1e-3)), log10(max(times))
        first, last = log10(tokens[0]), log10(tokens[-1])
        across, up = max(last - first, 1e-9), max(high - low, 1e-9)

        def x(value: float, first: float = first, across: float = across) -> float:
            return left + (log10(value) - first) / across * (width - left - 90)

        def y(value: float, low: float = low, up: float = up) -> float:
            return height - 40 - (log10(max(value, 1e-3)) - low) / up * (height - 40 - top)

        parts = [f'<text x="{left}" y="18">{record.shape}</text>']
        for kind in KINDS:
            points = [(c.tokens, c.us[kind][0]) for c in record.choices if kind in c.us]
            if points:
                line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
                style = f'fill="none" stroke="{COLOURS[kind]}" stroke-width="1.5"'
                parts.append(f'<polyline points="{line}" {style}/>')
                end = f'x="{x(points[-1][0]) + 6:.1f}" y="{y(points[-1][1]) + 4:.1f}"'
                parts.append(f'<text {end} fill="{COLOURS[kind]}">{kind}</text>')
        for value in (tokens[0], tokens[-1]):
            parts.append(f'<text x="{x(value):.1f}" y="{height - 20}">{value} tokens</text>')
        for us in (min(times), max(times)):
            parts.append(f'<text x="2" y="{y(us):.1f}">{us:.0f} µs</text>')
        panels.append(f'<g transform="translate(0,{number * height})">{"".join(parts)}</g>')
    return report.svg(panels, width, height * max(1, len(records)))
