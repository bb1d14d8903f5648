"""Where samples and real text come from: files, and checkpoints sampled at several NFE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokendrift._checks import fail
from tokendrift.evaluation.files import has_header, read_samples
from tokendrift.evaluation.samples import SampleSet, decode, id_sequences, tokenize
from tokendrift.files import read_text


class Source(NamedTuple):
    """One set of samples.

    Attributes:
        model: What the set is called; sets of one name and several NFE make one line of a plot.
        samples: The set.
        origin: File or checkpoint.
    """

    model: str
    samples: SampleSet
    origin: str

    @property
    def steps(self) -> int | None:
        """Steps of the sampler, as the file says, else its NFE: rows in which nothing moved cost fewer calls."""
        said = self.samples.metadata.get("steps")
        return said if isinstance(said, int) else self.samples.nfe


def named(argument: str) -> tuple[str, str]:
    """Return name and place of ``NAME=PLACE`` or ``PLACE``, whose name is then the last part without its ending.

    >>> named("base=runs/base-4.jsonl"), named("runs/base-4.jsonl")
    (('base', 'runs/base-4.jsonl'), ('base-4', 'runs/base-4.jsonl'))
    """
    name, equals, place = argument.partition("=")
    if equals and name.strip() and place and not Path(argument).exists():
        return name.strip(), place
    path = Path(argument)
    return (path.stem if path.suffix in {".jsonl", ".json", ".txt", ".safetensors", ".ckpt"} else path.name), argument


def read_sources(arguments: Sequence[str], *, skip_bad: bool = False) -> list[Source]:
    """Return the sets of samples files, ``PLACE`` or ``NAME=PLACE`` each."""
    places = map(named, arguments)
    return [Source(name, read_samples(place, skip_bad=skip_bad), place) for name, place in places]


def sample_checkpoints(
    checkpoints: Sequence[str],
    nfes: Sequence[int],
    folder: Path,
    *,
    progress: Callable[[str], object] = lambda stage: None,
    **options: Any,
) -> Iterator[Source]:
    """Sample each checkpoint at each NFE into a file of the folder, and yield the sets.

    Files that are there from an earlier run with the same settings are used, unfinished ones gone on with.

    Args:
        checkpoints: ``PLACE`` or ``NAME=PLACE`` each.
        nfes: Function evaluations, one set for each.
        folder: For the files.
        progress: Called with what is being sampled.
        **options: Of `tokendrift.sampling.to_file.SampleConfig`.

    Raises:
        TokenDriftError: As for `tokendrift.sampling.to_file.sample_to_file`.
    """
    from tokendrift.sampling.to_file import SampleConfig, sample_to_file

    for name, place in map(named, checkpoints):
        for nfe in nfes:
            progress(f"sampling {name} at {nfe} NFE")
            path = folder / f"{name.replace('/', '-')}-{nfe}.jsonl"
            try:
                sample_to_file(SampleConfig(place, steps=nfe, **options), path)
            except OSError as error:
                raise fail(
                    f"{path} could not be written: {error.strerror}.", "Free some space, or keep elsewhere."
                ) from None
            yield Source(name, read_samples(path), place)


def labels(sources: Sequence[Source]) -> list[str]:
    """Return a name for each set: that of its model, with its NFE where a model has several sets.

    Sets of one NFE are told apart by their steps: with more steps than tokens, rows hardly need more calls.

    Raises:
        TokenDriftError: If two sets have one name, one NFE and as many steps.
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
    for label in found:
        if found.count(label) > 1:
            places = ", ".join(source.origin for source, own in zip(sources, found, strict=True) if own == label)
            raise fail(f"two sets of samples are called {label!r}: {places}.", "Name them: NAME=FILE.")
    return found


def common_tokenizer(sources: Sequence[Source], name: str | None) -> Any:
    """Return the denoisers' tokenizer: the one named, or that which all files of ids name and which can be read.

    Two places are one tokenizer where what lies there is the same: every checkpoint folder has a copy of its own.

    Raises:
        TokenDriftError: If the one named cannot be read, files name tokenizers that differ, or ids without texts come
            without a tokenizer.
    """
    from tokendrift.models.tokenizer import load_tokenizer

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
            if _content(other) != _content(tokenizer):
                raise fail(
                    f"the tokenizers of {own[first].origin} and {own[place].origin} differ: {first}, {place}. Ids of "
                    "two vocabularies do not compare.",
                    'Evaluate them apart, or as texts: without "ids", samples are counted in the judge\'s tokens.',
                )
    for source in sources:
        if source.samples.texts is None and tokenizer is None:
            raise fail(
                f"{source.origin} has ids without texts, and no tokenizer that decodes them is known.",
                "Name the denoiser's: --tokenizer tokenizer.json, a folder, or a hub name.",
            )
    return tokenizer


def _content(tokenizer: Any) -> str:
    """Return all that makes a tokenizer, so that copies are equal wherever they lie."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        return str(backend.to_str())
    return repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))


def read_some_text(path: str) -> str:
    """Return the content of a UTF-8 text file that is not empty.

    Raises:
        TokenDriftError: If it cannot be read, or holds no text.
    """
    text = read_text(path, argument="text file")
    if not text.strip():
        raise fail(f"text file {path} is empty.", "Pass a file with text.")
    return text


def read_real(path: str, *, skip_bad: bool = False) -> SampleSet | str:
    """Return real text: the samples of a file that has them by line, or any other's text whole, for `real_windows`."""
    if Path(path).suffix == ".jsonl":
        return read_samples(path, skip_bad=skip_bad)
    text = read_some_text(path)
    return read_samples(path, skip_bad=skip_bad) if has_header(text) else text


def real_windows(text: str, sources: Sequence[Source], tokenizer: Any, judge_tokenizer: Any) -> SampleSet:
    """Return disjoint windows of a text, spread evenly over it: as many as the largest set has, as long as its longest.

    Windows are cut in the ids as generated where every set has them and the tokenizer is known, else in the judge's.

    Args:
        text: Real text.
        sources: The sets it will stand beside.
        tokenizer: The denoisers', None if it is not known.
        judge_tokenizer: The judge's.

    Raises:
        TokenDriftError: If the text is too short for two windows, or needs a tokenizer that is missing.
    """
    as_generated = tokenizer is not None and all(source.samples.ids is not None for source in sources)
    own = tokenizer if as_generated else judge_tokenizer
    count = max(len(source.samples) for source in sources)
    width = 2
    for source in sources:
        sequences = source.samples.ids if as_generated else id_sequences(source.samples.scored(), None, own)[0]
        width = max(width, *map(len, sequences or []))
    rows = windows(tokenize(own, [text])[0], width, count)
    if len(rows) < 2:
        raise fail(f"real text is too short for two windows of {width} tokens, the longest sample.", "Pass more text.")
    return SampleSet(ids=rows if as_generated else None, texts=decode(own, rows))


def windows(stream: list[int], width: int, count: int) -> list[list[int]]:
    """Return disjoint windows of one width, spread evenly over a stream of ids: so many, or as many as it holds.

    >>> windows([0, 1, 2, 3, 4, 5, 6], 3, 2)
    [[0, 1, 2], [4, 5, 6]]
    """
    count = min(count, len(stream) // width)
    step = (len(stream) - width) // max(1, count - 1)
    return [stream[i * step : i * step + width] for i in range(count)]
