"""The language whose law is known: bases, training and exact measures."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from arms import Arm, matching_config, objective, warmup
from cache import cached
from torch import Tensor

from tokendrift.diffusion import Process
from tokendrift.evaluation import validation_nelbo
from tokendrift.markov import ExactDenoiser, MarkovLanguage, few_step
from tokendrift.models import DiT, DiTConfig, load_denoiser, save_denoiser
from tokendrift.training import Continuation, Denoising, LoopConfig, train

NFES = (2, 4, 8)
TEMPERATURES = (1.0, 0.8, 0.6, 0.4, 0.2)
OWN_TEMPERATURES = (1.0, 0.6, 0.2)
BASE_STEPS = {"masked": 5000, "uniform": 8000}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How long everything runs.

    Attributes:
        base_share: Share of the usual steps of a base, from scratch.
        steps: Optimiser steps of an arm of the main comparison.
        ablation_steps: Of an ablation, and of the arm that it is compared with.
        batch_size: Sequences a step.
        learning_rate: Peak rate of the drifting arms and of the continuation.
        samples: Sequences a row.
    """

    base_share: float = 1.0
    steps: int = 1200
    ablation_steps: int = 150
    batch_size: int = 64
    learning_rate: float = 3e-4
    samples: int = 4096


class Markov:
    """The language, its bases, which are made once and kept, and what is measured of a model."""

    kinds = ("masked", "uniform")

    def __init__(self, folder: Path, sizes: Sizes = Sizes()) -> None:
        self.folder, self.sizes = folder, sizes
        self.language = MarkovLanguage.random()
        self.source = "MarkovLanguage.random(): 48 words, 4 successors each, sequences of 16"

    def process(self, kind: str) -> Process:
        """Return the process over the words."""
        return self.language.process(kind)

    def base_key(self, kind: str) -> dict[str, Any]:
        """Return what the base of a process depends on."""
        return {"steps": max(1, round(BASE_STEPS[kind] * self.sizes.base_share)), "process": kind}

    def base_folder(self, kind: str) -> Path:
        """Return the folder of a base of about 0.4 million parameters, trained near the optimum of its objective."""
        steps = self.base_key(kind)["steps"]

        def make(place: Path) -> None:
            torch.manual_seed(0)
            process = self.process(kind)
            model = DiT(_config(process, kind))
            learn = (Denoising if kind == "masked" else Continuation)(process, torch.Generator().manual_seed(1))
            loop = LoopConfig(
                steps, batch_size=128, learning_rate=2e-3, warmup=4 * warmup(steps), ema=0.999, log_every=250
            )
            train(model, learn, self.language.batches(128, seed=2), loop)
            save_denoiser(model, place, process)

        return cached(self.folder, f"base-{kind}", self.base_key(kind), make)[0]

    def base(self, kind: str) -> DiT:
        """Return the base of a process."""
        return load_denoiser(self.base_folder(kind))[0]

    @property
    def text(self) -> Tensor:
        """As much real text as a queue of features would hold, and more: the language is at hand without end."""
        return self.language.sample(20_000, seed=10**6 + 1)

    def train(self, arm: Arm, kind: str, seed: int, steps: int) -> tuple[DiT, list[dict[str, float]]]:
        """Train the base further; arms of one seed see the same text, those on corrupted text the same noise."""
        base, sizes = self.base(kind), self.sizes
        model = DiT(base.config)
        model.load_state_dict(base.state_dict())
        if steps == 0:
            return model.eval(), []
        if arm.loss == "matching":
            matching_config(arm, self.process(kind)).prepare(model)  # the random input of masked models
        rate = sizes.learning_rate * arm.rate
        loop = LoopConfig(steps, batch_size=sizes.batch_size, learning_rate=rate, warmup=warmup(steps))
        batches = self.language.batches(sizes.batch_size, seed=100 + seed)
        return model, train(model, objective(arm, base, self.process(kind), seed, self.text), batches, loop)

    def evaluate(self, model: DiT, kind: str, seed: int, *, baseline: Any, full: bool) -> dict[str, Any]:
        """Measure a model against the true law, at several temperatures if ``full``."""
        process = self.process(kind)
        held_out = self.language.sample(1024, seed=10**6)
        found = few_step(
            self.language,
            model,
            process,
            steps=NFES,
            temperatures=(TEMPERATURES if baseline is None else OWN_TEMPERATURES) if full else (1.0,),
            samples=self.sizes.samples,
            seed=seed,
        )
        return {"nelbo": validation_nelbo(model, process, held_out), **found.to_dict()}

    def facts(self) -> dict[str, Any]:
        """Return what the tables need beside the cells."""
        return {"exact": self.exact}

    @cached_property
    def exact(self) -> dict[str, Any]:
        """The exact denoiser of each process, which a base converges to: `few_step` results, made once and kept."""

        def make(place: Path) -> None:
            rows = {}
            for kind in self.kinds:
                process = self.process(kind)
                exact = ExactDenoiser(self.language, process)
                found = few_step(
                    self.language, exact, process, steps=NFES, temperatures=TEMPERATURES, samples=self.sizes.samples
                )
                rows[kind] = found.to_dict()
            (place / "exact.json").write_text(json.dumps(rows), encoding="utf-8")

        key = {"samples": self.sizes.samples, "temperatures": TEMPERATURES, "steps": NFES}
        found: dict[str, Any] = json.loads(
            (cached(self.folder, "exact", key, make)[0] / "exact.json").read_text(encoding="utf-8")
        )
        return found


def _config(process: Process, kind: str) -> DiTConfig:
    return DiTConfig(
        process.vocab_size,
        16,
        hidden_dim=96,
        cond_dim=32,
        n_blocks=3,
        n_heads=4,
        dropout=0.0,
        time_conditioning=kind == "uniform",
    )
