"""A small language with a known distribution, to measure few-step generation without a judge.

`MarkovLanguage` generates real text, which a denoiser learns in minutes. `ExactDenoiser` is the optimal denoiser of
this language. `few_step` samples any denoiser under any process and measures the samples against the language. The true
value of every figure is known, and the same figures are measured on real text of the same size.
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
