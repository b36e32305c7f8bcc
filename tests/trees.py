"""Trees of vLLM's files for tests: the installed release, and others where they are unpacked."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import release
import unpacked

from vllm_moe_lora import supported
from vllm_moe_lora.patching import Hook
from vllm_moe_lora.patchset import change
from vllm_moe_lora.patchset import tree as looked
from vllm_moe_lora.patchset.series import hooks_of, series, upstream_text

ROOT = Path(__file__).parents[1]
# With old and new homes of adapters and experts, and with few and many features. Of these, the
# releases whose sources are here.
RELEASES = [
    number
    for number in ("0.11.1", "0.16.0", "0.24.0", "0.32.0", "0.33.0")
    if number in unpacked.available()
]
# A file that hooks are in on every release since 0.13.
MANAGER = "vllm/lora/model_manager.py"
HERE = release.installed().partition("+")[0]
# What tells a tree and its release, and files that no patch touches.
MORE = ("__init__.py", "_version.py", "version.py", "lora/__init__.py", "lora/utils.py")


def original(number: str) -> Path:
    """The folder that holds a release's ``vllm/``, the installed one's or an unpacked one's."""
    spec = importlib.util.find_spec("vllm")
    if number == HERE and spec is not None and spec.origin is not None:
        return Path(spec.origin).parents[1]
    return unpacked.tree(number)


def copy(number: str, folder: Path) -> Path:
    """A copy of the files that the patches of a release look at, and of a few more."""
    source = original(number)
    read = {source / "vllm" / name for name in MORE}
    series(source, number, lambda file: read.add(file) or upstream_text(file))
    for file in read:
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Copies, not links: a test that writes into one must not write into the installed vLLM.
        shutil.copy(file, target)
    return folder


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
def patched(number: str = HERE) -> Path:
    """A patched copy of a release that can be imported: what no patch touches is linked."""
    source = original(number)
    folder = Path(tempfile.mkdtemp(prefix="patched-vllm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    texts = looked.look(source, number).texts(0)
    _link(source, folder, {Path(path) for path, text in texts.items() if text is not None})
    assert change.apply(looked.look(folder, number))
    return folder


UPSTREAM = ROOT / "patches" / "upstream"
# For classes that have another form, or another place, in the installed release.
NOT_HERE = {"0007-trtllm-bf16-fused.patch", "0017-cpu-int4-moe-lora.patch"}


@functools.cache
def upstream() -> Path:
    """The installed release, importable, with the patches for vLLM's maintainers instead of ours.

    They are for 0.33.0; on an older release they apply with one line of context.
    """
    series = UPSTREAM / "v0.33.0" / "series"
    patches = [series.parent / name for name in series.read_text().split() if name not in NOT_HERE]
    paths = re.findall(r"^--- a/(vllm/.*\.py)$", "".join(p.read_text() for p in patches), re.M)
    folder = Path(tempfile.mkdtemp(prefix="upstream-vllm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _link(original(HERE), folder, {Path(path) for path in paths})
    for patch in patches:
        command = ["git", "apply", "-C1", "--include=vllm/*", str(patch)]
        subprocess.run(command, cwd=folder, check=True, timeout=60)
    return folder


def _link(source: Path, folder: Path, touched: set[Path]) -> None:
    """Copy files ``touched``, and link what else ``source`` has in their folders or beside them."""
    parents = {parent for path in touched for parent in path.parents}
    for parent in sorted(parents - {Path(".")}):
        (folder / parent / "__pycache__").mkdir(parents=True)
        for entry in (source / parent).iterdir():
            path = parent / entry.name
            if path in touched:
                shutil.copy2(entry, folder / path)
            elif path not in parents and entry.name != "__pycache__":
                (folder / path).symlink_to(entry)
        # Python compiles again only what was patched.
        for entry in (source / parent).glob("__pycache__/*.pyc"):
            if parent / f"{entry.name.partition('.')[0]}.py" not in touched:
                (folder / parent / "__pycache__" / entry.name).symlink_to(entry)


def seamed(number: str) -> list[Hook]:
    """The hooks of a release; none if it is not known."""
    return hooks_of(number) if number in supported.releases() else []
