"""The demo from end to end: text, base, two continuations, samples, a table and a report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokendrift.demo.cache import cached, fingerprint
from tokendrift.demo.stages import (
    EOS,
    JUDGE_WINDOW,
    LENGTH,
    PRETRAINED,
    Corpus,
    DemoConfig,
    OnStep,
    Trained,
    check_base,
    continue_base,
    encode,
    load_judge,
    make_process,
    read_text,
    train_base,
    train_judge,
    train_tokenizer,
)
from tokendrift.diffusion import Process
from tokendrift.evaluation import (
    GenerativePerplexity,
    Measures,
    matched_entropy,
    measure,
    temperature_at,
    validation_nelbo,
)
from tokendrift.evaluation.matching import TEMPERATURES, entropy
from tokendrift.models import DiT, load_denoiser, save_denoiser
from tokendrift.models.tokenizer import decode
from tokendrift.sampling import sample

if TYPE_CHECKING:
    from rich.console import Console

ROWS_A_BATCH = 128
MATCHED = {"sample": "  = H sample", "unigram": "  = H unigram"}  # the temperature-matched rows of the continuation
OWN_TEMPERATURES = (1.0, 0.7, 0.4)  # of TokenDrift, for the plot
FRONTIER_SAMPLES = 256


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        model: What was sampled: ``base``, ``continuation``, ``TokenDrift``, ``real text``, or one of `MATCHED`.
        nfe: Function evaluations; None for real text.
        temperature: Sampling temperature; None for real text.
        measures: The figures.
        texts: The first samples.
    """

    model: str
    nfe: int | None
    temperature: float | None
    measures: Measures
    texts: list[str]


class Outcome(NamedTuple):
    """What a run found, for one seed.

    Attributes:
        rows: The table.
        frontier: Coarser rows over sampling temperatures, for the plot.
        curves: Training records by arm.
        nelbo: Held-out NELBO in nats per token by model.
        headline: The figures that decide, see `headline`.
    """

    rows: list[Row]
    frontier: list[Row]
    curves: dict[str, list[dict[str, float]]]
    nelbo: dict[str, float]
    headline: dict[str, float]


