"""The Trainer of transformers trains an objective, logs what it finds, and resumes with the queues."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, TrainerState, TrainingArguments

from tokendrift import TokenDriftError, TokenDriftLoss
from tokendrift.diffusion import MaskedDiffusion
from tokendrift.integrations.hf_trainer import QUEUES, ObjectiveTrainer
from tokendrift.models import DiT, DiTConfig, MaskedLMDenoiser, load_denoiser
from tokendrift.training import Continuation, DistributionMatching, Drift, MatchingConfig, StatefulObjective, StepLoss

VOCAB = 12


def drifting(model, process, generator):
    return Drift(
        process, TokenDriftLoss.from_encoder(model, queue_size=6, mask_id=process.mask_id), 0.0, generator=generator
    )


def matching(model, process, generator):
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    config = MatchingConfig(random_input=0, pair_sequences=8)
    return DistributionMatching(process, teacher, config=config, generator=generator)


OBJECTIVES = {
    "drift": drifting,
    "continuation": lambda model, process, generator: Continuation(process, generator),
    "matching": matching,
    "recorder": lambda model, process, generator: Recorder(),
}


class Recorder(StatefulObjective):
    """Writes down when it is called."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, x0, *, log=False):
        self.calls.append("loss")
        return StepLoss(model(x0, torch.ones(len(x0))).square().mean(), {})

    def before_training(self, take):
        self.calls.append(take(20))

    @contextmanager
    def step_context(self):
        self.calls.append("enter")
        yield
        self.calls.append("leave")

    def after_step(self, finished, optimization):
        assert optimization.optimizer.state and not optimization.average.values
        self.calls.append(finished)

    def state_dict(self):
        return {"calls": torch.tensor(len(self.calls))}

    def load_state_dict(self, state):
        self.calls.append(f"loaded {int(state['calls'])}")


