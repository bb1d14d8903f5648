"""Few-step generation measured without a judge: a language whose law is known, and the denoiser that knows it.

The exact denoiser makes no error of learning. What is wrong with its samples is the price of few steps alone: words
drawn in parallel from right marginals that do not fit together. Real text of the same size stands below the rows.

To measure an idea of your own, train a denoiser on ``language.batches(...)`` and pass it to ``few_step`` in place of
the exact one; a sampler of your own goes in as ``sampler=``.
"""

from __future__ import annotations

import torch
from rich.console import Console

from tokendrift.markov import ExactDenoiser, MarkovLanguage, few_step

torch.set_num_threads(1)  # at this size, threads would only wait for one another
language = MarkovLanguage.random()
console = Console(width=120)

for kind in ("masked", "uniform"):
    process = language.process(kind)
    denoiser = ExactDenoiser(language, process)
    result = few_step(language, denoiser, process, steps=(2, 4, 8), temperatures=(1.0, 0.6), samples=512)
    console.print(result.table(f"{kind} diffusion, exact denoiser"))

    by_setting = {(row.nfe, row.temperature): row.measures for row in result.rows}
    assert by_setting[2, 1.0].total_variation.low > by_setting[8, 1.0].total_variation.high, "steps bring it nearer"
    assert by_setting[2, 0.6].validity.low > by_setting[2, 1.0].validity.high, "a low temperature makes it valid ..."
    assert by_setting[2, 0.6].mode_imbalance.low > by_setting[2, 1.0].mode_imbalance.high, "... and lopsided"
    assert by_setting[2, 0.6].unigram_entropy < language.unigram_entropy - 0.2, "as its entropy shows, too"

print("ok")
