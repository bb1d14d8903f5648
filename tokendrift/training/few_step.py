"""Evaluation of a model in training at few sampling steps, beside real text, and the warning that it collapses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendrift._checks import fail
from tokendrift.diffusion import Process
from tokendrift.models.tokenizer import TextTokenizer
from tokendrift.training.config import RefineConfig
from tokendrift.training.optimization import Optimization
from tokendrift.training.packing import mix
from tokendrift.training.processes import any_rank

Row = dict[str, Any]


@dataclass(eq=False)
class FewStepEvaluation:
    """Samples at a few numbers of function evaluations and measures them, with the same random numbers at every call.

    Attributes:
        config: The settings of the run. The judge is that of the next attribute instead.
        judge: A `GenerativePerplexity`, or the judge to make one of: name or folder of a causal language model, model
            or callable. None measures entropy and diversity alone.
        process: The process of the model.
        tokenizer: Tokenizer of the model, for a judge with tokens of its own.
        real: Real text to compare with, ids (n, L); as many sequences of that length are sampled.
        seed: Random seed of the samples.
        device: Device for sampling and for the judge.
    """

    config: RefineConfig
    judge: Any
    process: Process
    tokenizer: TextTokenizer
    real: Tensor
    seed: int
    device: torch.device

    @property
    def conditions(self) -> dict[str, Any]:
        """Everything except the model that the figures depend on, for JSON; required to be equal for a comparison."""
        nfes, tokenizer = list(self.config.evaluate_nfe), self.config.judge_tokenizer
        found = {"judge": judge_name(self.judge), "nfes": nfes, "samples": len(self.real)}
        return found if tokenizer is None else found | {"judge_tokenizer": tokenizer}

    def sample_all(
        self, optimization: Optimization, accelerator: Any, progress: Callable[[], object] = lambda: None
    ) -> dict[int, Tensor]:
        """Sample the averaged model at every number of function evaluations; every process must call.

        ``progress`` is called after each of the numbers.

        A sharded network needs all processes at every call: each of them then draws all samples, in step. Otherwise
        the processes share the samples, and call the network without its wrapper, which would wait for the others.

        Returns:
            Ids (n, L) on the CPU for each number of function evaluations, on every process.

        Raises:
            TokenDriftError: On every process, if one of them could not sample its share.
        """
        rank, ranks = accelerator.process_index, accelerator.num_processes
        sharded = any(hasattr(parameter, "full_tensor") for parameter in optimization.parameters)
        network, share = (optimization.network, (0, 1)) if sharded else (optimization.bare_network, (rank, ranks))
        found: dict[int, Tensor] = {}
        error: Exception | None = None
        try:
            with optimization.evaluating():
                for nfe in self.config.evaluate_nfe:
                    found[nfe] = self.sample(network, nfe, share=share)
                    progress()
        except Exception as caught:
            error = caught
        if any_rank(accelerator, error is not None)[0]:  # all processes stop, instead of waiting for one
            raise error or fail("another process could not sample its share.")
        if sharded or ranks == 1:
            return found
        return {nfe: accelerator.reduce(ids.to(self.device), "sum").cpu() for nfe, ids in found.items()}

    def sample(self, network: Callable[..., Tensor], nfe: int, *, share: tuple[int, int] = (0, 1)) -> Tensor:
        """Return samples (n, L) on the CPU; the batch size and the number of processes do not change them.

        Args:
            network: The denoiser, in evaluation mode.
            nfe: Number of reverse steps.
            share: Rank of this process and the number of processes that share the work. Rows of the others are zero.
        """
        from tokendrift.sampling import sample

        (count, length), (rank, ranks) = self.real.shape, share
        found = torch.zeros(count, length, dtype=torch.int64)
        first, end = rank * count // ranks, (rank + 1) * count // ranks
        if first < end:
            found[first:end] = sample(
                network,
                self.process,
                (end - first, length),
                steps=nfe,
                seed=mix(self.seed, nfe),
                first_row=first,
                batch_size=self.config.evaluate_batch,
                device=self.device,
            ).ids.cpu()
        return found

    def measure(self, ids: Tensor) -> Row:
        """Return the figures of ids (n, L)."""
        from tokendrift.evaluation import distinct_n, measure, sample_entropy, unigram_entropy

        if self._metric is None:
            return {
                "sample_entropy": float(sample_entropy(ids).mean()),
                "unigram_entropy": float(unigram_entropy(ids)),
                "distinct_3": float(distinct_n(ids, 3)),
            }
        # A judge without a tokenizer reads the ids as they are: it shares their vocabulary.
        tokenizer = None if self._metric.judge.tokenizer is None else self.tokenizer.tokenizer
        found = measure(ids, self._metric, tokenizer=tokenizer, skip_bad=True)
        return {name: interval.estimate for name, interval in found.intervals().items()}

    @cached_property
    def real_row(self) -> Row:
        """The figures of the real text."""
        return self.measure(self.real)

    @cached_property
    def _metric(self) -> Any:
        """The judge as a `GenerativePerplexity`; None without a judge."""
        from tokendrift.evaluation import GenerativePerplexity
        from tokendrift.models.tokenizer import load_tokenizer

        if self.judge is None or isinstance(self.judge, GenerativePerplexity):
            return self.judge
        name = self.config.judge_tokenizer
        tokenizer = None if name is None else load_tokenizer(name)
        return GenerativePerplexity(self.judge, tokenizer, device=self.device, batch_size=self.config.evaluate_batch)

    def warnings(self, rows: Sequence[Row]) -> list[str]:
        """Return a message for each row whose samples have less entropy than real text."""
        real = self.real_row["sample_entropy"]
        return [
            f"at {row['nfe']} function evaluations the samples have an entropy of {row['sample_entropy']:.2f} nats, "
            f"real text has {real:.2f}: the model repeats itself, and from now on a lower Gen.-PPL is not an "
            "improvement. "
            "Take an earlier checkpoint, a lower learning rate, or the objective 'combined'."
            for row in rows
            if row["sample_entropy"] < (1 - self.config.entropy_tolerance) * real
        ]

    def score(self, rows: Sequence[Row]) -> float | None:
        """Return the mean log Gen.-PPL, lower is better; None without a judge, or where entropy has collapsed."""
        if not rows or any("gen_ppl" not in row for row in rows) or self.warnings(rows):
            return None
        return sum(math.log(row["gen_ppl"]) for row in rows) / len(rows)


def judge_name(judge: Any) -> str | None:
    """Return the name of a judge without loading it; None for none."""
    if judge is None:
        return None
    model = getattr(judge, "judge", judge)  # that of a GenerativePerplexity
    names = (getattr(model, name, None) for name in ("name", "name_or_path", "__name__"))
    own = model if isinstance(model, (str, Path)) else next((name for name in names if name), type(model).__name__)
    return str(own)
