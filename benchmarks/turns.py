"""Two engines measured in turns, on a machine that other processes use, too.

A neighbour that takes one of two cores makes a step two to five times as long, and the machine's
memory bandwidth changes by a factor of two within minutes. So a share is the median of what single
turns say, in which both engines run within seconds; and a turn is measured again if other processes
or the hypervisor took more than `FOREIGN` of the CPU's time in it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Any

FOREIGN = 0.05
ATTEMPTS = 8  # turns measured for each one wanted, at most


def _ticks(*processes: int) -> int:
    """Return how long CPUs were busy with other processes, or stolen, since the start; in ticks."""
    stat = Path("/proc/stat")
    if not stat.exists():  # no Linux: every turn counts
        return 0
    user, nice, system, _, _, irq, soft, stolen = map(int, stat.read_text().split()[1:9])
    own = 0
    for process in (os.getpid(), *processes):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        own += int(fields[11]) + int(fields[12])
    return user + nice + system + irq + soft + stolen - own


def turns(one: Any, two: Any, case: str, repeats: int) -> tuple[list[tuple[Any, Any]], int]:
    """Run a case in two engines (`cpu_engine.Engine`), one after the other, ``repeats`` times.

    Returns:
        What they took in each turn, and how many turns were not counted. Every second turn starts
        with ``two``. If the machine does not become quiet, turns that should not count do.
    """
    found: list[tuple[Any, Any]] = []
    attempts = 0
    while len(found) < repeats:
        attempts += 1
        before, start = _ticks(one.process.pid, two.process.pid), time.perf_counter()
        if attempts % 2:
            first, second = one.seconds(case), two.seconds(case)
        else:
            second, first = two.seconds(case), one.seconds(case)
        foreign = _ticks(one.process.pid, two.process.pid) - before
        capacity = (time.perf_counter() - start) * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        if foreign <= FOREIGN * capacity or attempts > ATTEMPTS * repeats - (repeats - len(found)):
            found.append((first, second))
    return found, attempts - repeats


def share(found: list[tuple[list[float], list[float]]]) -> tuple[float, float, float]:
    """Return the speed of the second engine as a share of the first's: median, and quartiles."""
    shares = sorted(median(one) / median(two) for one, two in found)
    return median(shares), shares[len(shares) // 4], shares[-1 - len(shares) // 4]
