#!/usr/bin/env python3
"""Write patches/, from the hooks, the payload and trees of vLLM's files.

    ci/refresh_patches.py v0.32.0=/path/to/site-packages v0.33.0=/path/to/unpacked/wheel ...
    ci/refresh_patches.py --check v0.32.0=...       # exit code 1 and the names where it differs

Each folder holds `vllm/` of the release, as its wheel or its git tag has it. Tags that are not
named keep their patches; patches/README.md is about all that are there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from packaging.version import Version  # noqa: E402

from vllm_moe_lora import supported  # noqa: E402
from vllm_moe_lora.patchset import tree as trees  # noqa: E402
from vllm_moe_lora.patchset.mail import mail  # noqa: E402

PATCHES = ROOT / "patches"
README = """\
# LoRA on MoE models as patches to vLLM

For those who build their own vLLM: the same code that the plugin brings, as changes to vLLM's own
files. Written by `ci/refresh_patches.py`; do not edit. A folder for each tag of vLLM holds
`series`, the names of its patches in their order, and the patches.

    cd vllm && git checkout v0.32.0
    patches=/path/to/patches/v0.32.0
    sed "s|^|$patches/|" $patches/series | xargs git am --keep-non-patch

`--keep-non-patch` keeps the `[Bugfix][LoRA]` of the subjects, `-s` adds your Signed-off-by.
`git apply` takes the files too. Take a whole series. The package does the same without this folder,
for every release it knows, and checks the sources first:

    vllm-moe-lora patches list|check|apply|revert --tree /path/to/vllm

A patched vLLM needs no plugin, and with the plugin nothing is applied twice. `VLLM_MOE_LORA` turns
nothing off that was patched in. Each patch says why it is there (`Hook:` names the function that
it changes), where that is reported (`Forwarded:`) and when it can go (`Until:`).
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    parser.add_argument("--patches", type=Path, default=PATCHES, help="folder to write")
    parser.add_argument("trees", nargs="+", metavar="TAG=TREE")
    args = parser.parse_args(argv)
    wanted: dict[str, str] = {}
    for pair in args.trees:
        tag, _, place = pair.partition("=")
        if not place or tag.removeprefix("v") not in supported.releases():
            known = ", ".join(f"v{release}" for release in supported.releases())
            parser.error(f"{pair}: TAG=TREE is wanted, with a tag of {known}")
        try:
            wanted |= files(tag, Path(place))
        except trees.Refusal as error:
            print(f"✗ {tag}: {error}", file=sys.stderr)
            return 1
    tags = {pair.partition("=")[0] for pair in args.trees}
    have = {
        file.relative_to(args.patches).as_posix(): file.read_text(encoding="utf-8")
        for file in sorted(args.patches.rglob("*"))
        if file.is_file()
    }
    wanted |= {path: text for path, text in have.items() if path.split("/")[0] not in tags}
    wanted["README.md"] = readme(wanted)
    differ = [path for path in sorted({*have, *wanted}) if have.get(path) != wanted.get(path)]
    if args.check:
        for path in differ:
            print(f"✗ patches/{path} differs: run ci/refresh_patches.py", file=sys.stderr)
        return int(bool(differ))
    for tag in tags:
        shutil.rmtree(args.patches / tag, ignore_errors=True)
    for path, text in wanted.items():
        file = args.patches / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    print(f"{len(differ)} files changed")
    return 0


def files(tag: str, place: Path) -> dict[str, str]:
    """Path below patches/ -> text, of one tag. Raises Refusal for a tree of another release."""
    tree = trees.look(place, tag.removeprefix("v"))
    if tree.problems:
        raise trees.Refusal("\n    ".join(tree.problems), f"a tree of {tag}")
    found = {f"{tag}/{patch.name}.patch": mail(patch) for patch in tree.patches}
    found[f"{tag}/series"] = "".join(f"{patch.name}.patch\n" for patch in tree.patches)
    return found


def readme(wanted: dict[str, str]) -> str:
    """What patches/README.md says of these files."""
    lines = [README]
    tags = {path.split("/")[0] for path in wanted if path.endswith("/series")}
    for tag in sorted(tags, key=Version):
        lines += [f"\n## {tag}\n", "| patch | what | files |", "|---|---|---|"]
        for name in wanted[f"{tag}/series"].split():
            text = wanted[f"{tag}/{name}"]
            start = "Subject: [PATCH] "
            subject = next(line for line in text.splitlines() if line.startswith(start))
            count = sum(line.startswith("diff --git ") for line in text.splitlines())
            lines.append(f"| [{name}]({tag}/{name}) | {subject.removeprefix(start)} | {count} |")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
