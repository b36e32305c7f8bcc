"""Trees of vLLM's files for tests: the installed release, and others where they are unpacked."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import release
import unpacked
from packaging.version import Version

from vllm_moe_lora import supported
from vllm_moe_lora.patching import Hook
from vllm_moe_lora.patchset.series import hooks_of

ROOT = Path(__file__).parents[1]
PATCHES = ROOT / "patches"
TAGS = sorted(path.parent.name for path in PATCHES.glob("*/series"))
# A file that hooks are in on every release since 0.13.
MANAGER = "vllm/lora/model_manager.py"
HERE = release.installed().partition("+")[0]
# Upstream has it since, so nothing is put there.
RIGHT_UPSTREAM = {"vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys": Version("0.31")}


def original(number: str) -> Path:
    """The folder that holds a release's ``vllm/``; skips the test where there is none."""
    spec = importlib.util.find_spec("vllm")
    if number == HERE and spec is not None and spec.origin is not None:
        return Path(spec.origin).parents[1]
    return unpacked.tree(number)


def copy(number: str, folder: Path) -> Path:
    """A copy of the release's Python files, to be changed at will."""
    source = original(number)
    # Copies, not links: a test that writes into one must not write into the installed vLLM.
    shutil.copytree(source / "vllm", folder / "vllm", ignore=_no_python)
    return folder


def _no_python(folder: str, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if name == "__pycache__"
        or not (name.endswith(".py") or os.path.isdir(os.path.join(folder, name)))
    ]


def snapshot(tree: Path) -> dict[str, tuple[int, bytes]]:
    """Path -> mode and content of everything there but git's own."""
    return {
        path.relative_to(tree).as_posix(): (
            path.lstat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(tree.rglob("*"))
        if ".git" not in path.relative_to(tree).parts
    }


def commit(tree: Path, *args: str) -> str:
    """Run git in ``tree`` as somebody; returns what it prints."""
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        [*command, *args], cwd=tree, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def repository(tree: Path) -> Path:
    """Make ``tree`` a git repository with one commit."""
    commit(tree, "init", "-q")
    commit(tree, "add", "-A")
    commit(tree, "commit", "-qm", "base")
    return tree


@functools.cache
def patched() -> Path:
    """A copy of the installed vLLM, patched, that can run: what is not Python is linked."""
    source = original(HERE)
    folder = Path(tempfile.mkdtemp(prefix="patched-vllm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def place(have: str, want: str) -> None:
        if have.endswith(".py"):
            shutil.copy2(have, want)
        else:
            os.symlink(have, want)

    shutil.copytree(
        source / "vllm",
        folder / "vllm",
        copy_function=place,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    command = [sys.executable, "-m", "vllm_moe_lora.cli", "patches", "apply", "--tree", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return folder


def known(tag: str) -> str:
    """The release of a tag; skips where it has no row any more."""
    number = tag.removeprefix("v")
    assert number in supported.releases(), f"patches/{tag} is of no release in supported.toml"
    return number


def seamed(number: str) -> list[Hook]:
    """The hooks of a release that upstream has not made unnecessary by then; none if unknown."""
    hooks = hooks_of(number) if number in supported.releases() else []
    return [h for h in hooks if Version(number) < RIGHT_UPSTREAM.get(h.target, Version("9999"))]
