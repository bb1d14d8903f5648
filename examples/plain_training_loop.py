"""The loss in a plain PyTorch loop: first the base objective, then drifting, with the diagnostics to watch.

Character-level uniform-state diffusion on Python's own language reference; a few seconds on one core, too few steps for
good text. Three lines are about drifting; they are marked.
"""

from __future__ import annotations

import pydoc_data.topics

import torch

import tokendrift as td
from tokendrift.diffusion import UniformDiffusion
from tokendrift.models import DiT, DiTConfig

LENGTH, BATCH, BASE_STEPS, DRIFT_STEPS = 32, 16, 60, 20

torch.set_num_threads(1)  # at this size, threads would only wait for one another
torch.manual_seed(0)

# Data: windows of printable characters as ids.
text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
ids = torch.tensor([ord(c) - 32 for c in text if 32 <= ord(c) < 127])
windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def batch() -> torch.Tensor:
    return windows[torch.randint(len(windows), (BATCH,))]


# A denoiser and its process: yours go here.
process = UniformDiffusion(vocab_size=95)
model = DiT(
    DiTConfig(
        vocab_size=95,
        model_length=LENGTH,
        hidden_dim=64,
        cond_dim=32,
        n_blocks=2,
        n_heads=4,
        dropout=0.0,
        time_conditioning=True,
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

first = last = float("nan")
for step in range(BASE_STEPS):
    x0 = batch()
    noisy = process.corrupt(x0)
    loss = process.nelbo(model(noisy.x_t, noisy.sigma), x0, noisy.x_t, noisy.t).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    last = loss.item()
    first = last if step == 0 else first
print(f"base objective: NELBO {first:.2f} -> {last:.2f} nats a character in {BASE_STEPS} steps")

drift = td.TokenDriftLoss.from_encoder(model, queue_size=256)  # 1. a frozen copy of the model gives the features
before = [parameter.clone() for parameter in drift.feature_map.parameters()]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
print("step   loss   raw RMS (one a temperature)   positive mass   entropy of p   queue")
for step in range(DRIFT_STEPS):
    x0 = batch()
    noisy = process.corrupt(x0)
    logits = model(noisy.x_t, noisy.sigma)
    loss, watch = drift(logits, x0, noisy_ids=noisy.x_t, return_diagnostics=True)  # 2. in place of the base objective
    optimizer.zero_grad()
    loss.backward()  # 3. gradient reaches the model through the logits
    optimizer.step()
    if step % 10 == 0 or step == DRIFT_STEPS - 1:
        rms = " ".join(f"{value:.4f}" for value in watch.field.rms.tolist())
        mass = watch.field.positive_mass.mean()
        print(
            f"{step:4d}  {loss.item():.3f}   {rms:27s}   {mass:13.2f}   {watch.token_entropy:12.2f}   "
            f"{watch.queue_generated:5d}"
        )

# What must hold after any such loop.
assert last < first, "the base objective did not go down"
assert torch.isfinite(loss)
assert len(drift.queue_real) == len(drift.queue_generated) == 256
assert all(torch.equal(old, new) for old, new in zip(before, drift.feature_map.parameters(), strict=True)), "not frozen"
assert not list(drift.parameters()), "nothing of the loss is trained"
print("ok")
