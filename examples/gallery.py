"""The figures of docs/gallery.md, drawn anew with the small models that ship with the package, in half a minute.

``python examples/gallery.py docs/gallery`` writes those of the documentation. They need matplotlib and transformers.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

import tokendrift as td
from tokendrift.corpus import read_splits
from tokendrift.demo import pretrained_path
from tokendrift.evaluation import GenerativePerplexity, measure, sample_entropy, sweep
from tokendrift.models import load_denoiser
from tokendrift.models.tokenizer import encode, load_tokenizer
from tokendrift.sampling import SamplingSetting, denoiser_samples, sample
from tokendrift.training import Drift, LoopConfig, train, windows

STEPS, EVERY, SAMPLES, LENGTH = 60, 10, 64, 32
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "tokendrift", "font.size": 10}


def save(figure: Figure, name: str) -> None:
    """Write a figure below 100 KB, the same at every run on the same machine."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})
    assert (folder / f"{name}.svg").stat().st_size < 100_000


def draw_field() -> None:
    """Draw the drift of points in two dimensions, and that with real and generated text exchanged."""
    generator = torch.Generator().manual_seed(0)
    real = torch.cat(
        [torch.randn(20, 2, generator=generator) * 0.12 + torch.tensor(c) for c in ((-0.6, 0.4), (0.6, 0.4))]
    )
    generated = torch.randn(40, 2, generator=generator) * 0.15 + torch.tensor((0.0, -0.5))
    across = torch.linspace(-1.1, 1.1, 10)
    grid = torch.cartesian_prod(across, across)
    field = td.DriftField(temperatures=(0.5,), rms_normalize=False)
    there, back = field(grid, real, generated), field(grid, generated, real)
    assert torch.allclose(there, -back, atol=1e-6), "exchanging real and generated text turns every arrow around"
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    for axes, drift, title in zip(
        figure.subplots(1, 2, sharey=True), (there, back), ("drift", "real and generated exchanged"), strict=True
    ):
        axes.quiver(*grid.T.numpy(), *drift.T.numpy(), color="#555555", angles="xy", scale=4, width=0.005)
        axes.plot(*real.T.numpy(), "o", color="#2f9e62", markersize=4, label="real")
        axes.plot(*generated.T.numpy(), "o", color="#d9652b", markersize=4, label="generated")
        axes.set_title(title)
        axes.set_aspect("equal")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, "field")


def draw_entropy(entropies: dict[int, float], of_real: float) -> None:
    """Draw the entropy of samples over the steps of training, beside that of real text."""
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(entropies), list(entropies.values()), "o-", color="#3b7dd8", label="samples at 4 NFE")
    axes.axhline(of_real, color="#2f9e62", linestyle="--", label="real text")
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("sample entropy (nats)")
    axes.legend(frameon=False)
    save(figure, "entropy")


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output/gallery")
folder.mkdir(parents=True, exist_ok=True)
torch.set_num_threads(1)  # at this size, threads would only wait for one another
torch.manual_seed(0)
draw_field()

# A copy of the model is refined, and sampled on the way.
before, process = load_denoiser(pretrained_path("uniform"))
tokenizer = load_tokenizer(pretrained_path("tokenizer.json"))
texts = read_splits()
stream, held_out = (
    torch.tensor([token for part in encode(tokenizer, prose[:400]) for token in part])
    for prose in (texts.denoiser, texts.held_out)
)
real = held_out[: len(held_out) // LENGTH * LENGTH].view(-1, LENGTH)[:SAMPLES]
after, entropies = copy.deepcopy(before), dict[int, float]()


def watch(finished: int) -> None:
    """Sample the model every few steps."""
    if finished % EVERY == 0:
        drawn = sample(after.eval(), process, (SAMPLES, LENGTH), steps=4, seed=1)
        entropies[finished] = float(sample_entropy(drawn.ids).mean())


watch(0)
drifting = Drift(process, td.TokenDriftLoss.from_encoder(before), base_weight=1.0)
train(
    after, drifting, windows(stream, LENGTH, 16, seed=0), LoopConfig(STEPS, 16, 1e-4, warmup=10, ema=0.0), on_step=watch
)
draw_entropy(entropies, float(sample_entropy(real).mean()))

# Both models at two numbers of function evaluations and three temperatures, beside real text.
judge = GenerativePerplexity(str(pretrained_path("judge")))
frontier = sweep(
    {name: denoiser_samples(model.eval(), process, LENGTH) for name, model in (("before", before), ("refined", after))},
    [SamplingSetting(steps, temperature) for steps in (4, 16) for temperature in (0.7, 0.85, 1.0)],
    partial(measure, judge=judge, tokenizer=tokenizer, resamples=200),
    real=real,
    count=SAMPLES,
)
save(frontier.plot()[0], "frontier")
print("ok")
