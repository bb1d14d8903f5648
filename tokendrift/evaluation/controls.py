"""Controls: sets made from real text alone, without a model, which show what each figure can be deceived by.

Measured beside samples, a control tells how much of a figure is bought by word frequencies, by pairs of neighbours, by
whole sentences in any order, or by repeating one true passage. A sampler that does not surpass the controls in a figure
has shown nothing by it.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from typing import Any

from tokendrift._checks import fail
from tokendrift.models.tokenizer import decode, encode
from tokendrift.sampling import SampleSet

ORDER = 3  # of the n-gram draws
LEAST = 3  # times that a context must occur, or a shorter one is taken: rarer contexts would copy real text
MOST_TOKENS = 1 << 21  # of real text, from which the controls are made
PASSAGES = 8  # how often the tiled control says its passage


def control_sets(
    text: str, tokenizer: Any, *, count: int, length: int, seed: int = 0, with_ids: bool = True
) -> dict[str, SampleSet]:
    """Return sets of samples made from real text alone, by name.

    * ``"unigram draws"``: tokens drawn independently, each as often as real text has it.
    * ``"3-gram draws"``: each token drawn among those that follow the last two in real text, or the last one if the
      two are rare.
    * ``"shuffled sentences"``: the sentences of real text in random order.
    * ``"tiled text"``: a short passage of real text repeated.

    Args:
        text: Real text.
        tokenizer: Encodes and decodes it.
        count: Samples of each set.
        length: Tokens of each sample.
        seed: Random seed. Default: 0.
        with_ids: Whether the sets have ids beside texts, as samples of a denoiser do. Default: True.

    Raises:
        TokenDriftError: If the text has fewer tokens than one sample.
    """
    generator = random.Random(seed)
    (stream,) = encode(tokenizer, [text])
    stream = stream[:MOST_TOKENS]
    if len(stream) < length:
        raise fail(f"real text has {len(stream)} tokens, fewer than a sample of {length}.", "Pass more text.")
    sentences = re.split(r"(?<=[.!?])\s+", text)
    generator.shuffle(sentences)
    (shuffled,) = encode(tokenizer, [" ".join(sentences)])
    windows = range(min(count, len(shuffled) // length))
    passage = -(-length // PASSAGES)
    starts = [generator.randrange(len(stream) - passage + 1) for _ in range(count)]
    found = {
        "unigram draws": [generator.choices(stream, k=length) for _ in range(count)],
        f"{ORDER}-gram draws": _ngram_draws(stream, count, length, generator),
        "shuffled sentences": [shuffled[i * length : (i + 1) * length] for i in windows],
        "tiled text": [(stream[start : start + passage] * PASSAGES)[:length] for start in starts],
    }
    return {
        name: SampleSet(ids=rows if with_ids else None, texts=decode(tokenizer, rows), metadata={"control": True})
        for name, rows in found.items()
    }


def _ngram_draws(stream: list[int], count: int, length: int, generator: random.Random) -> list[list[int]]:
    """Return draws from the n-gram model of a stream, which backs off to shorter contexts where one is rare."""
    followers: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, token in enumerate(stream):
        for size in range(min(ORDER, i + 1)):
            followers[tuple(stream[i - size : i])].append(token)
    rows = []
    for _ in range(count):
        row: list[int] = []
        while len(row) < length:
            contexts = (tuple(row[len(row) - size :]) for size in range(min(ORDER - 1, len(row)), -1, -1))
            row.append(generator.choice(next(f for c in contexts if len(f := followers.get(c, [])) >= LEAST or not c)))
        rows.append(row)
    return rows
