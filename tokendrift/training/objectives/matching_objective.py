"""Distribution matching on the model's own chains: the student's loss, and the auxiliary model that follows it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokendrift._checks import check_count, check_frozen, check_ids, fail, warn_user
from tokendrift.diffusion import Corruption, Process
from tokendrift.distribution_matching import (
    ConditionalField,
    MatchingDiagnostics,
    MatchingOutput,
    distribution_matching_loss,
    not_finite,
    positions_to_match,
)
from tokendrift.models import MaskedLMDenoiser
from tokendrift.models.low_rank import low_rank_copy
from tokendrift.models.random_input import random_numbers
from tokendrift.modes import without_gradient
from tokendrift.pairs import PairDriftLoss
from tokendrift.references import add_over_ranks, refuse_recomputation
from tokendrift.sampling import draw
from tokendrift.training.objectives.auxiliary import AuxiliaryModel
from tokendrift.training.objectives.matching_config import MatchingConfig
from tokendrift.training.objectives.objective import Network, StatefulObjective, StepLoss, grouped
from tokendrift.training.objectives.own_chains import OwnChains, check_strata, count_pairs, pair_logs
from tokendrift.training.objectives.rounds import total_divergence

if TYPE_CHECKING:
    from tokendrift.training.optimization import Optimization

Result = TypeVar("Result")

LEAST_ENTROPY = 0.7  # of the tokens of a completion, as a share of that of the text, before a warning is given
ELEMENTS = {"cpu": 2**20, "cuda": 2**25}  # logits that are widened at a time while completions are drawn


class _FieldPart(NamedTuple):
    """The loss of the field on this process, and what was computed for it."""

    number: int  # of the position of the chains
    x_t: Tensor
    predicted: Tensor
    logits: Tensor
    loss: Tensor
    diagnostics: MatchingDiagnostics
    watched: dict[str, Tensor]


class DistributionMatching(StatefulObjective):
    r"""Distribution matching at what the model meets when it samples in few steps.

    A call takes the student to one position of one of its own chains, at x_t, and its law p of the clean tokens there.
    A completion x^ is drawn from p and corrupted to a time that is uniform between 0 and t, which gives z. The settings
    can replace both, as D-MMD and IDLM do: x_t by corrupted text, and the time of z. The frozen
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
            ``config.positions(process)``. Default: made by the configuration, one law for all positions.
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
        numbers = None if isinstance(teacher, MaskedLMDenoiser) else random_numbers(teacher)
        self.config = config = (config or MatchingConfig()).for_process(process, numbers)
        self.process, self.teacher, self.share, self.autocast = process, teacher, share, autocast
        self.generator = generator
        self.micro_batches = None if micro_batches is None else check_count("micro_batches", micro_batches, least=1)
        self.chains = OwnChains(process, generator, share)
        self.field = ConditionalField(config.field_form, config.field_clip)
        self.shares = config.positions(process)
        if pair_loss is not None and not config.pair_weight:
            raise fail("pair_loss was given, but pair_weight is 0.", "Leave one of the two out.", pair_loss=pair_loss)
        self.pair_loss = pair_loss or (config.pair_loss(process, strata=1) if config.pair_weight else None)
        if self.pair_loss is not None:
            check_strata(self.pair_loss, 1 if config.student_inputs == "text" else len(self.shares))
        if config.auxiliary_teacher_weight and config.auxiliary_loss == "nelbo":
            remedy = "Set auxiliary_loss to cross_entropy, or leave auxiliary_teacher_weight out."
            raise fail("auxiliary_teacher_weight was given, but auxiliary_loss is nelbo.", remedy)
        if auxiliary is None:
            rank = config.auxiliary_rank
            auxiliary = low_rank_copy(teacher, rank) if rank else copy.deepcopy(teacher).requires_grad_(True)
        first, second = config.auxiliary_betas
        options: dict[str, Any] = {"rate": config.auxiliary_rate, "clip": config.auxiliary_clip, "ranks": share[1]}
        self.auxiliary = AuxiliaryModel(auxiliary, betas=(first, second), **options)
        self.completions: list[Tensor] = []
        self.times: list[Tensor] = []
        self._calls = 0
        self._warned = False

    @property
    def module(self) -> nn.ModuleList:
        """Teacher, auxiliary model and pair loss, to be moved to a device before the first call."""
        parts = (self.teacher, self.auxiliary.network, self.pair_loss)
        return nn.ModuleList(part for part in parts if part is not None)

    def before_training(self, take: Callable[[int], Tensor]) -> None:
        if self.pair_loss is not None and self.config.pair_sequences:
            count_pairs(self.pair_loss, take(self.config.pair_sequences), self.share)

    def after_step(self, finished: int, optimization: Optimization | None = None) -> None:
        self.update_auxiliary()

    def __call__(self, model: Network, x0: Tensor, *, log: bool = False) -> StepLoss:
        """Return the student's loss for a batch of clean ids (B, L).

        Of the clean ids the field reads the shape alone; the pair loss and the NELBO read them.

        Raises:
            TokenDriftError: If there were ``micro_batches`` calls since `update_auxiliary`, the model lacks the
                random input of the configuration, logits are not finite, or the call is repeated in the backward pass,
                as gradient checkpointing does. An error on one process is one on all. Generator and completions are
                then as before the call.
        """
        with self._all_or_nothing():
            # 1. to 4. The loss of the field, a sum over the positions that this process reads.
            self._calls += 1
            part = self._together(x0.device, lambda: self._of_the_field(model, x0, log))
            number, read = part.number, part.diagnostics.positions
            weight = self.share[1] / self._over_ranks(read, x0.device, number)
            loss = part.loss * weight if self.config.position_weight == "mean" else part.loss
            logs = {"matching": loss.detach()}
            if log:
                for name in ("mean_field", "clipped_share", "token_entropy"):
                    logs[name] = getattr(part.diagnostics, name) * read * weight
                logs |= part.watched
            # 5. What stands beside it.
            if self.pair_loss is not None:
                stratum = number % len(self.pair_loss.generated)
                pairs = self.pair_loss(part.logits, x0, noisy_ids=part.x_t, predicted=part.predicted, stratum=stratum)
                logs |= {"drift": pairs.detach()} | (pair_logs(self.pair_loss) if log else {})
                loss = loss + (self.config.pair_weight or 0.0) * pairs
            del part  # with the logits
            if self.config.base_weight:
                base = self._together(x0.device, lambda: self.chains.nelbo(model, x0))
                self._over_ranks(0, x0.device, number)
                logs["nelbo"] = base.detach()
                loss = loss + self.config.base_weight * base
            return StepLoss(loss, logs)

    def _of_the_field(self, model: Network, x0: Tensor, log: bool) -> _FieldPart:
        """Return the loss of the field on this process."""
        self._check_call(model)
        # 1. What the student reads: a state of one of its own chains, or corrupted text.
        number, x_t, times = self._input(model, x0)
        predicted = self.process.predicted(x_t)
        # 2. The law that the step to time 0 draws from, and a completion drawn from it.
        logits = self.chains.logits(model, x_t, times)
        completion = self._drawn(logits.detach(), x_t, predicted)
        if torch.is_grad_enabled():  # an evaluation trains nobody
            self.completions.append(completion)
            self.times.append(times)
        # 3. The completion corrupted again, and both networks there.
        noised = self._renoised(completion, times)
        options = self.chains.random_input(self.teacher, noised.x_t)
        mask_id, replaced = self.process.mask_id, self.config.replaced_only
        read = positions_to_match(noised.x_t, completion, predicted, mask_id=mask_id, replaced_only=replaced)
        with without_gradient():
            teacher = self._logits(self.teacher, noised, read, options)
            auxiliary = self._logits(self.auxiliary.network, noised, read, options)
        # 4. The field moves the law. The graph of the loss holds the logits of both as long as it needs them.
        loss, diagnostics = self._matched(logits, teacher, auxiliary, read, noised)
        if not loss.isfinite():  # an accelerator has been waited for already, to draw the completion
            raise not_finite(logits, teacher, auxiliary, read)
        watched = self._watched(completion, x0, noised, options) if log else {}
        return _FieldPart(number, x_t, predicted, logits, loss, diagnostics, watched)

    def update_auxiliary(self) -> Tensor:
        """Train the auxiliary model on the completions of the calls since it was last trained.

        Call it once after each step of the student's optimiser, when the student's graph is gone. Every process has to.

        Returns:
            Its mean loss on them before the last of its steps, by default the NELBO in nats per token, on this process;
            a detached scalar.

        Raises:
            TokenDriftError: If there was no call, or, on all processes, if a loss or a gradient is not finite. The
                completions are kept then.
        """
        if not self.completions:
            raise fail("there are no completions to train the auxiliary model on.", "Call the objective first.")
        with self._all_or_nothing():
            for _ in range(self.config.auxiliary_steps):
                nelbo = self.auxiliary.step(self._auxiliary_losses())
        self.completions.clear()
        self.times.clear()
        return nelbo

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a run needs to go on to the bit, as named tensors on the CPU that share no memory.

        These are the trained parameters of f, the moments of its optimiser, the laws of pairs, the state of the
        generator and, between a call and `update_auxiliary`, the completions with their times. Teacher, student and its
        optimiser are the caller's.
        """
        found = {f"auxiliary/{name}": value for name, value in self.auxiliary.state_dict().items()}
        if self.pair_loss is not None:
            found |= {f"pairs/{name}": value for name, value in self.pair_loss.state_dict().items()}
        if self.generator is not None:
            found["generator"] = self.generator.get_state()
        for name in ("completions", "times"):
            found |= {f"{name}/{number}": values for number, values in enumerate(getattr(self, name))}
        return {name: value.detach().cpu().clone() for name, value in found.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            TokenDriftError: If it is the state of another auxiliary model, lacks the pairs or the generator, or holds
                values that no state has.
        """
        groups = grouped(state)
        needed = {"auxiliary": True, "pairs": self.pair_loss is not None, "generator": self.generator is not None}
        missing = [name for name, own in needed.items() if own and name not in groups]
        if missing:
            raise fail(f"the state lacks {' and '.join(missing)}.", "Build the objective as the one that was saved.")
        waiting = groups.get("completions", {})
        pending = [waiting.get(str(number)) for number in range(len(waiting))]  # in their order, not that of a file
        completions = [check_ids("completions", ids, self.process.vocab_size).to(self._device) for ids in pending]
        times = [groups["times"][str(number)].to(self._device) for number in range(len(waiting))]
        self.auxiliary.load_state_dict(groups["auxiliary"])
        if self.pair_loss is not None:
            self.pair_loss.load_state_dict(groups["pairs"])
        if self.generator is not None:
            try:
                self.generator.set_state(groups["generator"][""].cpu())
            except (KeyError, RuntimeError, TypeError) as error:
                raise fail(
                    f"the state of the generator does not fit: {error}.", "Use the device of that run."
                ) from None
        self.completions, self.times = completions, times

    # ------------------------------------------------------------------------------------------ parts

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """If the block raises an error, put the generator and the completions back to what they were before it.

        All processes raise together, so that they are in step after a batch that was left out.
        """
        source = torch.default_generator if self.generator is None else self.generator
        state, completions, times = source.get_state(), list(self.completions), list(self.times)
        try:
            yield
        except Exception:
            source.set_state(state)
            self.completions, self.times = completions, times
            raise

    def _together(self, device: torch.device, work: Callable[[], Result]) -> Result:
        """Do what may fail on this process alone; if it does, `_over_ranks` raises on all of them."""
        try:
            return work()
        except Exception as error:
            self._over_ranks(0, device, 0, error)
            raise

    def _check_call(self, model: Network) -> None:
        refuse_recomputation("the generator and the completions")
        waiting = len(self.completions) if torch.is_grad_enabled() else 0
        if self.micro_batches is not None and waiting >= self.micro_batches:
            raise fail(
                f"the auxiliary model was not trained after {len(self.completions)} calls.",
                "Call update_auxiliary() after each optimiser step, or set micro_batches to the calls of a step.",
            )
        if self.config.random_input and not random_numbers(model):
            raise fail(
                f"the configuration gives the model {self.config.random_input} random numbers at each masked position, "
                "but the model has no random input.",
                "Call add_random_input(model, numbers) first, or set random_input=0.",
            )

    def _input(self, model: Network, x0: Tensor) -> tuple[int, Tensor, Tensor]:
        """Return the number of the position, the noisy ids x_t (B, L) and their times (B,)."""
        if self.config.student_inputs == "text":
            corrupted = self.chains.corrupt(x0)
            return 0, corrupted.x_t, corrupted.t
        number, (total, taken) = self._position()
        x_t = self.chains.inputs(model, x0, total, taken)
        return number, x_t, torch.full((len(x_t),), 1 - taken / total, device=x_t.device)

    def _matched(
        self, logits: Tensor, teacher: Tensor, auxiliary: Tensor, read: Tensor, noised: Corruption
    ) -> MatchingOutput:
        """Return the loss at z: the sum over the positions read, or with weights the mean over all positions."""
        sides = (logits, teacher, auxiliary, read)
        options: dict[str, Any] = {"field": self.field, "mask_id": self.process.mask_id}
        if self.config.position_weight == "mean":
            return distribution_matching_loss(*sides, reduction="sum", return_diagnostics=True, **options)
        values, diagnostics = distribution_matching_loss(*sides, reduction="none", return_diagnostics=True, **options)
        weights = -self.process.schedule.dalpha(noised.t) / self.process.schedule.noise(noised.t)
        return MatchingOutput((weights.to(values)[:, None] * values).mean(), diagnostics)

    def _position(self) -> tuple[int, tuple[int, int]]:
        """Draw a position of a chain; return its number and (N, k). Reading it waits for an accelerator."""
        chance = self._rand(1)[0].item()
        positions = list(self.shares)
        edges = torch.tensor(list(self.shares.values()), dtype=torch.float64).cumsum(0)
        number = min(int((edges <= chance).sum()), len(positions) - 1)
        return number, positions[number]

    def _rand(self, count: int) -> Tensor:
        device = None if self.generator is None else self.generator.device
        return torch.rand(count, generator=self.generator, device=device)

    def _drawn(self, logits: Tensor, x_t: Tensor, predicted: Tensor) -> Tensor:
        """Return the completion (B, L): tokens drawn at predicted positions, a few rows of V at a time."""
        # This waits for an accelerator, as drawing from a part of the rows has to.
        rows, index = logits.flatten(0, 1), predicted.flatten().nonzero()[:, 0]
        uniform, found = self.chains.noise(x_t).uniform(x_t.shape[1]).flatten()[index], x_t.flatten().clone()
        step = max(1, ELEMENTS.get(logits.device.type, ELEMENTS["cpu"]) // logits.shape[-1])
        for positions, numbers in zip(index.split(step), uniform.split(step), strict=True):
            part = rows[positions]
            if self.process.mask_id is not None:
                part[:, self.process.mask_id] = -torch.inf
            found[positions] = draw(part, uniform=numbers).ids
        return found.view_as(x_t)

    def _renoised(self, ids: Tensor, times: Tensor) -> Corruption:
        """Corrupt completions of the rows of this process again, as one process would."""
        if self.config.renoising == "same":
            return self.chains.corrupt(ids, times)
        (rank, ranks), rows = self.share, len(ids)
        drawn = self._rand(ranks * rows)[rank * rows : (rank + 1) * rows].to(ids.device)
        span = times.clamp_max(self.config.renoising_reach)
        earlier = self.config.renoising == "earlier"
        return self.chains.corrupt(ids, (times - span) + (1 - drawn) * span if earlier else 1 - 0.999 * drawn)

    def _logits(self, network: nn.Module, noised: Corruption, read: Tensor, options: Mapping[str, Tensor]) -> Tensor:
        """Return logits of the teacher or the auxiliary model at the positions read, (K, V)."""
        with self._autocast():
            head: Network | None = getattr(network, "logits_at", None)
            # Reading whether any position is wanted waits for an accelerator, as taking the positions would anyway.
            if head is not None and read.any():
                found: Tensor = head(noised.x_t, noised.sigma, read, **options)
            else:
                found = network(noised.x_t, noised.sigma, **options)[read]
            return found

    @without_gradient()
    def _watched(
        self, completion: Tensor, x0: Tensor, noised: Corruption, options: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return how far the auxiliary model is from the teacher on the student's samples, and their entropy.

        It draws no random number: what is logged changes no result. Counting tokens waits for an accelerator.
        """
        found = {}
        for name, network in (("auxiliary_nelbo", self.auxiliary.network), ("teacher_nelbo", self.teacher)):
            with self._autocast():
                logits = network(noised.x_t, noised.sigma, **options)
            found[name] = self.process.nelbo(logits, completion, noised.x_t, noised.t).mean()
        for name, ids in (("completion_entropy", completion), ("text_entropy", x0)):
            shares = [row.unique(return_counts=True)[1] / len(row) for row in ids]
            found[name] = torch.stack([torch.special.entr(share).sum() for share in shares]).mean()
        drawn, text = found["completion_entropy"].item(), found["text_entropy"].item()
        if drawn < LEAST_ENTROPY * text and not self.share[0] and not self._warned:
            self._warned = True
            warn_user(
                f"the student writes repetitive text: the tokens of its completions have an entropy of {drawn:.2f} "
                f"nats, those of the text {text:.2f}. It moves faster than the auxiliary model can follow. "
                "If it does not recover as the learning rate falls, lower the learning rate."
            )
        return found

    def _auxiliary_losses(self) -> Iterator[Tensor]:
        """Yield the loss of the auxiliary model on each call's completions, divided by the number of calls."""
        for completion, times in zip(self.completions, self.times, strict=True):
            with self._autocast():
                if self.config.auxiliary_loss == "nelbo":
                    loss = self.chains.nelbo(self.auxiliary.network, completion)
                else:
                    loss = self._cross_entropy(completion, times)
            yield loss / len(self.completions)

    def _cross_entropy(self, completion: Tensor, times: Tensor) -> Tensor:
        """Return D-MMD's loss of the auxiliary model, whose targets are the completions and the teacher's law.

        It is a mean over all positions, of which those that are not predicted count nothing.
        """
        noised = self._renoised(completion, times)
        options = self.chains.random_input(self.teacher, noised.x_t)
        logits = self._completed(self.auxiliary.network, noised, options)
        loss = self.process.nll(logits, completion, noised.x_t).sum()
        if self.config.auxiliary_teacher_weight:
            with torch.no_grad():
                teacher = self._completed(self.teacher, noised, options)[noised.predicted]
            # The divergence is the cross-entropy less the teacher's entropy, which has no gradient.
            gap = total_divergence(self.process, logits, teacher, noised, "kl_teacher_student")
            loss = loss + self.config.auxiliary_teacher_weight * gap
        return loss / completion.numel()

    def _completed(self, network: nn.Module, noised: Corruption, options: Mapping[str, Tensor]) -> Tensor:
        """Return logits (B, L, V) of the law of the completion given all of z, the token at a position itself too."""
        return self.process.completion_logits(noised.denoise(network, **options), noised.x_t, noised.t)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.auxiliary.trained.values())).device

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self.autocast, enabled=self.autocast is not None)

    def _over_ranks(self, count: int, device: torch.device, number: int, error: Exception | None = None) -> Tensor:
        """Return a count added up over all processes, at least 1; if one has an error, all raise one."""
        call = self._calls * len(self.shares) + number
        total = add_over_ranks(count, ranks=self.share[1], device=device, call=call, error=error)
        return torch.full((), total, device=device).clamp_min(1)
