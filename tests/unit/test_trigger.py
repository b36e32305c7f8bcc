"""Every order of importing vLLM, importing us and loading plugins, on a vLLM of five files."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_moe_lora import envs
from vllm_moe_lora.patching import digest

PACKAGE = Path(__file__).parents[2] / "vllm_moe_lora"

VLLM = {
    "vllm/__init__.py": "__version__ = '1.2.3+cpu'\n",
    "vllm/envs.py": "environment_variables = {}\n",
    "vllm/platforms.py": """
class current_platform:
    device_type = "cpu"
    is_out_of_tree = staticmethod(lambda: False)
""",
    "vllm/victim.py": "def f():\n    return 'upstream'\n",
    # What vLLM 0.29 to 0.33 do: loading is guarded, calling is not, and once is enough.
    "vllm/plugins/__init__.py": """
import os
plugins_loaded = False
def load_general_plugins():
    global plugins_loaded
    if plugins_loaded:
        return
    plugins_loaded = True
    from importlib.metadata import entry_points
    allowed = os.environ["VLLM_PLUGINS"].split(",") if "VLLM_PLUGINS" in os.environ else None
    functions = []
    for entry in entry_points(group="vllm.general_plugins"):
        if allowed is None or entry.name in allowed:
            try:
                functions.append(entry.load())
            except Exception:
                print("vLLM PASSED OVER A PLUGIN")
    for function in functions:
        function()
""",
    "vllm_moe_lora/supported.toml": '[releases."1.2.3"]\nf = "engine"\n',
    "vllm_moe_lora/hooks/victim.py": """
from vllm_moe_lora.patching import Hook
HOOKS = (
    Hook("f", "vllm.victim:f", lambda o: lambda: "ours", ">=1", "why", "", "until", hashed=False),
)
""",
}

PRELUDE = """
import importlib.metadata, sys
class Entry:
    name, module = "moe_lora", "vllm_moe_lora"
    load = staticmethod(lambda: __import__("vllm_moe_lora").register)
