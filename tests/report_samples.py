"""A report over samples made here, which the tests of the page and those of the browser share."""

from __future__ import annotations

import torch

from tokendrift.evaluation import GenerativePerplexity, SampleSet, evaluate
from tokendrift.evaluation.report import EvaluationReport
from tokendrift.evaluation.report.sources import NamedSamples, unique_names

EVIL = "<script>alert(1)</script></li></ol><img src=x onerror=alert(2)> & \"'{{ 7 * 7 }}"
LITTLE_WORDS = (261, 293, 289, 258, 284, 290)  # " the", " of", " is", " a", " in", " to"
EVIL_NAME = '_<b onclick="x()">$\\frac{a</b>'


def language(count, *, dull=False, length=24, seed=0):
    """Return ids over the demo's vocabulary; dull ones are six little words."""
    tokens = torch.tensor(LITTLE_WORDS if dull else range(300, 900))
    generator = torch.Generator().manual_seed(seed)
    return tokens[torch.randint(len(tokens), (count, length), generator=generator)].tolist()


def make_report(tokenizer, sets, real=None):
    """Evaluate sets of (model, SampleSet) under a judge that finds low ids likely."""
    judge = GenerativePerplexity(
        lambda ids, mask: (-torch.arange(1024) / 200).expand(*ids.shape, 1024), tokenizer, protocol="all"
    )
    sources = [NamedSamples(model, samples, f"{model}.jsonl") for model, samples in sets]
    keys = unique_names(sources)
    real = language(20, seed=9) if real is None else real
    evaluation = evaluate(
        {key: source.samples for key, source in zip(keys, sources, strict=True)},
        judge,
        real=SampleSet(ids=real, texts=tokenizer.decode_batch(real)),
        tokenizer=tokenizer,
        resamples=200,
    )
    texts = {key: source.samples.texts for key, source in zip(keys, sources, strict=True)}
    texts["real text"] = tokenizer.decode_batch(real)
    return EvaluationReport(evaluation, tuple(sources), texts, {"judge": "low ids", "nfe": (4, 8)})


def as_samples(tokenizer, ids, **more):
    return SampleSet(ids=ids, texts=tokenizer.decode_batch(ids), **more)


def hostile_report(tokenizer):
    """Return a report of two models at two NFE, one of them dull, one with a name and a text that try to break out."""
    evil = as_samples(tokenizer, language(20, seed=3), nfe=4)
    return make_report(
        tokenizer,
        [
            (EVIL_NAME, SampleSet(ids=evil.ids, texts=[EVIL, *evil.texts[1:]], nfe=4)),
            (EVIL_NAME, as_samples(tokenizer, language(20, seed=4), nfe=8)),
            ("dull", as_samples(tokenizer, language(20, dull=True), nfe=4)),
            ("dull", as_samples(tokenizer, language(20, dull=True, seed=5), nfe=8)),
        ],
    )
