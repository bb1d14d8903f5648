"""Gen.-PPL: how likely a causal language model, the judge, finds generated samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from tokendrift._checks import check_choice, check_count, fail
from tokendrift.evaluation.judge import DEFAULT_JUDGE, Judge, check_range
from tokendrift.evaluation.protocols import (
    NEED_EOS,
    PROTOCOLS,
    SLIDING,
    WHOLE,
    Window,
    log_perplexity,
    plan_windows,
    scored_targets,
)
from tokendrift.evaluation.samples import SampleInput, id_sequences
from tokendrift.modes import evaluation_mode
from tokendrift.references import rank_count
from tokendrift.sampling import SampleSet

USUAL_LENGTH = 1024  # tokens of a window; recent judges know so many positions that batches would not fit into memory


class PerplexityResult(NamedTuple):
    """Gen.-PPL with everything needed to quote, pool or bootstrap it.

    Attributes:
        perplexity: Gen.-PPL.
        nll: Summed negative log-likelihood of the counted tokens, nats.
        tokens: Counted tokens.
        samples: n.
        protocol: Convention, one of `PROTOCOLS`.
        precision: Dtype in which the judge ran.
        judge: Its name or folder.
        revision: Commit or branch of its weights, None if unknown.
        sample_nll: What each sample adds to ``nll``, float64 (n,), in the order given.
        sample_tokens: What each sample adds to ``tokens``, int64 (n,).
        sample_bytes: UTF-8 bytes of the text of each sample, int64 (n,); None if the judge read ids, or a part of the
            text.
        sample_generated: Tokens of each sample as the denoiser generated it, int64 (n,); None if they are not known.
    """

    perplexity: float
    nll: float
    tokens: int
    samples: int
    protocol: str
    precision: str
    judge: str
    revision: str | None
    sample_nll: Tensor
    sample_tokens: Tensor
    sample_bytes: Tensor | None = None
    sample_generated: Tensor | None = None

    @property
    def bits_per_byte(self) -> float | None:
        """Total NLL in bits over all UTF-8 bytes, which compares across judges; None if the bytes are not known.

        Tokens that the protocol does not count add their bytes all the same: the first token of a window, unless the
        judge reads a start token before it, and end-of-text tokens that are written in a text.
        """
        return None if self.sample_bytes is None else self.nll / math.log(2) / int(self.sample_bytes.sum())

    @property
    def nats_per_generated_token(self) -> float | None:
        """Total NLL in nats over all tokens that the denoiser generated; None if their number is not known."""
        return None if self.sample_generated is None else self.nll / int(self.sample_generated.sum())

    def with_sizes(self, texts: Sequence[str] | None, ids: Sequence[Sequence[int] | Tensor] | None) -> PerplexityResult:
        """Return the result with the bytes of the texts and the number of ids as generated of each sample."""
        return self._replace(
            sample_bytes=None if texts is None else torch.tensor([len(text.encode()) for text in texts]),
            sample_generated=None if ids is None else torch.tensor([len(row) for row in ids]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and texts for JSON, those of each sample included."""
        plain = self._asdict()
        plain["perplexity"] = self.perplexity if math.isfinite(self.perplexity) else None
        plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in plain.items()}
        return plain | {"bits_per_byte": self.bits_per_byte, "nats_per_generated_token": self.nats_per_generated_token}


