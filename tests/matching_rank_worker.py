"""One rank of the tests of distribution matching, which test_matching_objective.py starts."""

from __future__ import annotations

import copy

import torch
from torch import distributed

from tokendrift import PairDriftLoss, TokenDriftError
from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion
from tokendrift.models import DiT, DiTConfig
from tokendrift.training import DistributionMatching, MatchingConfig

V, L, ROWS = 7, 6, 4


def model(mask_id=None, seed=0):
    """Return a small denoiser in float64 with values everywhere."""
    sizes = {"hidden_dim": 8, "cond_dim": 4, "n_blocks": 1, "n_heads": 2, "dropout": 0.0}
    found = DiT(DiTConfig(V, L, mask_id=mask_id, **sizes)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return found


def train(rank, ranks, kind, rank_of_adapters, steps=3):
    """Take steps of the student and the auxiliary model; return losses and weights."""
    process = MaskedDiffusion(V, mask_id=V - 1) if kind == "masked" else UniformDiffusion(V)
    teacher = model(process.mask_id).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    config = MatchingConfig(
        chains=(2, 4), random_input=0, pair_weight=0.5, auxiliary_rank=rank_of_adapters, auxiliary_steps=2
    )
    objective = DistributionMatching(
        process,
        teacher,
        config=config,
        pair_loss=PairDriftLoss(V, mask_id=process.mask_id).double(),
        generator=torch.Generator().manual_seed(1),
        share=(rank, ranks),
        micro_batches=2,
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    own = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    text = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        for _ in range(2):
            x0 = torch.randint(V - 1, (ROWS, L), generator=text)
            loss, logs = objective(student, x0[own], log=True)
            (loss / 2).backward()
            mean = torch.stack([logs["matching"], logs["nelbo"], logs["auxiliary_nelbo"], logs["teacher_nelbo"]])
            if ranks > 1:
                distributed.all_reduce(mean)
            losses.append(mean / ranks)
        for parameter in student.parameters():
            if ranks > 1 and parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= ranks
        optimizer.step()
        optimizer.zero_grad()
        objective.update_auxiliary()
    weights = {f"student/{name}": value for name, value in student.state_dict().items()}
    return {"losses": torch.stack(losses)} | weights | objective.state_dict()


def fail(rank, ranks):
    """Break one part after the other on rank 0; return what was said, and how the objective went on."""
    process = MaskedDiffusion(V, mask_id=V - 1)
    teacher = model(process.mask_id).eval().requires_grad_(False)
    config = MatchingConfig(chains=(2, 4), random_input=0, pair_weight=0.5)
    options = {"generator": torch.Generator().manual_seed(1), "share": (rank, ranks), "micro_batches": None}
    learn = DistributionMatching(process, teacher, config=config, **options)
    student, own = copy.deepcopy(teacher).requires_grad_(True), learn.auxiliary.network
    x0 = torch.randint(V - 1, (64, L), generator=torch.Generator().manual_seed(2))

    def attempt(part):
        before, kept = learn.generator.get_state(), copy.deepcopy(learn.auxiliary.state_dict())
        broken = {"teacher": learn.teacher, "student": student}.get(part, own)
        weight = broken.output_layer.linear.bias if part != "text" else torch.zeros(1)
        value = weight.detach().clone()
        if rank == 0:
            weight.data[0] = torch.nan
        ids = x0.clone().fill_(V + 9) if part == "text" and rank == 0 else x0
        said = ""
        try:
            learn.update_auxiliary() if part == "step" else learn(student, ids)
        except TokenDriftError as error:
            said = str(error)
        weight.data.copy_(value)
        same = all(torch.equal(kept[name], value) for name, value in learn.auxiliary.state_dict().items())
        return said, torch.equal(before, learn.generator.get_state()) and same, len(learn.completions)

    found = [attempt(part) for part in ("student", "teacher", "auxiliary", "text")]
    found.append(bool(learn(student, x0).loss.isfinite()))
    found.append(attempt("step"))
    found.append(bool(learn.update_auxiliary().isfinite()))
    weights = copy.deepcopy(learn.auxiliary.state_dict())
    if rank == 0:
        learn._calls += 1  # as if the other had left out a batch
    try:
        learn(student, x0)
    except TokenDriftError as error:
        found.append(str(error))
    return found, weights


def main(rank, ranks, store):
    if ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = {(kind, lora): train(rank, ranks, kind, lora) for kind in ("masked", "uniform") for lora in (0, 2)}
    if ranks > 1:
        found["failures"] = fail(rank, ranks)
    if ranks > 1:
        distributed.destroy_process_group()
    return found
