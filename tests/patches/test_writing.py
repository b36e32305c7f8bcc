"""`vllm-moe-lora patches` where files cannot be written, are links, or have modes to keep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trees
from trees import MANAGER

from vllm_moe_lora.patchset.write import TEMPORARY


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
@pytest.mark.parametrize("action", ["apply", "revert"])
def test_read_only(say, tree, action):
    if action == "revert":
        assert say("apply", tree)[0] == 0
    before = trees.snapshot(tree)
    for path in [*tree.parents, tree, *tree.rglob("*")]:
        if path.stat().st_uid == 0 and len(path.parts) > 2:
            path.chmod(path.stat().st_mode | 0o055)
    modes = trees.snapshot(tree)
    # Everything is imported by then: nobody may not read this Python's own files either.
    code = (
        "import os, sys\nfrom vllm_moe_lora import cli\n"
        f"tree = {str(tree)!r}\n"
        "assert cli.main(['patches', 'check', '--tree', tree]) == 0\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"sys.exit(cli.main(['patches', {action!r}, '--tree', tree]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "nothing was changed, as a file cannot be written" in done.stderr
    assert "Permission denied" in done.stderr
    assert "cure: run it as a user who may write there" in done.stderr
    assert trees.snapshot(tree) == modes
    assert modes.keys() == before.keys()


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_disk_that_fails_on_the_way(say, refused, tree, monkeypatch, action, after):
    if action == "revert":
        assert say("apply", tree)[0] == 0
    real, calls = os.replace, []

    def fails(source, target):
        calls.append(target)
        if len(calls) == after + 1:
            raise OSError(5, "Input/output error", str(target))
        real(source, target)

    # Removing files is the other half of reverting.
    monkeypatch.setattr(os, "replace", fails)
    if action == "revert" and after == 20:
        monkeypatch.setattr(os, "replace", real)
        gone, unlink = [], Path.unlink

        def stays(self, *args, **more):
            gone.append(self)
            if len(gone) == 5 and not self.name.endswith(TEMPORARY):
                raise OSError(5, "Input/output error", str(self))
            unlink(self, *args, **more)

        monkeypatch.setattr(Path, "unlink", stays)
    refused(action, tree, "nothing was changed, as a file cannot be written")
    monkeypatch.undo()
    assert not list(tree.rglob(f"*{TEMPORARY}"))
    assert say(action, tree)[0] == 0, "the next try gets through"


def test_links_into_a_cache_are_left_alone(refused, tree, tmp_path):
    """uv can install so; the file behind the link is other environments' too."""
    file = tree / MANAGER
    file.rename(tmp_path / "cached.py")
    file.symlink_to(tmp_path / "cached.py")
    refused("apply", tree, "is a symbolic link", cure="--link-mode=copy")


def test_hard_links_into_a_cache_are_broken(say, tree, tmp_path):
    os.link(tree / MANAGER, tmp_path / "cached.py")
    before = (tmp_path / "cached.py").read_bytes()
    assert say("apply", tree)[0] == 0
    assert (tmp_path / "cached.py").read_bytes() == before
    assert (tree / MANAGER).read_bytes() != before


def test_modes_stay(say, tree):
    (tree / MANAGER).chmod(0o640)
    before = trees.snapshot(tree)
    assert say("apply", tree)[0] == 0
    assert (tree / MANAGER).stat().st_mode & 0o777 == 0o640
    assert say("revert", tree)[0] == 0
    assert trees.snapshot(tree) == before