class Demo:
    """One run of the demo.

    Args:
        config: Sizes and lengths.
        files: The user's text; empty for the text that CPython carries.
        output: Folder for the report, the results and the cache of finished stages.
        from_scratch: Train tokenizer, judge and base instead of loading the shipped ones. Implied by files.
        console: Where progress goes.
    """

    def __init__(
        self, config: DemoConfig, files: Sequence[Path], output: Path, *, from_scratch: bool, console: Console
    ) -> None:
        self.config, self.output, self.console = config, output, console
        self.process: Process = make_process(config.process)
        self.shipped = not (from_scratch or files)
        self.files = list(files)
        self.stages = output / "stages"

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[OnStep]:
        """Show a bar with the time left; yields a callback that takes the steps done so far."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.update(task, completed=done)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False)

    def prepare(self) -> tuple[Corpus, Any, DiT]:
        """Return corpus, judge and base, loaded or trained; refuses a base that knows only unigrams."""
        from tokenizers import Tokenizer

        began = time.perf_counter()
        splits = read_text(self.files)
        words = {name: sum(len(p.split()) for p in part) for name, part in splits._asdict().items()}
        if self.shipped:
            tokenizer = Tokenizer.from_file(str(PRETRAINED / "tokenizer.json"))
        else:
            tokenizer = train_tokenizer(splits)
        corpus = encode(splits, tokenizer)
        self.text_key = fingerprint([corpus.denoiser.tolist(), corpus.judge.tolist(), tokenizer.to_str()])
        self.say(
            f"text: {words['denoiser']:,} words for the denoiser, {words['judge']:,} for the judge, "
            f"{words['held_out']:,} held out ({time.perf_counter() - began:.0f} s)"
        )
        if not self.shipped:
            self.announce()
        judge = load_judge(self.judge_folder(corpus))
        base, _ = load_denoiser(self.base_folder(corpus))
        nelbo = check_base(base, self.process, corpus)
        self.say(
            f"base ({self.config.process}, {sum(p.numel() for p in base.parameters()):,} parameters): held-out NELBO "
            f"{nelbo:.2f} nats per token, unigram entropy {corpus.unigram_entropy:.2f}"
        )
        return corpus, judge, base

    def announce(self) -> None:
        """Say how long training from scratch takes, from a few timed steps."""
        from tokendrift.demo.stages import make_denoiser
        from tokendrift.training import Continuation, LoopConfig, train

        model, batch = make_denoiser(self.process), torch.zeros(64, LENGTH, dtype=torch.int64)
        began = time.perf_counter()
        train(model, Continuation(self.process), iter([batch] * 6), LoopConfig(6))
        minutes = (time.perf_counter() - began) / 6 * (self.config.base_steps + 0.9 * self.config.judge_steps) / 60
        self.say(f"training base and judge from scratch takes about {minutes:.0f} minutes on this machine, once")

    def judge_folder(self, corpus: Corpus) -> Path:
        """Return the judge's folder, training it first where none is shipped or cached."""
        if self.shipped:
            return PRETRAINED / "judge"
        steps = self.config.judge_steps

        def make(place: Path) -> None:
            with self.progress("judge, its own split", steps) as on_step:
                train_judge(corpus, steps, place, on_step)

        return self.stage("judge", {"steps": steps}, make)

    def base_folder(self, corpus: Corpus) -> Path:
        """Return the base's folder, training it first where none is shipped or cached."""
        if self.shipped:
            return PRETRAINED / self.config.process
        steps = self.config.base_steps

        def make(place: Path) -> None:
            with self.progress(f"base, {self.config.process}", steps) as on_step:
                train_base(corpus, self.process, steps, place, on_step)

        return self.stage("base", {"steps": steps, "process": self.config.process}, make)

    def stage(self, name: str, key: dict[str, Any], make: Any) -> Path:
        """Run or reuse a stage of this text."""
        folder, reused = cached(self.stages, name, {"text": self.text_key, "shipped": self.shipped, **key}, make)
        if reused:
            self.say(f"{name}: reused from {folder}")
        return folder

    def arm(self, base: DiT, corpus: Corpus, name: Any, seed: int) -> Trained:
        """Continue the base by its own objective or by drift, or reuse the finished continuation."""
        config = self.config

        def make(place: Path) -> None:
            with self.progress(f"{name}, seed {seed}", config.steps) as on_step:
                trained = continue_base(base, self.process, corpus, config, name, seed=seed, on_step=on_step)
            save_denoiser(trained.model, place, self.process)
            (place / "records.json").write_text(json.dumps(trained.records), encoding="utf-8")

        key = {
            "process": config.process,
            "base_steps": config.base_steps,
            "steps": config.steps,
            "rate": config.learning_rate,
            "seed": seed,
        }
        if name == "drift":
            names = ("base_weight", "queue_size", "window", "encoder_time")
            key |= {name: getattr(config, name) for name in names}
        folder = self.stage(name, key, make)
        return Trained(load_denoiser(folder)[0], json.loads((folder / "records.json").read_text(encoding="utf-8")))

    def run_seed(self, corpus: Corpus, judge: Any, base: DiT, seed: int) -> Outcome:
        """Continue, sample and measure with one seed."""
        continued, drifted = (self.arm(base, corpus, name, seed) for name in ("continuation", "drift"))
        models = {"base": base, "continuation": continued.model, "TokenDrift": drifted.model}
        scorer = Scorer(self, corpus, judge, seed)
        count, nfes = self.config.samples, self.config.nfes
        grid = min(FRONTIER_SAMPLES, count // 2)
        # Forward rows, the unit of the progress bar: three models and two matched rows at every NFE, and two grids.
        total = sum(nfes) * (5 * count + (len(TEMPERATURES) + len(OWN_TEMPERATURES)) * grid)
        rows, frontier = [scorer.real()], []
        with self.progress(f"sampling and scoring, seed {seed}", total) as on_step:
            scorer.begin(on_step)
            for nfe in nfes:
                found = {name: scorer.row(name, model, nfe, 1.0, count) for name, model in models.items()}
                rows += found.values()
                curve = [scorer.row("continuation", continued.model, nfe, t, grid) for t in TEMPERATURES]
                frontier += curve
                own = [scorer.row("TokenDrift", drifted.model, nfe, t, grid) for t in OWN_TEMPERATURES]
                frontier += own
                for kind in ("sample", "unigram"):
                    # Both sides of the match from sets of one size, on which the entropy of all tokens depends.
                    target = entropy(own[0].measures, kind).estimate
                    levels = [entropy(row.measures, kind).estimate for row in curve]
                    at = temperature_at(list(zip(TEMPERATURES, levels, strict=True)), target)
                    rows.append(scorer.row(MATCHED[kind], continued.model, nfe, at, count))
        nelbo = {name: validation_nelbo(model, self.process, corpus.held_out) for name, model in models.items()}
        curves = {"continuation": continued.records, "drift": drifted.records}
        return Outcome(rows, frontier, curves, nelbo, headline(rows, nfes[0]))


class Scorer:
    """Samples from models and measures what comes, with one judge."""

    def __init__(self, demo: Demo, corpus: Corpus, judge: Any, seed: int) -> None:
        self.demo, self.corpus, self.seed = demo, corpus, seed
        self.judge = GenerativePerplexity(
            judge, corpus.tokenizer, max_length=JUDGE_WINDOW, eos_id=EOS, batch_size=ROWS_A_BATCH
        )
        self.done = 0
        self.on_step: OnStep = lambda _: None

    def begin(self, on_step: OnStep) -> None:
        """Report finished forward rows to ``on_step``."""
        self.on_step = on_step

    def row(self, name: str, model: DiT, nfe: int, temperature: float, count: int) -> Row:
        """Sample ``count`` sequences and measure them."""
        parts: list[Tensor] = []
        for start in range(0, count, ROWS_A_BATCH):
            size = min(ROWS_A_BATCH, count - start)

            def advance(steps: int, size: int = size) -> None:
                self.done += steps * size
                self.on_step(self.done)

            found = sample(
                model,
                self.demo.process,
                (size, LENGTH),
                steps=nfe,
                temperature=temperature,
                seed=self.seed,
                first_row=start,
                progress=advance,
            )
            parts.append(found.ids)
        return self.measured(name, torch.cat(parts), nfe, temperature)

    def real(self) -> Row:
        """Measure held-out text of the same length."""
        return self.measured("real text", self.corpus.held_out[: self.demo.config.samples], None, None)

    def measured(self, name: str, ids: Tensor, nfe: int | None, temperature: float | None) -> Row:
        """Decode, retokenise and score ids (n, L)."""
        tokenizer = self.corpus.tokenizer
        figures = measure(ids, self.judge, tokenizer=tokenizer, nfe=nfe)
        return Row(name, nfe, temperature, figures, decode(tokenizer, ids[:12]))


def headline(rows: Sequence[Row], nfe: int) -> dict[str, float]:
    r"""Return what decides, at one NFE.

    ``relative_change``: Gen.-PPL of TokenDrift against the continuation, minus one. ``log_gap_closed``:
    :math:`(\ln P_{cont} - \ln P_{drift}) / (\ln P_{cont} - \ln P_{real})`. ``entropy_below_real``: sample entropy
    of real text minus that of TokenDrift, nats. ``over_matched_*``: Gen.-PPL of TokenDrift over that of the
    continuation at the temperature of the same entropy, with its 95 % bootstrap interval.
    """
    found = {row.model: row.measures for row in rows if row.nfe in (None, nfe)}
    drift, continued, real = found["TokenDrift"], found["continuation"], found["real text"]
    logs = {name: math.log(m.gen_ppl.estimate) for name, m in (("d", drift), ("c", continued), ("r", real))}
    out = {
        "nfe": float(nfe),
        "relative_change": drift.gen_ppl.estimate / continued.gen_ppl.estimate - 1,
        "log_gap_closed": (logs["c"] - logs["d"]) / (logs["c"] - logs["r"]),
        "entropy_below_real": real.sample_entropy.estimate - drift.sample_entropy.estimate,
    }
    temperatures = {row.model: row.temperature or 1.0 for row in rows if row.nfe == nfe}
    for kind in ("sample", "unigram"):
        matched = found[MATCHED[kind]]
        ratio = matched_entropy(drift, matched, real, kind=kind, temperature=temperatures[MATCHED[kind]]).ratio
        out |= {f"over_matched_{kind}": ratio.estimate}
        out |= {f"over_matched_{kind}_low": ratio.low, f"over_matched_{kind}_high": ratio.high}
    return out
