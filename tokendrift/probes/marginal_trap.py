"""The marginal trap: tokens drawn in parallel from correct marginals can be inconsistent with each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokendrift._checks import check_count, check_positive, fail
from tokendrift.diffusion.process import Denoiser, Process
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.diversity import unigram_entropy
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity
from tokendrift.evaluation.plots import canvas, plot_band
from tokendrift.evaluation.samples import id_sequences
from tokendrift.modes import evaluation_mode
from tokendrift.probes.noisy_prompts import NoisyPrompts, entropies, interval_of_means
from tokendrift.sampling.categorical import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

BISECTIONS = 12  # of a temperature: to 1/4096
PROTOCOL = "all"  # every token counts, an end of text too: log-likelihoods of wholes are compared


@dataclass(frozen=True)
class MarginalTrap:
    r"""The loss in likelihood when k tokens are drawn in one step instead of one after another; lists run over k.

    The gap for a judge J, prompt c and the denoiser's tokens x:

    .. math::
        \frac1k\Big(\mathbb E_{\text{in turn}}\log p_J(x \mid c) - \mathbb E_{\text{at once}}\log p_J(x \mid c)\Big)

    It is zero at k = 1. With the true law p as judge and as denoiser it is
    :math:`(\mathrm{KL}(\prod_i p_i \,\|\, p) + \mathrm{TC}) / k`, with the total correlation
    :math:`\mathrm{TC} = \sum_i H(p_i) - H(p)`: a property of the language. A uniform-state denoiser can close the gap
    with predictions that are sharp and depend on the noise, which all positions see. The input of a masked denoiser
    contains no noise, so it can only restrict itself to fewer continuations. Sharper predictions alone also change the
    gap, in either direction, because tokens drawn in turn become more likely too: compare at equal ``entropy``.
    ``drawn_entropy`` is the entropy of the drawn tokens: if it falls, the smaller gap comes at the expense of variety.

    Attributes:
        sizes: The k.
        gap: Log-likelihood per position of the sequential draw minus that of the parallel draw, nats.
        sequential: Mean log-likelihood per position of tokens drawn one after another, nats.
        parallel: The same of tokens drawn in one step.
        entropy: Mean entropy of the predictions that the parallel draw was made from, nats.
        drawn_entropy: Entropy of all tokens of the parallel draws together, nats.
        less_likely: Share of parallel draws that the judge finds less likely than their sequential twin; ties half.
        prompt_gaps: The gap of each prompt, float64 (n, number of sizes).
        draws: Draws averaged for each prompt.
        temperature: Sampling temperature of both.
        judge: Name of the judge.
        level: Share of the bootstrap inside the intervals, over prompts.
    """

    sizes: tuple[int, ...]
    gap: list[Interval]
    sequential: list[float]
    parallel: list[float]
    entropy: list[float]
    drawn_entropy: list[float]
    less_likely: list[float]
    prompt_gaps: Tensor
    draws: int
    temperature: float
    judge: str
    level: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON, those of each prompt included."""
        plain = vars(self) | {"sizes": list(self.sizes), "prompt_gaps": self.prompt_gaps.tolist()}
        return plain | {"gap": [interval._asdict() for interval in self.gap]}

    def table(self) -> Table:
        """Return a `rich` table (extra ``cli``), a row for each k."""
        return trap_table({"": self})

    def plot(self, axes: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the gap over k with its interval; returns the figure and axes of matplotlib."""
        return plot_trap({"": self}, axes)


def marginal_trap(
    denoiser: Denoiser,
    process: Process,
    prompts: Tensor,
    judge: GenerativePerplexity,
    *,
    decode: Callable[[Tensor], Sequence[str]] | None = None,
    sizes: Sequence[int] = (1, 2, 4, 8, 16),
    draws: int = 4,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> MarginalTrap:
    """Draw k tokens after prompts, at once and one after another from left to right, and let a judge compare.

    Both draws use the same noise and the same uniform numbers at each position. They differ in the context of the later
    predictions, and their first tokens are equal. When tokens are drawn one after another, the denoiser is called with
    the noise level of the positions that are still noisy.

    Args:
        denoiser: As for `information_decay`.
        process: Its process.
        prompts: Clean ids (n, P), n at least 2.
        judge: Scores log-likelihoods; of protocol ``"all"``.
        decode: Returns the texts of ids (m, L), if the judge has another vocabulary. Both draws are then retokenised
            whole, and the prompt, which is the same in both, cancels in the gap. Default: None.
        sizes: Numbers k of tokens drawn. Default: (1, 2, 4, 8, 16).
        draws: Pairs of draws for each prompt. Default: 4.
        temperature: Sampling temperature of both draws. Default: 1.0.
        batch_size: Sequences in a forward call. Default: 64.
        seed: Random seed of noise and draws. With the same seed two denoisers use the same random numbers. Default: 0.
        resamples: Redraws of the bootstrap over prompts. Default: 1000.
        level: Confidence of the intervals. Default: 0.95.

    Raises:
        TokenDriftError: If prompts, judge or an option do not fit.
    """
    prompted = NoisyPrompts(denoiser, process, prompts, draws, batch_size, seed)
    interval = interval_of_means(resamples, level)
    if not sizes:
        raise fail("sizes is empty.", "Name at least one number of positions, such as sizes=(1, 2, 4, 8).")
    for k in sizes:
        check_count("sizes", k, least=1)
    check_positive("temperature", temperature)
    if judge.protocol != PROTOCOL:
        raise fail(
            f"judge must score every token, but its protocol is {judge.protocol!r}.",
            f"Build it as GenerativePerplexity(model, protocol={PROTOCOL!r}).",
        )
    # 1. Draw every k at once and in turn, from the same noise and the same uniform numbers.
    noise, uniform = prompted.noise(max(sizes)), prompted.uniform(max(sizes))
    pairs, entropy = [], []
    with evaluation_mode(denoiser):
        for k in sizes:
            found = [
                _draw_twice(prompted, span, noise[span, :k], uniform[span, :k], temperature)
                for span in prompted.batches()
            ]
            at_once, in_turn, spread = (torch.cat(part).cpu() for part in zip(*found, strict=True))
            pairs.append((at_once, in_turn))
            entropy.append(float(spread.mean()))
    # 2. One pass of the judge over the prompts and all draws.
    prompt_nll, pair_nll = _score(judge, decode, prompted.prompts, pairs)
    # 3. The gap of each pair, averaged over the draws of each prompt.
    before, gaps, likelihood, less_likely = prompt_nll.repeat_interleave(draws), [], [], []
    for k, (at_once, in_turn), (cost_at_once, cost_in_turn) in zip(sizes, pairs, pair_nll, strict=True):
        # Equal ids are equally likely; what a judge makes of them differs by the rounding of two batches.
        same = (at_once == in_turn).all(dim=1)
        gap = torch.where(same, 0.0, (cost_at_once - cost_in_turn) / k)
        gaps.append(gap.view(-1, draws).mean(dim=1))
        likelihood.append([float((before - cost).mean()) / k for cost in (cost_in_turn, cost_at_once)])
        less_likely.append(float(((gap > 0).double() + (gap == 0).double() / 2).mean()))
    return MarginalTrap(
        sizes=tuple(sizes),
        gap=[interval(gap) for gap in gaps],
        sequential=[pair[0] for pair in likelihood],
        parallel=[pair[1] for pair in likelihood],
        entropy=entropy,
        drawn_entropy=[unigram_entropy(at_once[:, -k:]) for k, (at_once, _) in zip(sizes, pairs, strict=True)],
        less_likely=less_likely,
        prompt_gaps=torch.stack(gaps, dim=1),
        draws=draws,
        temperature=temperature,
        judge=judge.judge.name,
        level=level,
    )


def trap_change(before: MarginalTrap, after: MarginalTrap, *, resamples: int = 1000) -> list[Interval]:
    """Return by how much the gap of each size fell, nats per position, with paired intervals over prompts.

    The trap is closed in part if an interval lies above 0. Compare the entropies as well: see `MarginalTrap`.

    Args:
        before: Result for one denoiser.
        after: Result for another, on the same prompts and with the same seed.
        resamples: Redraws of the bootstrap. Default: 1000.

    Raises:
        TokenDriftError: If sizes, draws, judge or the number of prompts differ.
    """
    for name in ("sizes", "draws", "judge", "level"):
        ours, theirs = getattr(before, name), getattr(after, name)
        if ours != theirs:
            raise fail(
                f"before has {name} {ours!r} and after has {theirs!r}, so they cannot be compared.",
                "Probe both with the same options.",
            )
    if before.prompt_gaps.shape != after.prompt_gaps.shape:
        raise fail(
            "before and after were probed on different numbers of prompts.",
            "Use the same prompts for both.",
            before=before.prompt_gaps,
            after=after.prompt_gaps,
        )
    interval = interval_of_means(resamples, before.level)
    return [interval(column) for column in (before.prompt_gaps - after.prompt_gaps).T]


def matched_temperature(
    denoiser: Denoiser,
    process: Process,
    prompts: Tensor,
    entropy: float,
    *,
    positions: int,
    draws: int = 4,
    batch_size: int = 64,
    seed: int = 0,
) -> float:
    """Return the temperature, 1 at most, at which predictions at noisy positions have a mean entropy.

    Sharper predictions alone change the gap. To see whether a denoiser does more than that, compare it with the other
    one at this temperature.

    Args:
        denoiser: As for `marginal_trap`.
        process: Its process.
        prompts: Clean ids (n, P).
        entropy: The mean entropy wanted, nats: ``MarginalTrap.entropy`` of the other denoiser.
        positions: The k that it belongs to.
        draws: Noise patterns for each prompt. Default: 4.
        batch_size: Sequences in a forward call. Default: 64.
        seed: Random seed of the noise. Default: 0.

    Raises:
        TokenDriftError: If prompts or an option do not fit.
    """
    prompted = NoisyPrompts(denoiser, process, prompts, draws, batch_size, seed)
    noise = prompted.noise(check_count("positions", positions, least=1))

    def mean_entropy(temperature: float) -> float:
        with evaluation_mode(denoiser):
            found = []
            for span in prompted.batches():
                ids = torch.cat([prompted.rows[span], noise[span]], dim=1)
                found.append(entropies(prompted.predict(ids, span, noisy=positions, temperature=temperature)))
            return float(torch.cat(found).mean())

    if mean_entropy(1.0) <= entropy:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(middle) < entropy else (low, middle)
    return (low + high) / 2


def _draw_twice(
    prompted: NoisyPrompts, span: slice, noise: Tensor, uniform: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (R, P + k) with k tokens drawn at once and in turn, and the entropies (R, k) of the former's laws."""
    prompts, k = prompted.rows[span], noise.shape[1]
    ids = torch.cat([prompts, noise], dim=1)
    log_p = prompted.predict(ids, span, noisy=k, temperature=temperature)
    tokens = draw(log_p.flatten(0, 1), uniform=uniform.flatten()).ids.view(noise.shape)
    at_once, entropy = torch.cat([prompts, tokens], dim=1), entropies(log_p)
    first = prompts.shape[1]
    ids[:, first] = tokens[:, 0]
    for i in range(1, k):
        log_p = prompted.predict(ids, span, noisy=k - i, temperature=temperature)
        ids[:, first + i] = draw(log_p[:, 0], uniform=uniform[:, i].contiguous()).ids
    return at_once, ids, entropy


def _score(
    judge: GenerativePerplexity,
    decode: Callable[[Tensor], Sequence[str]] | None,
    prompts: Tensor,
    pairs: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the NLL of the prompts (n,), and of both members of each pair (R,), from one pass of the judge."""
    pieces = [prompts.cpu(), *(ids for pair in pairs for ids in pair)]
    if prompts.shape[1] == 1 and decode is None:
        pieces[0] = pieces[0].new_zeros(len(prompts), 2)  # a first token is no target: it costs nothing
    rows = [row for piece in pieces for row in (piece if decode is None else decode(piece))]
    if decode is not None and min(map(len, id_sequences(rows, None, judge.judge.tokenizer)[0])) < 2:
        raise fail("the judge reads a prompt, alone or with its draw, as fewer than 2 tokens.", "Use longer prompts.")
    nll = judge.score(rows).sample_nll
    if not bool(nll.isfinite().all()):
        raise fail(
            "the judge assigns probability zero to some draws, so the gap is not defined.",
            "Use a judge that assigns every token a positive probability, as language models with a softmax do.",
        )
    found = nll.split([len(piece) for piece in pieces])
    before = torch.zeros_like(found[0]) if prompts.shape[1] == 1 and decode is None else found[0]
    return before, list(zip(found[1::2], found[2::2], strict=True))


def trap_table(probes: Mapping[str, MarginalTrap]) -> Table:
    """Return a `rich` table with a row for each k and denoiser."""
    from rich.table import Table

    first = next(iter(probes.values()))
    table = Table(
        title="Marginal trap: k tokens drawn at once against the same k drawn in turn",
        caption=f"nats per position, log-likelihoods under the judge {first.judge}; gap = in turn - at once; entropy: "
        "of the predictions at once, and of all tokens drawn from them; "
        f"{len(first.prompt_gaps)} prompts x {first.draws} draws; {first.level:.0%} intervals over prompts",
    )
    alone = len(probes) == 1
    if not alone:
        table.add_column("denoiser")
    for heading in ("k", "gap", "interval", "in turn", "at once", "entropy", "entropy drawn", "at once less likely"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, k in enumerate(first.sizes):
        if not alone:
            table.add_section()
        for name, probe in probes.items():
            gap = probe.gap[i]
            row = [str(k), f"{gap.estimate:.3f}", f"{gap.low:.3f} to {gap.high:.3f}"]
            row += [
                f"{figures[i]:.3f}"
                for figures in (probe.sequential, probe.parallel, probe.entropy, probe.drawn_entropy)
            ]
            table.add_row(*([] if alone else [name]), *row, f"{probe.less_likely[i]:.0%}")
    return table


def plot_trap(probes: Mapping[str, MarginalTrap], axes: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw the gap over k with intervals; returns matplotlib's (fig, ax)."""
    figure, ax = canvas(axes)
    for number, (name, probe) in enumerate(probes.items()):
        plot_band(ax, probe.sizes, probe.gap, f"C{number}", "o-", name or "gap")
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(next(iter(probes.values())).sizes)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="tokens drawn in one step", ylabel="gap (nats per position)")
    ax.legend()
    return figure, ax
