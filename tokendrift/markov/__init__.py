"""A small language whose law is known, to measure few-step generation without a judge.

`MarkovLanguage` makes real text; a denoiser learns it in minutes, or `ExactDenoiser` stands in for one that learned
it perfectly. `few_step` samples any denoiser under any process and measures what came out against the truth. Every
figure has its true value, and real text of the same size stands beside it.
"""

from tokendrift.markov.curve import FewStepResult, FewStepRow, few_step
from tokendrift.markov.language import MarkovLanguage
from tokendrift.markov.law_measures import MarkovMeasures, measure_ids, real_floor
from tokendrift.markov.oracle import ExactDenoiser

__all__ = [
    "ExactDenoiser",
    "FewStepResult",
    "FewStepRow",
    "MarkovLanguage",
    "MarkovMeasures",
    "few_step",
    "measure_ids",
    "real_floor",
]
