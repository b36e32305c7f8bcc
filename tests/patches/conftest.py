"""A tree to patch, and the command on it."""

from __future__ import annotations

import re
import shutil

import pytest
import trees
from trees import HERE

from vllm_moe_lora import cli
from vllm_moe_lora.patchset.series import pristine, series

MORE = ("__init__.py", "_version.py", "version.py", "lora/__init__.py", "lora/utils.py")


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    """The files of the installed release that are looked at, and a few more."""
    source, folder = trees.original(HERE), tmp_path_factory.mktemp("clean")
    read = {source / "vllm" / name for name in MORE}
    series(source, HERE, lambda file: read.add(file) or pristine(file))
    for file in read:
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return folder


@pytest.fixture
def tree(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "tree")


@pytest.fixture
def say(capsys):
    """say(action, tree, ...) -> (exit code, stdout, stderr)"""

    def run(action, place, *more):
        code = cli.main(["patches", action, "--tree", str(place), *more])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def refused(say):
    """refused(action, tree, text, ...): exit 1, this text on stderr, a cure, nothing changed."""

    def check(action, place, text, *more, cure=""):
        before = trees.snapshot(place)
        code, out, err = say(action, place, *more)
        assert trees.snapshot(place) == before
        assert code == 1, (out, err)
        assert out == ""
        assert err.startswith("✗ ")
        assert text in err
        assert re.search(rf"cure: .*{re.escape(cure)}", err), err
        return err

    return check
