"""One rank of the tests across processes, which test_ranks.py starts."""

from __future__ import annotations

import torch
from torch import distributed, nn

from tokendrift import DriftField, MirrorTeacherLoss, TokenDriftError, TokenDriftLoss
from tokendrift.references import gather
from tokendrift.variants import ExtendedDriftField

L, V, D = 4, 6, 5
SPLITS = {"even": (3, 3), "uneven": (4, 2), "one": (1, 5)}
LOSSES = {
    "joint": (TokenDriftLoss, {}),
    "two_sided": (TokenDriftLoss, {"field": DriftField(normalization="two_sided", kernel="laplace")}),
    "sinkhorn": (TokenDriftLoss, {"field": ExtendedDriftField((0.5,), normalization="sinkhorn", subtract_noise=True)}),
    "no_pair": (TokenDriftLoss, {"exclude_paired_positive": True}),
    "windows": (TokenDriftLoss, {}),
    "mirror": (MirrorTeacherLoss, {}),
}


def features(embeds):
    return nn.functional.normalize(torch.cat([embeds.mean(1), embeds.square().cumsum(-1).mean(1)], dim=-1), dim=-1)


def windows(embeds):
    return torch.stack([features(half) for half in embeds.chunk(2, dim=1)], dim=1)


def train(rank, ranks, name, split, **changes):
    """Take three steps; return what a process knows at the end."""
    cls, options = LOSSES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, D), nn.Tanh(), nn.Linear(D, V)).double()
    table = torch.randn(V, D, dtype=torch.float64)
    wrapped = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    loss = cls(table, windows if name == "windows" else features, queue_size=8, **options, **changes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = {"loss": [], "gradient": [], "rms": []}
    first = 0 if ranks == 1 else sum(split[:rank])
    mine = slice(0, sum(split)) if ranks == 1 else slice(first, first + split[rank])
    for _ in range(3):
        clean, noisy = torch.randint(V, (2, sum(split), L))
        out = loss(wrapped(noisy[mine]), clean[mine], return_diagnostics=True)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        found["loss"].append(out.loss.detach())
        found["rms"].append(out.diagnostics.field.rms)
        found["gradient"].append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    found = {key: torch.stack(values) for key, values in found.items()}
    return found | {"real": loss.queue_real.features(), "generated": loss.queue_generated.features()}


def numbered(rank, counts):
    first = sum(counts[:rank])
    return torch.arange(first, first + counts[rank]).float()[:, None].expand(-1, 2)


def fail(rank):
    """Call with a bad batch on rank 0; return what every call said, the loss of a good one last, and the queues."""
    said = []
    loss = TokenDriftLoss(torch.eye(V).double(), features, queue_size=8)
    good, clean = torch.zeros(2, L, V, dtype=torch.float64), torch.arange(2 * L).view(2, L) % V
    bad = [(good * torch.nan, clean), (good, clean + V), (good[:0], clean[:0])]
    for logits, ids in [*bad, (good, clean)]:
        try:
            said.append(float(loss(*((logits, ids) if rank == 0 else (good, clean)))))
        except TokenDriftError as error:
            said.append(str(error))
    queues = loss.queue_real.features()
    loss._calls += rank == 1  # as after a call of the other ranks alone
    try:
        loss(good, clean)
    except TokenDriftError as error:
        said.append(str(error))
    return said, queues


def main(rank, ranks, store):
    found = {}
    if ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        for counts in ((2, 2), (3, 1), (0, 2)):
            found["gather", counts] = tuple(gather(numbered(rank, counts).requires_grad_()))
        for kind, odd in (("width", torch.ones(2, 2 + rank)), ("dtype", torch.ones(2, 2).to([torch.half, None][rank]))):
            try:
                gather(odd)
            except TokenDriftError as error:
                found["error", kind] = str(error)
        found["failures"] = fail(rank)
        found["alone"] = train(rank, ranks, "joint", SPLITS["uneven"], across_ranks=False)
    for name in LOSSES:
        for case, split in SPLITS.items():
            found[name, case] = train(rank, ranks, name, split)
    if ranks > 1:
        distributed.destroy_process_group()
    return found
