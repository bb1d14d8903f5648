"""Few-step evaluation of a model in training, beside real text, and the warning that it collapses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendrift.diffusion import Process
from tokendrift.models.tokenizer import TextTokenizer
from tokendrift.training.packing import mix

Row = dict[str, Any]


class FewStep:
    """Sample at a few numbers of function evaluations and measure, the same way at every call.

    Args:
        process: The process of the model.
        tokenizer: Of the model, for a judge with tokens of its own.
        real: Real text to compare with, ids (n, L); as many sequences of that length are sampled.
        nfes: Numbers of function evaluations.
        judge: A `GenerativePerplexity`, or the judge to make one of: name or folder of a causal language model, model
            or callable. None measures entropy and diversity alone.
        batch: Sequences sampled at a time.
        seed: Of the samples.
        device: Where to sample and judge.
        tolerance: Share by which the sample entropy may fall below that of real text without a warning.
    """

    def __init__(
        self,
        process: Process,
        tokenizer: TextTokenizer,
        real: Tensor,
        *,
        nfes: Sequence[int] = (4, 8),
        judge: Any = None,
        batch: int = 16,
        seed: int = 0,
        device: torch.device | str | None = None,
        tolerance: float = 0.02,
    ) -> None:
        self.process, self.tokenizer, self.real = process, tokenizer, real
        self.nfes, self.batch, self.seed, self.tolerance = tuple(nfes), batch, seed, tolerance
        self.device, self._judge = torch.device(device or "cpu"), judge
        self._metric: Any = None
        self._real_row: Row | None = None

    @property
    def way(self) -> dict[str, Any]:
        """What the figures depend on beside the model, fit for JSON: those of another way do not compare."""
        return {"judge": judge_name(self._judge), "nfes": list(self.nfes), "samples": len(self.real)}

    @torch.no_grad()
    def sample(
        self,
        network: Callable[..., Tensor],
        nfe: int,
        *,
        share: tuple[int, int] = (0, 1),
        collect: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return samples (n, L) on the CPU, the same in whatever batches and on however many processes.

        Args:
            network: The denoiser, in evaluation mode.
            nfe: Reverse steps.
            share: Number of this process and how many share the work.
            collect: Adds up what the processes have sampled, rows of others being zero.
        """
        from tokendrift.sampling import sample

        count, length = self.real.shape
        found = torch.zeros(count, length, dtype=torch.int64)
        for number, first in enumerate(range(0, count, self.batch)):
            if number % share[1] != share[0]:
                continue
            rows = min(self.batch, count - first)
            drawn = sample(
                network,
                self.process,
                (rows, length),
                steps=nfe,
                seed=mix(self.seed, nfe),
                first_row=first,
                device=self.device,
            )
            found[first : first + rows] = drawn.ids.cpu()
        return found if collect is None else collect(found.to(self.device)).cpu()

    def measure(self, ids: Tensor) -> Row:
        """Return the figures of ids (n, L)."""
        from tokendrift.evaluation import GenerativePerplexity, distinct_n, measure, sample_entropy, unigram_entropy

        if self._judge is None:
            return {
                "sample_entropy": float(sample_entropy(ids).mean()),
                "unigram_entropy": float(unigram_entropy(ids)),
                "distinct_3": float(distinct_n(ids, 3)),
            }
        if self._metric is None:
            own = isinstance(self._judge, GenerativePerplexity)
            options: dict[str, Any] = {"device": self.device, "batch_size": self.batch}
            self._metric = self._judge if own else GenerativePerplexity(self._judge, **options)
        # A judge without a tokenizer reads the ids as they are: it shares their vocabulary.
        tokenizer = None if self._metric.judge.tokenizer is None else self.tokenizer.tokenizer
        found = measure(ids, self._metric, tokenizer=tokenizer, skip_bad=True)
        return {name: interval.estimate for name, interval in found.intervals().items()}

    def real_row(self) -> Row:
        """Return the figures of the real text."""
        if self._real_row is None:
            self._real_row = self.measure(self.real)
        return self._real_row

    def warnings(self, rows: Sequence[Row]) -> list[str]:
        """Return a message for each row whose samples have less entropy than real text."""
        real = self.real_row()["sample_entropy"]
        return [
            f"at {row['nfe']} function evaluations the samples have an entropy of {row['sample_entropy']:.2f} nats, "
            f"real text {real:.2f}: the model repeats itself, and a lower Gen.-PPL is no gain from here on. Take an "
            "earlier checkpoint, a lower learning rate, or objective 'combined'."
            for row in rows
            if row["sample_entropy"] < (1 - self.tolerance) * real
        ]

    def score(self, rows: Sequence[Row]) -> float | None:
        """Return the mean log Gen.-PPL, lower is better; None without a judge, or where entropy has collapsed."""
        if not rows or any("gen_ppl" not in row for row in rows) or self.warnings(rows):
            return None
        return sum(math.log(row["gen_ppl"]) for row in rows) / len(rows)


def judge_name(judge: Any) -> str | None:
    """Return what a judge is called without loading it; None for none."""
    if judge is None:
        return None
    model = getattr(judge, "judge", judge)  # that of a GenerativePerplexity
    names = (getattr(model, name, None) for name in ("name", "name_or_path", "__name__"))
    own = model if isinstance(model, (str, Path)) else next((name for name in names if name), type(model).__name__)
    return str(own)
