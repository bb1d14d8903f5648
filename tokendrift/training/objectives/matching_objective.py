"""Distribution matching on the model's own chains: the student's loss, and the auxiliary model that follows it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from tokendrift._checks import check_choice, check_count, check_frozen, check_positive, fail
from tokendrift.diffusion import Corruption, Process
from tokendrift.distribution_matching import (
    FORMS,
    ConditionalField,
    distribution_matching_loss,
    positions_to_match,
)
from tokendrift.models.low_rank import low_rank_copy
from tokendrift.models.random_input import random_numbers
from tokendrift.pairs import PairDriftLoss
from tokendrift.sampling import draw
from tokendrift.sampling.noise import RowNoise
from tokendrift.training.auxiliary import AuxiliaryModel
from tokendrift.training.objectives import Network, StepLoss
from tokendrift.training.trajectories import OwnTrajectories, places

ELEMENTS = {"cpu": 2**20, "cuda": 2**25}  # logits that are widened at a time while completions are drawn


@dataclass(frozen=True)
class MatchingConfig:
    """Settings of `DistributionMatching`.

    Attributes:
        chains: Numbers of steps of the model's own chains. Default: (2, 4).
        start_share: Share of the calls that are at the common start of the chains, whose input is the prior; the other
            positions of the chains share the rest evenly. Default (None): 0 for masked models, whose start is the same
            all-masked input for every text, and as often as any other position for uniform-state models. Give masked
            models a share only with a random input (`tokendrift.models.random_input`).
        form: Form of the field, ``"log_ratio"`` (default) or ``"bounded"``, see `ConditionalField`.
        clip: Largest absolute value of the log-ratio, in nats. Default: 5.
        replaced_only: For uniform-state models, read the field only where the re-noised token was replaced. Default:
            False.
        pair_weight: Weight of a `PairDriftLoss` beside the field. Default: 0.
        base_weight: Weight of the backbone's own NELBO on real text beside the field. Default: 0.1.
        auxiliary_rank: Rank of low-rank adapters on the teacher's weights as the auxiliary model; 0 (default) for a
            full copy of the teacher.
        auxiliary_steps: Optimiser steps of the auxiliary model for each of the student's. Default: 1.
        auxiliary_rate: Learning rate of the auxiliary model's AdamW, constant. Default: 1e-3.
        auxiliary_betas: Its decay rates. Default: (0.9, 0.98).
        auxiliary_clip: Its largest gradient norm. Default: 1.

    Raises:
        TokenDriftError: For a setting out of range.
    """

    chains: tuple[int, ...] = (2, 4)
    start_share: float | None = None
    form: Literal["log_ratio", "bounded"] = "log_ratio"
    clip: float = 5.0
    replaced_only: bool = False
    pair_weight: float = 0.0
    base_weight: float = 0.1
    auxiliary_rank: int = 0
    auxiliary_steps: int = 1
    auxiliary_rate: float = 1e-3
    auxiliary_betas: tuple[float, float] = (0.9, 0.98)
    auxiliary_clip: float = 1.0

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)
        if not self.chains:
            raise fail("chains must name a number of steps, such as (2, 4).", chains=self.chains)
        for steps in self.chains:
            check_count("chains", steps, least=1)
        for name in ("clip", "auxiliary_rate", "auxiliary_clip"):
            check_positive(name, getattr(self, name))
        check_count("auxiliary_rank", self.auxiliary_rank)
        check_count("auxiliary_steps", self.auxiliary_steps, least=1)
        for name in ("pair_weight", "base_weight"):
            if getattr(self, name) < 0:
                raise fail(f"{name} must be 0 or above.", **{name: getattr(self, name)})
        if self.start_share is not None and not 0 <= self.start_share <= 1:
            raise fail("start_share must lie in [0, 1], or be None.", start_share=self.start_share)

    def positions(self, process: Process) -> dict[tuple[int, int], float]:
        """Return how often each position (N, k) of the chains, after k of N steps, is trained: shares that add to 1."""
        start = (max(self.chains), 0)
        if self.start_share == 1:
            return {start: 1.0}
        others = [position for position in places(process, self.chains) if position != start]
        share = self.start_share
        if share is None:
            share = 0.0 if process.mask_id is not None else 1 / (1 + len(others))
        if not others and share < 1:
            raise fail("chains of one step have a start alone.", "Set start_share to 1.", start_share=share)
        found = {start: share} if share else {}
        return found | {position: (1 - share) / len(others) for position in others}


class DistributionMatching:
    r"""Distribution matching at what the model meets when it samples in few steps.

    A call takes the student to one position of one of its own chains, at x_t, and its law p of the clean tokens there.
    A completion x^ is drawn from p and corrupted to a time that is uniform between 0 and t, which gives z. The frozen
    teacher T and the auxiliary model f read z, and the loss moves p along their field, see
    `tokendrift.distribution_matching.distribution_matching_loss`. `update_auxiliary`, called after the student's
    optimiser, trains f by the NELBO on the completions of the calls before it, so that f stays the denoiser of the
    student's own samples.

    Besides the student there are T, which is never trained, and f, of the size of T or a low-rank adaptation of it,
    with an optimiser of its own. Both run in evaluation mode, without dropout, and are needed for training alone.

    Several processes have generators in the same state and each its ``share``; with equal numbers of rows they do what
    one process does with all of them, up to rounding. T and f are whole on every process, which averages the gradients
    of f itself: do not wrap f.

    Args:
        process: Corruption and posterior.
        teacher: Frozen denoiser T, usually a copy of the checkpoint that the student starts from.
        auxiliary: Denoiser f with the teacher's weights. Default: made by ``config.auxiliary_rank``.
        config: Settings. Default: ``MatchingConfig()``.
        pair_loss: Loss of the law of pairs for ``config.pair_weight``, with one stratum or one for each entry of
            ``config.positions(process)``.
        generator: Source of positions, chains, completions and noise, on the device of the text. Default: PyTorch's
            global one.
        share: Number of this process, and how many train together. Default: (0, 1).
        autocast: Dtype of teacher and auxiliary model under autocast. Default (None): no autocast.
        micro_batches: Calls for each step of the optimisers. More calls without `update_auxiliary` are an error.
            Default: 1; None does not count them.

    Attributes:
        auxiliary: f with its optimiser, an `AuxiliaryModel`.
        completions: Ids (B, L) of the calls since f was last trained.

    Raises:
        TokenDriftError: If the teacher is not frozen, f has nothing to train, or settings and losses do not fit.

    Source: D-MMD (arXiv 2603.20155) and IDLM (arXiv 2602.19066) in one form; chains of the student's own steps, and the
    pair loss beside it, are this package's.
    """

    def __init__(
        self,
        process: Process,
        teacher: nn.Module,
        auxiliary: nn.Module | None = None,
        config: MatchingConfig | None = None,
        *,
        pair_loss: PairDriftLoss | None = None,
        generator: torch.Generator | None = None,
        share: tuple[int, int] = (0, 1),
        autocast: torch.dtype | None = None,
        micro_batches: int | None = 1,
    ) -> None:
        check_frozen("teacher", teacher)
        self.config = config = MatchingConfig() if config is None else config
        self.process, self.teacher, self.pair_loss = process, teacher, pair_loss
        self.generator, self.share, self.autocast = generator, share, autocast
        self.micro_batches = None if micro_batches is None else check_count("micro_batches", micro_batches, least=1)
        self.field = ConditionalField(config.form, config.clip)
        self.shares = config.positions(process)
        self._check_pairs()
        if auxiliary is None:
            rank = config.auxiliary_rank
            auxiliary = low_rank_copy(teacher, rank) if rank else copy.deepcopy(teacher).requires_grad_(True)
        options = {"rate": config.auxiliary_rate, "betas": config.auxiliary_betas, "clip": config.auxiliary_clip}
        self.auxiliary = AuxiliaryModel(auxiliary, ranks=share[1], **options)  # type: ignore[arg-type]
        self.completions: list[Tensor] = []
        # Only its inputs and completions are used: positions are drawn here, and it has no loss.
        self._chains = OwnTrajectories(process, None, (2,), generator=generator, share=share)  # type: ignore[arg-type]

    @property
    def module(self) -> nn.ModuleList:
        """Teacher, auxiliary model and pair loss, to be moved to a device before the first call."""
        parts = (self.teacher, self.auxiliary.network, self.pair_loss)
        return nn.ModuleList(part for part in parts if part is not None)

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        """Return the student's loss for a batch of clean ids (B, L).

        Of the clean ids the field reads the shape alone; the pair loss and the NELBO read them.

        Raises:
            TokenDriftError: If there were ``micro_batches`` calls since `update_auxiliary`.
        """
        if self.micro_batches is not None and len(self.completions) >= self.micro_batches:
            raise fail(
                f"the auxiliary model was not trained after {len(self.completions)} calls.",
                "Call update_auxiliary() after each optimiser step, or set micro_batches to the calls of a step.",
            )
        # 1. A position of a chain, and the input to which the model's own steps lead.
        number, (total, taken) = self._position()
        times = torch.full((len(x0),), 1 - taken / total, device=x0.device)
        x_t = self._chains.inputs(model, x0, total, taken)
        predicted = self.process.predicted(x_t)
        # 2. The law that the step to time 0 draws from, and a completion drawn from it.
        options: dict[str, Any] = self._random_input(model, x_t)
        logits = self._chains._completion(model(x_t, self.process.sigma(times), **options), x_t, times)
        completion = self._drawn(logits.detach(), x_t, predicted)
        self.completions.append(completion)
        # 3. The completion corrupted to an earlier time, and both networks there.
        noised = self._corrupted(completion, below=1 - taken / total)
        mask_id, replaced = self.process.mask_id, self.config.replaced_only
        read = positions_to_match(noised.x_t, completion, predicted, mask_id=mask_id, replaced_only=replaced)
        with torch.no_grad():
            teacher = self._logits(self.teacher, noised, read)
            auxiliary = self._logits(self.auxiliary.network, noised, read)
        # 4. The field moves the law: a mean over the positions that all processes read.
        options = {"field": self.field, "mask_id": mask_id, "reduction": "sum", "return_diagnostics": True}
        loss, diagnostics = distribution_matching_loss(logits, teacher, auxiliary, read, **options)
        del teacher, auxiliary  # the graph of the loss holds them as long as it needs to
        loss = loss * self.share[1] / self._over_ranks(diagnostics.positions, x0.device)
        logs = {"matching": loss.detach()}
        if log:
            logs |= {"mean_field": -logs["matching"], "clipped_share": diagnostics.clipped_share}
            logs["token_entropy"] = diagnostics.token_entropy
            logs |= self._watched(completion, noised)
        # 5. What stands beside it.
        if self.pair_loss is not None:
            where: dict[str, Any] = {"noisy_ids": x_t, "predicted": predicted}
            where["stratum"] = number % len(self.pair_loss.generated)
            pairs = self.pair_loss(logits, x0, **where)
            logs["drift"] = pairs.detach()
            if log:
                met = self.pair_loss.generated_weight > 0
                logs["total_variation"] = self.pair_loss.total_variation()[met].mean()
            loss = loss + self.config.pair_weight * pairs
        del logits
        if self.config.base_weight:
            base = self._nelbo(model, x0)
            logs["nelbo"] = base.detach()
            loss = loss + self.config.base_weight * base
        return StepLoss(loss, logs)

    def update_auxiliary(self) -> Tensor:
        """Train the auxiliary model on the completions of the calls since it was last trained.

        Call it once after each step of the student's optimiser, when the student's graph is gone. Every process has to.

        Returns:
            Its mean NELBO on them before the last of its steps, nats a token, on this process; a detached scalar.

        Raises:
            TokenDriftError: If there was no call.
        """
        if not self.completions:
            raise fail("there are no completions to train the auxiliary model on.", "Call the objective first.")
        for _ in range(self.config.auxiliary_steps):
            nelbo = self.auxiliary.step(self._auxiliary_losses())
        self.completions.clear()
        return nelbo

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a run needs to go on to the bit, as named tensors on the CPU that share no memory.

        These are the trained parameters of f, the moments of its optimiser, the laws of pairs, the state of the
        generator and, between a call and `update_auxiliary`, the completions. Teacher, student and its optimiser are
        the caller's.
        """
        found = {f"auxiliary/{name}": value for name, value in self.auxiliary.state_dict().items()}
        if self.pair_loss is not None:
            found |= {f"pairs/{name}": value for name, value in self.pair_loss.state_dict().items()}
        if self.generator is not None:
            found["generator"] = self.generator.get_state()
        found |= {f"completions/{number}": ids for number, ids in enumerate(self.completions)}
        return {name: value.detach().cpu().clone() for name, value in found.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            TokenDriftError: If it is the state of another auxiliary model, or lacks the pairs or the generator.
        """
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = value
        needed = {"auxiliary": True, "pairs": self.pair_loss is not None, "generator": self.generator is not None}
        missing = [name for name, own in needed.items() if own and name not in groups]
        if missing:
            raise fail(f"the state lacks {' and '.join(missing)}.", "Build the objective as the one that was saved.")
        self.auxiliary.load_state_dict(groups["auxiliary"])
        if self.pair_loss is not None:
            self.pair_loss.load_state_dict(groups["pairs"])
        if self.generator is not None:
            self.generator.set_state(groups["generator"][""].cpu())
        pending = sorted(groups.get("completions", {}).items(), key=lambda item: int(item[0]))
        self.completions = [ids.to(self._device) for _, ids in pending]

    # ------------------------------------------------------------------------------------------ parts

    def _check_pairs(self) -> None:
        if (self.pair_loss is None) != (not self.config.pair_weight):
            raise fail(
                "pair_loss and a pair_weight above 0 belong together.",
                "Pass pair_loss=PairDriftLoss(...) and MatchingConfig(pair_weight=...).",
                pair_weight=self.config.pair_weight,
                pair_loss=self.pair_loss,
            )
        if self.pair_loss is not None and len(self.pair_loss.generated) not in (1, len(self.shares)):
            raise fail(
                f"pair_loss must have one stratum, or one for each of the {len(self.shares)} positions of the chains.",
                "Build it with strata=1.",
                strata=len(self.pair_loss.generated),
            )

    def _position(self) -> tuple[int, tuple[int, int]]:
        """Draw a position of a chain; return its number and (N, k)."""
        chance = self._rand(1)[0].item()
        positions = list(self.shares)
        edges = torch.tensor(list(self.shares.values()), dtype=torch.float64).cumsum(0)
        number = min(int((edges <= chance).sum()), len(positions) - 1)
        return number, positions[number]

    def _rand(self, count: int) -> Tensor:
        device = None if self.generator is None else self.generator.device
        return torch.rand(count, generator=self.generator, device=device)

    def _noise(self, ids: Tensor) -> RowNoise:
        """Return fresh streams of random numbers, one for each row, numbered through over all processes."""
        return RowNoise(self._chains._random(2**62), self.share[0] * len(ids), len(ids), ids.device)

    def _random_input(self, model: Network, ids: Tensor) -> dict[str, Tensor]:
        """Return the random numbers of a model that takes some."""
        numbers = random_numbers(model)
        if not numbers:
            return {}
        noise, shape = self._noise(ids), (ids.shape[1], numbers)
        return {"normals": torch.stack([torch.randn(shape, generator=g) for g in noise.generators]).to(ids.device)}

    def _drawn(self, logits: Tensor, x_t: Tensor, predicted: Tensor) -> Tensor:
        """Return the completion (B, L): tokens drawn at predicted positions, a few rows of V at a time."""
        rows, index = logits.flatten(0, 1), predicted.flatten().nonzero()[:, 0]
        uniform, found = self._noise(x_t).uniform(x_t.shape[1]).flatten()[index], x_t.flatten().clone()
        step = max(1, ELEMENTS.get(logits.device.type, ELEMENTS["cpu"]) // logits.shape[-1])
        for positions, numbers in zip(index.split(step), uniform.split(step), strict=True):
            part = rows[positions]
            if self.process.mask_id is not None:
                part[:, self.process.mask_id] = -torch.inf
            found[positions] = draw(part, uniform=numbers).ids
        return found.view_as(x_t)

    def _corrupted(self, ids: Tensor, below: float | None = None) -> Corruption:
        """Corrupt this process's rows as one process would within the batch of all.

        Args:
            ids: Clean ids (B, L).
            below: Draw times uniformly in (0, below]; by default as the process does for its own objective.
        """
        rank, ranks = self.share
        times = None
        if below is not None:
            times = (1 - self._rand(ranks * len(ids)).to(ids.device)) * below
        if ranks == 1:
            return self.process.corrupt(ids, times, generator=self.generator)
        # Numbers are drawn for all rows; those of the other processes do not matter.
        drawn = self.process.corrupt(ids.repeat(ranks, 1), times, generator=self.generator)
        return Corruption(*(value[rank * len(ids) : (rank + 1) * len(ids)] for value in drawn))

    def _nelbo(self, model: Network, ids: Tensor) -> Tensor:
        """Return the mean NELBO per token of clean ids (B, L), in nats."""
        corrupted = self._corrupted(ids)
        options = self._random_input(model, corrupted.x_t)
        logits = model(corrupted.x_t, corrupted.sigma, **options)
        return self.process.nelbo(logits, ids, corrupted.x_t, corrupted.t).mean()

    def _logits(self, network: nn.Module, noised: Corruption, read: Tensor) -> Tensor:
        """Return logits of the teacher or the auxiliary model at the positions read, (K, V)."""
        with self._autocast():
            head = getattr(network, "logits_at", None)
            if head is not None and read.any():
                return head(noised.x_t, noised.sigma, read)
            return network(noised.x_t, noised.sigma)[read]

    @torch.no_grad()
    def _watched(self, completion: Tensor, noised: Corruption) -> dict[str, Tensor]:
        """Return how far the auxiliary model is from the teacher on the student's samples, and their entropy.

        It draws no random number: what is logged changes no result.
        """
        found = {}
        for name, network in (("auxiliary_nelbo", self.auxiliary.network), ("teacher_nelbo", self.teacher)):
            with self._autocast():
                logits = network(noised.x_t, noised.sigma)
            found[name] = self.process.nelbo(logits, completion, noised.x_t, noised.t).mean()
        shares = [row.unique(return_counts=True)[1] / len(row) for row in completion]
        found["completion_entropy"] = torch.stack([torch.special.entr(share).sum() for share in shares]).mean()
        return found

    def _auxiliary_losses(self) -> Iterator[Tensor]:
        """Yield the NELBO of the auxiliary model on each call's completions, divided by the number of calls."""
        for completion in self.completions:
            with self._autocast():
                loss = self._nelbo(self.auxiliary.network, completion) / len(self.completions)
            yield loss

    @property
    def _device(self) -> torch.device:
        return next(iter(self.auxiliary.trained.values())).device

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self.autocast, enabled=self.autocast is not None)

    def _over_ranks(self, count: int, device: torch.device) -> Tensor:
        """Return a count added up over all processes, at least 1."""
        total = torch.tensor(count, device=device)
        if self.share[1] > 1:
            distributed.all_reduce(total)
        return total.clamp_min(1)
