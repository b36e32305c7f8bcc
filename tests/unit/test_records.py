"""Records of `vllm-moe-lora tune`: written whole, read strictly, used only where they were made."""

from __future__ import annotations

import dataclasses
import json
import os
import stat

import pytest

from vllm_moe_lora import fingerprint, records
from vllm_moe_lora.records import Choice, Conditions, LayerShape, Record

HERE = Conditions("Some GPU", "sm_90", "570", "3.9.0", "0.33.0", "abc")
SHAPE = LayerShape(128, 8, 2048, 768, 2, 2, 4, 16, "bfloat16")
US = {"upstream": (10.0, 9.0, 11.0), "ours": (5.0, 4.5, 5.5)}
RECORD = Record(
    HERE,
    SHAPE,
    (Choice(1, "ours", US), Choice(8, "upstream", US), Choice(64, "ours", US)),
    ((16, 16, 128, 4, 4, 128, 4), (32, 16, 128, 4, 4, 128, 8)),
    {"tail": "w2: 1 of 64 numbers are wrong"},
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MOE_LORA_TUNED", str(tmp_path / "tuned"))
    return tmp_path / "tuned"


def test_what_is_written_is_read(folder):
    assert records.find(HERE, SHAPE)[0] is None
    path = records.write(RECORD)
    assert path.parent == folder
    assert records.read(path) == RECORD
    assert records.find(HERE, SHAPE) == (RECORD, "")
    assert [one.name for one in folder.iterdir()] == [path.name], "no part is left behind"
    newer = dataclasses.replace(RECORD, refused={})
    assert records.write(newer) == path
    assert records.find(HERE, SHAPE) == (newer, "")


def test_others_may_read_it():
    before = os.umask(0o027)
    try:
        assert stat.S_IMODE(records.write(RECORD).stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_a_failed_write_leaves_the_old_one(folder, monkeypatch):
    path = records.write(RECORD)
    monkeypatch.setattr(records.Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        records.write(dataclasses.replace(RECORD, refused={}))
    assert [one.name for one in folder.iterdir()] == [path.name]
    assert records.read(path) == RECORD


@pytest.mark.parametrize(
    ("tokens", "winner"),
    [(1, "ours"), (2, "upstream"), (8, "upstream"), (9, "ours"), (64, "ours"), (9999, "ours")],
)
def test_the_winner_is_that_of_the_next_larger_batch(tokens, winner):
    assert RECORD.winner(tokens) == winner


@pytest.mark.parametrize("field", [one.name for one in dataclasses.fields(Conditions)])
def test_a_record_of_other_conditions_does_not_count(field):
    records.write(RECORD)
    found, why = records.find(dataclasses.replace(HERE, **{field: "other"}), SHAPE)
    assert found is None
    assert f"{field} was {getattr(HERE, field)}, is other" in why


@pytest.mark.parametrize("field", [one.name for one in dataclasses.fields(LayerShape)])
def test_a_record_of_another_shape_does_not_count(field):
    records.write(RECORD)
    other = "float16" if field == "dtype" else 7
    found, why = records.find(HERE, dataclasses.replace(SHAPE, **{field: other}))
    assert found is None
    assert "there is no record for" in why


def broken(**changes):
    return {"version": records.VERSION, **dataclasses.asdict(RECORD), **changes}


CHOICES = dataclasses.asdict(RECORD)["choices"]
BROKEN = {
    "no JSON": "{",
    "a list": "[]",
    "another version": json.dumps(broken(version=99)),
    "no choices": json.dumps(broken(choices=[])),
    "sizes in no order": json.dumps(broken(choices=CHOICES[::-1])),
    "unknown kernels": json.dumps(broken(choices=[{**CHOICES[0], "winner": "theirs"}])),
    "a refused winner": json.dumps(broken(refused={"ours": "wrong"})),
    "a missing field": json.dumps(broken(shape={"experts": 1})),
    "a wrong type": json.dumps(broken(shape={**dataclasses.asdict(SHAPE), "experts": "128"})),
    "times that are none": json.dumps(broken(choices=[{**CHOICES[0], "us": {"ours": [1]}}])),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_and_not_used(name, folder):
    path = records.write(RECORD)
    path.write_text(BROKEN[name])
    with pytest.raises(records.RecordError, match=path.name):
        records.read(path)
    found, why = records.find(HERE, SHAPE)
    assert found is None
    assert path.name in why


def test_a_broken_file_hides_no_other(folder):
    records.write(RECORD)
    (folder / "0.json").write_text("{")
    assert records.find(HERE, SHAPE)[0] == RECORD


def test_compiled_artefacts_know_of_records(monkeypatch):
    before = fingerprint.fingerprint()
    records.write(RECORD)
    with_one = fingerprint.fingerprint()
    assert with_one != before
    assert with_one == fingerprint.fingerprint()
    monkeypatch.setenv("VLLM_MOE_LORA_KERNELS", "upstream")
    upstream = fingerprint.fingerprint()
    records.write(dataclasses.replace(RECORD, refused={}))
    assert upstream == fingerprint.fingerprint()


def test_the_folder_is_vllms(monkeypatch):
    monkeypatch.delenv("VLLM_MOE_LORA_TUNED")
    monkeypatch.setenv("VLLM_CONFIG_ROOT", "/somewhere")
    assert str(records.folder()) == "/somewhere/moe_lora_tuned"
    monkeypatch.delenv("VLLM_CONFIG_ROOT")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/else")
    assert str(records.folder()) == "/else/vllm/moe_lora_tuned"
