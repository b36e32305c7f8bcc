"""A patched vLLM in a process of its own: alone, and with the plugin loaded on top of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import forks
import pytest
import trees
from trees import HERE

from vllm_moe_lora import supported
from vllm_moe_lora.patchset.series import hooks_of

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None or HERE not in supported.releases(),
        reason=f"wants a vLLM of supported.toml, here is {HERE}: run ci/install.sh",
    ),
]
# Those that a CPU has a use for; two hooks have one target where their platforms differ.
NEEDED = [h for h in trees.seamed(HERE) if not h.platforms or "cpu" in h.platforms]
AS_ENGINES = {"TORCHDYNAMO_DISABLE": "1"}  # so that they are forks of one process
TARGETS = sorted({hook.target for hook in NEEDED})

SHOW = """
import importlib, inspect, json, sys
import vllm
from vllm.plugins import load_general_plugins
{before}
load_general_plugins()
def held(target):
    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    thing = inspect.getattr_static(owner, name)
    return thing.fget if isinstance(thing, property) else getattr(thing, "__func__", thing)
found = {{target: held(target) for target in {targets}}}
facts = {{
    "file": vllm.__file__,
    "marked": sorted(t for t, f in found.items() if getattr(f, "__vllm_moe_lora__", None) == t),
    "home": sorted({{f.__module__.rpartition(".hooks.")[0] for f in found.values()}}),
    "plugin": "vllm_moe_lora" in sys.modules,
}}
if facts["plugin"]:
    import vllm_moe_lora
    from vllm_moe_lora import patching
    facts["status"] = vllm_moe_lora.status()
    facts["applied"] = [f"{{binding.owner}}.{{binding.name}}" for binding in patching._applied]
    vllm_moe_lora.revert()
    facts["kept"] = found == {{target: held(target) for target in {targets}}}
print("@" + json.dumps(facts))
"""


def _ask(run, folder, tree, before="", **env):
    """What the vLLM in ``tree`` says, None for the installed one, and all that it prints.

    Args:
        run: `subprocess.run`, or `forks.launch`, whose processes have imported vLLM already.
        folder: for the script.
    """
    script = folder / "show.py"
    script.write_text(SHOW.format(before=before, targets=TARGETS))
    if tree:
        env["PYTHONPATH"] = str(tree)
    done = run(
        [sys.executable, str(script)],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    out = done.stdout + done.stderr
    assert done.returncode == 0, out[-3000:]
    line = next(line for line in out.splitlines() if line.startswith("@"))
    return json.loads(line[1:]), out


def test_a_patched_tree_does_it_alone(tmp_path):
    """In a fresh process: what it prints while it is imported counts."""
    tree = trees.patched()
    facts, out = _ask(subprocess.run, tmp_path, tree, VLLM_PLUGINS="")
    assert facts["file"].startswith(str(tree))
    assert facts["marked"] == TARGETS
    assert facts["home"] == ["vllm.lora.moe_lora"]
    assert not facts["plugin"]
    assert "vllm-moe-lora" not in out


@pytest.mark.parametrize(
    ("before", "env"),
    [("", {"VLLM_MOE_LORA": "1"}), ("import vllm_moe_lora", {"VLLM_PLUGINS": ""})],
    ids=["entry-point", "import"],
)
def test_with_the_plugin_nothing_is_applied_twice(tmp_path, before, env):
    tree = trees.patched()
    facts, out = _ask(forks.launch, tmp_path, tree, before, **AS_ENGINES, **env)
    assert facts["file"].startswith(str(tree))
    assert facts["marked"] == TARGETS
    assert facts["home"] == ["vllm.lora.moe_lora"], "what is patched in is what runs"
    used = {hook.feature for hook in NEEDED}
    features = supported.releases()[HERE]
    assert facts["status"] == {f: "on" if f in used else "not needed on cpu" for f in features}
    assert facts["applied"] == []
    assert facts["kept"], "revert() is for what the plugin did"
    assert "stays off" not in out
    said = [line for line in out.splitlines() if "vllm-moe-lora" in line]
    assert not [line for line in said if "WARNING" in line and "processes that vLLM" not in line]


def test_the_plugin_alone_holds_the_same_places(tmp_path):
    """Of the test itself: unpatched, the same question is answered by the package."""
    facts, _ = _ask(forks.launch, tmp_path, None, **AS_ENGINES)
    assert facts["marked"] == TARGETS
    assert facts["home"] == ["vllm_moe_lora"]
    assert len(facts["applied"]) >= len(TARGETS)


# Each module is imported by a fork that has torch and transformers, and of vLLM only its platforms:
# as if it were the first one. The fork ends when the platform is asked for, and says by whom.
EACH_FIRST = """
import importlib, os, sys, torch, transformers
import vllm.platforms as platforms
assert platforms._current_platform is None, "importing vllm.platforms asks for it"

def asked(name):
    if name == "current_platform":
        frame = sys._getframe(1)
        while frame.f_globals["__name__"].startswith("importlib."):  # of "from ... import"
            frame = frame.f_back
        print("@", module, frame.f_globals["__name__"], flush=True)
        os._exit(0)
    raise AttributeError(name)

platforms.__getattr__ = asked
for module in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(module)
        if module.endswith(".seams"):
            sys.modules[module]._needed("cpu-dense-lora")
        print("@", module, "nobody", flush=True)
        os._exit(1)
    os.wait()
"""


def test_modules_of_platform_hooks_know_the_platform_already():
    """`seams` asks for it while they are imported; that must not be the first time.

    On the patched tree it is seen directly who asks first, while a module is imported before any
    other of vLLM: one of vLLM's own modules, or `seams`. Whoever asks gets an answer or an error,
    so when a seam asks later, the platform is known. What comes after the first question, which is
    most of the import, need not be waited for.
    """
    modules = {h.target.partition(":")[0] for h in hooks_of(HERE) if h.platforms or h.layers}
    seams = "vllm.lora.moe_lora.seams"
    done = subprocess.run(
        [sys.executable, "-c", EACH_FIRST, *sorted(modules), seams],
        env={
            **os.environ,
            "PYTHONPATH": str(trees.patched()),
            "VLLM_PLUGINS": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    said = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("@ ")]
    first = dict(said)
    assert first.pop(seams, "") == seams, "the test would see it"
    assert first.keys() == modules, done.stdout + done.stderr[-1000:]
    for module, asker in first.items():
        assert asker.startswith("vllm."), f"{module}: {asker} asks first"
        assert not asker.startswith("vllm.lora.moe_lora"), f"{module}: {asker} asks first"
