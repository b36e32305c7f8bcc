"""The hooks against the installed vLLM and against supported.toml."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import forks
import pytest
import release
import torch
from packaging.specifiers import SpecifierSet

from vllm_moe_lora import supported
from vllm_moe_lora.hooks import all_hooks
from vllm_moe_lora.patching import MARK, _Binding, digest, source_text
from vllm_moe_lora.sources import target_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: run ci/install.sh"
)
HOOKS = all_hooks()


def _here():
    """The hooks made for the installed release."""
    if release.installed() == "none":
        return []
    return supported.made_for(release.installed().partition("+")[0], HOOKS)


HERE = _here()
NEEDED = [hook for hook in HERE if "cpu" in (hook.platforms or ("cpu",))]  # by this machine


@pytest.mark.parametrize("hook", HOOKS, ids=lambda h: h.target.split(":")[1])
def test_record_is_complete(hook):
    assert hook.why
    assert hook.until
    assert hook.feature
    known = supported.table()["hashes"][hook.target] if hook.hashed else {}
    where = {release for releases in known.values() for release in releases}
    named = {r for r in supported.releases() if r in SpecifierSet(hook.releases)}
    assert named <= where or not hook.hashed, (
        f"no hash for {sorted(named - where)}: run ci/record_hashes.py"
    )


def test_each_hook_of_the_newest_release_names_its_test():
    """`ci/upstream.sh hooks` runs them: each fails without its hook."""
    folder = Path(__file__).parents[2]
    rows = tomllib.loads(Path(__file__).with_name("each_hook.toml").read_text())
    newest = list(supported.releases())[-1]
    named = {(feature, target) for feature, tests in rows.items() for target in tests}
    assert named == {(hook.feature, hook.target) for hook in HOOKS if hook.made_for(newest)}
    for test in {test for tests in rows.values() for test in tests.values()}:
        file, _, name = test.split()[0].partition("::")
        assert f"def {name.partition('[')[0]}" in (folder / file).read_text(), test


def test_no_hash_without_a_hook():
    assert set(supported.table()["hashes"]) == {hook.target for hook in HOOKS if hook.hashed}


@pytest.mark.parametrize("release", supported.releases())
def test_every_feature_says_how_it_is_known(release):
    levels = supported.releases()[release]
    assert set(levels) == {hook.feature for hook in HOOKS if release in SpecifierSet(hook.releases)}
    assert set(levels.values()) <= set(supported.LEVELS)


@pytest.mark.parametrize("release", supported.releases())
def test_features_are_all_or_nothing_by_release_and_platform(release):
    """`patching.apply` leaves a feature off as a whole, so its hooks for a release must agree."""
    here = supported.made_for(release, HOOKS)
    for one, other in itertools.combinations(here, 2):
        assert one.target != other.target or not one.shares_platform(other)
    for feature in {hook.feature for hook in here}:
        hooks = [hook for hook in here if hook.feature == feature]
        assert len({hook.platforms for hook in hooks}) == 1, feature


def test_an_unknown_release_is_taken_for_the_known_one_before_it():
    targets = {hook.target for hook in supported.made_for("0.27.9", HOOKS)}
    assert targets == {hook.target for hook in supported.made_for("0.27.1", HOOKS)}
    assert targets != {hook.target for hook in supported.made_for("0.28.0", HOOKS)}


@needs_vllm
@pytest.mark.parametrize(
    "hook", [hook for hook in HERE if hook.hashed], ids=lambda h: h.target.split(":")[1]
)
def test_installed_source_is_the_recorded_one(hook):
    """Also: read from the tree and taken from the import, the text is the same."""
    import vllm

    tree = Path(vllm.__file__).parents[1]
    text = target_text(tree, hook.target)
    current = _Binding.find(hook.target).get()
    if not hasattr(current, MARK):  # an earlier test may have registered in this process
        assert source_text(current) == text
    version = vllm.__version__.partition("+")[0]
    assert digest(text) in supported.hashes(version)[hook.target]


def _fresh(code, **env):
    """Exit code and output of a process in which nothing is imported before ``code``."""
    return _run(subprocess.run, code, env)


def _forked(code, **env):
    """The same where vLLM is imported already, as it is when vLLM loads its plugins."""
    # As engines have it, so that they are forks of one process.
    return _run(forks.launch, code, {"TORCHDYNAMO_DISABLE": "1", **env})


def _run(run, code, env):
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")  # a file: `inspect` reads the source of functions
        script.write_text(code)
        done = run(
            [sys.executable, str(script)],
            env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **env},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    return done.returncode, done.stdout + done.stderr


STATE = """
import vllm_moe_lora as v
from vllm.lora.model_manager import LoRAModelManager as M
print("PATCHED", hasattr(M._create_lora_modules, "__vllm_moe_lora__"))
print("ON", sorted(k for k, s in v.status().items() if s == "on"))
"""
LOAD = "from vllm.plugins import load_general_plugins as load; load()\n"
ALL = sorted({hook.feature for hook in NEEDED})


@needs_vllm
@pytest.mark.parametrize(
    ("run", "code", "env"),
    [
        (_fresh, LOAD, {}),  # the entry point alone
        (_fresh, "import vllm_moe_lora\n" + LOAD, {"VLLM_PLUGINS": ""}),  # the import alone
        (_fresh, "import vllm_moe_lora\n" + LOAD, {}),  # both
        (_forked, "import vllm.plugins, vllm_moe_lora\n", {"VLLM_PLUGINS": ""}),  # vLLM first
        # After the plugins were loaded.
        (_forked, LOAD + "import vllm_moe_lora\n", {"VLLM_PLUGINS": ""}),
        (_forked, "import vllm_moe_lora as v\nv.register()\nv.register()\n", {}),
        (
            _forked,
            "import vllm_moe_lora as v\nv.register()\nv.revert()\nv.register()\n",
            {"VLLM_PLUGINS": ""},
        ),
    ],
    ids=["entry", "import", "both", "vllm-first", "late", "twice", "revert-register"],
)
def test_every_route_ends_alike(run, code, env):
    heard = "import logging; logging.basicConfig(level=logging.INFO)\n"
    rc, out = run(heard + code + STATE, **env)
    assert rc == 0, out[-2000:]
    assert "PATCHED True" in out
    assert f"ON {ALL}" in out
    assert out.count("vllm-moe-lora on vLLM") == (2 if "revert" in code else 1), "one INFO line"


@needs_vllm
@pytest.mark.parametrize(
    ("run", "code"),
    [
        (_forked, LOAD),
        (_fresh, "import vllm_moe_lora\n" + LOAD),
        (_forked, "import vllm_moe_lora as v; v.register()\n"),
    ],
    ids=["entry", "import", "register"],
)
def test_off_switch(run, code):
    rc, out = run(code + STATE, VLLM_MOE_LORA="0")
    assert rc == 0, out[-2000:]
    assert "PATCHED False" in out


@needs_vllm
def test_revert_restores_every_original():
    names = [name for hook in NEEDED for name in (hook.target, *hook.also)]
    code = (
        f"names = {names}"
        + """
