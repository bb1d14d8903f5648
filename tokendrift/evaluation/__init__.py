"""Evaluation of samples: Gen.-PPL in the literature's conventions, and the figures to read it with."""

import sys

from tokendrift.evaluation.bootstrap import (
    Interval,
    bootstrap_interval,
    perplexity_interval,
    perplexity_ratio_interval,
)
from tokendrift.evaluation.comparison import Comparison, compare
from tokendrift.evaluation.diversity import (
    distinct_n,
    duplicate_share,
    most_frequent_share,
    sample_entropy,
    unigram_entropy,
)
from tokendrift.evaluation.evaluator import EvaluatedSet, Evaluation, evaluate
from tokendrift.evaluation.figures import FIGURES, Figure, per_sample, register_figure
from tokendrift.evaluation.frontier import Frontier, Point, ratio_at_entropy, sweep
from tokendrift.evaluation.generative_perplexity import (
    GenerativePerplexity,
    PerplexityResult,
    generative_perplexity,
)
from tokendrift.evaluation.gradient_moment import gradient_features, gradient_moment
from tokendrift.evaluation.guard import Verdict, check_samples
from tokendrift.evaluation.matching import (
    DrawSamples,
    MatchedEntropy,
    MeasureSamples,
    at_matched_entropy,
    matched_entropy,
    temperature_at,
)
from tokendrift.evaluation.measures import Measures, measure
from tokendrift.evaluation.nelbo import nelbo_interval, sequence_nelbo, validation_nelbo
from tokendrift.evaluation.overlap import copied_share, self_bleu
from tokendrift.evaluation.panel import PanelComparison, compare_panels
from tokendrift.evaluation.repetition import longest_repeat, sample_repetition
from tokendrift.evaluation.sample_reader import read_samples
from tokendrift.evaluation.two_sample import (
    character_features,
    encoder_features,
    judge_features,
    kernel_distance,
    mauve,
)
from tokendrift.sampling import SampleSet

# The name that the module had in earlier versions.
sys.modules["tokendrift.evaluation.files"] = sys.modules["tokendrift.evaluation.sample_reader"]

__all__ = [
    "FIGURES",
    "Comparison",
    "DrawSamples",
    "EvaluatedSet",
    "Evaluation",
    "Figure",
    "Frontier",
    "GenerativePerplexity",
    "Interval",
    "MatchedEntropy",
    "MeasureSamples",
    "Measures",
    "PanelComparison",
    "PerplexityResult",
    "Point",
    "SampleSet",
    "Verdict",
    "at_matched_entropy",
    "bootstrap_interval",
    "character_features",
    "check_samples",
    "compare",
    "compare_panels",
    "copied_share",
    "distinct_n",
    "duplicate_share",
    "encoder_features",
    "evaluate",
    "generative_perplexity",
    "gradient_features",
    "gradient_moment",
    "judge_features",
    "kernel_distance",
    "longest_repeat",
    "matched_entropy",
    "mauve",
    "measure",
    "most_frequent_share",
    "nelbo_interval",
    "per_sample",
    "perplexity_interval",
    "perplexity_ratio_interval",
    "ratio_at_entropy",
    "read_samples",
    "register_figure",
    "sample_entropy",
    "sample_repetition",
    "self_bleu",
    "sequence_nelbo",
    "sweep",
    "temperature_at",
    "unigram_entropy",
    "validation_nelbo",
]
