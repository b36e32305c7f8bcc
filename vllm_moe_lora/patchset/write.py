"""Change many files, all of them or none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

TEMPORARY = ".moe-lora-tmp"


class WriteError(Exception):
    """A file cannot be written; the text says which and why. Nothing is changed, or it says so."""


def replace_all(tree: Path, changes: Mapping[str, str | None]) -> None:
    """Give files new texts; None removes a file, and then the folders that this empties.

    Every text is written beside its file first, then all are renamed, which breaks hard links
    (an installer's cache may hold the same file) and keeps modes. What fails on the way is undone.

    Stale .pyc files need no care: Python compares size and time of the source. The RECORD of an
    installed wheel is left as it is: it names what pip put there and removes, and `revert` makes
    it true again; only our folder stays behind if vLLM is uninstalled while it is patched.

    Args:
        tree: the folder that holds ``vllm/``.
        changes: path below ``tree`` -> text or None.

    Raises:
        WriteError: as said there.
    """
    made: list[Path] = []
    ready: list[tuple[Path, Path | None]] = []
    before: dict[Path, tuple[bytes, int] | None] = {}
    try:
        for path, text in sorted(changes.items()):
            file = tree / path
            before[file] = (file.read_bytes(), file.stat().st_mode) if file.exists() else None
            if text is None:
                ready.append((file, None))
                continue
            for folder in reversed(list(_missing(file.parent))):
                folder.mkdir()
                made.append(folder)
            beside = file.with_name(file.name + TEMPORARY)
            ready.append((file, beside))
            beside.write_bytes(text.encode())
            if file.exists():
                shutil.copymode(file, beside)
        _swap(ready, before)
    except OSError as error:
        for _, leaving in ready:
            if leaving is not None:
                with contextlib.suppress(OSError):
                    leaving.unlink()
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise WriteError(f"{error.filename or tree}: {error.strerror or error}") from error
    for path, text in changes.items():
        if text is None:
            _prune((tree / path).parent, tree)


def _swap(
    ready: list[tuple[Path, Path | None]], before: Mapping[Path, tuple[bytes, int] | None]
) -> None:
    done: list[Path] = []
    try:
        for file, beside in ready:
            if beside is None:
                file.unlink()
            else:
                os.replace(beside, file)
            done.append(file)
    except OSError as error:
        lost = []
        for file in reversed(done):
            try:
                _put_back(file, before[file])
            except OSError:
                lost.append(str(file))
        if lost:
            text = f"{error}; these are changed and could not be put back: {', '.join(lost)}"
            raise WriteError(text) from error
        raise


def _put_back(file: Path, held: tuple[bytes, int] | None) -> None:
    if held is None:
        file.unlink()
        return
    beside = file.with_name(file.name + TEMPORARY)
    beside.write_bytes(held[0])
    beside.chmod(held[1])
    os.replace(beside, file)


def _missing(folder: Path) -> Iterator[Path]:
    while not folder.exists():
        yield folder
        folder = folder.parent


def _prune(folder: Path, tree: Path) -> None:
    """Remove ``folder`` and those above it that hold nothing but caches and our leavings."""
    while folder != tree and folder.is_dir():
        names = [entry.name for entry in folder.iterdir()]
        if any(name != "__pycache__" and not name.endswith(TEMPORARY) for name in names):
            return
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
        folder = folder.parent