@pytest.fixture
def make(tmp_path):
    """Build trainers over the same data and weights."""
    texts = torch.randint(VOCAB - 1, (16, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": text} for text in texts]

    def build(kind="drift", **changes):
        torch.manual_seed(0)
        model = DiT(DiTConfig(VOCAB, 8, hidden_dim=16, cond_dim=4, n_blocks=1, n_heads=2, dropout=0.0))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        process, generator = MaskedDiffusion(VOCAB), torch.Generator().manual_seed(1)
        objective = OBJECTIVES[kind](model, process, generator)
        options = {
            "output_dir": str(tmp_path), "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1,
            "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2,
        }  # fmt: skip
        args = TrainingArguments(**{**options, **changes})
        return ObjectiveTrainer(model, args, train_dataset=data, eval_dataset=data[:8], objective=objective), model

    return build


def test_it_trains_logs_and_saves(make, tmp_path):
    trainer, model = make()
    before = model.vocab_embed.embedding.detach().clone()
    trainer.train()
    assert not torch.equal(before, model.vocab_embed.embedding)
    logged = [entry for entry in trainer.state.log_history if "raw_drift_rms/0.05" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
    config = dataclasses.asdict(model.config) | {"model_type": "mdlm", "mask_id": VOCAB - 1}
    stored, _ = load_denoiser(tmp_path / "checkpoint-4" / "model.safetensors", config=config)
    assert torch.equal(stored.vocab_embed.embedding, model.vocab_embed.embedding)
    assert [entry["loss"] for entry in logged] == pytest.approx([entry["drift"] for entry in logged], abs=1e-4)


def test_any_objective_will_do(make):
    trainer, _ = make("continuation", save_steps=100)
    trainer.train()
    assert "nelbo" in trainer.state.log_history[0]


def test_accumulated_micro_batches_are_averaged(make):
    trainer, _ = make("continuation", gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=1)
    losses = []
    inner = trainer.objective
    trainer.objective = lambda *args, **options: losses.append(found := inner(*args, **options)) or found
    trainer.train()
    assert len(losses) == 2
    mean = sum(found.loss.item() for found in losses) / 2
    assert trainer.state.log_history[0]["loss"] == pytest.approx(mean, abs=1e-4)


def test_diagnostics_are_the_means_over_accumulated_micro_batches(make):
    trainer, _ = make(gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=2)
    found = []
    inner = trainer.objective
    trainer.objective = lambda *args, **options: found.append(each := inner(*args, **options)) or each
    trainer.train()
    logged = [entry["drift"] for entry in trainer.state.log_history if "drift" in entry]
    drifts = [each.logs["drift"].item() for each in found]
    assert logged == pytest.approx([(drifts[0] + drifts[1]) / 2, (drifts[2] + drifts[3]) / 2])


def test_an_objective_that_does_not_know_the_other_processes_is_warned_of(make, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.warns(UserWarning, match=r"has share=\(0, 1\), but this is process 0 of 2.*same noise"):
        make("continuation")
    monkeypatch.setitem(OBJECTIVES, "continuation", lambda _, process, own: Continuation(process, own, share=(0, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("continuation")


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"logging_steps": 2}, [2, 4]),
        ({"logging_steps": 0.5}, [2, 4]),  # a share of all steps
        ({"logging_steps": 500, "logging_strategy": "epoch"}, [2, 4]),
        ({"logging_steps": 2, "logging_strategy": "no"}, []),
    ],
)
def test_diagnostics_are_computed_at_the_steps_that_are_logged_alone(make, arguments, steps):
    trainer, _ = make("continuation", per_device_train_batch_size=4, gradient_accumulation_steps=2, **arguments)
    asked, inner = [], trainer.objective
    trainer.objective = lambda *args, log: asked.append(log) or inner(*args, log=log)
    trainer.train()
    assert [number // 2 + 1 for number, log in enumerate(asked) if log] == [each for each in steps for _ in range(2)]
    assert [entry["step"] for entry in trainer.state.log_history if "nelbo" in entry] == steps


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("drift", True),
        ("drift", False),
        pytest.param("continuation", True, marks=pytest.mark.slow),
        ("continuation", False),
        ("matching", True),
    ],
)
def test_evaluations_repeat_and_leave_training_as_it_is(make, kind, own):
    ends = []
    for evaluations in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer, model = make(kind, save_steps=100, **evaluations)
        if not own:  # the chains of matching have the generator, too
            trainer.objective.generator = None
        trainer.train()
        pushed = None if trainer.drift is None else trainer.drift.queue_real.features().clone()
        first, again = (trainer.evaluate()["eval_loss"] for _ in range(2))
        assert first == again
        if pushed is not None:
            assert torch.equal(trainer.drift.queue_real.features(), pushed)
        ends.append(model.vocab_embed.embedding.detach().clone())
    assert torch.equal(*ends)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1, 2, 3, 4, 4, 4]


def test_a_checkpoint_without_queues_is_said(make, tmp_path):
    make()[0].train()
    (tmp_path / "checkpoint-2" / QUEUES).unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-2 has no tokendrift_loss.pt, so the queues start empty"):
        make()[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("kind", ["drift", "continuation"])
def test_a_generator_of_the_objective_is_resumed_to_the_bit(make, tmp_path, kind):
    ends = []
    for begin in (None, str(tmp_path / "checkpoint-2")):
        trainer, model = make(kind)
        trainer.train(resume_from_checkpoint=begin)
        ends.append(model.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_the_queues_of_a_checkpoint_are_written_before_what_completes_it(make, monkeypatch):
    save, complete = TrainerState.save_to_json, []

    def watched(self, path):
        complete.append((Path(path).parent / QUEUES).is_file())
        save(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", watched)
    make()[0].train()
    assert complete == [True, True]


def test_queues_are_in_the_checkpoint_and_come_back(make, tmp_path):
    trainer, _ = make()
    trainer.train()
    whole = trainer.drift.queue_real.features()
    assert (tmp_path / "checkpoint-2" / QUEUES).is_file()
    resumed, _ = make()
    stored = torch.load(tmp_path / "checkpoint-2" / QUEUES, weights_only=True)
    seen = []
    inner = resumed.objective
    resumed.objective = lambda *args, **options: seen.append(len(resumed.drift.queue_real)) or inner(*args, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen == [6, 6]
    assert int(stored["queue_real.pushed"]) == 8
    assert resumed.drift.queue_real.features().shape == whole.shape


def test_the_folder_of_a_checkpoint_is_one_that_load_denoiser_reads(make, tmp_path):
    trainer, model = make(save_steps=4)
    trainer.train()
    stored, process = load_denoiser(tmp_path / "checkpoint-4")
    assert repr(process) == repr(trainer.objective.process)
    assert torch.equal(stored.vocab_embed.embedding, model.vocab_embed.embedding)
    resumed, again = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(again.vocab_embed.embedding, model.vocab_embed.embedding)


def test_the_hooks_of_an_objective_are_called_as_refine_calls_them(make, tmp_path):
    micro = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2, "save_steps": 1}
    trainer, _ = make("recorder", **micro)
    trainer.train()
    (first, *calls), data = trainer.objective.calls, [row["input_ids"] for row in trainer.train_dataset]
    assert torch.equal(first, torch.stack(data + data[:4]))  # as many as were asked for: the data begin again
    step = ["enter", "loss", "loss", "leave"]
    assert calls == [*step, 1, *step, 2]
    resumed, _ = make("recorder", **micro)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.objective.calls == ["loaded 6", *step, 2]


def test_matching_trains_its_auxiliary_model_and_resumes_to_the_bit(make, tmp_path):
    ends = []
    for begin in (None, str(tmp_path / "checkpoint-2")):
        trainer, model = make("matching")
        matching = trainer.objective
        assert not matching.pair_loss.real_weight.any()
        trainer.train(resume_from_checkpoint=begin)
        for name, weight in matching.teacher.state_dict().items():
            assert "vocab_embed" not in name or not torch.equal(weight, matching.auxiliary.network.state_dict()[name])
        assert not matching.teacher.training and not matching.completions
        ends.append({**model.state_dict(), **matching.state_dict()})
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


@pytest.fixture
def make_bert(tmp_path):
    """Build trainers of a masked language model of transformers, whose output layer is tied to its embedding."""

    def build(**changes):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        bert = BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=8, **sizes))
        options = {"max_steps": 2, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        args = TrainingArguments(str(tmp_path), **{**options, **changes})
        data = [{"input_ids": torch.randint(VOCAB - 1, (8,))} for _ in range(8)]
        denoiser = MaskedLMDenoiser(bert, mask_id=VOCAB - 1)
        return ObjectiveTrainer(
            denoiser, args, objective=Continuation(MaskedDiffusion(VOCAB)), train_dataset=data
        ), bert

    return build


def test_a_model_with_tied_weights_is_saved_for_from_pretrained_and_resumed(make_bert, tmp_path):
    trainer, bert = make_bert()
    trainer.train()
    loaded, _ = load_denoiser(tmp_path / "checkpoint-2")  # the mask is in no configuration of BERT
    assert loaded.config == MaskedLMDenoiser(bert, mask_id=VOCAB - 1).config
    stored = BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-2")
    assert stored.cls.predictions.decoder.weight is stored.bert.embeddings.word_embeddings.weight
    for name, tensor in bert.state_dict().items():
        assert torch.equal(stored.state_dict()[name], tensor), name
    resumed, again = make_bert()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(again.bert.embeddings.word_embeddings.weight, bert.bert.embeddings.word_embeddings.weight)


def test_gradient_checkpointing_is_switched_on_in_the_model_inside(make_bert):
    trainer, bert = make_bert(gradient_checkpointing=True, save_strategy="no")
    trainer.train()
    assert bert.is_gradient_checkpointing


def test_options_that_do_not_go_with_an_objective_are_refused(make):
    with pytest.raises(TokenDriftError, match=r"gradient_checkpointing is on, but the denoiser does not support it"):
        make(gradient_checkpointing=True)[0].train()
    for name in ("label_smoothing_factor", "neftune_noise_alpha"):
        with pytest.raises(TokenDriftError, match=f"{name} changes a loss of labels"):
            make(**{name: 0.1})
