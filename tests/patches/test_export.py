"""`vllm-moe-lora patches write`: the folder for git, and what is not overwritten."""

from __future__ import annotations

import json
import os

import pytest
import trees
from trees import HERE, MANAGER

from vllm_moe_lora import supported
from vllm_moe_lora.patchset.mail import SUBJECTS, subject
from vllm_moe_lora.patchset.series import FIRST, Patch
from vllm_moe_lora.patchset.write import TEMPORARY


def test_a_folder_for_git(say, tree, written, names, tmp_path):
    before, out = trees.snapshot(tree), tmp_path / "new" / "out"
    code, text, err = say("write", tree, str(out))
    assert (code, err) == (0, "")
    assert text.endswith(f": {len(names)} patches and their series written to {out}\n")
    assert {file.name for file in out.iterdir()} == {"series", *(f"{n}.patch" for n in names)}
    assert trees.snapshot(out) == trees.snapshot(written)
    assert trees.snapshot(tree) == before, "the tree is only read"
    facts = json.loads(say("write", tree, str(tmp_path / "json"), "--json")[1])
    assert [patch["name"] for patch in facts["patches"]] == names
    assert trees.snapshot(tmp_path / "json") == trees.snapshot(written)


def test_of_a_patched_tree_the_same(say, patched, written, tmp_path):
    assert say("write", patched, str(tmp_path / "out"))[0] == 0
    assert trees.snapshot(tmp_path / "out") == trees.snapshot(written)


def test_a_tree_of_another_release(say, refused, tree, tmp_path):
    file, out = tree / MANAGER, tmp_path / "out"
    text = file.read_text().replace("def _add_adapter(self, lora", "def _add_adapter(self, lara")
    file.write_text(text)
    refused("write", tree, "LoRAModelManager._add_adapter is not as in vLLM", str(out))
    refused("write", tree, "vLLM 9.9.9 is not a supported", "--release", "9.9.9", str(out))
    assert not out.exists()


def test_what_is_there_stays_without_force(refused, tree, written, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    before = trees.snapshot(out)
    refused("write", tree, f"{out} is not empty", str(out), cure="--force")
    assert trees.snapshot(out) == before
    refused("write", tree, "is not a folder", str(out / "mine.txt"), "--force")
    assert trees.snapshot(out) == before


def test_force_replaces_a_series_and_nothing_else(say, tree, written, names, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "outside.patch").write_text("not in the folder")
    (out / "series").write_text(f"{FIRST}.patch\nold.patch\ngone.patch\n../outside.patch\nmine.txt")
    for name in (f"{FIRST}.patch", "old.patch", "mine.patch", "mine.txt"):
        (out / name).write_text("before")
    assert say("write", tree, str(out), "--force")[0] == 0
    have = trees.snapshot(out)
    assert have.pop("mine.txt")[1] == have.pop("mine.patch")[1] == b"before"
    assert have == trees.snapshot(written)
    assert (tmp_path / "outside.patch").read_text() == "not in the folder"


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_a_disk_that_fails_on_the_way(say, refused, tree, written, monkeypatch, tmp_path, force):
    out, more = tmp_path / "out", ["--force"] if force else []
    if force:
        assert say("write", tree, str(out))[0] == 0
        (out / f"{FIRST}.patch").write_text("old")
        (out / "old.patch").write_text("old")
        (out / "series").write_text("old.patch\n")
    before = trees.snapshot(tmp_path)
    real, calls = os.replace, []

    def fails(source, target):
        calls.append(target)
        if len(calls) == 5:
            raise OSError(5, "Input/output error", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", fails)
    what = "nothing was changed, as a file cannot be written"
    refused("write", tree, what, str(out), *more, cure="where you may write")
    monkeypatch.undo()
    assert trees.snapshot(tmp_path) == before
    assert not list(tmp_path.rglob(f"*{TEMPORARY}"))
    assert say("write", tree, str(out), *more)[0] == 0, "the next try gets through"
    assert trees.snapshot(out) == trees.snapshot(written)


def test_every_feature_has_a_subject_of_its_own():
    features = {feature for known in supported.releases().values() for feature in known}
    assert set(SUBJECTS) == {FIRST} | features
    assert len(set(SUBJECTS.values())) == len(SUBJECTS)
    for text in SUBJECTS.values():
        assert text.startswith("["), text
        assert len(text) <= 80, text
    with pytest.raises(LookupError, match="no subject for the patch new-feature"):
        subject(Patch("new-feature"))


def test_the_release_is_written(written):
    assert f'+RELEASE = "{HERE}"\n' in (written / f"{FIRST}.patch").read_text()
