"""A tree to patch, and the command on it."""

from __future__ import annotations

import re
import shutil

import pytest
import trees
from trees import HERE

from vllm_moe_lora import cli
from vllm_moe_lora.patchset import change
from vllm_moe_lora.patchset.tree import look


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    """The files of the installed release that are looked at, and a few more."""
    return trees.copy(HERE, tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="session")
def done(clean, tmp_path_factory):
    """The same, patched."""
    folder = tmp_path_factory.mktemp("done") / "tree"
    shutil.copytree(clean, folder)
    assert change.apply(look(folder))
    return folder


@pytest.fixture(scope="session")
def written(clean, tmp_path_factory):
    """The folder that `patches write` writes for the installed release."""
    folder = tmp_path_factory.mktemp("written")
    assert cli.main(["patches", "write", "--tree", str(clean), str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def names(written):
    """The patches of the installed release, in their order."""
    return [name.removesuffix(".patch") for name in (written / "series").read_text().split()]


@pytest.fixture
def tree(clean, tmp_path):
    """A tree to change."""
    return shutil.copytree(clean, tmp_path / "tree")


@pytest.fixture
def patched(done, tmp_path):
    """A patched tree to change."""
    return shutil.copytree(done, tmp_path / "tree")


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
