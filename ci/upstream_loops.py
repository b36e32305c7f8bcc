"""What ci/upstream.sh --loops adds: patches whose kernels need a GPU, by loops in place of kernels.

tests/releases has layers, wrappers and methods of a release as they are, with loops in place of the
GPU's operators. Run on 0.33.0 without and with the series, never with the plugin.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "releases"), str(ROOT / "tests"), str(ROOT)]

# Patch -> script of tests/releases, its arguments, cases.
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "0002": ("parallel_experts.py", (), ("fs4-some",)),
    "0003": (
        "parallel_experts.py",
        (),
        ("ep3-uneven", "ep8-uneven", "ep3-uneven-fused", "ep3-uneven-interleaved"),
    ),
    "0004": (
        "quantised_experts.py",
        (),
        ("ct-triton", "moe_wna16", "moe_wna16-awq", "moe_wna16-8"),
    ),
    "0005": (
        "parallel_experts.py",
        (),
        ("marlin-padded", "marlin-padded-tp2", "marlin-padded-tp2-fused", "rounded-fused"),
    ),
    "0006": ("oai_experts.py", ("3.8",), ("fused", "slices", "ranks")),
    "0007": ("trtllm_experts.py", (), ("one slice", "one slice, tp2")),
    "0010": ("quantised_experts.py", (), ("mxfp8",)),
    "0011": ("parallel_experts.py", (), ("ep2-moved",)),
}


def word(found: dict[str, Any]) -> str:
    """The answer with an adapter is right, or wrong by as much as adapters do; or the error."""
    if "error" in found:
        return str(found["error"]).strip()[:60]
    if found["base_off"] > 0.1 * found["moved"]:
        return "base wrong"
    return "right" if found["off"] <= 0.1 * found["moved"] else "wrong"


def table(before: Path, after: Path) -> list[tuple[str, str, str, str]]:
    """Rows: patch, case, what the tree ``before`` answers, what the tree ``after`` does."""
    import unpacked

    rows = []
    for number, (script, arguments, cases) in CASES.items():
        # The scripts run with the plugin, too, where the patched functions are unknown to it.
        more = {"VLLM_MOE_LORA_ALLOW_UNVERIFIED": "1", "MOE_LORA_BARE": "1"}
        trees = [unpacked.asked(str(t), script, *arguments, **more) for t in (before, after)]
        for case in cases:
            words = [word(t["bare"][case]) if isinstance(t, dict) else t[-60:] for t in trees]
            rows.append((number, f"by loops: {case}", words[0], words[1]))
    return rows
