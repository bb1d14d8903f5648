"""Samples and real text from files, with a name for each set and the tokenizer that all sets share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokendrift._checks import fail, warn_user
from tokendrift.evaluation.controls import control_sets
from tokendrift.evaluation.measures import texts_of
from tokendrift.evaluation.sample_reader import has_header, read_samples
from tokendrift.evaluation.samples import id_sequences
from tokendrift.files import file_kind
from tokendrift.models.tokenizer import UNKNOWN, decode, encode, load_tokenizer, same_tokenizer, vocabulary_size
from tokendrift.sampling import SampleSet
from tokendrift.text_files import JSON_KINDS, read_documents

REAL = "real text"  # its name in reports, which no set of samples may have


class NamedSamples(NamedTuple):
    """A set of samples with its name and where it came from.

    Attributes:
        model: Name of the model. Sets of the same model at several NFE make one line of a plot.
        samples: The set.
        origin: File or checkpoint of the set.
    """

    model: str
    samples: SampleSet
    origin: str

    @property
    def control(self) -> bool:
        """Whether the set was made from real text alone, see `tokendrift.evaluation.controls`."""
        return bool(self.samples.metadata.get("control"))

    @property
    def steps(self) -> int | None:
        """Steps of the sampler if the file names them, else NFE, which is lower if some steps needed no call."""
        steps = self.samples.metadata.get("steps")
        return steps if isinstance(steps, int) else self.samples.nfe


def split_name(argument: str) -> tuple[str, str]:
    """Return name and path of ``NAME=PATH``, or of ``PATH``: its last part without the file ending is then the name.

    >>> split_name("base=runs/base-4.jsonl"), split_name("runs/base-4.jsonl")
    (('base', 'runs/base-4.jsonl'), ('base-4', 'runs/base-4.jsonl'))
    """
    name, equals, path_named = argument.partition("=")
    if equals and name.strip() and path_named and not Path(argument).exists():
        return name.strip(), path_named
    path = Path(argument)
    known = file_kind(path) in {*JSON_KINDS, ".txt", ".safetensors", ".ckpt"}
    unpacked = path.name[:-3] if path.suffix.lower() == ".gz" else path.name
    return (Path(unpacked).stem if known else path.name), argument


def read_sources(arguments: Sequence[str], *, skip_bad: bool = False, lines: bool = False) -> list[NamedSamples]:
    """Return the sets of samples files, ``PATH`` or ``NAME=PATH`` each; options as in `read_samples`."""
    return [
        NamedSamples(name, read_samples(path, skip_bad=skip_bad, lines=lines), path)
        for name, path in map(split_name, arguments)
    ]


def unique_names(sources: Sequence[NamedSamples]) -> list[str]:
    """Return a name for each set: the name of its model, with the NFE if there are several sets of that model.

    Sets of a model with equal NFE are named by their steps as well: with more steps than tokens, more steps hardly
    need more calls.

    Raises:
        TokenDriftError: If two sets have the same name, NFE and number of steps, or one is called as real text is.
    """
    models = [source.model for source in sources]
    found = [
        source.model if models.count(source.model) == 1 else f"{source.model}, {source.samples.nfe} NFE"
        for source in sources
    ]
    found = [
        f"{label} of {source.steps} steps" if found.count(label) > 1 and source.steps != source.samples.nfe else label
        for label, source in zip(found, sources, strict=True)
    ]
    if REAL in found:
        raise fail(f"a set of samples is called {REAL!r}, as real text is.", "Give it another name: NAME=FILE.")
    for label in found:
        if found.count(label) > 1:
            places = ", ".join(source.origin for source, own in zip(sources, found, strict=True) if own == label)
            raise fail(f"two sets of samples are called {label!r}: {places}.", "Give them different names: NAME=FILE.")
    return found


def common_tokenizer(sources: Sequence[NamedSamples], name: str | None) -> Any:
    """Return the tokenizer that all sets of ids share, None if it is not known.

    Every checkpoint folder has its own copy of a tokenizer; copies with the same content count as one tokenizer.

    Args:
        sources: The sets. The metadata of a samples file names the tokenizer of its ids.
        name: Tokenizer to load instead: a ``tokenizer.json``, a folder or a hub name.

    Raises:
        TokenDriftError: If ``name`` cannot be read, if the sets have different tokenizers, or if a set has ids without
            texts and no tokenizer is known.
    """
    if name is not None:
        return load_tokenizer(name)
    own = {source.samples.metadata.get("tokenizer"): source for source in sources if source.samples.ids is not None}
    try:
        found = {place: load_tokenizer(place, fetch=False) for place in own if isinstance(place, str)}
    except ValueError:  # made on another machine; texts are then counted in the judge's tokens
        found = {}
    tokenizer = None
    if found and len(found) == len(own):
        (first, tokenizer), *others = found.items()
        for place, other in others:
            if not same_tokenizer(other, tokenizer):
                raise fail(
                    f"the tokenizers of {own[first].origin} and {own[place].origin} differ: {first}, {place}. Ids of "
                    "two vocabularies cannot be compared.",
                    'Evaluate them apart, or as texts: without "ids", samples are counted in the judge\'s tokens.',
                )
    for source in sources:
        if source.samples.texts is None and tokenizer is None:
            raise fail(
                f"{source.origin} has ids without texts, and no tokenizer that decodes them is known.",
                "Pass the denoiser's with --tokenizer: a tokenizer.json, a folder, or a hub id.",
            )
    return tokenizer


def warn_of_unknown_ids(sources: Sequence[NamedSamples], tokenizer: Any) -> None:
    """Warn of ids that the tokenizer of the samples does not have, which count as tokens of their own."""
    size = float("inf") if tokenizer is None else vocabulary_size(tokenizer)
    for source in sources:
        ids = source.samples.ids or []
        unknown = sum(token >= size for row in ids for token in row)
        if unknown:
            warn_user(
                f"{unknown} of {sum(map(len, ids))} ids of {source.origin} are not in the vocabulary of the tokenizer, "
                f"which has {size} entries. Every figure counts them, and texts that have to be decoded show them as "
                f"{UNKNOWN!r}."
            )


def read_real(path: str, *, skip_bad: bool = False) -> SampleSet | str:
    """Return the samples of JSON that are not blank, or the text of any other file, which `real_windows` cuts."""
    if file_kind(path) not in JSON_KINDS:
        (text,) = read_documents(path)
        if not has_header(text):
            return text
    return read_samples(path, skip_bad=skip_bad, skip_blank=True)


def read_controls(
    real: SampleSet | str, real_set: SampleSet, tokenizer: Any, judge_tokenizer: Any, *, seed: int
) -> list[NamedSamples]:
    """Return the controls, as many samples of each as of real text, as long as the longest of them.

    Args:
        real: Real text as it was read.
        real_set: The samples of real text.
        tokenizer: Tokenizer of the denoisers, None if it is not known.
        judge_tokenizer: Tokenizer of the judge, in whose tokens the controls are drawn if samples have no ids.
        seed: Random seed.
    """
    own = tokenizer if real_set.ids is not None else judge_tokenizer
    texts = texts_of(real_set, own) or []
    text = real if isinstance(real, str) else "\n\n".join(texts)
    rows = real_set.ids if real_set.ids is not None else encode(own, texts)
    size: dict[str, Any] = {"count": len(rows), "length": max(map(len, rows))}
    found = control_sets(text, own, **size, seed=seed, with_ids=real_set.ids is not None)
    return [NamedSamples(f"control: {name}", samples, "real text") for name, samples in found.items()]


def real_windows(text: str, sources: Sequence[NamedSamples], tokenizer: Any, judge_tokenizer: Any) -> SampleSet:
    """Return disjoint windows of a text, spread evenly over it.

    There are as many windows as samples in the largest set, and they are as long as the longest sample. They are cut
    in tokens of the denoisers if every set has ids and the tokenizer is known, else in tokens of the judge.

    Args:
        text: Real text.
        sources: The sets to compare with it.
        tokenizer: Tokenizer of the denoisers, None if it is not known.
        judge_tokenizer: Tokenizer of the judge.

    Raises:
        TokenDriftError: If the text is too short for two windows, or needs a tokenizer that is missing.
    """
    as_generated = tokenizer is not None and all(source.samples.ids is not None for source in sources)
    own = tokenizer if as_generated else judge_tokenizer
    count = max(len(source.samples) for source in sources)
    if count < 2:
        raise fail(
            f"every set has {count} sample, and intervals need at least two.",
            "Draw more samples; a file of running text has one sample a paragraph.",
            origins=[source.origin for source in sources],
        )
    width = 2
    for source in sources:
        sequences = source.samples.ids if as_generated else id_sequences(source.samples.scored(), None, own)[0]
        width = max(width, *map(len, sequences or []))
    rows = evenly_spaced_windows(encode(own, [text])[0], width, count)
    if len(rows) < 2:
        raise fail(f"real text is too short for two windows of {width} tokens, the longest sample.", "Pass more text.")
    return SampleSet(ids=rows if as_generated else None, texts=decode(own, rows))


def evenly_spaced_windows(stream: list[int], width: int, count: int) -> list[list[int]]:
    """Return ``count`` disjoint windows of one width, spread evenly over a stream of ids, or as many as it holds.

    >>> evenly_spaced_windows([0, 1, 2, 3, 4, 5, 6], 3, 2)
    [[0, 1, 2], [4, 5, 6]]
    """
    count = min(count, len(stream) // width)
    step = (len(stream) - width) // max(1, count - 1)
    return [stream[i * step : i * step + width] for i in range(count)]
