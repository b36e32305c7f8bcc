"""What ci/upstream.sh runs: makes the trees, runs the tests of each patch, prints a table.

A patch names its tests in its message: ``Test: pytest FILE::NAME``; for what runs here in Triton's
interpreter only, ``Test (GPU; ran in Triton's interpreter): pytest FILE``; for what this machine
cannot run, ``Test (GPU, not run): pytest FILE``.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import trees
import upstream_loops

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches" / "upstream" / "v0.33.0"
# `ray.shutdown` is all that vLLM's tests want of it on one CPU.
RAY = "def shutdown():\n    pass\n"
KEPT = ("vllm/", "tests/", "docs/", "benchmarks/", "pyproject.toml")


def source(release: str, folder: Path) -> Path:
    """The unpacked source package of a release; fetched if it is not there."""
    tree = folder / f"vllm-{release}"
    if tree.is_dir():
        return tree
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with tarfile.open(fileobj=io.BytesIO(trees.download("vllm", release))) as data:
            data.extractall(scratch, filter="data")
        Path(scratch, f"vllm-{release}").rename(tree)
    return tree


def git(tree: Path, *args: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *who, *args], cwd=tree, check=True, capture_output=True, text=True
    )
    return done.stdout


def repository(sdist: Path, tree: Path) -> None:
    """Make ``tree`` a repository of vLLM's files, with the installed operators in their places."""
    for name in KEPT:
        have = sdist / name
        copy = shutil.copytree if have.is_dir() else shutil.copy
        copy(have, tree / name)
    git(tree, "init", "-q")
    (tree / ".git" / "info" / "exclude").write_text("*.so\n__pycache__\n")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "base")
    git(tree, "tag", "base")
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent
    for built in installed.rglob("*.so"):
        link = tree / "vllm" / built.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(built)


class Tests(NamedTuple):
    here: list[str]
    interpreted: list[str]
    elsewhere: list[str]


def tests_of(patch: Path) -> Tests:
    """The tests that a patch's message names."""
    message = patch.read_text().partition("\n---\n")[0]
    kinds = ("", r" \(GPU; ran in Triton's interpreter\)", r" \(GPU, not run\)")
    return Tests(*(re.findall(rf"^Test{kind}:\s+pytest (\S+)$", message, re.M) for kind in kinds))


def run(tree: Path, *arguments: str, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    """pytest on the tree's vLLM."""
    site = Path(os.environ["SDISTS"], "site")
    (site / "ray").mkdir(parents=True, exist_ok=True)
    (site / "ray" / "__init__.py").write_text(RAY)
    env = os.environ | {
        "PYTHONPATH": f"{tree}:{site}",
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_PLUGINS": "",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
    if interpreted:
        env |= {"TRITON_INTERPRET": "1"}
        env["PYTHONPATH"] += f":{ROOT / 'ci'}:{ROOT / 'tests'}"
        options += ["-p", "upstream_interpreted"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


def collect(tree: Path, test: str) -> None:
    """Ends with an error where the test's file does not import."""
    done = run(tree, "--collect-only", test.partition("::")[0])
    if done.returncode not in (0, 5):  # 5: it skips itself without a GPU
        sys.exit(done.stdout[-3000:])


def outcomes(tree: Path, tests: Tests) -> dict[str, str]:
    """Run the tests that can run here: name -> "passes", "fails", ..."""
    found = {}
    for names, interpreted in ((tests.here, False), (tests.interpreted, True)):
        if names:
            found |= pytest(tree, names, interpreted)
    return found


def pytest(tree: Path, tests: list[str], interpreted: bool) -> dict[str, str]:
    """Run tests: name -> "passes", "fails", ...; a name stands for all its parameters."""
    report = tree / "report.xml"
    options = (f"--junitxml={report}", "-o", "junit_family=xunit1")
    done = run(tree, *options, *tests, interpreted=interpreted)
    if done.returncode > 1 or not report.exists():
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    states: dict[str, set[str]] = {test: set() for test in tests}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('file')}::{case.get('name', '').partition('[')[0]}"
        tags = {child.tag for child in case}
        state = next((tag for tag in ("error", "failure", "skipped") if tag in tags), "passes")
        for test, found in states.items():
            if name == test or name.startswith(f"{test}::"):
                found.add("fails" if state == "failure" else state)
    report.unlink()
    return {test: worst(found) for test, found in states.items()}


def worst(states: set[str]) -> str:
    return next((s for s in ("error", "fails", "skipped", "passes") if s in states), "not found")


def apply(tree: Path, patches: list[Path]) -> None:
    git(tree, "am", "-q", "--keep-non-patch", *map(str, patches))


def bare(tree: Path) -> None:
    """Take the patches away from vllm/, and leave them in tests/."""
    git(tree, "rm", "-rqf", "vllm")
    git(tree, "checkout", "-q", "base", "--", "vllm")


def needed(patch: Path, names: list[Path]) -> list[Path]:
    """The patch with those that its message says it needs."""
    message = patch.read_text().partition("\n---\n")[0]
    numbers = re.findall(r"\d{4}", " ".join(re.findall(r"[Nn]eeds \d{4}(?: and \d{4})?", message)))
    return [*(p for p in names if p.name[:4] in numbers), patch]


def alone(tree: Path, series: list[Path], tests: dict[Path, Tests]) -> None:
    for patch in series:
        git(tree, "reset", "-q", "--hard", "base")
        apply(tree, needed(patch, series))
        for test, state in outcomes(tree, tests[patch]).items():
            print("alone", patch.stem, test, state, flush=True)


def main(argv: list[str]) -> int:
    series = [PATCHES / name for name in (PATCHES / "series").read_text().split()]
    tests = {patch: tests_of(patch) for patch in series}
    every = Tests(*([name for one in tests.values() for name in one[kind]] for kind in range(3)))
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "vllm")
        tree.mkdir()
        repository(source("0.33.0", Path(os.environ["SDISTS"])), tree)
        for patch in series:  # each applies to a clean tree
            needs = needed(patch, series)
            if needs == [patch]:
                git(tree, "apply", "--check", str(patch))
            else:
                apply(tree, needs)
                git(tree, "reset", "-q", "--hard", "base")
        apply(tree, series)
        git(tree, "tag", "patched")
        after = outcomes(tree, every)
        for test in every.elsewhere:
            collect(tree, test)
        loops = []
        if "--loops" in argv:
            patched = Path(scratch, "patched")
            shutil.copytree(tree / "vllm", patched / "vllm", symlinks=True)
            compiled = [sys.executable, str(ROOT / "ci" / "upstream_compiled.py"), str(patched)]
            subprocess.run(compiled, check=True)
            bare(tree)
            loops = upstream_loops.table(tree, patched)
        bare(tree)
        before = outcomes(tree, every)
        if "--alone" in argv:
            alone(tree, series, tests)
    rows = [("patch", "test", "before", "after")]
    for patch in series:
        here, interpreted, elsewhere = tests[patch]
        rows += [(patch.stem, test, before[test], after[test]) for test in here]
        marked = [(test, f"{test} (interpreter)") for test in interpreted]
        rows += [(patch.stem, name, before[test], after[test]) for test, name in marked]
        rows += [(patch.stem, test, "GPU: not run", "") for test in elsewhere]
    good = {row[2:] for row in rows[1:]} <= {("fails", "passes"), ("GPU: not run", "")}
    rows += loops
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0 if good and all(row[2] != row[3] and row[3] != "wrong" for row in loops) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
