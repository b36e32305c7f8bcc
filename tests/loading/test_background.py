"""Staging beside the steps: one load at a time, errors reach whoever asks."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from vllm_moe_lora.fitting.memory import PausedGC
from vllm_moe_lora.loading.background import BackgroundLoader


def _until(loader, number, load):
    for _ in range(500):
        if loader.ready(number, "a", load):
            return
        time.sleep(0.002)
    raise AssertionError("never ready")


def test_runs_elsewhere_and_is_taken_once():
    loader, go, where = BackgroundLoader(), threading.Event(), []

    def load():
        go.wait(5)
        where.append(threading.current_thread())
        assert loader.take(1, "a") is None, "the load itself must not wait for itself"
        return "staged"

    assert not loader.ready(1, "a", load)
    assert not loader.ready(1, "a", load), "begun once"
    go.set()
    _until(loader, 1, load)
    assert where != [threading.current_thread()]
    assert len(where) == 1
    assert loader.take(2, "a") is None
    assert loader.take(1, "b") is None
    assert loader.take(1, "a") == "staged"
    assert loader.take(1, "a") is None


def test_files_that_changed_meanwhile_are_staged_again(tmp_path):
    loader, file = BackgroundLoader(), tmp_path / "adapter_config.json"
    file.write_text("{}")
    while not loader.ready(1, str(tmp_path), lambda: "old"):
        time.sleep(0.002)
    file.write_text("{} ")
    assert loader.take(1, str(tmp_path)) is None
    while not loader.ready(1, str(tmp_path), lambda: "new"):
        time.sleep(0.002)
    assert loader.take(1, str(tmp_path)) == "new"


def test_errors_are_raised_and_forgotten():
    loader, fail = BackgroundLoader(), [True]

    def load():
        if fail:
            raise ValueError("why")
        return "staged"

    with pytest.raises(ValueError, match="why"):
        _until(loader, 1, load)
    fail.clear()
    _until(loader, 1, load)
    assert loader.take(1, "a") == "staged"


def test_what_nobody_comes_for_is_dropped(monkeypatch):
    loader = BackgroundLoader()
    for number in range(10):
        _until(loader, number, lambda: "staged")
    assert all(loader.take(number, "a") for number in range(5)), "many loads at a time"
    monkeypatch.setattr("vllm_moe_lora.loading.background.EXPIRE_SECONDS", 0.0)
    time.sleep(0.01)
    _until(loader, 99, lambda: "staged")
    assert not any(loader.take(number, "a") for number in range(5, 10))


def test_collection_is_off_while_any_lives():
    assert gc.isenabled()
    one, two = PausedGC(), PausedGC()
    del one
    assert not gc.isenabled()
    del two
    assert gc.isenabled()
    with PausedGC() as three:
        assert not gc.isenabled()
    assert gc.isenabled()
    three.release()
    assert gc.isenabled()
    gc.disable()
    try:
        four = PausedGC()
        del four
        assert not gc.isenabled(), "whoever switched it off wants it off"
    finally:
        gc.enable()


def test_adapters_that_were_removed_in_use_are_kept():
    loader = BackgroundLoader()
    for number in (1, 2, 3):
        loader.keep_removed(number, f"path {number}", f"adapter {number}", limit=2)
    assert loader.take_removed(1, "path 1") is None, "the oldest went"
    assert loader.take_removed(2, "another version") is None
    assert loader.take_removed(2, "path 2") == "adapter 2", "a question for another took nothing"
    assert loader.take_removed(2, "path 2") is None
    loader.forget(3)
    assert loader.take_removed(3, "path 3") is None
