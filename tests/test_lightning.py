"""In Lightning the loss needs no hook: as a part of the module it moves, trains and is stored with it."""

from __future__ import annotations

import logging

import pytest
import torch

from tokendrift import TokenDriftLoss
from tokendrift.diffusion import MaskedDiffusion
from tokendrift.models import DiT, DiTConfig

lightning = pytest.importorskip("lightning")
VOCAB = 12


class Refinement(lightning.LightningModule):
    """As in docs/recipes.md."""

    def __init__(self, model, process):
        super().__init__()
        self.model, self.process = model, process
        self.drift = TokenDriftLoss.from_encoder(model, mask_id=process.mask_id, queue_size=6)

    def training_step(self, x0, _):
        x_t, predicted, _, sigma, *_ = self.process.corrupt(x0)
        loss = self.drift(self.model(x_t, sigma), x0, noisy_ids=x_t, predicted=predicted)
        self.log("drift", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)


def make():
    torch.manual_seed(0)
    model = DiT(DiTConfig(VOCAB, 8, hidden_dim=16, cond_dim=4, n_blocks=1, n_heads=2))
    return Refinement(model, MaskedDiffusion(VOCAB))


def test_the_queues_are_in_the_checkpoint_of_lightning(tmp_path):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = torch.utils.data.DataLoader(torch.randint(VOCAB - 1, (16, 8)), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    first = make()
    frozen = first.drift.feature_map.encoder.vocab_embed.embedding.clone()
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(first.drift.feature_map.encoder.vocab_embed.embedding, frozen)
    second = make()
    second.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    assert len(second.drift.queue_real) == 6
    assert torch.equal(second.drift.queue_real.features(), first.drift.queue_real.features())
    assert not any(name.startswith("drift.") for name, _ in second.named_parameters())
