"""What a resumed run takes from its folder: the real best, comparable figures, the same text; or it says why not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import refine_worker as worker
import torch
from forked import run_code

from tokendrift import TokenDriftError
from tokendrift.evaluation import GenerativePerplexity
from tokendrift.files import exclusive
from tokendrift.models import load_denoiser
from tokendrift.training import read_log, refine, refinement
from tokendrift.training.checkpointing import load_checkpoint
from tokendrift.training.few_step import FewStepEvaluation
from tokendrift.training.processes import termination
from tokendrift.training.refinement import Run
from tokendrift.training.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    """Refine a tiny checkpoint in a folder of this test."""
    worker.make_inputs(tmp_path)

    def run(*, judge=None, **changes):
        return refine(worker.config(tmp_path, **changes), judge=judge, progress=False)

    return run


def uniform():
    return GenerativePerplexity(lambda ids, attention_mask: torch.zeros(*ids.shape, 1025), protocol="all")


def scores(monkeypatch, by_step):
    monkeypatch.setattr(FewStepEvaluation, "score", lambda self, rows: by_step[rows[0]["step"]])


def steps_of(folder):
    return [path.name for path in sorted((folder / "checkpoints").iterdir())]


def assert_best_is_of(folder, step):
    place = folder / "checkpoints" / f"step-{step:08d}"
    weights = load_checkpoint(place).tensors["average"]
    best = load_denoiser(folder / "best")[0].state_dict()
    assert all(torch.equal(best[name], weights[name]) for name in weights)


def test_a_kill_between_a_checkpoint_and_the_best_model_costs_neither(run, tmp_path, monkeypatch):
    scores(monkeypatch, {0: 9.0, 2: 2.0, 4: 1.0, 6: 3.0})
    export = RunFolder.export

    def killed(self, groups, rows, steps, *, best=False):
        if best and steps == 4:
            raise KeyboardInterrupt
        export(self, groups, rows, steps, best=best)

    monkeypatch.setattr(RunFolder, "export", killed)
    with pytest.raises(KeyboardInterrupt):
        run(evaluate_every=2)
    monkeypatch.setattr(RunFolder, "export", export)
    assert_best_is_of(run(evaluate_every=2).folder, 4)


def test_a_best_that_could_not_be_saved_does_not_cost_the_one_before(run, tmp_path, monkeypatch):
    scores(monkeypatch, {0: 9.0, 2: 2.0, 4: 1.0, 6: 3.0})
    save = RunFolder.save

    def full(self, finished, *args, **options):
        if finished == 4:
            raise OSError(28, "No space left on device")
        save(self, finished, *args, **options)

    monkeypatch.setattr(RunFolder, "save", full)
    with pytest.warns(UserWarning, match="checkpoint of step 4 could not be written"):
        folder = run(evaluate_every=2, keep=1).folder
    assert steps_of(folder) == ["step-00000002", "step-00000006"]
    assert_best_is_of(folder, 2)


def test_a_best_model_that_cannot_be_written_is_written_at_the_next_start(run, monkeypatch):
    scores(monkeypatch, {0: 9.0, 2: 2.0, 4: 3.0, 6: 3.0})
    export = RunFolder.export

    def full(self, *args, best=False):
        if best:
            raise OSError(28, "No space left on device")
        export(self, *args, best=best)

    monkeypatch.setattr(RunFolder, "export", full)
    with pytest.warns(UserWarning, match=r"the best model, of step 2, could not be written"):
        run(evaluate_every=2)
    monkeypatch.setattr(RunFolder, "export", export)
    assert_best_is_of(run(evaluate_every=2).folder, 2)


def test_figures_of_another_judge_are_made_anew(run):
    before = run(steps=2).evaluations
    assert not any("gen_ppl" in row for row in before)
    with pytest.warns(
        UserWarning,
        match=r"evaluations were made with "
        "{'judge': None, .* figures remain only in log.jsonl",
    ):
        refined = run(steps=2, judge=uniform())
    assert [(row["step"], row["nfe"]) for row in refined.evaluations] == [(0, None), (0, 2), (2, 2)]
    assert all(row["gen_ppl"] == pytest.approx(1025.0, rel=1e-4) for row in refined.evaluations)
    for old, new in zip(before, refined.evaluations, strict=True):  # the same models, the base among them
        assert new["sample_entropy"] == pytest.approx(old["sample_entropy"])
    state = json.loads((refined.folder / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["way"] == {"judge": "<lambda>", "nfes": [2], "samples": 4}
    lines = len(read_log(refined.folder))
    assert run(steps=2, judge=uniform()).evaluations == refined.evaluations
    assert len(read_log(refined.folder)) == lines


def test_a_changed_way_of_measuring_chooses_the_best_anew(run, monkeypatch):
    scores(monkeypatch, {0: 9.0, 2: 1.0, 4: 5.0, 6: 6.0})
    run(evaluate_every=2, steps=4)
    with pytest.warns(UserWarning, match="evaluations were made with"):
        folder = run(evaluate_every=2, steps=6, evaluate_samples=6).folder
    assert_best_is_of(folder, 4)


def test_without_evaluations_the_rows_before_stay(run):
    before = run(steps=2).evaluations
    assert run(steps=2, evaluate_nfe=()).evaluations == before


@pytest.mark.parametrize("objective", ["drift", "combined"])
def test_a_run_from_before_the_pairs_goes_on(run, monkeypatch, objective):
    run(steps=2, objective=objective)
    check = RunFolder.check_same_run

    def from_before(self, state):
        known = {name: value for name, value in state["config"].items() if name != "chains" and "pair_" not in name}
        check(self, {**state, "config": known | {"base_weight": 1.0}})

    monkeypatch.setattr(RunFolder, "check_same_run", from_before)
    run(steps=4, objective=objective)
    if objective == "combined":
        with pytest.raises(TokenDriftError, match=r"configuration: base_weight was 1\.0 and is 2\.0"):
            run(steps=4, objective=objective, base_weight=2.0)


def test_settings_of_pairs_belong_to_runs_on_pairs(run, tmp_path):
    run(steps=2)
    run(steps=2, chains=(8,), pair_decay=0.5, pair_buckets=16, pair_sequences=0)
    pairs = {"output": str(tmp_path / "pairs"), "objective": "pairs", "steps": 2}
    pairs |= {"pair_sequences": 8, "pair_buckets": 64}
    run(**pairs)
    with pytest.raises(TokenDriftError, match=r"configuration: pair_decay was 0\.95 and is 0\.5"):
        run(**pairs, pair_decay=0.5)


def test_fewer_steps_than_were_taken_are_refused(run):
    run(steps=4)
    with pytest.raises(
        TokenDriftError, match=r"(?s)steps is 2, but .*run already contains a run of 4 steps.*at least 4 steps"
    ):
        run(steps=2)


@pytest.mark.parametrize("change", ["edited", "longer"])
def test_a_changed_text_is_noticed(run, tmp_path, change):
    run(steps=2)
    text = tmp_path / "text.txt"
    content = text.read_text()
    text.write_text(content + "\nmore" if change == "longer" else content[:-1] + "#")
    with pytest.raises(TokenDriftError, match=r"the text, or what .* \(text added at the end counts, too\)"):
        run(steps=4)


def test_a_changed_tokenizer_is_noticed(run, tmp_path):
    file = tmp_path / "tokenizer.json"
    shutil.copy(worker.PRETRAINED / "tokenizer.json", file)
    run(steps=2, tokenizer=str(file))
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["!"], vocab["#"] = vocab["#"], vocab["!"]
    file.write_text(json.dumps(content))
    with pytest.raises(TokenDriftError, match="the tokenizer has changed"):
        run(steps=4, tokenizer=str(file))


def test_an_accelerator_that_cannot_work_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    with pytest.raises(TokenDriftError, match="gradient_accumulation_steps of accelerate must be 1"):
        run()
    assert not (tmp_path / "run").exists()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["Cargo.toml", "config.toml", "step-00000001/model.safetensors"])
@pytest.mark.parametrize("output", ["there", "."])
def test_a_folder_of_someone_else_is_refused_before_any_work(run, tmp_path, monkeypatch, name, output):
    folder = tmp_path / "there"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    monkeypatch.chdir(tmp_path if output == "there" else folder)
    monkeypatch.setattr("tokendrift.training.refinement.read_checkpoint", pytest.fail)
    with pytest.raises(TokenDriftError, match="contains files that were not written by refine"):
        run(output=output, baseline=True)
    assert files(folder) == {Path(name).name: b"mine"}


def test_an_output_without_a_name_is_refused(run):
    with pytest.raises(TokenDriftError, match="output must name a folder"):
        run(output=" ")


@pytest.mark.parametrize("marked", [True, False])
def test_an_empty_folder_and_one_that_a_run_has_made_are_written_to(run, tmp_path, marked):
    (tmp_path / "run").mkdir()
    run(steps=2)
    assert not (tmp_path / "run" / ".tokendrift-lock").exists()
    if not marked:  # as an earlier version left it
        (tmp_path / "run" / ".tokendrift-run").unlink()
    run(steps=3)


def test_one_run_at_a_time_is_in_a_folder(run, tmp_path):
    lock, said = tmp_path / "run" / ".tokendrift-lock", f"run is in use by process {os.getpid()} on"
    with exclusive(lock, tmp_path / "run"), pytest.raises(TokenDriftError, match=said):
        run(steps=1)
    run(steps=1)


def test_a_lock_survives_no_kill(run, tmp_path):
    lock = tmp_path / "run" / ".tokendrift-lock"
    code = f"import os, pathlib\nfrom tokendrift.files import exclusive\nplace = pathlib.Path({str(lock)!r})\n"
    code += "with exclusive(place, place):\n    os._exit(9)"
    with pytest.raises(AssertionError, match=r"^9: "):
        run_code(code)
    assert lock.exists()
    run(steps=1)


@pytest.mark.parametrize("evaluate_every", [0, 2])
def test_an_evaluation_that_fails_costs_its_row_and_not_the_run(run, tmp_path, monkeypatch, evaluate_every):
    expected = run(output=str(tmp_path / "whole"), evaluate_every=evaluate_every).folder
    measure, calls = FewStepEvaluation.measure, []

    def fails(self, ids):
        calls.append(len(calls))
        if len(calls) > 2:  # after real text and the model before
            raise RuntimeError("the judge is gone")
        return measure(self, ids)

    monkeypatch.setattr(FewStepEvaluation, "measure", fails)
    with pytest.warns(UserWarning, match="the evaluation after 6 steps has failed, without figures: the judge is gone"):
        refined = run(evaluate_every=evaluate_every)
    assert [row["step"] for row in refined.evaluations] == [0, 0]
    assert (refined.folder / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_a_kill_during_an_evaluation_loses_no_step_and_the_evaluation_is_made_at_the_next_start(
    run, tmp_path, monkeypatch
):
    whole = run(output=str(tmp_path / "whole"), evaluate_every=2)
    evaluate = Run._evaluate
    for step in (2, 6):

        def killed(self, finished, step=step):
            if finished == step:
                raise KeyboardInterrupt
            return evaluate(self, finished)

        monkeypatch.setattr(Run, "_evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(evaluate_every=2)
        assert steps_of(tmp_path / "run")[-1] == f"step-{step:08d}"
        assert (tmp_path / "run" / "model.safetensors").exists() == (step == 6)
    monkeypatch.setattr(Run, "_evaluate", evaluate)
    again = run(evaluate_every=2)
    assert again.evaluations == whole.evaluations
    for name in ("model.safetensors", "log.jsonl"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    card = (again.folder / "README.md").read_text()
    assert card.replace(str(tmp_path / "run"), str(tmp_path / "whole")) == (whole.folder / "README.md").read_text()


def test_a_first_checkpoint_comes_by_the_clock(run, tmp_path):
    run(steps=2, checkpoint_every=1000, checkpoint_minutes=1e-9, keep=9)
    assert steps_of(tmp_path / "run") == ["step-00000002"]
    run(steps=5, checkpoint_every=1000, checkpoint_minutes=1e-9, keep=9)
    assert steps_of(tmp_path / "run") == [f"step-{step:08d}" for step in (2, 4, 5)]


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="SIGINT is ignored here")
def test_control_c_finishes_the_step_and_a_second_one_does_not(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with termination() as received:
        signal.raise_signal(signal.SIGINT)
        assert received()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_resumed_run_does_not_hold_the_tensors_that_it_has_read(run, monkeypatch):
    run(steps=2)
    read, taken, held = RunFolder.newest, Run._step, []

    def newest(self, warn):
        held.append(read(self, warn))
        return held[0]

    def step(self, number):
        assert held[0].state["step"] == 2 and not held[0].tensors
        return taken(self, number)

    monkeypatch.setattr(RunFolder, "newest", newest)
    monkeypatch.setattr(Run, "_step", step)
    run(steps=3)


def test_all_processes_learn_that_the_first_evaluation_has_failed(run, monkeypatch):
    """The others wait for the main process, which tells them before it raises its error."""
    told = []
    monkeypatch.setattr(refinement, "broadcast_from_main", lambda _, value: told.append(value) or value)

    def measure(self, ids):
        raise RuntimeError("the judge is gone")

    monkeypatch.setattr(FewStepEvaluation, "measure", measure)
    with pytest.raises(RuntimeError, match="the judge is gone"):
        run()
    assert told == [(None, True)]
