"""A plugin of pytest: turns vLLM's plugins on, and writes each test's outcome to $OUTCOMES.

As JSON: test -> [when, outcome, the last line of what was raised].
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FOUND: dict[str, list[str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """As an engine does; many of these tests use vLLM's classes without one."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    import vllm_moe_lora

    on = bool(vllm_moe_lora.status())
    assert on == (os.environ.get("VLLM_MOE_LORA") != "0"), "not as the environment says"


def _keep(name: str, when: str, report: object) -> None:
    said = str(report.longrepr or "").strip().splitlines()
    FOUND[name] = [when, report.outcome, said[-1] if said else ""]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _keep(report.nodeid, report.when, report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        _keep(report.nodeid, "collect", report)


def pytest_sessionfinish() -> None:
    Path(os.environ["OUTCOMES"]).write_text(json.dumps(FOUND, indent=0, sort_keys=True))
