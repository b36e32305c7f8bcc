"""`vllm-moe-lora doctor`: is the plugin active here, and will these adapters load on this model?"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_moe_lora.commands import plan
from vllm_moe_lora.report import Finding, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="folder of a model: as `plan` does")
    plan.options(parser)


def run(args: argparse.Namespace) -> int:
    if args.adapter and not args.model:
        print("doctor: --adapter needs --model", file=sys.stderr)
        return 2
    findings, command = plan.report(args) if args.model else (_environment(), None)
    return show(findings, command, args)


# Runs in a fresh process, where vLLM itself calls the entry point as it does in every engine.
_PROBE = """
import importlib.metadata, json, sys
import torch, vllm
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
import vllm_moe_lora
from vllm_moe_lora import patching
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
print("@" + json.dumps({
    "python": sys.version.split()[0],
    "vllm": vllm.__version__,
    "torch": torch.__version__,
    "triton": version("triton"),
    "platform": current_platform.device_type,
    "entry_points": [e.name for e in plugins],
    "status": vllm_moe_lora.status(),
    "strangers": patching.strangers(),
}))
"""


def _environment() -> list[Finding]:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False, timeout=300
    )
    line = next((text for text in done.stdout.splitlines() if text.startswith("@")), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return [Finding(False, f"vLLM does not start here: {last}", "repair this environment")]
    facts: dict[str, Any] = json.loads(line[1:])
    versions = ("python", "vllm", "torch", "triton", "platform")
    findings = [Finding(True, ", ".join(f"{key} {facts[key]}" for key in versions))]
    if "moe_lora" in facts["entry_points"]:
        findings.append(Finding(True, "vLLM finds the plugin by its entry point"))
    else:
        cure = "pip install vllm-moe-lora into the environment that vLLM runs in"
        findings.append(Finding(False, "vLLM does not find the plugin by its entry point", cure))
    if not facts["status"]:
        warnings = [text for text in done.stderr.splitlines() if "vllm-moe-lora:" in text]
        said = warnings[-1].partition("vllm-moe-lora:")[2].strip() if warnings else "it is off"
        findings.append(
            Finding(False, f"the plugin is not active: {said}", "see VLLM_MOE_LORA, VLLM_PLUGINS")
        )
    for feature, state in facts["status"].items():
        harmless = state == "on" or "platform" in state or "not needed" in state
        cure = "" if harmless else "upgrade vllm-moe-lora to a release made for this vLLM"
        if "VLLM_MOE_LORA" in state:
            cure = "unset VLLM_MOE_LORA"
        findings.append(Finding(harmless, f"{feature}: {state}", cure))
    for target, owner in facts["strangers"].items():
        findings.append(
            Finding(False, f"{target} was replaced by {owner} after us", f"start without {owner}")
        )
    return findings
