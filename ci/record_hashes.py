#!/usr/bin/env python3
"""Write the hashes of every hooked source into vllm_moe_lora/supported.toml.

    ci/record_hashes.py 0.32.0=/path/to/site-packages 0.33.0=/path/to/unpacked/wheel ...

Each release's folder holds `vllm/`. Entries of releases not named are kept. Nothing is imported
from the trees. A target that a release within the hook's range does not have is reported.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from packaging.specifiers import SpecifierSet  # noqa: E402
from packaging.version import Version  # noqa: E402

from vllm_moe_lora import supported  # noqa: E402
from vllm_moe_lora.hooks import all_hooks  # noqa: E402
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
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
