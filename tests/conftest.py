"""For all tests: nothing is downloaded, what cannot run here is not collected, and workers."""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest
import release
import torch
import unpacked

from vllm_moe_lora import supported

# Engines and the oracle run on random weights; nothing is ever to be downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Several hundred processes import the same files, of up to ten releases: compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "draw engines for so long in tests/e2e/matrix, and shrink what fails"
    parser.addoption("--minutes", type=float, default=0, help=text)


LEFT_OUT: pytest.StashKey[Counter[str]] = pytest.StashKey()


def _missing(item: pytest.Item) -> str:
    """What a test wants that is not here, with the command that has it; "" if all is here."""
    marks = {mark.name for mark in item.iter_markers()}
    if "gpu" in marks and not torch.cuda.is_available():  # tests of kernels want no vLLM
        return "want a GPU: ci/gpu.sh"
    if "legacy" in marks and not release.installed().startswith("0.11."):
        return "want vLLM 0.11.1: ci/legacy.sh"
    if "cpu_engine" in marks and release.installed() == "none":
        return "want vLLM: ci/install.sh"
    if "long" in marks and os.environ.get("MOE_LORA_ALL") != "1":
        return "take long: ci/test.sh --all"
    if "verl" in marks and not unpacked.other("verl-0.9.1").is_dir():
        return "want verl's wheel: ci/trees.py verl==0.9.1"
    if any("empty parameter set" in mark.kwargs.get("reason", "") for mark in item.iter_markers()):
        return "want a release that is not here: ci/test.sh --all"
    if "ascend" in marks and not unpacked.other("vllm_ascend-0.23.0.post1").is_dir():
        return "want vllm-ascend's files: ci/trees.py vllm_ascend==0.23.0.post1"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {item: _missing(item) for item in items}
    left_out = [item for item, why in missing.items() if why]
    config.stash[LEFT_OUT] = Counter(missing[item] for item in left_out)
    items[:] = [item for item in items if not missing[item]]
    config.hook.pytest_deselected(items=left_out)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = dict(config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from together import Scheduling

    return Scheduling(config, log) if config.getvalue("dist") == "loadscope" else None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    node.config.stash[LEFT_OUT] = Counter(node.workeroutput.get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    known, here = supported.releases(), unpacked.available()
    parts = [f"{n} tests {why}" for why, n in config.stash.get(LEFT_OUT, Counter()).items()]
    if len(here) < len(known):
        parts.append(f"{len(known) - len(here)} of {len(known)} releases: ci/test.sh --all")
    if parts:
        terminalreporter.line(f"Not collected: {'; '.join(parts)}")
