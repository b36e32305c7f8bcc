#!/usr/bin/env python3
"""Compare the outcomes of vLLM's own tests: compare.py WITHOUT WITH [DIFFERENT].

Both are files of stand_ins/outcomes.py. Outcomes are compared, and the reasons in the words of the
last line, without addresses, line numbers and times. The names of tests that differ are written to
DIFFERENT. Exit 1 if one of them differs.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

# What is another thing each time: addresses, lines, folders, times, numbers of processes.
_CHANGES = re.compile(r"0x[0-9a-f]+|:\d+:|/tmp/\S+|\d+\.\d+ ?s|\bpid[= ]\d+")


def read(file: str) -> dict[str, tuple[str, ...]]:
    """Test -> (when, outcome, reason)"""
    found = {}
    for line in Path(file).read_text().splitlines():
        name, when, outcome, said = json.loads(line)
        found[name] = when, outcome, _CHANGES.sub("", said)
    return found


def main(without: str, with_us: str, names: str = "/dev/null") -> int:
    before, after = read(without), read(with_us)
    different = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
    Path(names).write_text("".join(f"{name}\n" for name in different))
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
