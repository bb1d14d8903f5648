"""What a run tells survives a full disk, and is told under one name."""

from __future__ import annotations

import sys
import types
import warnings

import pytest

from tokendrift.training import read_log
from tokendrift.training.records import Records


class FullDisk:
    """A writer of curves that fails at every call, as TensorBoard's does once its thread has met a full disk."""

    calls = 0

    def add_scalar(self, *args):
        self.calls += 1
        raise OSError(28, "No space left on device")

    def close(self):
        raise OSError(28, "No space left on device")


def test_a_full_disk_ends_the_curves_with_one_warning_and_nothing_else(tmp_path):
    with warnings.catch_warnings(record=True) as caught, Records(tmp_path, 0, 2, progress=False) as records:
        warnings.simplefilter("always")
        records.curves = broken = FullDisk()
        for step in (1, 2):
            records.figures("train", step, {"drift": 0.5})
    assert [str(each.message) for each in caught] == [
        "the curves cannot be written ([Errno 28] No space left on device); training continues without them."
    ]
    assert broken.calls == 1
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]


def test_curves_that_cannot_be_closed_do_not_fail_the_run(tmp_path):
    with pytest.warns(UserWarning, match="the curves cannot be written"), Records(tmp_path, 0, 1) as records:
        records.curves = FullDisk()


def test_curves_that_cannot_be_begun_do_not_fail_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="the curves cannot be written"):
        records = Records(tmp_path, 0, 1, tensorboard=True, progress=False)
    assert records.curves is None


def test_every_phase_has_a_bar_with_its_name(tmp_path):
    with Records(tmp_path, 1, 3, label="baseline: ") as records:
        with records.phase("initial evaluation", 2) as part:
            part()
            training, evaluation = records.bar.tasks
            assert (training.description, training.completed, training.total) == ("baseline: training", 1, 3)
            assert (evaluation.description, evaluation.completed) == ("baseline: initial evaluation", 1)
        assert len(records.bar.tasks) == 1


def test_weights_and_biases_knows_folders_of_one_name_apart_and_a_resumed_run_again(tmp_path, monkeypatch):
    seen = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: seen.append(options)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    one, two = tmp_path / "a" / "refined", tmp_path / "b" / "refined"
    for folder, step in ((one, 0), (two, 0), (one, 5)):
        folder.mkdir(parents=True, exist_ok=True)
        Records(folder, step, 9, wandb="project", progress=False)
    first, second, again = (options["id"] for options in seen)
    assert first == again != second
    assert {options["name"] for options in seen} == {"refined"}


def test_a_line_that_a_kill_left_incomplete_is_no_entry_of_the_log(tmp_path):
    with Records(tmp_path, 0, 2, progress=False) as records:
        for step in (1, 2):
            records.figures("train", step, {"drift": 0.5})
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text()[:-5])
    assert [entry["step"] for entry in read_log(tmp_path)] == [1]
