"""Information decay: predictions at growing distance from the prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokendrift._checks import check_count, check_ids, check_positive, check_tensor, fail
from tokendrift.diffusion.process import Denoiser, Process
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.plots import canvas, plot_band
from tokendrift.modes import evaluation_mode
from tokendrift.probes.noisy_prompts import NoisyPrompts, interval_of_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

TOP = 3  # likeliest tokens kept for each distance


class Share(NamedTuple):
    """A token and its mean probability over prompts."""

    token: int
    probability: float


@dataclass(frozen=True)
class InformationDecay:
    """What is predicted at each distance from the prompt; lists run over distances 1, 2, ..., K.

    Attributes:
        entropy: Mean entropy of the prediction, nats.
        divergence: Mean KL divergence of the prediction from the unigram law of the corpus, nats.
        top: The three tokens of largest mean probability.
        corpus_entropy: Entropy of the unigram law, nats: what the first figure tends to where the second vanishes.
        prompts: n, number of prompts.
        prompt_length: Tokens of a prompt.
        draws: Noise patterns averaged for each prompt; 1 with masks.
        level: Share of the bootstrap inside the intervals, over prompts.
    """

    entropy: list[Interval]
    divergence: list[Interval]
    top: list[list[Share]]
    corpus_entropy: float
    prompts: int
    prompt_length: int
    draws: int
    level: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        named = {"entropy": self.entropy, "divergence": self.divergence}
        return vars(self) | {
            "distance": list(range(1, len(self.entropy) + 1)),
            "top": [[share._asdict() for share in shares] for shares in self.top],
            **{name: [interval._asdict() for interval in intervals] for name, intervals in named.items()},
        }

    def table(self, decode: Callable[[int], str] = str) -> Table:
        """Return a `rich` table (extra ``cli``), a row for each distance; ``decode`` gives the text of one token."""
        return decay_table({"": self}, decode)

    def plot(self, axes: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw entropy and divergence over distance with their intervals; returns the figure and axes of matplotlib."""
        return plot_decay({"": self}, axes)

    def heat_map(self, decode: Callable[[int], str] = str, axes: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the mean probability of the three likeliest tokens of each distance; see `heat_map`."""
        return heat_map(self, decode, axes)


def information_decay(
    denoiser: Denoiser,
    process: Process,
    prompts: Tensor,
    unigram: Tensor,
    *,
    positions: int = 16,
    draws: int = 8,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> InformationDecay:
    r"""Append noise to prompts and read the predictions at each distance from the prompt.

    .. math:: H_d = -\sum_v p_{dv}\log p_{dv}, \qquad D_d = \sum_v p_{dv}\log\frac{p_{dv}}{u_v}

    Args:
        denoiser: Maps ids (B, L) and sigma (B,) to raw logits (B, L, V); called in evaluation mode.
        process: Its process.
        prompts: Clean ids (n, P), n at least 2.
        unigram: u, the corpus' law of single tokens (V,), as `unigram_law` counts it; which may be 0 only at the mask.
        positions: Noisy positions K after each prompt. Default: 16.
        draws: Noise patterns for each prompt; with masks there is only one. Default: 8.
        temperature: Sampling temperature. Default: 1.0.
        batch_size: Sequences in a forward call. Default: 64.
        seed: Random seed of the noise. Default: 0.
        resamples: Redraws of the bootstrap over prompts. Default: 1000.
        level: Confidence of the intervals. Default: 0.95.

    Raises:
        TokenDriftError: If prompts, unigram or an option do not fit.

    >>> from tokendrift.diffusion import MaskedDiffusion
    >>> blind = lambda ids, sigma: torch.zeros(*ids.shape, 5)  # knows nothing: every token but the mask alike
    >>> alike = torch.tensor([0.25, 0.25, 0.25, 0.25, 0])
    >>> probe = information_decay(blind, MaskedDiffusion(5), torch.zeros(2, 3).long(), alike)
    >>> round(probe.entropy[0].estimate, 4), abs(round(probe.divergence[0].estimate, 4))
    (1.3863, 0.0)
    """
    draws = draws if process.mask_id is None else min(draws, 1)  # masks are all alike: one draw says it all
    prompted = NoisyPrompts(denoiser, process, prompts, draws, batch_size, seed)
    interval = interval_of_means(resamples, level)
    check_count("positions", positions, least=1)
    check_positive("temperature", temperature)
    law = _checked_law(unigram, process)
    # Entropy, divergence and mean probabilities of the predictions, a batch of prompts at a time.
    noise, rows = prompted.noise(positions), len(prompted.rows)
    entropy, divergence = (torch.zeros(rows, positions, dtype=torch.float64) for _ in range(2))
    mean = torch.zeros(positions, process.vocab_size, dtype=torch.float64)
    with evaluation_mode(denoiser):
        for span in prompted.batches():
            ids = torch.cat([prompted.rows[span], noise[span]], dim=1)
            log_p = prompted.predict(ids, span, noisy=positions, temperature=temperature)
            for d in range(positions):  # one distance at a time: float64 of the whole would be large
                p = log_p[:, d].double().exp().cpu()
                entropy[span, d] = torch.special.entr(p).sum(dim=-1)
                divergence[span, d] = torch.special.xlogy(p, p).sum(dim=-1) - torch.special.xlogy(p, law).sum(dim=-1)
                mean[d] += p.sum(dim=0)
    probability, token = (mean / rows).topk(min(TOP, process.vocab_size), dim=-1)
    of_prompts = (figure.view(-1, draws, positions).mean(dim=1) for figure in (entropy, divergence))
    entropies, divergences = ([interval(column) for column in each.T] for each in of_prompts)
    return InformationDecay(
        entropies,
        divergences,
        top=[list(map(Share, *pair)) for pair in zip(token.tolist(), probability.tolist(), strict=True)],
        corpus_entropy=float(torch.special.entr(law).sum()),
        prompts=len(prompts),
        prompt_length=prompts.shape[1],
        draws=draws,
        level=level,
    )


def unigram_law(ids: Tensor | Sequence[int], process: Process, *, smoothing: float = 0.5) -> Tensor:
    r"""Return the law of single tokens of a corpus, float64 (V,), zero at the mask alone.

    .. math:: u_v = \frac{c_v + s}{N + sV}

    with V the entries that are no mask. Smoothing keeps divergences finite where the corpus lacks a token; s = 1/2 is
    the estimator of Krichevsky and Trofimov.

    Args:
        ids: Tokens of any shape, or a list of them.
        process: Whose vocabulary it is.
        smoothing: s, above 0.

    Raises:
        TokenDriftError: If there is no token, or one outside the vocabulary.

    >>> from tokendrift.diffusion import MaskedDiffusion
    >>> unigram_law([0, 0, 0, 1], MaskedDiffusion(3))
    tensor([0.7000, 0.3000, 0.0000], dtype=torch.float64)
    """
    check_positive("smoothing", smoothing)
    flat = torch.as_tensor(ids, device="cpu").flatten()
    if flat.numel() == 0:
        raise fail("ids is empty: there is no corpus to count.")
    check_ids("ids", flat[None], process.vocab_size)
    counts = torch.bincount(flat.long(), minlength=process.vocab_size).double() + smoothing
    if process.mask_id is not None:
        counts[process.mask_id] = 0
    return counts / counts.sum()


def _checked_law(unigram: Tensor, process: Process) -> Tensor:
    """Require a law over the vocabulary that is positive on every token that can be predicted."""
    law = check_tensor("unigram", unigram, ("V",)).detach().cpu().double()
    open_entries = torch.arange(len(law)) != (-1 if process.mask_id is None else process.mask_id)
    fits = len(law) == process.vocab_size and bool((law[open_entries] > 0).all()) and bool((law >= 0).all())
    if not fits or not math.isclose(float(law.sum()), 1, abs_tol=1e-4):
        raise fail(
            f"unigram must be a law over V = {process.vocab_size} tokens, which may be 0 only at the mask.",
            "Count it with unigram_law(corpus_ids, process).",
            unigram=unigram,
        )
    return law


def decay_table(
    probes: Mapping[str, InformationDecay],
    decode: Callable[[int], str] = str,
    distances: Sequence[int] | None = None,
) -> Table:
    """Return a `rich` table with a row for each distance.

    Args:
        probes: Results by the name of the denoiser.
        decode: Text of one token.
        distances: Rows to show; all by default.
    """
    from rich.markup import escape
    from rich.table import Table

    first = next(iter(probes.values()))
    alone = len(probes) == 1
    table = Table(
        title="Information decay: predictions at a distance from the prompt",
        caption=f"nats; entropy of the corpus' unigrams {first.corpus_entropy:.2f}; {first.prompts} prompts of "
        f"{first.prompt_length} tokens" + (f"; {first.level:.0%} intervals over prompts" if alone else ""),
    )
    table.add_column("distance", justify="right")
    for heading, justify in (("entropy", "right"), ("KL from\nunigrams", "right"), ("likeliest tokens", "left")):
        for name in probes:
            table.add_column(f"{heading}\n{name}".strip(), justify=justify, no_wrap=justify == "right")  # type: ignore[arg-type]
    for d in distances or range(1, len(first.entropy) + 1):
        figures = [probe.entropy[d - 1] for probe in probes.values()]
        figures += [probe.divergence[d - 1] for probe in probes.values()]
        shown = [f"{figure:.2f}" if alone else f"{figure.estimate:.2f}" for figure in figures]
        for probe in probes.values():
            tokens = (f"{escape(repr(decode(share.token)))} {share.probability:.2f}" for share in probe.top[d - 1])
            shown.append("  ".join(token.replace(" ", "\u00a0") for token in tokens))  # lines break between tokens
        table.add_row(str(d), *shown)
    return table


def plot_decay(probes: Mapping[str, InformationDecay], axes: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw entropy (solid) and divergence (dashed) over distance, with intervals; returns matplotlib's (fig, ax)."""
    figure, ax = canvas(axes)
    for number, (name, probe) in enumerate(probes.items()):
        distance = range(1, len(probe.entropy) + 1)
        for label, intervals, style in (("entropy", probe.entropy, "-"), ("KL", probe.divergence, "--")):
            plot_band(ax, distance, intervals, f"C{number}", style, f"{label}, {name}" if name else label)
    ax.axhline(next(iter(probes.values())).corpus_entropy, color="grey", linewidth=0.8, label="entropy of unigrams")
    ax.set(xlabel="distance from the prompt (tokens)", ylabel="nats", ylim=(0, None))
    ax.legend()
    return figure, ax


def heat_map(
    probe: InformationDecay, decode: Callable[[int], str] = str, axes: Axes | None = None
) -> tuple[Figure, Axes]:
    """Draw the mean probability of the three likeliest tokens of each distance; returns matplotlib's (fig, ax).

    Rows are tokens in the order of their first appearance, columns distances; blank where a token is not among the
    three.
    """
    tokens = list(dict.fromkeys(share.token for shares in probe.top for share in shares))
    grid = [[float("nan")] * len(probe.top) for _ in tokens]
    for column, shares in enumerate(probe.top):
        for share in shares:
            grid[tokens.index(share.token)][column] = share.probability
    figure, ax = canvas(axes)
    if axes is None:
        figure.set_size_inches(1.8 + 0.3 * len(probe.top), 1.5 + 0.22 * len(tokens))
    image = ax.imshow(grid, aspect="auto", vmin=0, cmap="viridis")
    ax.set_yticks(range(len(tokens)), [repr(decode(token)) for token in tokens])
    ax.set_xticks(range(len(probe.top)), [str(d) for d in range(1, len(probe.top) + 1)])
    ax.set(xlabel="distance from the prompt (tokens)", ylabel="token")
    figure.colorbar(image, ax=ax, label="mean probability")
    return figure, ax
