#!/usr/bin/env python3
"""Write the hashes of every hooked source into vllm_moe_lora/supported.toml.

Those of the model classes in models/rows.py go into vllm_moe_lora/models/hashes.py.

    ci/record_hashes.py 0.32.0=/path/to/site-packages 0.33.0=/path/to/unpacked/wheel ...

Each release's folder holds `vllm/`. Entries of releases not named are kept. Nothing is imported
from the trees. A target that a release within the hook's range does not have is reported.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from packaging.specifiers import SpecifierSet  # noqa: E402
from packaging.version import Version  # noqa: E402

from vllm_moe_lora import supported  # noqa: E402
from vllm_moe_lora.hooks import all_hooks  # noqa: E402
from vllm_moe_lora.models.hashes import HASHES  # noqa: E402
from vllm_moe_lora.models.rows import ROWS  # noqa: E402
from vllm_moe_lora.patching import digest  # noqa: E402
from vllm_moe_lora.sources import target_text  # noqa: E402

HEADER = """\
# Releases this version knows, and the hashes of the upstream sources its hooks were written for.
# [hashes] is written by ci/record_hashes.py; [releases] by hand: how each feature is known,
#   engine  a real engine ran it here (tests/e2e, on the CPU)
#   import  its hooks were applied to the release's real modules and layer tests ran
#   source  the hooked sources were read and hashed; never run
"""


def main(pairs: list[str]) -> int:
    trees = {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}
    hooks, missing = [hook for hook in all_hooks() if hook.hashed], 0
    table: dict[str, dict[str, set[str]]] = {}
    for target, found in supported.table().get("hashes", {}).items():
        for value, where in found.items():
            kept = set(where) - set(trees)
            if kept and any(hook.target == target for hook in hooks):
                table.setdefault(target, {})[value] = kept
    for hook in hooks:
        for release, tree in trees.items():
            if release not in SpecifierSet(hook.releases):
                continue
            try:
                value = digest(target_text(tree, hook.target))
            except LookupError as error:
                print(f"{release}: {error}", file=sys.stderr)
                missing += 1
                continue
            table.setdefault(hook.target, {}).setdefault(value, set()).add(release)
    lines = [HEADER]
    for release, notes in sorted(supported.releases().items(), key=lambda kv: Version(kv[0])):
        lines.append(f'[releases."{release}"]\n')
        lines += [f'{key} = "{value}"\n' for key, value in notes.items()]
        lines.append("\n")
    for target in sorted(table):
        lines.append(f'[hashes."{target}"]\n')
        for value, where in sorted(table[target].items()):
            names = ", ".join(f'"{release}"' for release in sorted(where, key=Version))
            lines.append(f'"{value}" = [{names}]\n')
        lines.append("\n")
    supported.PATH.write_text("".join(lines).rstrip() + "\n")
    write_classes(trees)
    return 1 if missing else 0


CLASSES = '''\
"""The sources of model classes that `rows.py` was written for; ci/record_hashes.py writes this."""

# Class -> digest of its source -> the first and the last release that have it.
HASHES: dict[str, dict[str, tuple[str, str]]] = {
'''


def write_classes(trees: dict[str, Path]) -> None:
    """Write models/hashes.py. A class that a release does not have is left out there."""
    known = sorted(supported.releases(), key=Version)
    lines = [CLASSES]
    for target in sorted({target for row in ROWS for target in row.targets}):
        found: dict[str, str] = {}  # release -> digest
        for value, (first, last) in HASHES.get(target, {}).items():
            found |= dict.fromkeys(known[known.index(first) : known.index(last) + 1], value)
        for release, tree in trees.items():
            found.pop(release, None)
            if any(row.made_for(release) for row in ROWS if target in row.targets):
                with contextlib.suppress(LookupError):
                    found[release] = digest(target_text(tree, target))
        line = f'    "{target}": {{'
        lines.append(f"{line}{'  # noqa: E501' if len(line) > 100 else ''}\n")
        for value in sorted(set(found.values())):
            where = [release for release in known if found.get(release) == value]
            between = known[known.index(where[0]) : known.index(where[-1]) + 1]
            assert where == between, f"{target} came back: {where}"
            lines.append(f'        "{value}": ("{where[0]}", "{where[-1]}"),\n')
        lines.append("    },\n")
    (ROOT / "vllm_moe_lora" / "models" / "hashes.py").write_text("".join([*lines, "}\n"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
