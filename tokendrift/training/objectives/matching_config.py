"""Settings of the objective ``matching``."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tokendrift._checks import check_betas, check_count, check_fraction, check_positive, fail
from tokendrift.diffusion import Process
from tokendrift.models import DiT, LoadedDenoiser
from tokendrift.models.random_input import add_random_input
from tokendrift.training.objectives.objective import ObjectiveSetup
from tokendrift.training.objectives.own_chains import ChainsConfig, chain_positions

if TYPE_CHECKING:
    from tokendrift.training.objectives.matching_objective import DistributionMatching


@dataclass(frozen=True)
class MatchingConfig(ChainsConfig):
    """Settings of the objective ``matching``: `DistributionMatching`.

    The defaults of ``chains``, ``pair_weight`` and ``random_input`` depend on the process; `for_process` fills them in.

    Attributes:
        chains: Numbers of steps of the model's own chains. Default: 1, 2 and 4 for masked models with a random input, 2
            and 4 for others.
        start_share: Share, in [0, 1], of the micro-batches at the common start of the chains, whose input is the prior;
            the other positions share the rest evenly. Default: as often as chains begin there (3 in 7 for chains of 1,
            2 and 4) for masked models with a random input, 0 for masked models without, whose start is the same input
            for every text, and as often as any other position for uniform-state models.
        field_form: Form of the field, ``"log_ratio"`` or ``"bounded"``, see `ConditionalField`.
        field_clip: Largest absolute value of the log-ratio, in nats; ``inf`` clips nothing.
        student_inputs: What the student reads: ``"chains"``, states of its own few-step chains, or ``"text"``, text
            that is corrupted to random times, as D-MMD and IDLM have it; the settings of the chains do not matter then.
        renoising: Times to which completions are corrupted again: ``"earlier"`` than that of the student's input, the
            ``"same"`` as in IDLM's code, or ``"any"`` time as in IDLM's paper.
        renoising_reach: Largest distance, in (0, 1], of an earlier time. D-MMD has 1/k for a student of k steps.
        position_weight: ``"mean"`` over the positions that are read, or ``"nelbo"``: the mean over all positions of
            the field times the weight of the masked NELBO at the time of re-noising, as IDLM has it.
        replaced_only: Whether to read the field of a uniform-state model only where corruption has replaced the token
            of the completion.
        pair_weight: Weight of the law of pairs, a `PairDriftLoss`, beside the field; 0 leaves it out. Default: 0.2 for
            masked models, 1 for uniform-state models.
        random_input: Number of random numbers that the refined model is given at each masked position, see
            `tokendrift.models.random_input`; 0 leaves the model as it is. Default: 32 for a masked `DiT` without one, 0
            for others.
        auxiliary_rank: Rank of low-rank adapters on the teacher's weights as the auxiliary model; 0 for a full copy of
            the teacher.
        auxiliary_steps: Optimiser steps of the auxiliary model for each of the refined model's.
        auxiliary_loss: Loss of the auxiliary model on the student's completions: ``"nelbo"``, or ``"cross_entropy"`` at
            the times of re-noising, as D-MMD has it.
        auxiliary_teacher_weight: Weight of the cross-entropy between the laws of the teacher and the auxiliary model,
            which D-MMD adds to ``"cross_entropy"`` with weight 1.
        auxiliary_rate: Learning rate of the auxiliary model's AdamW, constant.
        auxiliary_betas: Decay rates of the moments of the auxiliary model's AdamW.
        auxiliary_clip: Largest norm of the auxiliary model's gradient.

    Raises:
        TokenDriftError: For a setting out of range.
    """

    description: ClassVar[str] = "distribution matching at its own samples (`DistributionMatching`)"
    chains: tuple[int, ...] | None = None
    start_share: float | None = None
    field_form: Literal["log_ratio", "bounded"] = "log_ratio"
    field_clip: float = 5.0
    student_inputs: Literal["chains", "text"] = "chains"
    renoising: Literal["earlier", "same", "any"] = "earlier"
    renoising_reach: float = 1.0
    position_weight: Literal["mean", "nelbo"] = "mean"
    replaced_only: bool = False
    pair_weight: float | None = None
    random_input: int | None = None
    auxiliary_rank: int = 0
    auxiliary_steps: int = 1
    auxiliary_loss: Literal["nelbo", "cross_entropy"] = "nelbo"
    auxiliary_teacher_weight: float = 0.0
    auxiliary_rate: float = 1e-3
    auxiliary_betas: tuple[float, ...] = (0.9, 0.98)
    auxiliary_clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("auxiliary_rate", "auxiliary_clip", "renoising_reach"):
            check_positive(name, getattr(self, name))
        check_positive("auxiliary_teacher_weight", self.auxiliary_teacher_weight, or_zero=True)
        if self.pair_weight is not None:
            check_positive("pair_weight", self.pair_weight, or_zero=True)
        if self.field_clip != math.inf:
            check_positive("field_clip", self.field_clip)
        if self.renoising_reach > 1:
            raise fail("renoising_reach must lie in (0, 1].", renoising_reach=self.renoising_reach)
        check_count("auxiliary_rank", self.auxiliary_rank)
        check_count("auxiliary_steps", self.auxiliary_steps, least=1)
        if self.random_input is not None:
            check_count("random_input", self.random_input)
        if self.start_share is not None:
            check_fraction("start_share", self.start_share, ", or be left out", closed=True)
        check_betas("auxiliary_betas", self.auxiliary_betas)

    def for_process(self, process: Process, numbers: int | None = 0) -> MatchingConfig:
        masked = process.mask_id is not None
        given = self.random_input
        if given is None:
            given = 32 if masked and numbers == 0 else 0
        if given and numbers is None:
            raise fail(
                "random_input needs a DiT, and the checkpoint is another network.", "Leave it out.", random_input=given
            )
        if self.replaced_only and masked:
            raise fail(
                "replaced_only was given, but a masked model is read where its completion is masked again.",
                "Leave it out.",
                replaced_only=True,
            )
        chains = self.chains or ((1, 2, 4) if given or numbers else (2, 4))
        weight = self.pair_weight if self.pair_weight is not None else (0.2 if masked else 1.0)
        share = self.start_share
        if share is None:
            counts = set(chains)
            share = len(counts) / sum(counts) if given or numbers else 0.0
            if not masked:
                share = 1 / len(chain_positions(process, chains))
        return replace(self, random_input=given, chains=chains, pair_weight=weight, start_share=share)

    def positions(self, process: Process) -> dict[tuple[int, int], float]:
        """Return how often each position (N, k) of the chains, after k of N steps, is trained: shares that add to 1."""
        config = self.for_process(process)
        start, *others = chain_positions(process, config.chains or (), start=True)
        share = config.start_share or 0.0
        if not others and share < 1:
            raise fail("chains of one step have a start alone.", "Set start_share to 1.", start_share=share)
        found = {start: share} if share else {}
        return found | ({position: (1 - share) / len(others) for position in others} if share < 1 else {})

    def prepare(self, model: LoadedDenoiser) -> None:
        if self.random_input and isinstance(model, DiT):
            add_random_input(model, self.random_input)

    def build(self, setup: ObjectiveSetup) -> DistributionMatching:
        from tokendrift.training.objectives.matching_objective import DistributionMatching  # which reads this class

        teacher = copy.deepcopy(setup.base).eval().requires_grad_(False)
        options: dict[str, Any] = {"generator": setup.generator, "share": setup.share, "autocast": setup.autocast}
        return DistributionMatching(setup.process, teacher, config=self, micro_batches=None, **options)