installed = {installed}
importlib.metadata.entry_points = lambda group: (
    [Entry] if installed and group == "vllm.general_plugins" else []
)
"""
ENDING = """
import vllm.victim
print("STATE", vllm.victim.f())
"""
STEPS = {
    "vllm": "import vllm.plugins",
    "copy": "from vllm.plugins import load_general_plugins as copy",
    "us": "import vllm_moe_lora",
    "load": "import vllm.plugins; vllm.plugins.load_general_plugins()",
    "load-copy": "copy()",
    "register": "import vllm_moe_lora; vllm_moe_lora.register()",
    "revert": "import vllm_moe_lora; vllm_moe_lora.revert()",
    "look": "import importlib.util; importlib.util.find_spec('vllm.plugins')",
}


@pytest.fixture
def run(tmp_path):
    """run(steps, installed, **env) -> (exit status, output); ends with STATE upstream or ours."""
    ignore = shutil.ignore_patterns("__pycache__", "tiny", "layers", "kernels", "commands")
    shutil.copytree(PACKAGE, tmp_path / "vllm_moe_lora", ignore=ignore)
    for hook in (tmp_path / "vllm_moe_lora" / "hooks").glob("*.py"):
        if hook.name != "__init__.py":
            hook.unlink()
    for name, text in VLLM.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def run(steps, installed=False, **env):
        code = PRELUDE.format(installed=installed) + "\n".join(STEPS[s] for s in steps) + ENDING
        clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, "PYTHONPATH": str(tmp_path), **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=tmp_path,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def orders():
    for size in (2, 3, 4):
        for steps in itertools.permutations(("vllm", "us", "load", "register"), size):
            if "us" in steps and "load" in steps:
                yield steps


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "path-only"])
def test_every_order_ends_with_the_plugin_on(run, installed):
    for steps in orders():
        rc, out = run(steps, installed)
        assert (rc, "STATE ours" in out) == (0, True), f"{steps}: {out}"


def test_the_entry_point_needs_no_import_and_nothing_happens_without_either(run):
    assert "STATE ours" in run(["load"], installed=True)[1]
    assert "STATE upstream" in run(["load"], installed=False)[1]
    assert "STATE upstream" in run(["load"], installed=True, VLLM_PLUGINS="other")[1]


@pytest.mark.parametrize("steps", [["us", "load"], ["load", "us"], ["copy", "us", "load-copy"]])
def test_an_import_counts_where_vllm_plugins_leaves_us_out(run, steps):
    rc, out = run(steps, installed=True, VLLM_PLUGINS="")
    assert (rc, "STATE ours" in out) == (0, True), out
    assert "not in the processes that vLLM spawns" in out
    assert "Cure: add moe_lora to VLLM_PLUGINS" in out


def test_a_package_only_on_the_path_is_told_about_spawned_processes_once(run):
    _, out = run(["us", "load", "load"], installed=False)
    assert out.count("not in the processes that vLLM spawns") == 1
    assert "Cure: pip install" in out
    assert "spawns" not in run(["us", "load"], installed=True)[1]


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    ("steps", "state"),
    [
        (["us", "revert", "load"], "ours"),
        (["us", "load", "revert"], "upstream"),
        (["us", "load", "revert", "load"], "upstream"),  # the next engine does not undo revert()
        (["us", "load", "revert", "register"], "ours"),
        (["us", "load", "register", "revert"], "upstream"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_revert_lasts_until_register(run, installed, steps, state):
    rc, out = run(steps, installed)
    assert (rc, f"STATE {state}" in out) == (0, True), out


@pytest.mark.parametrize("installed", [True, False])
def test_somebody_only_looking_for_vllm_does_not_disarm_the_import(run, installed):
    assert "STATE ours" in run(["us", "look", "load"], installed)[1]


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("steps", [["us", "load"], ["load", "us"], ["register", "load"]])
def test_off_switch(run, installed, steps):
    rc, out = run(steps, installed, VLLM_MOE_LORA="0")
    assert (rc, "STATE upstream" in out) == (0, True), out
    assert "vllm-moe-lora" not in out


@pytest.mark.parametrize(
    ("mode", "reason"), [("1", "vLLM 1.2.3 is not a supported release"), ("yes", "use one of auto")]
)
@pytest.mark.parametrize(
    ("steps", "installed"),
    [(["load"], True), (["us", "load"], True), (["us", "load"], False), (["vllm", "us"], False)],
    ids=["entry", "both", "import", "late"],
)
def test_must_be_on_stops_the_process_by_every_route(run, tmp_path, mode, reason, steps, installed):
    """vLLM passes over what is raised while it imports a plugin, so it must not be raised there."""
    (tmp_path / "vllm_moe_lora" / "supported.toml").write_text('[releases."1.0.0"]\nf = "engine"\n')
    rc, out = run(steps, installed, VLLM_MOE_LORA=mode)
    assert rc != 0, out
    assert reason in out
    assert "PASSED OVER" not in out


def test_allow_unverified_is_the_cure_it_is_said_to_be(run, tmp_path):
    (tmp_path / "vllm_moe_lora" / "supported.toml").write_text('[releases."1.0.0"]\nf = "engine"\n')
    hook = tmp_path / "vllm_moe_lora" / "hooks" / "victim.py"
    hook.write_text(hook.read_text().replace('">=1"', '"<1.1"').replace(", hashed=False", ""))
    rc, out = run(["us", "load"])
    assert (rc, "STATE upstream" in out) == (0, True), out
    assert "set VLLM_MOE_LORA_ALLOW_UNVERIFIED=1 to try" in out
    for mode in ("auto", "1"):
        rc, out = run(["us", "load"], VLLM_MOE_LORA_ALLOW_UNVERIFIED="1", VLLM_MOE_LORA=mode)
        assert (rc, "STATE ours" in out) == (0, True), out
        assert "vLLM 1.2.3 is outside <1.1" in out
        assert "the source of vllm.victim:f" in out
    # A source that has not changed since a known release is none to warn of.
    known = digest(VLLM["vllm/victim.py"])
    with (tmp_path / "vllm_moe_lora" / "supported.toml").open("a") as file:
        file.write(f'[hashes."vllm.victim:f"]\n"{known}" = ["1.0.0"]\n')
    rc, out = run(["us", "load"], VLLM_MOE_LORA_ALLOW_UNVERIFIED="1")
    assert (rc, "STATE ours" in out) == (0, True), out
    assert "the source of" not in out


def test_vllm_knows_our_variables_on_and_off(run, tmp_path):
    """vLLM warns of, or refuses, VLLM_ variables that are not in its table."""
    plugins = tmp_path / "vllm" / "plugins" / "__init__.py"
    text = "    import vllm.envs; print('TABLE', sorted(vllm.envs.environment_variables))\n"
    plugins.write_text(plugins.read_text() + text)
    for mode in ("0", "1"):
        out = run(["load"], installed=True, VLLM_MOE_LORA=mode)[1]
        assert f"TABLE {sorted(envs.VARIABLES)}" in out, mode


def test_a_vllm_that_cannot_be_imported_is_a_warning(run, tmp_path):
    (tmp_path / "vllm" / "platforms.py").write_text("raise RuntimeError('no driver')\n")
    rc, out = run(["load", "register"], installed=True)
    assert (rc, "STATE upstream" in out) == (0, True), out
    assert out.count("no driver") == 1
