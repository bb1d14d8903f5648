"""One rank of the tests of laws of pairs across processes, which test_pairs.py starts."""

from __future__ import annotations

import itertools

import torch
from torch import distributed

from tokendrift import PairDriftLoss, TokenDriftError, pairs

V, L = 5, 6
SPLITS = {"even": (3, 3), "uneven": (4, 2)}


def calls(rank, ranks, split, padded, buckets):
    """Ask three times at two strata; return losses, gradients and laws."""
    generator = torch.Generator().manual_seed(0)
    loss = PairDriftLoss(V, lags=(1, 3), buckets=buckets, strata=2, decay=0.5).double()
    table = torch.randn(V, V, generator=generator, dtype=torch.float64).requires_grad_()
    first = 0 if ranks == 1 else sum(split[:rank])
    mine = slice(0, sum(split)) if ranks == 1 else slice(first, first + split[rank])
    found = {"loss": [], "gradient": []}
    for stratum in (0, 1, 0):
        clean, noisy = torch.randint(V, (2, sum(split), L), generator=generator)
        text = torch.arange(L) < torch.randint(2, L + 1, (sum(split), 1), generator=generator)
        value = loss(table[noisy[mine]], clean[mine], attention_mask=text[mine] if padded else None, stratum=stratum)
        found["loss"].append(value.detach())
        found["gradient"] += torch.autograd.grad(value, table)
    return {name: torch.stack(values) for name, values in found.items()} | loss.state_dict()


def fail(rank, *, blind=False):
    """Call with a bad batch, and then with another stratum, on rank 0; return what was said, and the laws.

    Where ``blind``, numbers cannot be looked at, as on an accelerator.
    """
    loss, said, look = PairDriftLoss(V, strata=2), [], pairs.can_be_read
    pairs.can_be_read = lambda values: not blind and look(values)
    for bad, stratum in ((True, 0), (False, 0), (False, 1)):
        clean = torch.full((2, L), 1 + 98 * (bad and rank == 0))
        try:
            said.append(float(loss(torch.zeros(2, L, V), clean, stratum=stratum if rank == 0 else 0)))
        except TokenDriftError as error:
            said.append(str(error))
    pairs.can_be_read = look
    return said, loss.generated_weight, loss.real


def main(rank, ranks, store):
    if ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    cases = itertools.product(SPLITS, (False, True), (None, 16))
    found = {case: calls(rank, ranks, SPLITS[case[0]], *case[1:]) for case in cases}
    if ranks > 1:
        found |= {"failures": fail(rank), "blind": fail(rank, blind=True)}
    if ranks > 1:
        distributed.destroy_process_group()
    return found
