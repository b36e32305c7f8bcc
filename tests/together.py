"""Which tests pytest-xdist gives to one worker: those that share what is made once for a module.

pytest-xdist's own --dist loadgroup does not group under pytest 9.1 (its mark no longer reaches the
test's id), and --dist loadfile keeps each file of tests/releases, whose releases have nothing in
common, on one worker.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
PATCHED_TREE = ("tests/patches/test_both.py", "tests/patches/test_engine.py")  # made once


class Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        release = re.search(r"\[.*?(\d+\.\d+\.\d+)", test)
        if "releases" in Path(file).parts and release:
            return f"{file} {release[1]}"
        if file in PATCHED_TREE:
            return "the patched tree"
        return file if _shares(file) else nodeid


@functools.cache
def _shares(file: str) -> bool:
    return 'scope="module"' in (ROOT / file).read_text()