from vllm_moe_lora.patching import _Binding
bindings = {}
for n in names:
    try:
        bindings[n] = _Binding.find(n)
    except Exception:
        pass
before = {n: b.original for n, b in bindings.items()}
import vllm_moe_lora as v
v.register()
same = [n for n in bindings if _Binding.find(n).original is before[n]]
v.revert()
left = [n for n in bindings if _Binding.find(n).original is not before[n]]
print("FOUND", len(bindings), "SAME", same, "LEFT", left)
"""
    )
    rc, out = _forked(code)  # the entry point is there, so the import alone does nothing
    assert rc == 0, out[-2000:]
    line = next(line for line in out.splitlines() if line.startswith("FOUND"))
    assert int(line.split()[1]) >= len(NEEDED)
    assert "SAME [] LEFT []" in line, "each name is replaced, and restored"


@needs_vllm
def test_unknown_release_stays_off_with_one_warning_and_its_cure():
    code = "import vllm; vllm.__version__ = '9.9.9'\nimport vllm_moe_lora as v\nv.register()\n"
    rc, out = _forked(code + "v.register()\n" + STATE, VLLM_PLUGINS="")
    assert rc == 0, out[-2000:]
    assert "PATCHED False" in out
    assert out.count("vLLM 9.9.9 is not a supported release") == 1
    assert "Cure: upgrade vllm-moe-lora" in out


@needs_vllm
def test_must_be_on_stops_vllm_through_the_entry_point():
    """vLLM logs what a plugin raises while it is imported, and starts without it."""
    rc, out = _forked("import vllm; vllm.__version__ = '9.9.9'\n" + LOAD, VLLM_MOE_LORA="1")
    assert rc != 0, out[-2000:]
    assert "VLLM_MOE_LORA=1, but vllm-moe-lora: vLLM 9.9.9 is not a supported release" in out
    assert "Failed to load plugin" not in out


def _exists_here(target):
    import vllm

    try:
        return bool(target_text(Path(vllm.__file__).parents[1], target))
    except LookupError:
        return False


@needs_vllm
def test_unverified_applies_to_an_unknown_release_and_says_so_once():
    code = "import vllm; vllm.__version__ = '0.99.0'\n" + LOAD + STATE
    rc, out = _forked(code, VLLM_MOE_LORA_ALLOW_UNVERIFIED="1")
    assert rc == 0, out[-2000:]
    applied = supported.made_for("0.99.0", HOOKS)
    # The hooks of the newest release are taken, of which the installed one may lack a function.
    lacking = {h.feature for h in applied if h.hashed and not _exists_here(h.target)}
    assert f"ON {sorted(set(ALL) - lacking)}" in out
    assert out.count("these mismatches were ignored") == 1
    for releases in {hook.releases for hook in applied if "cpu" in (hook.platforms or ("cpu",))}:
        assert out.count(f"vLLM 0.99.0 is outside {releases}") == 1


@needs_vllm
def test_out_of_tree_platforms_get_what_reads_adapters_and_no_layers():
    """The engine's twin of this is tests/e2e/test_out_of_tree.py."""
    made = """
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum
type(current_platform)._enum = PlatformEnum.OOT
assert current_platform.device_type == "cpu"
import vllm_moe_lora as v
v.register()
from vllm_moe_lora import supported
from vllm_moe_lora.hooks import all_hooks
from vllm_moe_lora.patching import MARK, _Binding
marked = {}
for hook in supported.made_for(RELEASE, all_hooks()):
    marked.setdefault(hook.layers or bool(hook.platforms), []).append(
        hasattr(_Binding.find(hook.target).get(), MARK)
    )
print("MARKED", set(marked[True]), sum(marked[False]) > 10)
"""
    made = made.replace("RELEASE", repr(release.installed().partition("+")[0]))
    rc, out = _forked(made + STATE, VLLM_PLUGINS="", VLLM_MOE_LORA="1")
    assert rc == 0, out[-2000:]
    assert "MARKED {False} True" in out
    own = {hook.feature for hook in HERE if hook.layers or hook.platforms}
    assert f"ON {sorted(set(ALL) - own)}" in out
    assert {"adapters", "shared-experts", "safe-loading"} <= set(ALL) - own


