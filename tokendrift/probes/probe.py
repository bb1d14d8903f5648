"""Both probes on checkpoints and a text file, before and after refinement: what ``tokendrift probe`` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.diffusion import Process
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity
from tokendrift.evaluation.judge import DEFAULT_JUDGE
from tokendrift.evaluation.samples import decode
from tokendrift.files import read_text
from tokendrift.probes.information_decay import InformationDecay, information_decay, unigram_law
from tokendrift.probes.marginal_trap import (
    PROTOCOL,
    MarginalTrap,
    marginal_trap,
    matched_temperature,
    trap_change,
)
from tokendrift.probes.views import decay_table, trap_table

if TYPE_CHECKING:
    from rich.table import Table

SIZES = (1, 2, 4, 8, 16)
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # distances in the table; the JSON has all
MOST_PROMPT, MOST_POSITIONS = 64, 32  # by default, where the model is long enough
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class ProbeReport:
    """Both probes of one checkpoint, or of two.

    Attributes:
        settings: How the probes were made.
        decay: Information decay by name: ``"before"`` and, with a second checkpoint, ``"after"``.
        trap: Marginal trap by name; with a second checkpoint also the first one sampled at the temperature at which
            its predictions have the second one's entropy.
        change: How much smaller the second checkpoint's gap is, one interval for each size; None without one.
        matched_change: The same against the first at that temperature; None if that is 1.
        token: Text of one token.
    """

    settings: dict[str, Any]
    decay: dict[str, InformationDecay]
    trap: dict[str, MarginalTrap]
    change: list[Interval] | None
    matched_change: list[Interval] | None
    token: Callable[[int], str]

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers for JSON, with the text of every token that is named."""
        decays = {name: probe.to_dict() for name, probe in self.decay.items()}
        for probe in decays.values():
            probe["top"] = [[share | {"text": self.token(share["token"])} for share in top] for top in probe["top"]]
        return {
            "settings": self.settings,
            "information_decay": decays,
            "marginal_trap": {name: probe.to_dict() for name, probe in self.trap.items()},
            "change": _plain(self.change),
            "change_at_matched_entropy": _plain(self.matched_change),
        }

    def tables(self) -> Iterator[Table]:
        """Yield a `rich` table for each probe."""
        alone = len(self.decay) == 1
        decays, traps = ({"": next(iter(found.values()))} if alone else found for found in (self.decay, self.trap))
        positions = len(next(iter(self.decay.values())).entropy)
        yield decay_table(decays, self.token, [d for d in SHOWN if d <= positions])  # type: ignore[arg-type]
        yield trap_table(traps)  # type: ignore[arg-type]

    def sentences(self) -> Iterator[str]:
        """Yield what the numbers say about the largest k."""
        first = self.trap[BEFORE]
        k, gap = first.sizes[-1], first.gap[-1]
        yield (
            f"Drawn at once, {k} tokens are {_shown(gap)} nats a position less likely to the judge than drawn in turn: "
            f"{'a trap beyond chance' if gap.low > 0 else 'no trap beyond chance'}."
        )
        if self.change is None:
            return
        yield f"After, the gap is {_moved(self.change[-1])}."
        if self.matched_change is None:
            yield "Its predictions are no sharper than before: there is no temperature to compare with."
        else:
            (matched,) = (name for name in self.trap if name not in (BEFORE, AFTER))
            yield f"Against '{matched}', which is as sharp, it is {_moved(self.matched_change[-1])}."
        drawn, then = first.drawn_entropy[-1], self.trap[AFTER].drawn_entropy[-1]
        yield f"Entropy of all tokens drawn at once: {drawn:.2f} nats before, {then:.2f} after."


