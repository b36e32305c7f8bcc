"""Stands in for ray, which vLLM's tests import to shut it down, and do not use on one machine."""


def shutdown() -> None:
    pass