@needs_vllm
@pytest.mark.parametrize("mode", ["0", "auto"])
def test_vllm_accepts_our_variables(mode):
    code = "from vllm.platforms import current_platform as p; p.validate_environ(True)"
    rc, out = _forked(LOAD + code, VLLM_MOE_LORA=mode)
    assert rc == 0, out[-2000:]


@needs_vllm
def test_changed_upstream_function_switches_its_feature_off():
    code = """
import vllm.lora.model_manager as m
def _create_lora_modules(self):
    "not what we know"
m.LoRAModelManager._create_lora_modules = _create_lora_modules
import vllm_moe_lora as v
v.register()
print("KEPT", m.LoRAModelManager._create_lora_modules is _create_lora_modules)
print("OFF", v.status()["shared-experts"])
"""
    rc, out = _forked(code, VLLM_PLUGINS="")
    assert rc == 0, out[-2000:]
    assert "KEPT True" in out
    assert "LoRAModelManager._create_lora_modules" in out.split("OFF")[1]
    rc, out = _forked(code, VLLM_PLUGINS="", VLLM_MOE_LORA="1")
    assert rc != 0
    assert "VLLM_MOE_LORA=1, but" in out


@needs_vllm
def test_dense_models_and_engines_without_lora_fall_through():
    """The replacements call the originals, with the same arguments, for anything but MoE LoRA."""
    by_target = {hook.target.split(":")[1]: hook for hook in HERE}
    seen = []

    def original(*args, **kwargs):
        seen.append((args, kwargs))
        return "upstream"

    class Dense:
        _is_moe = False
        is_lora_enabled = False
        model = torch.nn.Module()

    dense = Dense()
    calls = {
        "LoRAModelManager._create_lora_modules": (dense,),
        "LoRAModelManager._add_adapter": (dense, "lora"),
        "PunicaWrapperCPU.add_lora_linear": (dense, "y", "x", "a", "b", 1.0, (4,)),
        "PunicaWrapperCPU.add_lora_logits": (dense, "y", "x", "a", "b", 1.0),
        "PunicaWrapperCPU.add_lora_embedding": (dense, "y", "x", "b"),
        "select_unquantized_moe_backend": (dense,),
    }
    for name, args in calls.items():
        seen.clear()
        by_target[name].make(original)(*args)
        assert seen[0][0][: len(args)] == args, name
