"""The package as a whole: cheap to import, imports strictly downward, files small."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_moe_lora import cli

PACKAGE = Path(__file__).parents[2] / "vllm_moe_lora"

# Who may be imported by whom: a module may import from rooms further down only.
ROOMS = [
    "cli",
    "commands",
    "tuning",
    "patchset",
    "probe",
    "meta_model",
    "tiny",
    "trigger",
    "plugin",
    "seams",
    "platforms",
    "hooks",
    "rl",
    "layers",
    "loading",
    "fitting",
    "targets",
    "models",
    "adapters",
    "kernels",
    "fingerprint",
    "records",
    "sources",
    "supported",
    "report",
    "patching",
    "envs",
    "log",
]

PAYLOAD = (
    *("seams", "hooks", "rl", "layers", "loading", "fitting", "targets", "models", "adapters"),
    *("kernels", "fingerprint", "records", "patching", "envs", "log"),
)


def _modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield file, parts[0]


def _imports(file):
    """Full names of what a file of ours imports, modules below a room by name too."""
    home = ("vllm_moe_lora", *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == "vllm_moe_lora":
                yield from (f"{module}.{name.name}" for name in node.names)
            else:
                yield module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_imports_go_downward():
    for file, room in _modules():
        assert room in ROOMS, f"{file}: a room this test does not know"
        for name in _imports(file):
            if name.startswith("vllm_moe_lora."):
                other = name.split(".")[1]
                assert ROOMS.index(other) >= ROOMS.index(room), f"{file} imports {name}"


def test_payload_can_move():
    """The patches put these rooms into vllm/lora/moe_lora byte for byte."""
    for file, room in _modules():
        if room in PAYLOAD:
            assert "vllm_moe_lora." not in file.read_text(), file


def test_lowest_rooms_import_nothing_heavy():
    for file, room in _modules():
        if room in ("patching", "envs", "log", "supported", "sources"):
            heavy = [n for n in _imports(file) if n.split(".")[0] in ("torch", "vllm", "triton")]
            assert not heavy, f"{file} imports {heavy}"


def test_files_are_small():
    for file, _ in _modules():
        assert len(file.read_text().splitlines()) <= 400, file


def _python(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["vllm_moe_lora", "vllm_moe_lora.cli"])
def test_import_is_cheap(name):
    code = f"import sys, {name}; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    assert _python(code) == "[]"


def test_help_needs_neither_torch_nor_vllm():
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['vllm'] = None\n"
        "from vllm_moe_lora import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as stop:\n    print(stop.code)"
    )
    assert _python(code).endswith("0")


def test_usage_error_is_2():
    code = (
        "from vllm_moe_lora import cli\n"
        "try:\n    cli.main(['no-such-command'])\nexcept SystemExit as stop:\n    print(stop.code)"
    )
    assert _python(code) == "2"


def test_commands_and_their_modules_are_the_same_set():
    """Nothing is offered that does not exist, and nothing exists unoffered."""
    files = {file.stem for file in (PACKAGE / "commands").glob("*.py")} - {"__init__"}
    assert files == set(cli.COMMANDS)
    for name in files:
        module = importlib.import_module(f"vllm_moe_lora.commands.{name}")
        assert callable(module.add_arguments)
        assert callable(module.run)


def test_a_wrong_mode_does_not_keep_help_away():
    code = (
        "from vllm_moe_lora import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as stop:\n    print(stop.code)"
    )
    assert _python(code, VLLM_MOE_LORA="yes").endswith("0")
