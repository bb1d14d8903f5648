"""Losses, gradients, fields and samples of an accelerator beside those of the CPU, for `gpu.py` and the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokendrift import DriftField, LinearLogits, MirrorTeacherLoss, PairDriftLoss, PooledFeatures, TokenDriftLoss
from tokendrift.diffusion import MaskedDiffusion, Process, UniformDiffusion, network_log_score, score_entropy
from tokendrift.distribution_matching import ConditionalField, distribution_matching_loss
from tokendrift.models import DiT, DiTConfig
from tokendrift.sampling import Psi, ReMDM, sample
from tokendrift.variants import build_field

VOCAB, LENGTH, ROWS, WIDTH = 211, 24, 6, 32
SAMPLED = 12  # rows of the samples that are compared

Run = Callable[[], tuple[Tensor, Tensor]]
"""Computes a loss and its gradient."""
Case = Callable[[torch.device, torch.dtype], Run]
"""Builds a loss and its inputs on a device, with logits of a dtype."""


class Off(NamedTuple):
    """How far an accelerator is from the CPU, relative to the size of what the CPU gives.

    Attributes:
        value: Of the loss.
        gradient: Of the gradient, by its norm.
    """

    value: float
    gradient: float


class Batch(NamedTuple):
    """Inputs of a loss, equal on every device.

    Attributes:
        x0: Clean ids (B, L).
        x_t: Noisy ids (B, L).
        t: Times (B,).
        logits: Three tensors (B, L, V), the first of which receives a gradient.
        hidden: Hidden states (B, L, D).
    """

    x0: Tensor
    x_t: Tensor
    t: Tensor
    logits: list[Tensor]
    hidden: Tensor


def make_network(process: Process, device: torch.device, seed: int = 0) -> DiT:
    """Return a small network with random weights, the same on every device."""
    masked = process.mask_id is not None
    sizes = {"hidden_dim": WIDTH, "cond_dim": 8, "n_blocks": 2, "n_heads": 2, "dropout": 0.0}
    model = DiT(DiTConfig(process.vocab_size, LENGTH, mask_id=process.mask_id, time_conditioning=not masked, **sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval().to(device)


def make_batch(process: Process, device: torch.device, dtype: torch.dtype) -> Batch:
    """Return the inputs of a loss."""
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(VOCAB - 1, (ROWS, LENGTH), generator=generator)
    corrupted = process.corrupt(x0, torch.linspace(0.2, 0.9, ROWS), generator=generator)
    logits = [(2 * torch.randn(ROWS, LENGTH, VOCAB, generator=generator)).to(device, dtype) for _ in range(3)]
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=generator).to(device, dtype)
    return Batch(x0.to(device), corrupted.x_t.to(device), corrupted.t.to(device), logits, hidden)


def cases() -> dict[str, Case]:
    """Return every loss and objective by name."""
    masked, uniform = MaskedDiffusion(VOCAB), UniformDiffusion(VOCAB)
    found = {
        "drift, masked": drift(masked),
        "drift, uniform": drift(uniform),
        "drift, hidden states": drift(uniform, hidden=True),
        "drift, straight through": drift(masked, lift="straight_through"),
        "drift, Laplace kernel": drift(uniform, field=DriftField(kernel="laplace")),
        "drift, two-sided": drift(uniform, field=DriftField(normalization="two_sided")),
        "drift, Sinkhorn": drift(uniform, field=build_field((0.05, 0.2), kernel="gaussian", normalization="sinkhorn")),
        "mirror teacher": drift(masked, MirrorTeacherLoss),
        "NELBO, masked": objective(masked, lambda own, b: own.nelbo(b.logits[0], b.x0, b.x_t, b.t)),
        "NELBO, uniform": objective(uniform, lambda own, b: own.nelbo(b.logits[0], b.x0, b.x_t, b.t)),
        "cross-entropy": objective(masked, lambda own, b: own.nll(b.logits[0], b.x0, b.x_t)),
        "score entropy": objective(masked, score),
    }
    for name, options in {"every pair": {}, "buckets": {"buckets": 64}, "triples": {"order": 3, "buckets": 64}}.items():
        found[f"pairs, {name}"] = pairs(masked, **options)
    for form in ("log_ratio", "bounded"):
        found[f"matching, {form}"] = objective(
            masked,
            lambda own, b, form=form: distribution_matching_loss(
                *b.logits, b.x_t == own.mask_id, field=ConditionalField(form), mask_id=own.mask_id
            ),
        )
    return found


def score(process: Process, batch: Batch) -> Tensor:
    """Return the score entropy with logits in place of the network's output."""
    log_s = network_log_score(process, batch.logits[0], batch.x_t, process.sigma(batch.t))
    return score_entropy(process, log_s, batch.x0, batch.x_t, batch.t)


