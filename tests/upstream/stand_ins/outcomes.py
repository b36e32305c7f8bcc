"""A plugin of pytest: turns vLLM's plugins on, and writes each test's outcome to $OUTCOMES.

One line of JSON for each: [test, when, outcome, the last line of what was raised]. The last line of
a test counts. With pytest-xdist the process that hears of all of them writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure(config: pytest.Config) -> None:
    """As an engine does; many of these tests use vLLM's classes without one."""
    if not WORKER and config.getoption("numprocesses", None):
        return
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    import vllm_moe_lora

    on = bool(vllm_moe_lora.status())
    assert on == (os.environ.get("VLLM_MOE_LORA") != "0"), "not as the environment says"


def _keep(name: str, when: str, report: object) -> None:
    if not WORKER:
        said = str(report.longrepr or "").strip().splitlines()
        with Path(os.environ["OUTCOMES"]).open("a") as file:
            print(json.dumps([name, when, report.outcome, said[-1] if said else ""]), file=file)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _keep(report.nodeid, report.when, report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        _keep(report.nodeid, "collect", report)
