"""Times calls on a GPU, or pretends to where there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from statistics import median
from typing import Protocol

import torch

Call = Callable[[], None]
Times = dict[str, tuple[float, float, float]]
FLUSH_BYTES = 256 << 20  # more than any L2 cache


class Clock(Protocol):
    """Times several calls against each other."""

    def time(self, calls: Mapping[str, Call], what: str) -> Times:
        """Return name -> (median, lowest, highest) microseconds of a call.

        Args:
            calls: by name.
            what: the case, for example the number of tokens.
        """


class GraphClock:
    """Times CUDA graphs in turn, each replay with a cold L2 cache."""

    def __init__(self, repeats: int = 21) -> None:
        self.repeats = repeats

    def time(self, calls: Mapping[str, Call], what: str) -> Times:
        """See `Clock.time`. The lowest and highest are the 10th and 90th percentile."""
        graphs = {name: self._captured(call) for name, call in calls.items()}
        flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.repeats):
            for name, graph in graphs.items():
                flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end) * 1000)
        return {name: _spread(found) for name, found in times.items()}

    def _captured(self, call: Call) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph


def _spread(times: list[float]) -> tuple[float, float, float]:
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return median(ordered), ordered[tenth], ordered[-1 - tenth]


class StubClock:
    """Runs each call once and returns invented times, the same for the same names.

    For `tune --interpret`, where real times would mean nothing.
    """

    def time(self, calls: Mapping[str, Call], what: str) -> Times:
        """See `Clock.time`."""
        found: Times = {}
        for name, call in calls.items():
            call()
            digest = hashlib.sha256(f"{name} {what}".encode()).digest()
            middle = 10 + digest[0] / 8
            found[name] = (middle, middle - 0.5, middle + 0.5)
        return found
