"""A checkpoint is there as a whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch

from tokendrift import TokenDriftError
from tokendrift.files import write_atomically
from tokendrift.training import checkpointing
from tokendrift.training.checkpointing import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    update_state,
)

GROUPS = {"model": {"a": torch.arange(3.0), "b": torch.ones(2, 2)}, "optimizer": {}}


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_what_is_saved_comes_back(tmp_path):
    place = save_checkpoint(tmp_path, 7, GROUPS, {"data": {"epoch": 1}})
    stored = load_checkpoint(place)
    assert stored.state["step"] == 7
    assert stored.state["data"] == {"epoch": 1}
    assert stored.tensors.keys() == GROUPS.keys()
    assert all(torch.equal(stored.tensors["model"][name], tensor) for name, tensor in GROUPS["model"].items())


STATES = {
    "state": b'{"step": 4',
    "no keys": b"{}",
    "no object": b"[1, 2]",
    "another step": b'{"step": 3, "sha256": {}}',
    "wrong types": b'{"step": "4", "sha256": [1]}',
    "deep": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "edited", *STATES])
def test_the_newest_whole_one_is_found_and_a_broken_one_said(tmp_path, harm):
    for step in (2, 4):
        save_checkpoint(tmp_path, step, GROUPS, {"note": 1})
    file = tmp_path / "step-00000004" / "model.safetensors"
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[:-1])
    elif harm == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "remove":
        file.unlink()
    elif harm == "edited":
        state = file.with_name("state.json")
        state.write_text(state.read_text().replace('"note": 1', '"note": 2'))
    else:
        file.with_name("state.json").write_bytes(STATES[harm])
    told = []
    place, stored = latest_checkpoint(tmp_path, told.append)
    assert place.name == "step-00000002"
    assert stored.state["step"] == 2
    assert "step-00000004" in told[0]
    assert told[0].endswith("The previous checkpoint is used instead.")
    assert names(tmp_path) == ["step-00000002"]
    assert (tmp_path / "broken-step-00000004").is_dir()


def test_without_a_whole_one_there_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere", print) is None
    (tmp_path / "step-00000001").mkdir()  # cut off while it was removed
    (tmp_path / ".saving-00000002").mkdir()  # cut off while it was written
    assert latest_checkpoint(tmp_path, print) is None
    assert list(tmp_path.iterdir()) == []


def test_where_none_can_be_read_nothing_is_given_up(tmp_path):
    for step in (2, 4):
        place = save_checkpoint(tmp_path, step, GROUPS, {})
        (place / "model.safetensors").write_bytes(b"")
    for _ in range(2):  # asked again it says the same: a run never begins anew by itself
        with pytest.raises(
            TokenDriftError, match=r"none of 2 checkpoints in .* can be read. For the newest: .*00000004"
        ):
            latest_checkpoint(tmp_path, print)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_one_that_the_disk_does_not_give_keeps_its_name(tmp_path, monkeypatch):
    for step in (2, 4):
        save_checkpoint(tmp_path, step, GROUPS, {})
    digest = checkpointing.file_digest

    def fails(file):
        if "00000004" in str(file):
            raise OSError(5, "Input/output error")
        return digest(file)

    monkeypatch.setattr(checkpointing, "file_digest", fails)
    told = []
    assert latest_checkpoint(tmp_path, told.append)[0].name == "step-00000002"
    assert "Input/output error" in told[0]
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_an_error_while_writing_leaves_nothing_and_the_old_one_whole(tmp_path):
    save_checkpoint(tmp_path, 1, GROUPS, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, 2, GROUPS, {"bad": object()})
    assert names(tmp_path) == ["step-00000001"]
    load_checkpoint(tmp_path / "step-00000001")


def test_the_newest_and_the_spared_are_kept(tmp_path):
    for step in range(1, 7):
        save_checkpoint(tmp_path, step, {}, {})
    prune_checkpoints(tmp_path, 2, spare={3})
    assert names(tmp_path) == ["step-00000003", "step-00000005", "step-00000006"]


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    save_checkpoint(tmp_path, 1, {}, {"note": "old"})
    save_checkpoint(tmp_path, 1, GROUPS, {"note": "new"})
    assert load_checkpoint(tmp_path / "step-00000001").state["note"] == "new"


def test_a_state_without_digests_is_refused(tmp_path):
    place = save_checkpoint(tmp_path, 1, GROUPS, {})
    (place / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(TokenDriftError, match=r"the checkpoint .*step-00000001 cannot be read"):
        load_checkpoint(place)


def test_a_text_is_replaced_as_a_whole(tmp_path):
    for text in ("one", "two"):
        write_atomically(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_checkpoint_of_a_version_without_a_digest_of_the_state_still_loads(tmp_path):
    place = save_checkpoint(tmp_path, 1, GROUPS, {"note": "old"})
    state = json.loads((place / "state.json").read_text())
    del state["state_sha256"]
    (place / "state.json").write_text(json.dumps(state))
    assert load_checkpoint(place).state["note"] == "old"
    with pytest.raises(TokenDriftError, match="no valid entry 'note'"):
        load_checkpoint(place, {"note": int})


def test_entries_of_a_state_are_changed_as_a_whole(tmp_path):
    place = save_checkpoint(tmp_path, 1, GROUPS, {"note": "old", "way": 3})
    update_state(place, {"note": "new"})
    stored = load_checkpoint(place)
    assert (stored.state["note"], stored.state["way"]) == ("new", 3)
    assert stored.tensors.keys() == GROUPS.keys()


def test_nothing_is_removed_or_renamed_that_has_another_name_than_a_checkpoint(tmp_path):
    for step in (2, 4):
        save_checkpoint(tmp_path, step, GROUPS, {})
    for name in ("step-final", "step-1", "step-00000009", ".saving-notes", "broken-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("mine")
    prune_checkpoints(tmp_path, 1)
    assert latest_checkpoint(tmp_path, pytest.fail)[0].name == "step-00000004"
    names = ["step-final", "step-1", "step-00000009", ".saving-notes", "broken-mine", "step-00000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_kill_while_a_step_is_saved_again_leaves_one_of_the_two(tmp_path, monkeypatch):
    place = save_checkpoint(tmp_path, 1, GROUPS, {"note": "old"})
    rename = type(place).rename

    def killed(path, target):
        if path.name.startswith(".saving-"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(type(place), "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, GROUPS, {"note": "new"})
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path, pytest.fail)[1].state["note"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