class GenerativePerplexity:
    """Score samples under a judge: `update` with each batch of samples, `compute` over all of them.

    Every sample is scored, and the result does not depend on batch size, order or padding beyond the rounding of the
    judge. Log-probabilities are float32 or wider, sums float64. Windows of similar length are read together, with up
    to ``batch_size * max_length`` tokens in a forward call, and no more than ``batch_size * 1024`` unless a single
    window is longer.

    If a process group is initialised, every rank scores samples of its own; only `compute` communicates.

    Args:
        judge: A transformers causal LM; any callable (ids (B, L) int64, attention_mask (B, L) int64) -> logits
            (B, L, V); or the name or folder of a transformers model (safetensors; its own code is never run).
        tokenizer: Tokenizer of the judge, for texts: one of transformers, or a ``tokenizers.Tokenizer``. No special
            token is added, except the start token of a judge that has one, see `Judge`. Default: that of a judge
            loaded by name, else None.
        protocol: ``"mdlm"`` (also DUO's and ReMDM's), ``"sedd"``, ``"sdtt"``, ``"bd3"``, or ``"all"``: every token
            but the first, with context across windows. See `tokendrift.evaluation.protocols`. Default: ``"mdlm"``.
        max_length: Tokens that the judge reads at once. Longer samples are split into windows, never cut;
            ``"sedd"`` and ``"sdtt"`` refuse them. Default: the judge's own window, else 1024.
        batch_size: Windows of full length in a forward call; of shorter windows correspondingly more. Default: 8.
        stride: Step of the sliding windows of ``"bd3"`` and ``"all"``, tokens. Default: half of ``max_length``.
        device: Device to which ids are sent. Default: that of the judge's parameters.
        precision: ``"float32"`` or ``"bfloat16"`` for a judge loaded by name; any other judge keeps its own. The
            result records the precision. Default: float32.
        revision: Branch, tag or commit of a judge loaded by name. Default: None.
        eos_id: End-of-text token, for ``"mdlm"`` and ``"bd3"``. Default: the tokenizer's or the judge's.
        truncate: Score only the first ``truncate`` tokens of a sample, as MDLM's evaluation does at the model length.
            Default: None, for whole samples.
        pad_eos: For parity with MDLM and DUO, which pad the samples of a call to the longest with EOS and count the
            first pad as an EOS that the sample should have ended with. The length of one sample then changes the NLL
            of the others. Default: False.
        drop_remainder: For parity with the published code, which drops the last n mod ``batch_size`` samples of each
            call. Default: False.

    Raises:
        TokenDriftError: If an option is out of range, or the protocol needs an EOS and none is known.

    Source: MDLM ``compute_generative_perplexity``; DUO, SEDD, SDTT and BD3-LM as in `protocols`.

    >>> uniform = lambda ids, attention_mask: torch.zeros(*ids.shape, 10)
    >>> metric = GenerativePerplexity(uniform, protocol="all")
    >>> metric.update([[1, 2, 3], [4, 5]])
    >>> result = metric.compute()
    >>> round(result.perplexity, 4), result.tokens, result.samples
    (10.0, 3, 2)
    """

    def __init__(
        self,
        judge: object = DEFAULT_JUDGE,
        tokenizer: Any = None,
        *,
        protocol: str = "mdlm",
        max_length: int | None = None,
        batch_size: int = 8,
        stride: int | None = None,
        device: torch.device | str | None = None,
        precision: str | None = None,
        revision: str | None = None,
        eos_id: int | None = None,
        truncate: int | None = None,
        pad_eos: bool = False,
        drop_remainder: bool = False,
    ) -> None:
        check_choice("protocol", protocol, PROTOCOLS)
        self.batch_size = check_count("batch_size", batch_size, least=1)
        self.truncate = truncate if truncate is None else check_count("truncate", truncate, least=2)
        self.judge = Judge(judge, tokenizer, device=device, precision=precision, revision=revision)
        self.protocol, self.pad_eos, self.drop_remainder = protocol, pad_eos, drop_remainder
        self.max_length = _window(max_length, self.judge.window)
        if stride is not None and protocol not in SLIDING:
            raise fail(f"stride is for the protocols {', '.join(SLIDING)}, not for {protocol!r}.", stride=stride)
        self.stride = stride if protocol not in SLIDING or stride is not None else max(1, self.max_length // 2)
        start = self.judge.start_id
        self._start = torch.tensor([] if start is None else [start], dtype=torch.int64)  # before every window
        self._windows(self.max_length)  # refuses a bad stride now, not after sampling
        self.eos_id = self._end_of_text(eos_id)
        self.reset()

    def update(
        self,
        samples: SampleInput,
        *,
        attention_mask: Tensor | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Score samples and accumulate what each of them contributes.

        Args:
            samples: Texts; or ids of the judge's vocabulary, int64 (n, L) or a list of sequences, then nothing
                is tokenised; or a `SampleSet`, of which the texts are read if it has them.
            attention_mask: With ids (n, L): 0 on padding, at either end. Padding is never scored. Default: None.
            progress: Called after each forward call with the number of windows that it scored; a sample is one
                window unless it is longer than ``max_length``. Default: None.

        Raises:
            TokenDriftError: For no samples, a sample of fewer than 2 tokens, ids outside the judge's vocabulary.
        """
        self._scored.append(self._score(samples, attention_mask, progress))

    def compute(self) -> PerplexityResult:
        """Return Gen.-PPL over all samples since the start or the last `reset`, on all ranks.

        With several processes every rank must call this method, and each gets the result over the samples of all
        ranks, those of rank 0 first. A rank may have no samples.

        Raises:
            TokenDriftError: If nothing was scored, the protocol counts no token of it, or ranks differ in
                protocol or precision.
        """
        parts = list(self._scored)
        if rank_count() > 1:
            gathered: list[Any] = [None] * rank_count()
            distributed.all_gather_object(gathered, parts)
            parts = [part for rank in gathered for part in rank]
        if not parts:
            raise fail("there are no samples to compute a result from.", "Call update(samples) first.")
        conventions = {(part.protocol, part.precision) for part in parts}
        if len(conventions) > 1:
            shown = ", ".join(sorted(f"{protocol} in {precision}" for protocol, precision in conventions))
            raise fail(f"the ranks used different options: {shown}.", "Build the same evaluator on every rank.")
        contributions = [part[-4:] for part in parts]
        sizes = (None if any(x is None for x in each) else torch.cat(each) for each in zip(*contributions, strict=True))
        return self._counted(self._result(parts[0].precision, *sizes))  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forget all samples."""
        self._scored: list[PerplexityResult] = []

    def score(
        self,
        samples: SampleInput,
        *,
        attention_mask: Tensor | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> PerplexityResult:
        """Return Gen.-PPL of these samples alone; arguments as for `update`, whose state it leaves as it is."""
        return self._counted(self._score(samples, attention_mask, progress))

    def _score(
        self, samples: SampleInput, attention_mask: Tensor | None, progress: Callable[[int], object] | None
    ) -> PerplexityResult:
        sequences, read = self._prepare(samples, attention_mask)
        pieces = [(owner, window) for owner, ids in enumerate(read) for window in self._windows(len(ids))]
        nll = torch.zeros(len(sequences), dtype=torch.float64)
        tokens = torch.zeros(len(sequences), dtype=torch.int64)
        precision = ""
        with evaluation_mode(self.judge.model):
            for batch in self._batches(pieces):
                owners = torch.tensor([owner for owner, _ in batch])
                ids, mask, counted = self._collate(read, batch)
                each, precision = self.judge.token_nll(ids, mask)
                nll.index_add_(0, owners, torch.where(counted, each, 0).sum(dim=1))
                tokens.index_add_(0, owners, counted.sum(dim=1))
                if progress is not None:
                    progress(len(batch))
        scored = self._result(precision, nll, tokens)
        whole = self.truncate is None and len(sequences) == len(samples)
        if isinstance(samples, SampleSet):
            return scored.with_sizes(samples.texts, samples.ids) if whole else scored
        if isinstance(samples[0], str):
            return scored.with_sizes([str(text) for text in samples], None) if whole else scored
        return scored.with_sizes(None, sequences)

    def sample_losses(self, samples: SampleInput) -> Iterator[tuple[int, Tensor, int]]:
        """Yield the index of a sample, the summed NLL of its counted tokens, and their number, for each of its windows.

        A window is read alone, when it is asked for. The NLL is a scalar, differentiable if gradients are switched on.

        Args:
            samples: As for `update`.
        """
        _, read = self._prepare(samples, None)
        for owner, sequence in enumerate(read):
            for window in self._windows(len(sequence)):
                ids, mask, counted = self._collate(read, [(owner, window)])
                each, _ = self.judge.token_nll(ids, mask)
                yield owner, torch.where(counted, each, 0).sum(), int(counted.sum())

    def _windows(self, length: int) -> list[Window]:
        """Return the windows of a sample, in which a start token is not counted but takes room."""
        first = 1 - len(self._start)
        return plan_windows(length, self.max_length - len(self._start), self.stride, first=first)

    def _batches(self, pieces: list[tuple[int, Window]]) -> Iterator[list[tuple[int, Window]]]:
        """Yield windows of like length together: hardly any padding, and no dependence on the order given.

        The longest come first, so that what does not fit into memory shows at once.
        """
        pieces = sorted(pieces, key=lambda piece: piece[1].start - piece[1].end)
        first = 0
        while first < len(pieces):
            longest = len(self._start) + pieces[first][1].end - pieces[first][1].start
            count = max(1, self.batch_size * min(self.max_length, USUAL_LENGTH) // longest)
            yield pieces[first : first + count]
            first += count

    def _prepare(self, samples: SampleInput, attention_mask: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return the ids of each sample, cut or dropped as the options ask, and what the judge reads after its start.

        A start token that a sample has already is not read twice.
        """
        sequences, width = id_sequences(samples, attention_mask, self.judge.tokenizer)
        if self.truncate is not None:
            sequences, width = [ids[: self.truncate] for ids in sequences], min(width, self.truncate)
        if self.drop_remainder:
            sequences = sequences[: len(sequences) - len(sequences) % min(self.batch_size, len(sequences))]
        for i, ids in enumerate(sequences):
            if len(ids) < 2:
                raise fail(
                    f"sample {i} has {len(ids)} token{'' if len(ids) else 's'}; the judge predicts each token from "
                    "those before it, so a sample needs at least 2.",
                    "Leave such samples out and report how many there were.",
                )
        closed = sequences
        if self.pad_eos and self.protocol == "mdlm":
            closing = torch.tensor([self.eos_id])
            closed = [torch.cat([ids, closing]) if len(ids) < width else ids for ids in sequences]
        read = [ids[1:] if torch.equal(ids[:1], self._start) else ids for ids in closed]
        for i, ids in enumerate(read):
            if self.protocol in WHOLE and len(self._start) + len(ids) > self.max_length:
                raise fail(
                    f"sample {i} has {len(ids)} tokens, but protocol {self.protocol!r} scores each sample as a whole "
                    f"and the judge accepts max_length = {self.max_length}.",
                    "Pass protocol='all', which uses sliding windows for long samples, or truncate=max_length.",
                )
        check_range(torch.cat(sequences), self.judge.vocab_size)
        return sequences, read

    def _collate(self, sequences: list[Tensor], batch: Sequence[tuple[int, Window]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, attention mask and counted targets (B, L) of windows, padded on the right."""
        parts = [torch.cat([self._start, sequences[owner][window.start : window.end]]) for owner, window in batch]
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        position = torch.arange(ids.shape[1])
        real = position < torch.tensor([len(part) for part in parts])[:, None]
        first = torch.tensor([len(self._start) + window.first - window.start for _, window in batch])
        fresh = position >= first[:, None]
        return ids, real.long(), scored_targets(ids, self.protocol, self.eos_id) & real & fresh

    def _result(self, precision: str, nll: Tensor, tokens: Tensor, *sizes: Tensor | None) -> PerplexityResult:
        log = float(log_perplexity(nll, tokens, self.protocol))
        perplexity = math.exp(log) if log < 709 else math.inf
        made = len(nll), self.protocol, precision, self.judge.name, self.judge.revision
        return PerplexityResult(perplexity, float(nll.sum()), int(tokens.sum()), *made, nll, tokens, *sizes)

    def _counted(self, result: PerplexityResult) -> PerplexityResult:
        """Return a result if it counts a token. A batch may count none, but not all of them together."""
        if result.tokens == 0:
            raise fail(
                f"protocol {self.protocol!r} counts no token of these {result.samples} samples: they consist of "
                "end-of-text tokens only.",
                "Look at the samples.",
            )
        return result

    def _end_of_text(self, eos_id: int | None) -> int | None:
        """Return the EOS that the protocol needs, None if it needs none."""
        if self.protocol not in NEED_EOS:
            return None
        found = eos_id if eos_id is not None else self.judge.eos_id
        if found is None:
            raise fail(
                f"protocol {self.protocol!r} treats end-of-text tokens specially, and neither the tokenizer nor the "
                "judge states their id.",
                "Pass eos_id, or protocol='all', which counts every token.",
            )
        size = self.judge.vocab_size
        if found < 0 or (size is not None and found >= size):
            raise fail(
                f"eos_id is {found}, which is not in the judge's vocabulary of V = {size}.",
                "Pass the id that the judge's tokenizer gives to the end of text.",
            )
        return found


def generative_perplexity(
    samples: SampleInput,
    judge: object = DEFAULT_JUDGE,
    tokenizer: Any = None,
    *,
    attention_mask: Tensor | None = None,
    protocol: str = "mdlm",
    max_length: int | None = None,
    batch_size: int = 8,
    stride: int | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    revision: str | None = None,
    eos_id: int | None = None,
    truncate: int | None = None,
    pad_eos: bool = False,
    drop_remainder: bool = False,
    progress: Callable[[int], object] | None = None,
) -> PerplexityResult:
    """Return Gen.-PPL of samples in one call.

    Args:
        samples: Texts, or ids of the judge's vocabulary.
        attention_mask: With ids (n, L): 0 on padding. Default: None.
        progress: Called with the number of windows after each forward call. Default: None.
        judge, tokenizer, protocol, max_length, batch_size, stride, device, precision, revision, eos_id, truncate,
            pad_eos, drop_remainder: As for `GenerativePerplexity`, with its defaults.

    >>> uniform = lambda ids, attention_mask: torch.zeros(*ids.shape, 10)
    >>> round(generative_perplexity(torch.tensor([[1, 2, 3]]), uniform, protocol="sdtt").perplexity, 4)
    10.0
    """
    metric = GenerativePerplexity(
        judge, tokenizer, protocol=protocol, max_length=max_length, batch_size=batch_size, stride=stride,
        device=device, precision=precision, revision=revision, eos_id=eos_id, truncate=truncate,
        pad_eos=pad_eos, drop_remainder=drop_remainder,
    )  # fmt: skip
    return metric.score(samples, attention_mask=attention_mask, progress=progress)


def _window(max_length: int | None, window: int | None) -> int:
    """Return the tokens read at once: as asked, within what the judge knows."""
    if max_length is None:
        return window if window is not None else 1024
    check_count("max_length", max_length, least=2)
    if window is not None and max_length > window:
        raise fail(f"max_length is {max_length}, but the judge has {window} positions.", "Longer samples are split.")
    return max_length
