"""One rank of the tests of Gen.-PPL across processes, which test_evaluation_ranks.py starts."""

from __future__ import annotations

import torch
from torch import distributed

from tokendrift import TokenDriftError
from tokendrift.evaluation import GenerativePerplexity

V = 12
SPLITS = {"even": (3, 3), "uneven": (5, 1), "one rank empty": (0, 6)}


def judge(ids, attention_mask):
    """Judge by the last token only."""
    return torch.randn(V, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[ids]


def samples():
    """Return six samples of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (length,), generator=generator) for length in (4, 9, 2, 7, 7, 3)]


def scored(protocol, mine, *, precision=torch.float64):
    """Return the result of scoring some of the samples here, in two updates."""
    metric = GenerativePerplexity(lambda ids, mask: judge(ids, mask).to(precision), protocol=protocol, eos_id=0)
    for part in (mine[:2], mine[2:]):
        if part:
            metric.update(part)
    return metric.compute()


def main(rank, ranks, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = {}
    for name, split in SPLITS.items():
        first = sum(split[:rank])
        for protocol in ("mdlm", "sedd", "sdtt", "bd3", "all"):
            found[name, protocol] = scored(protocol, samples()[first : first + split[rank]])
    for name, run in {
        "nothing": lambda: scored("all", []),
        "protocols": lambda: scored(("all", "sdtt")[rank], samples()),
        "precisions": lambda: scored("all", samples(), precision=(torch.float64, torch.float32)[rank]),
    }.items():
        try:
            run()
        except TokenDriftError as error:
            found[name] = str(error)
    distributed.destroy_process_group()
    return found