def probe_checkpoints(
    checkpoint: str | Path,
    text: str | Path,
    *,
    compare: str | Path | None = None,
    judge: object = DEFAULT_JUDGE,
    judge_reads_ids: bool = False,
    tokenizer: str | Path | None = None,
    prompts: int = 64,
    prompt_length: int | None = None,
    positions: int | None = None,
    draws: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[str], object] = lambda stage: None,
) -> ProbeReport:
    """Probe one checkpoint, or two side by side on the same prompts and random numbers.

    Args:
        checkpoint: Hub id, folder or file, as `tokendrift.models.load_denoiser` takes it.
        text: UTF-8 file; prompts are spread evenly over it, and its tokens give the unigram law.
        compare: The refined checkpoint, of the same vocabulary.
        judge: As for `GenerativePerplexity`.
        judge_reads_ids: The judge has the denoiser's vocabulary; nothing is decoded and retokenised.
        tokenizer: ``tokenizer.json``, folder or hub name; by default that of the first checkpoint's folder.
        prompts: n.
        prompt_length: P; by default 64, or what the model's length leaves.
        positions: K of `information_decay`; by default 32, or half of the model's length. The trap is read at powers
            of two up to 16 within K.
        draws: Noise patterns and pairs of draws for each prompt.
        batch_size: Sequences a forward call.
        seed: Of noise and draws.
        device: Where the denoisers and a judge loaded by name go.
        progress: Called with what is being done.

    Raises:
        TokenDriftError: If anything cannot be read, is too short, or does not fit together.
    """
    from tokendrift.models import build, load_denoiser, read_checkpoint
    from tokendrift.models.tokenizer import load_tokenizer

    written = read_text(text, argument="text")
    progress("loading")
    source = read_checkpoint(checkpoint)
    found = {BEFORE: build(source, device=device)}
    if compare is not None:
        found[AFTER] = load_denoiser(compare, device=device)
        sizes = [process.vocab_size for _, process in found.values()]
        if sizes[0] != sizes[1]:
            raise fail(
                f"the checkpoints have V = {sizes[0]} and V = {sizes[1]}; one text does not fit both.",
                "Compare a checkpoint with what was made of it.",
            )
    model, process = found[BEFORE]
    named = _tokenizer_of(source.folder, process) if tokenizer is None else load_tokenizer(tokenizer)
    stream = _encoded(named, written, process)
    length = min(network.config.model_length for network, _ in found.values())
    k = min(MOST_POSITIONS, length // 2) if positions is None else check_count("positions", positions, least=1)
    width = (
        min(MOST_PROMPT, length - k) if prompt_length is None else check_count("prompt_length", prompt_length, least=1)
    )
    if width < 1 or width + k > length:
        raise fail(
            f"{width} tokens of prompt and {k} positions do not fit into the model's {length}.",
            "Lower --prompt-length or --positions.",
        )
    starts = _prompts(stream, check_count("prompts", prompts, least=2), width)
    # The judge may be large: it comes last, when everything else fits.
    scorer = GenerativePerplexity(judge, named if judge_reads_ids else None, protocol=PROTOCOL, device=device)
    texts = None if judge_reads_ids else lambda ids: decode(named, ids)

    options: dict[str, Any] = {"draws": draws, "batch_size": batch_size, "seed": seed}
    trap_options = options | {"decode": texts, "sizes": tuple(size for size in SIZES if size <= k)}
    decay, trap = {}, {}
    for name, (network, own) in found.items():
        progress(f"information decay, {name}")
        law = unigram_law(stream, own)
        decay[name] = information_decay(network, own, starts, law, positions=k, **options)
        progress(f"marginal trap, {name}")
        trap[name] = marginal_trap(network, own, starts, scorer, **trap_options)
    change = matched_change = None
    if AFTER in found:
        change = trap_change(trap[BEFORE], trap[AFTER])
        progress("marginal trap at matched entropy")
        largest = trap[BEFORE].sizes[-1]
        warmth = matched_temperature(model, process, starts, trap[AFTER].entropy[-1], positions=largest, **options)
        if warmth < 1:
            cooler = marginal_trap(model, process, starts, scorer, temperature=warmth, **trap_options)
            matched_change = trap_change(cooler, trap[AFTER])
            trap = {BEFORE: trap[BEFORE], f"before, T = {warmth:.2f}": cooler, AFTER: trap[AFTER]}
    settings = {
        "checkpoint": str(checkpoint),
        "compare": None if compare is None else str(compare),
        "text": str(text),
        "judge": scorer.judge.name,
        "judge_reads_ids": judge_reads_ids,
        "prompts": prompts,
        "prompt_length": width,
        "positions": k,
        "draws": draws,
        "seed": seed,
    }
    return ProbeReport(settings, decay, trap, change, matched_change, lambda token: decode(named, [[token]])[0])


def _tokenizer_of(folder: Path, process: Process) -> Any:
    """Return the tokenizer beside the weights, or GPT-2's for a vocabulary of its size."""
    from tokendrift.models.tokenizer import find_tokenizer

    found = find_tokenizer(folder, process.vocab_size, fetch=True)
    if found is None:
        raise fail(f"{folder} has no tokenizer.", "Name one: a tokenizer.json, a folder or a hub name (--tokenizer).")
    return found[0]


def _encoded(tokenizer: Any, text: str, process: Process) -> Tensor:
    """Return the tokens of a text, int64 (n,)."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) and int(ids.max()) >= process.vocab_size:
        raise fail(
            f"the tokenizer gives id {int(ids.max())}, the denoiser's vocabulary V has {process.vocab_size} entries.",
            "Name the tokenizer that the denoiser was trained with (--tokenizer).",
        )
    return ids


def _prompts(stream: Tensor, count: int, length: int) -> Tensor:
    """Return ``count`` disjoint windows (n, P), spread evenly over a text."""
    if len(stream) < count * length:
        raise fail(
            f"the text has {len(stream)} tokens, too few for {count} prompts of {length}.",
            "Pass more text, or fewer or shorter prompts.",
        )
    starts = torch.arange(count) * ((len(stream) - length) // max(1, count - 1))
    return stream[starts[:, None] + torch.arange(length)]


def _plain(intervals: list[Interval] | None) -> list[dict[str, float]] | None:
    return None if intervals is None else [interval._asdict() for interval in intervals]


def _shown(interval: Interval) -> str:
    return f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _moved(fall: Interval) -> str:
    """Return in words by how much a gap fell, or rose."""
    direction, change = "smaller", fall
    if fall.estimate < 0:
        direction, change = "larger", Interval(-fall.estimate, -fall.high, -fall.low)
    return f"{direction} by {_shown(change)}, {'beyond chance' if fall.excludes(0) else 'not beyond chance'}"
