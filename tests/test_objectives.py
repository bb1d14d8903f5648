"""An objective of the user is one class and one line: it trains, its networks are saved, and it resumes to the bit."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import refine_worker as worker
import torch
from typer.testing import CliRunner

from tokendrift import TokenDriftError
from tokendrift.cli import app
from tokendrift.models import load_denoiser
from tokendrift.training import (
    OBJECTIVES,
    Continuation,
    LoopConfig,
    ObjectiveConfig,
    Optimization,
    RefineConfig,
    StatefulObjective,
    StepLoss,
    make_config,
    read_log,
    refine,
)
from tokendrift.training.checkpointing import load_checkpoint
from tokendrift.training.config import setting_help


class Toy(StatefulObjective):
    """Three networks, as in distribution matching: the trained one, a teacher, and an auxiliary that is trained, too.

    The teacher is replaced by the averaged network every few steps, as in distillation by rounds.
    """

    def __init__(self, config, setup):
        self.config, self.base = config, Continuation(setup.process, setup.generator, setup.share)
        self.teacher = copy.deepcopy(setup.base).eval().requires_grad_(False)
        self.auxiliary = Optimization(torch.nn.Linear(1, 1), LoopConfig(setup.steps, learning_rate=0.1, ema=0.0))
        self.rounds, self.seen = 0, 0

    @property
    def module(self):
        return self.teacher

    def before_training(self, take):
        self.seen = int(take(3).sum())

    def __call__(self, model, x0, *, log=False):
        loss, logs = self.base(model, x0)
        gap = self.auxiliary.model(loss.detach().view(1, 1)).square().mean()
        gap.backward()
        away = self.teacher.vocab_embed.embedding - model.vocab_embed.embedding
        return StepLoss(loss + self.config.toy_weight * away.square().sum(), {**logs, "gap": gap.detach()})

    def after_step(self, finished, optimization):
        self.auxiliary.optimizer.step()
        self.auxiliary.optimizer.zero_grad()
        if finished % self.config.toy_round == 0:
            with optimization.average.applied():
                self.teacher.load_state_dict(optimization.model.state_dict())
            self.rounds += 1

    def state_dict(self):
        auxiliary = {f"{group}.{n}": x for group, of in self.auxiliary.state().items() for n, x in of.items()}
        teacher = {f"teacher.{name}": tensor for name, tensor in self.teacher.state_dict().items()}
        return {**auxiliary, **teacher, "counts": torch.tensor([self.rounds, self.seen])}

    def load_state_dict(self, state):
        groups = {}
        for name, tensor in state.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = tensor
        self.rounds, self.seen = groups.pop("counts")[""].tolist()
        self.teacher.load_state_dict(groups.pop("teacher"))
        self.auxiliary.load_state(groups)


@dataclass(frozen=True)
class ToyConfig(ObjectiveConfig):
    """Settings of the toy.

    Attributes:
        toy_weight: Weight of the distance to the teacher.
        toy_round: Steps between copies into the teacher.
        toy_kind: Without meaning.
    """

    description: ClassVar[str] = "a toy with three networks"
    toy_weight: float = 0.5
    toy_round: int = 2
    toy_kind: Literal["red", "blue"] = "red"

    def build(self, setup):
        return Toy(self, setup)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a tiny checkpoint and a text, with the toy in the table of objectives."""
    monkeypatch.setitem(OBJECTIVES, "toy", ToyConfig)
    worker.make_inputs(tmp_path)
    return tmp_path


def run(folder, name, on_step=None, **changes):
    made = worker.config(folder, output=str(folder / name), objective="toy", **changes)
    return refine(made, progress=False, on_step=on_step).folder


def test_a_registered_objective_trains_with_its_settings(toy):
    folder = run(toy, "run", toy_weight=0.25, steps=2)
    assert {"nelbo", "gap"} <= read_log(folder, "train")[-1].keys()
    assert "trained for 2 further steps with\na toy with three networks" in (folder / "README.md").read_text()
    assert 'objective = "toy"\ntoy_weight = 0.25\ntoy_round = 2\n' in (folder / "config.toml").read_text()
    assert make_config(file=folder / "config.toml").objective == ToyConfig(toy_weight=0.25)
    load_denoiser(folder)


def test_teacher_auxiliary_and_its_moments_are_resumed_to_the_bit(toy):
    def on_step(step):
        if step in (1, 3, 5):
            raise KeyboardInterrupt

    changes = {"checkpoint_every": 1, "evaluate_nfe": ()}
    whole = run(toy, "whole", **changes)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(toy, "stopped", on_step, **changes)
    resumed = run(toy, "stopped", **changes)
    for name in ("model.safetensors", "log.jsonl"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    states = [load_checkpoint(f / "checkpoints" / "step-00000006").tensors["objective"] for f in (whole, resumed)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert states[0]["counts"].tolist()[0] == 3 and states[0]["counts"].tolist()[1] > 0
    assert any("exp_avg" in name for name in states[0])


def test_a_registered_objective_is_a_choice_everywhere(toy):
    assert setting_help("objective").startswith("What is minimised: drift, continuation, combined, pairs, ")
    assert "toy" in setting_help("objective")
    flags = ["refine", "base", "--objective", "toy", "--set", "toy_round=5", "--show"]
    shown = CliRunner().invoke(app, flags)
    assert shown.exit_code == 0 and "toy_round = 5" in shown.stdout and "# tokenizer is not set" in shown.stdout
    with pytest.raises(TokenDriftError, match="toy_kind must be one of 'red', 'blue'"):
        make_config(values={"checkpoint": "base", "objective": "toy", "toy_kind": "green"})
    with pytest.raises(TokenDriftError, match="unknown key 'toy_wait'; the nearest is 'toy_weight'"):
        make_config(values={"checkpoint": "base", "toy_wait": 1.0})


def test_an_objective_without_a_name_is_refused(toy, monkeypatch):
    made = RefineConfig("base", objective=ToyConfig())
    monkeypatch.delitem(OBJECTIVES, "toy")
    with pytest.raises(TokenDriftError, match=r"(?s)ToyConfig is not registered.*Add it to OBJECTIVES"):
        made.settings()


def test_checkpoints_that_call_the_state_queues_are_resumed(tmp_path):
    worker.make_inputs(tmp_path)
    made = worker.config(tmp_path, evaluate_nfe=())
    whole = refine(made, progress=False).folder
    made = made.replace(output=str(tmp_path / "old"))
    renamed = refine(made.replace(steps=4), progress=False).folder
    place = renamed / "checkpoints" / "step-00000004"
    (place / "objective.safetensors").rename(place / "queues.safetensors")
    state = json.loads((place / "state.json").read_text())
    state["sha256"]["queues"] = state["sha256"].pop("objective")
    (place / "state.json").write_text(json.dumps(state))
    resumed = refine(made, progress=False).folder
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_state_that_does_not_fit_is_refused_in_plain_words(tmp_path, monkeypatch):
    worker.make_inputs(tmp_path)
    pairs = {"objective": "pairs", "pair_sequences": 0, "evaluate_nfe": ()}
    refine(worker.config(tmp_path, steps=2, pair_buckets=50, **pairs), progress=False)
    monkeypatch.setattr("tokendrift.training.run_folder.RunFolder.check_same_run", lambda self, state: None)
    with pytest.raises(TokenDriftError, match=r"(?s)the state of the objective in .*run does not fit.*another version"):
        refine(worker.config(tmp_path, steps=4, pair_buckets=60, **pairs), progress=False)
