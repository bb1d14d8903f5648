"""Both probes on checkpoints and a text file, before and after refinement: what ``tokendrift probe`` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.devices import resolve_device
from tokendrift.diffusion import Process
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity
from tokendrift.evaluation.judge import DEFAULT_JUDGE
from tokendrift.models import LoadedDenoiser, build, load_denoiser, read_checkpoint
from tokendrift.models.tokenizer import decode, encode, load_tokenizer, require_tokenizer
from tokendrift.probes.information_decay import InformationDecay, decay_table, information_decay, unigram_law
from tokendrift.probes.marginal_trap import (
    PROTOCOL,
    MarginalTrap,
    marginal_trap,
    matched_temperature,
    trap_change,
    trap_table,
)
from tokendrift.text_files import read_documents

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
        settings: Options of the probes.
        decay: Information decay by name: ``"before"`` and, with a second checkpoint, ``"after"``.
        trap: Marginal trap by name. With a second checkpoint there is a third entry: the first one, sampled at the
            temperature at which its predictions have the second one's entropy.
        change: By how much the second checkpoint's gap is smaller, one interval for each size; None without one.
        matched_change: The same against the first checkpoint at that temperature; None if the temperature is 1.
        token: Returns the text of a token id.
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
        """Yield sentences on the results for the largest k."""
        first = self.trap[BEFORE]
        k, gap = first.sizes[-1], first.gap[-1]
        yield (
            f"Under the judge, {k} tokens drawn at once are {gap:.2f} nats per position less likely than drawn "
            "in turn: "
            f"{'the marginal trap exceeds chance' if gap.low > 0 else 'no marginal trap beyond chance'}."
        )
        if self.change is None:
            return
        yield f"After, the gap is {_change_in_words(self.change[-1])}."
        if self.matched_change is None:
            yield "Its predictions are no sharper than before, so there is no comparison at a lower temperature."
        else:
            (matched,) = (name for name in self.trap if name not in (BEFORE, AFTER))
            yield f"Against '{matched}', which is as sharp, it is {_change_in_words(self.matched_change[-1])}."
        drawn, then = first.drawn_entropy[-1], self.trap[AFTER].drawn_entropy[-1]
        yield f"Entropy of all tokens drawn at once: {drawn:.2f} nats before, {then:.2f} after."


def probe_checkpoints(
    checkpoint: str | Path,
    text: str | Path,
    *,
    compare: str | Path | None = None,
    judge: object = DEFAULT_JUDGE,
    judge_reads_ids: bool = False,
    judge_tokenizer: str | Path | None = None,
    tokenizer: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    prompts: int = 64,
    prompt_length: int | None = None,
    positions: int | None = None,
    draws: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str | None = "auto",
    progress: Callable[[str], object] = lambda stage: None,
) -> ProbeReport:
    """Probe one checkpoint, or two side by side on the same prompts and random numbers.

    The trap is measured at powers of two up to 16, as far as there are noisy positions.

    Args:
        checkpoint: Hub id, folder or file, as `tokendrift.models.load_denoiser` takes it.
        text: UTF-8 text file from which prompts and unigram frequencies are taken.
        compare: Refined checkpoint to compare with the first one. Default: none.
        judge: Causal language model that scores text: hub id or folder. Default: gpt2-large.
        judge_reads_ids: The judge has the vocabulary of the denoiser and reads its ids instead of text.
        judge_tokenizer: Tokenizer of the judge: a tokenizer.json, a folder or a hub id. Default: the judge's own.
        tokenizer: Tokenizer of the denoiser: a tokenizer.json, a folder or a hub id. Default: that of the checkpoint,
            or that of GPT-2 if the vocabulary has its size.
        config: Fields that replace or complete those of the configuration of both, as for `load_denoiser`.
        prompts: Number of prompts, evenly spread over the text. Default: 64.
        prompt_length: Tokens of a prompt. Default: 64, or less if the model is too short.
        positions: Noisy positions after a prompt. Default: 32, or less if the model is too short.
        draws: Number of draws for each prompt, which are averaged. Default: 4.
        batch_size: Sequences in a forward call. Default: 64.
        seed: Random seed of the noise and the draws. Default: 0.
        device: Device such as cpu or cuda:0; auto takes cuda if it is available, else cpu. Default: auto.
        progress: Called with a description of each stage. Default: a function that does nothing.

    Raises:
        TokenDriftError: If anything cannot be read, is too short, or does not fit together.
    """
    # 1. Load the denoisers and encode the text. The judge may be large: it is loaded last, when everything else fits.
    device = resolve_device(device, needs_float64=True)
    written = "\n\n".join(read_documents(text, argument="text"))
    progress("loading")
    denoisers, own_tokenizer = _load(checkpoint, compare, tokenizer, device, config)
    model, process = denoisers[BEFORE]
    stream = _encoded(own_tokenizer, written, process)
    shortest = min(network.config.model_length for network, _ in denoisers.values())
    k, width = _sizes(positions, prompt_length, shortest)
    starts = _prompts(stream, check_count("prompts", prompts, least=2), width)
    of_judge = own_tokenizer if judge_reads_ids else None
    if judge_tokenizer is not None:
        if judge_reads_ids:
            raise fail("judge_tokenizer was given, but the judge reads ids.", "Leave one of the two out.")
        of_judge = load_tokenizer(judge_tokenizer)
    scorer = GenerativePerplexity(judge, of_judge, protocol=PROTOCOL, device=device)
    # 2. Both probes on every denoiser, with the same random numbers.
    options: dict[str, Any] = {"draws": draws, "batch_size": batch_size, "seed": seed}
    sizes = tuple(size for size in SIZES if size <= k)
    texts = None if judge_reads_ids else partial(decode, own_tokenizer)
    trap_options = options | {"decode": texts, "sizes": sizes}
    decay, trap = {}, {}
    for name, (network, own) in denoisers.items():
        progress(f"information decay, {name}")
        decay[name] = information_decay(network, own, starts, unigram_law(stream, own), positions=k, **options)
        progress(f"marginal trap, {name}")
        trap[name] = marginal_trap(network, own, starts, scorer, **trap_options)
    # 3. The change, and the change against the first denoiser at the temperature that makes it as sharp.
    change = matched_change = None
    if AFTER in denoisers:
        change = trap_change(trap[BEFORE], trap[AFTER])
        progress("marginal trap at matched entropy")
        target = trap[AFTER].entropy[-1]
        temperature = matched_temperature(model, process, starts, target, positions=sizes[-1], **options)
        if temperature < 1:
            cooler = marginal_trap(model, process, starts, scorer, temperature=temperature, **trap_options)
            matched_change = trap_change(cooler, trap[AFTER])
            trap = {BEFORE: trap[BEFORE], f"before, T = {temperature:.2f}": cooler, AFTER: trap[AFTER]}
    settings = {
        "checkpoint": str(checkpoint), "compare": None if compare is None else str(compare), "text": str(text),
        "judge": scorer.judge.name, "judge_reads_ids": judge_reads_ids, "prompts": prompts, "prompt_length": width,
        "positions": k, "draws": draws, "seed": seed, "device": str(device),
    }  # fmt: skip
    return ProbeReport(settings, decay, trap, change, matched_change, lambda token: decode(own_tokenizer, [[token]])[0])


def _load(
    checkpoint: str | Path,
    compare: str | Path | None,
    tokenizer: str | Path | None,
    device: torch.device | str | None,
    config: Mapping[str, Any] | None,
) -> tuple[dict[str, tuple[LoadedDenoiser, Process]], Any]:
    """Return model and process of one checkpoint or of two, and the tokenizer, which they share."""
    source = read_checkpoint(checkpoint, config=config)
    found = {BEFORE: build(source, device=device)}
    if compare is not None:
        found[AFTER] = load_denoiser(compare, config=config, device=device)
        sizes = [process.vocab_size for _, process in found.values()]
        if sizes[0] != sizes[1]:
            raise fail(
                f"the checkpoints have V = {sizes[0]} and V = {sizes[1]}; the same text cannot be used for both.",
                "Compare a checkpoint with a refined version of it.",
            )
    size = found[BEFORE][1].vocab_size
    return found, require_tokenizer(source.folder, size, source=tokenizer, trusted=source.trusted)[0]


def _sizes(positions: int | None, prompt_length: int | None, length: int) -> tuple[int, int]:
    """Return the numbers of noisy positions and of prompt tokens, which fit into a model's length together."""
    k = min(MOST_POSITIONS, length // 2) if positions is None else check_count("positions", positions, least=1)
    width = max(1, min(MOST_PROMPT, length - k))
    if prompt_length is not None:
        width = check_count("prompt_length", prompt_length, least=1)
    if width + k > length:
        raise fail(
            f"{width} token{'s' * (width > 1)} of prompt and {k} positions exceed the length of the model, {length}.",
            "Lower --prompt-length or --positions.",
        )
    return k, width


def _encoded(tokenizer: Any, text: str, process: Process) -> Tensor:
    """Return the tokens of a text, int64 (n,)."""
    ids = torch.tensor(encode(tokenizer, [text])[0], dtype=torch.int64)
    if len(ids) and int(ids.max()) >= process.vocab_size:
        raise fail(
            f"the tokenizer gives id {int(ids.max())}, the denoiser's vocabulary V has {process.vocab_size} entries.",
            "Pass the tokenizer that the denoiser was trained with (--tokenizer).",
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


def _change_in_words(fall: Interval) -> str:
    """Return in words by how much a gap became smaller or larger."""
    direction, change = "smaller", fall
    if fall.estimate < 0:
        direction, change = "larger", Interval(-fall.estimate, -fall.high, -fall.low)
    return f"{direction} by {change:.2f}, {'beyond chance' if fall.excludes(0) else 'not beyond chance'}"
