"""The Trainer of transformers trains an objective, logs what it finds, and resumes with the queues."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import TrainingArguments

from tokendrift import TokenDriftLoss
from tokendrift.diffusion import MaskedDiffusion
from tokendrift.integrations.hf_trainer import QUEUES, ObjectiveTrainer
from tokendrift.models import DiT, DiTConfig, load_denoiser
from tokendrift.training import Continuation, Drift

VOCAB = 12


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
        drift = TokenDriftLoss.from_encoder(model, queue_size=6, mask_id=process.mask_id)
        objective = Drift(process, drift, 0.0, generator) if kind == "drift" else Continuation(process, generator)
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


@pytest.mark.parametrize("kind", ["drift", "continuation"])
@pytest.mark.parametrize("own", [True, False], ids=["generator", "global numbers"])
def test_evaluations_repeat_and_leave_training_as_it_is(make, kind, own):
    ends = []
    for evaluations in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer, model = make(kind, save_steps=100, **evaluations)
        trainer.objective.generator = trainer.objective.generator if own else None
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
    with pytest.warns(UserWarning, match=r"checkpoint-2 has no tokendrift_loss.pt: the queues start empty"):
        make()[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


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
