"""Evaluation of samples: Gen.-PPL in the literature's conventions, and what has to stand beside it."""

from tokendrift.evaluation.bootstrap import (
    Interval,
    bootstrap_interval,
    perplexity_interval,
    perplexity_ratio_interval,
)
from tokendrift.evaluation.diversity import (
    distinct_n,
    duplicate_share,
    most_frequent_share,
    repetition,
    sample_entropy,
    sample_repetition,
    unigram_entropy,
)
from tokendrift.evaluation.generative_perplexity import (
    GenerativePerplexity,
    PerplexityResult,
    generative_perplexity,
)
from tokendrift.evaluation.measures import Measures, measure
from tokendrift.evaluation.protocols import PROTOCOLS

__all__ = [
    "PROTOCOLS",
    "GenerativePerplexity",
    "Interval",
    "Measures",
    "PerplexityResult",
    "bootstrap_interval",
    "distinct_n",
    "duplicate_share",
    "generative_perplexity",
    "measure",
    "most_frequent_share",
    "perplexity_interval",
    "perplexity_ratio_interval",
    "repetition",
    "sample_entropy",
    "sample_repetition",
    "unigram_entropy",
]