def objective(process: Process, function: Callable[[Any, Batch], Tensor]) -> Case:
    """Return the case of a function of a process and a batch."""

    def case(device: torch.device, dtype: torch.dtype) -> Run:
        batch = make_batch(process, device, dtype)
        return lambda: with_gradient(lambda: function(process, batch).mean(), batch.logits[0])

    return case


def drift(process: Process, kind: Any = TokenDriftLoss, *, hidden: bool = False, **options: Any) -> Case:
    """Return the case of a drifting loss, whose queues hold the features of a call before."""

    def case(device: torch.device, dtype: torch.dtype) -> Run:
        features = PooledFeatures(make_network(process, torch.device("cpu")))
        loss = kind(features.embedding, features, queue_size=16, mask_id=process.mask_id, **options).to(device)
        batch = make_batch(process, device, dtype)
        where = {} if process.mask_id is None else {"noisy_ids": batch.x_t}
        loss(batch.logits[1], batch.x0.roll(1, dims=1), **where)
        if not hidden:
            return lambda: with_gradient(lambda: loss(batch.logits[0], batch.x0, **where), batch.logits[0])
        weight = make_network(process, device, seed=2).output_layer.linear.weight.detach().to(dtype)
        return lambda: with_gradient(lambda: loss(LinearLogits(batch.hidden, weight), batch.x0, **where), batch.hidden)

    return case


def pairs(process: Process, **options: Any) -> Case:
    """Return the case of a pair loss that has seen a call before."""

    def case(device: torch.device, dtype: torch.dtype) -> Run:
        loss, batch = (
            PairDriftLoss(VOCAB, mask_id=process.mask_id, **options).to(device),
            make_batch(process, device, dtype),
        )
        loss(batch.logits[1], batch.x0.roll(1, dims=1), noisy_ids=batch.x_t)
        return lambda: with_gradient(lambda: loss(batch.logits[0], batch.x0, noisy_ids=batch.x_t), batch.logits[0])

    return case


def with_gradient(function: Callable[[], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value of a function and its gradient to a leaf."""
    leaf.requires_grad_()
    value = function()
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def compare(case: Case, device: torch.device | str, dtype: torch.dtype) -> Off:
    """Return how far a device is from the CPU."""
    (value, gradient), (expected, slope) = (
        [each.double().cpu() for each in case(torch.device(place), dtype)()] for place in (device, "cpu")
    )
    return Off(float((value - expected).abs() / expected.abs()), float((gradient - slope).norm() / slope.norm()))


class LookUp(nn.Module):
    """A denoiser without products: logits of a token and its left neighbour, the same bits in every batch."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(2 * torch.randn(process.vocab_size, process.vocab_size, generator=generator))

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        return self.table[x_t] + self.table[x_t.roll(1, dims=1)]


def differing_ids(device: torch.device | str) -> dict[str, float]:
    """Return the share of sampled ids that differ between batches of 12, 5 and 1, and between a device and the CPU.

    A look-up gives the same logits in every batch, and then no id may differ. The products of a network may be rounded
    in another way in batches of another size, and between devices anything may be.
    """
    found = {}
    masked, uniform = MaskedDiffusion(VOCAB), UniformDiffusion(VOCAB)
    runs = {"ancestral": (masked, None), "ReMDM": (masked, ReMDM()), "psi": (masked, Psi()), "uniform": (uniform, None)}
    for name, (process, sampler) in runs.items():
        for kind, model in (("look-up", LookUp(process)), ("network", make_network(process, torch.device("cpu")))):

            def draw(place: torch.device | str, size: int, model: Any = model, how: Any = (process, sampler)) -> Tensor:
                options = {"steps": 8, "sampler": how[1], "seed": 5, "batch_size": size, "device": place}
                return sample(model.to(place), how[0], (SAMPLED, LENGTH), **options).ids.cpu()

            whole = draw(device, SAMPLED)
            for size in (5, 1):
                found[f"{name}, {kind}, batches of {size}"] = float((draw(device, size) != whole).double().mean())
            found[f"{name}, {kind}, on the CPU"] = float((draw("cpu", SAMPLED) != whole).double().mean())
    return found


@contextmanager
def tf32() -> Iterator[None]:
    """Switch TF32 on for everything inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def field_under_tf32(device: torch.device | str) -> float:
    """Return the largest difference that TF32 makes to a drift; it may make none."""
    generator = torch.Generator().manual_seed(4)
    clouds = [torch.randn(count, 512, generator=generator).to(device) for count in (8, 300, 300)]
    field = DriftField(temperatures=(200.0, 1000.0))
    expected = field(*clouds)
    with tf32():
        return float((field(*clouds) - expected).abs().max())
