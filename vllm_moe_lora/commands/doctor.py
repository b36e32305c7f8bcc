"""`vllm-moe-lora doctor`: checks whether the plugin is active in this environment.

It starts a fresh Python process in which vLLM loads its plugins, and reports the state there. With
--model it does the same as `vllm-moe-lora plan`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_moe_lora import records, supported
from vllm_moe_lora.commands import plan
from vllm_moe_lora.models.rows import ROWS
from vllm_moe_lora.patchset.mail import in_words
from vllm_moe_lora.report import Finding, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="folder of a model; then do as `plan` does")
    plan.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; return 0 if there is no problem, 1 if there is one, 2 for wrong usage."""
    if args.adapter and not args.model:
        print("doctor: --adapter needs --model", file=sys.stderr)
        return 2
    findings, command = plan.report(args) if args.model else (_environment(), None)
    return show(findings, command, args)


# Runs in a fresh process, in which vLLM calls the plugin's entry point, as in every engine process.
_SCRIPT = """
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
from vllm_moe_lora import envs, records
print("@" + json.dumps({
    "python": sys.version.split()[0],
    "vllm": vllm.__version__,
    "torch": torch.__version__,
    "triton": version("triton"),
    "platform": current_platform.device_type,
    "entry_points": [e.name for e in plugins],
    "status": vllm_moe_lora.status(),
    "replaced_by_others": patching.replaced_by_others(),
    "kernels": envs.get("VLLM_MOE_LORA_KERNELS"),
    "records": [str(path) for path in records.files()],
}))
"""


def _environment() -> list[Finding]:
    """Run `_SCRIPT` and turn what it prints into findings."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False, timeout=300
    )
    line = next((text for text in done.stdout.splitlines() if text.startswith("@")), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or ["the process printed nothing"])[-1]
        return [Finding(False, f"vLLM cannot be imported here: {last}", "repair this environment")]
    facts: dict[str, Any] = json.loads(line[1:])
    versions = ("python", "vllm", "torch", "triton", "platform")
    findings = [Finding(True, ", ".join(f"{key} {facts[key]}" for key in versions))]
    if "moe_lora" in facts["entry_points"]:
        findings.append(Finding(True, "vLLM finds the plugin by its entry point"))
    else:
        cure = "pip install vllm-moe-lora in the environment in which vLLM runs"
        findings.append(Finding(False, "vLLM does not find the plugin by its entry point", cure))
    if not facts["status"]:
        warnings = [text for text in done.stderr.splitlines() if "vllm-moe-lora:" in text]
        why = warnings[-1].partition("vllm-moe-lora:")[2].strip() if warnings else "it is off"
        cure = "look at the environment variables VLLM_MOE_LORA and VLLM_PLUGINS"
        findings.append(Finding(False, f"the plugin is not active: {why}", cure))
    for feature, state in sorted(facts["status"].items()):
        harmless = state == "on" or "platform" in state or "not needed" in state
        cure = "" if harmless else "upgrade vllm-moe-lora to a release made for this vLLM"
        if "VLLM_MOE_LORA" in state:
            cure = "unset VLLM_MOE_LORA"
        what = f"{feature}: {state}. {in_words(feature)}".rstrip(". ")
        findings.append(Finding(harmless, what, cure))
    if facts["status"].get("model-classes") == "on":
        findings.append(Finding(True, _classes(facts["vllm"])))
    for target, owner in facts["replaced_by_others"].items():
        what = f"{owner} replaced {target} after the plugin did, so LoRA may not be applied there"
        findings.append(Finding(False, what, f"start without {owner}"))
    if facts["platform"] == "cuda":
        findings.append(_kernels(facts["kernels"], facts["records"]))
    return findings


def _kernels(choice: str, files: list[str]) -> Finding:
    """Say which Triton kernels compute LoRA on experts.

    Args:
        choice: VLLM_MOE_LORA_KERNELS.
        files: of all records of `vllm-moe-lora tune`.
    """
    if choice != "auto":
        return Finding(True, f"kernels for LoRA on experts: {choice} (VLLM_MOE_LORA_KERNELS)")
    if not files:
        what = "kernels for LoRA on experts: vLLM's; `vllm-moe-lora tune MODEL` measures ours here"
        return Finding(True, what)
    said = []
    for path in files:
        try:
            found = records.read(Path(path))
        except records.RecordError as error:
            return Finding(False, str(error), "delete the file, or tune again")
        here = found.conditions
        said.append(f"{found.shape} on {here.device}, vLLM {here.vllm}, triton {here.triton}")
    what = "kernels for LoRA on experts: as these records say, where they match: " + "; ".join(said)
    return Finding(True, what)


def _classes(version: str) -> str:
    """Name the rows of models/rows.py for a version of vLLM."""
    release = supported.release_of(version)
    rows = [row for row in ROWS if row.made_for(release)]
    served = [f"{name} ({row.known})" for row in rows if not row.refused for name in row.names]
    refused = [name for row in rows if row.refused for name in row.names]
    added, left_out = (", ".join(dict.fromkeys(names)) for names in (served, refused))
    return f"model-classes: LoRA is added to {added}; refused with the reason: {left_out}"
