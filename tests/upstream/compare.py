#!/usr/bin/env python3
"""Compare the outcomes of vLLM's own tests: compare.py WITHOUT.json WITH.json.

Outcomes, and the reasons in the words of the last line, without addresses and line numbers. Exit 1
if one of them differs.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path


def read(file: str) -> dict[str, tuple[str, ...]]:
    """Test -> (when, outcome, reason)"""
    found = json.loads(Path(file).read_text())
    return {
        name: (when, outcome, re.sub(r"0x[0-9a-f]+|:\d+:|/tmp/\S+|\d+\.\d+ ?s", "", said))
        for name, (when, outcome, said) in found.items()
    }


def main(without: str, with_us: str) -> int:
    before, after = read(without), read(with_us)
    different = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
    for name in different:
        print(f"{name}\n  without: {before.get(name)}\n  with:    {after.get(name)}")
    counts = Counter(outcome for _, outcome, _ in after.values())
    print(
        f"{len(after)} tests of vLLM, {len(after.keys() - set(different))} with equal outcomes: "
        + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
    )
    return 1 if different or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
