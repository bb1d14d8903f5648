"""Distribution matching: a conditional field, learned by an auxiliary model, at the student's own re-noised samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor

from tokendrift._checks import (
    can_be_read,
    check_choice,
    check_floating,
    check_mask,
    check_mask_id,
    check_positive,
    check_same_device,
    check_tensor,
    fail,
)
from tokendrift.errors import TokenDriftError
from tokendrift.lift import close_entry

__all__ = [
    "ConditionalField",
    "MatchingDiagnostics",
    "MatchingOutput",
    "distribution_matching_loss",
    "positions_to_match",
]

FORMS = ("log_ratio", "bounded")
TILE = {"cpu": 2**18, "cuda": 2**23}  # entries of the logits that are widened at a time: 1 MiB and 32 MiB in float32


@dataclass(frozen=True)
class ConditionalField:
    r"""The field of distribution matching: where a teacher's conditional law and an auxiliary one disagree.

    With the laws :math:`T(c)` and :math:`f(c)` of one position given the same noisy text,

    .. math:: v(c) = \mathrm{clip}(\log T(c) - \log f(c),\, -b,\, b) \qquad\text{or}\qquad
              v(c) = 2\,\frac{T(c) - f(c)}{T(c) + f(c)} = 2 \tanh\frac{\log T(c) - \log f(c)}{2}

    Both are anti-symmetric, ``field(T, f) == -field(f, T)``, and exactly zero where the two laws agree. For small
    differences the two forms are equal.

    Args:
        form: ``"log_ratio"`` (default), the first formula, or ``"bounded"``, the second, which lies in [-2, 2] and has
            the form of `PairDriftLoss`.
        clip: Largest absolute value b of the log-ratio, in nats. Default: 5. ``math.inf`` clips nothing.
            ``"bounded"`` does not read it.

    Raises:
        TokenDriftError: If the form is unknown or clip is not above 0.

    >>> real, generated = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> ConditionalField("bounded")(real, generated)
    tensor([[ 0.6667, -0.4000]])
    """

    form: Literal["log_ratio", "bounded"] = "log_ratio"
    clip: float = 5.0

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)
        if self.clip != float("inf"):
            check_positive("clip", self.clip)

    def __call__(self, teacher_logits: Tensor, auxiliary_logits: Tensor, mask_id: int | None = None) -> Tensor:
        """Return the field for every row of logits.

        Args:
            teacher_logits: Logits of T, shape (..., V), any float dtype.
            auxiliary_logits: Logits of f, of the same shape.
            mask_id: Vocabulary entry without probability; the field is 0 there.

        Returns:
            Shape (..., V), in float32 or wider, without gradient.
        """
        with torch.no_grad():
            return self.of_ratio(log_ratio(teacher_logits, auxiliary_logits, mask_id))

    def of_ratio(self, ratio: Tensor) -> Tensor:
        """Return the field for log-ratios log T - log f, in nats."""
        if self.form == "bounded":
            return (ratio / 2).tanh_().mul_(2)
        return ratio.clamp(-self.clip, self.clip)


def log_ratio(teacher_logits: Tensor, auxiliary_logits: Tensor, mask_id: int | None = None) -> Tensor:
    """Return log T - log f in nats, (..., V), in float32 or wider; 0 where neither gives any probability."""
    dtype = torch.promote_types(torch.promote_types(teacher_logits.dtype, auxiliary_logits.dtype), torch.float32)
    sides = (close_entry(x.to(dtype), mask_id) for x in (teacher_logits, auxiliary_logits))
    teacher, auxiliary = (side.log_softmax(dim=-1) for side in sides)
    # Entries that both have closed would be -inf minus -inf. NaN is unlike itself and stays.
    return torch.where(teacher == auxiliary, 0.0, teacher - auxiliary)


class MatchingDiagnostics(NamedTuple):
    """How a call of `distribution_matching_loss` went; detached, on the device of the logits.

    Attributes:
        mean_field: Mean over positions of the expected field under p, scalar. For the log-ratio it estimates how much
            less likely the teacher finds the student's tokens than the auxiliary model does, in nats; it approaches 0
            from below.
        clipped_share: Mean probability under p of tokens whose log-ratio exceeds ``clip``, in [0, 1].
        token_entropy: Mean entropy of p at the positions read, nats.
        positions: Number K of positions read.
    """

    mean_field: Tensor
    clipped_share: Tensor
    token_entropy: Tensor
    positions: int


class MatchingOutput(NamedTuple):
    """The loss, with gradient, and its diagnostics, without."""

    loss: Tensor
    diagnostics: MatchingDiagnostics


@overload
def distribution_matching_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    auxiliary_logits: Tensor,
    read: Tensor | None = ...,
    *,
    field: ConditionalField = ...,
    mask_id: int | None = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_diagnostics: Literal[False] = ...,
) -> Tensor: ...


@overload
def distribution_matching_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    auxiliary_logits: Tensor,
    read: Tensor | None = ...,
    *,
    field: ConditionalField = ...,
    mask_id: int | None = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_diagnostics: Literal[True],
) -> MatchingOutput: ...


def distribution_matching_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    auxiliary_logits: Tensor,
    read: Tensor | None = None,
    *,
    field: ConditionalField = ConditionalField(),
    mask_id: int | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_diagnostics: bool = False,
) -> Tensor | MatchingOutput:
    r"""Return the distribution-matching loss: the student's law moves along a learned conditional field.

    .. math:: \mathcal L = -\frac1K \sum_{i} \sum_c p_i(c)\, \mathrm{sg}(v_i(c)),\qquad p_i = \mathrm{softmax}(\ell_i)

    p is the student's law of the clean tokens given its noisy input x_t. A completion x^ is drawn from p and corrupted
    again, to z; the teacher T and the auxiliary model f, which is trained on such completions, both read z, and
    v(c) is the `ConditionalField` of their laws at each position, by default :math:`\log T(c | z) - \log f(c | z)`. The
    sum over tokens is exact: only z is drawn. Exchange T and f and the gradient changes its sign; where the two agree
    it is zero. Adding to v a number that is the same for all tokens of a position changes no gradient.

    On an accelerator and in a compiled function, where numbers cannot be read without waiting, logits that hold NaN or
    infinities at the positions read give a loss of NaN. Minus infinity stands for a token without probability.

    The laws of the positions are worked through some rows at a time, forward and backward, in float32 or wider. Beside
    the inputs, the only tensor of their size is the gradient of the logits. Teacher and auxiliary logits need to exist
    at the positions read alone, as (K, V). First derivatives only.

    Args:
        logits: Logits of the student's law p, (B, L, V), any float dtype. For a uniform-state model they have to hold
            what the position itself shows, as the logits of `tokendrift.training.OwnTrajectories` do.
        teacher_logits: Logits of T at z, (B, L, V), or (K, V) at the positions read, row after row. No gradient.
        auxiliary_logits: Logits of f at z, of either shape. No gradient.
        read: Positions whose law is moved, bool (B, L), see `positions_to_match`. Default: all.
        field: Form and clip of the field. Default: ``ConditionalField()``.
        mask_id: Vocabulary entry without probability, for p, T and f alike (the mask of MDLM).
        reduction: ``"mean"`` over the K positions read (default), ``"sum"``, or ``"none"`` for a value at every
            position, (B, L), which is 0 where the position is not read.
        return_diagnostics: Return a `MatchingOutput`, with the loss and its diagnostics.

    Returns:
        A scalar, or (B, L), in float32 or wider. Without any position read it is zero, attached to the graph.

    Raises:
        TokenDriftError: If shapes, dtypes or devices do not belong together, or, on a CPU, if the loss would not be
            finite: logits hold NaN or infinities, or an unclipped log-ratio is infinite.

    Source: D-MMD (arXiv 2603.20155) and IDLM (arXiv 2602.19066), in one form.

    >>> logits = torch.zeros(1, 2, 3, requires_grad=True)
    >>> teacher, auxiliary = torch.tensor([[[2.0, 0.0, 0.0]] * 2]), torch.zeros(1, 2, 3)
    >>> distribution_matching_loss(logits, teacher, auxiliary).backward()
    >>> logits.grad.argmin(dim=-1)  # descent makes the token likelier that the teacher prefers
    tensor([[0, 0]])
    """
    read = _checked(logits, teacher_logits, auxiliary_logits, read, mask_id)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    rows = logits.flatten(0, 1)
    # With ``read``, this waits for an accelerator: K is the size of what is computed.
    index = torch.arange(len(rows), device=rows.device) if read is None else read.flatten().nonzero()[:, 0]
    sides = [_rows(name, x, len(index)) for name, x in _named(teacher_logits, auxiliary_logits)]
    run = cast(Any, _ExpectedField.apply)  # torch leaves it without types
    expected, clipped, entropy = run(rows, index, *sides, field, mask_id, return_diagnostics)
    if can_be_read(expected) and not expected.isfinite().all():
        raise not_finite(logits, teacher_logits, auxiliary_logits, read)

    loss, count = -expected.sum(), max(1, len(index))
    if reduction == "mean":
        loss = loss / count
    elif reduction == "none":
        loss = -expected.new_zeros(len(rows)).index_copy(0, index, expected).view(logits.shape[:2])
    if not return_diagnostics:
        return loss
    mean_field, clipped_share, token_entropy = (x.detach().sum() / count for x in (expected, clipped, entropy))
    return MatchingOutput(loss, MatchingDiagnostics(mean_field, clipped_share, token_entropy, len(index)))


def not_finite(
    logits: Tensor, teacher_logits: Tensor, auxiliary_logits: Tensor, read: Tensor | None
) -> TokenDriftError:
    """Build the error for a loss that is not finite; arguments as in `distribution_matching_loss`."""
    wrong = []
    for name, side in (("logits", logits), *_named(teacher_logits, auxiliary_logits)):
        rows = side if read is None or side.ndim == 2 else side[read]
        if not rows.amax(dim=-1).isfinite().all():  # NaN, infinity, or a row without any probability
            wrong.append(name)
    if not wrong:
        return fail(
            "the field is infinite: teacher and auxiliary model differ in which tokens have probability 0.",
            "Pass a field with a finite clip.",
        )
    return fail(
        f"{' and '.join(wrong)} contain NaN or infinities, or a row of minus infinity alone.",
        "Look for an overflow in the network, or leave the batch out on all ranks.",
    )


def positions_to_match(
    noised_ids: Tensor,
    completion: Tensor,
    predicted: Tensor,
    *,
    mask_id: int | None = None,
    replaced_only: bool = False,
) -> Tensor:
    """Return the positions at which teacher and auxiliary model are read, bool (B, L).

    In masked diffusion these are the positions that the student predicted and that are masked again in z. In
    uniform-state diffusion they are all predicted positions, or only those where another token stands in z than in the
    completion: elsewhere z shows both networks the answer.

    Args:
        noised_ids: z, the completion corrupted again, integer ids (B, L).
        completion: x^, integer ids (B, L).
        predicted: Positions that the student predicted in x_t, bool (B, L).
        mask_id: Id of the mask; None for uniform-state diffusion.
        replaced_only: In uniform-state diffusion, leave out positions whose token was kept. Default: False.

    >>> z, completion = torch.tensor([[9, 1, 9]]), torch.tensor([[4, 1, 5]])
    >>> positions_to_match(z, completion, torch.tensor([[True, True, False]]), mask_id=9)
    tensor([[ True, False, False]])
    """
    if mask_id is not None:
        return predicted & (noised_ids == mask_id)
    return predicted & (noised_ids != completion) if replaced_only else predicted


class _ExpectedField(torch.autograd.Function):
    """Mean of the field under the softmax of rows of logits, (K,), with the tokens' clipped share and entropy.

    Only the inputs are kept for the backward pass, which computes the tiles again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        index: Tensor,
        teacher: Tensor,
        auxiliary: Tensor,
        field: ConditionalField,
        mask_id: int | None,
        diagnose: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rows, index, teacher, auxiliary)
        ctx.field, ctx.mask_id = field, mask_id
        out = rows.new_zeros(3, len(index), dtype=torch.promote_types(rows.dtype, torch.float32))
        for span, p, ratio in _tiles(rows, index, teacher, auxiliary, mask_id):
            out[0, span] = (p * _field_under(p, field, ratio)).sum(dim=-1)
            if diagnose:
                if field.form == "log_ratio":
                    out[1, span] = (p * (ratio.abs() > field.clip)).sum(dim=-1)
                out[2, span] = torch.special.entr(p).sum(dim=-1)
        expected, clipped, entropy = out[0].clone(), out[1].clone(), out[2].clone()
        ctx.mark_non_differentiable(clipped, entropy)
        return expected, clipped, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        rows, index, teacher, auxiliary = ctx.saved_tensors
        found = torch.zeros_like(rows)
        for span, p, ratio in _tiles(rows, index, teacher, auxiliary, ctx.mask_id):
            # d <p, v> / d logits = p (v - <p, v>)
            v = _field_under(p, ctx.field, ratio)
            v.sub_((p * v).sum(dim=-1, keepdim=True)).mul_(p).mul_(grad[span, None])
            found.index_copy_(0, index[span], v.to(found.dtype))
        return found, None, None, None, None, None, None


def _tiles(
    rows: Tensor, index: Tensor, teacher: Tensor, auxiliary: Tensor, mask_id: int | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield p and the log-ratio, (k, V) each, for some of the positions at a time."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    step = max(1, TILE.get(rows.device.type, TILE["cpu"]) // rows.shape[1])
    for start in range(0, len(index), step):
        span = slice(start, min(start + step, len(index)))
        p = close_entry(rows.index_select(0, index[span]).to(dtype), mask_id).softmax(dim=-1)
        # Rows of (K, V) are those of the positions; of (B L, V) they are looked up.
        real, own = (x[span] if len(x) == len(index) else x.index_select(0, index[span]) for x in (teacher, auxiliary))
        yield span, p, log_ratio(real, own, mask_id).to(dtype)


def _field_under(p: Tensor, field: ConditionalField, ratio: Tensor) -> Tensor:
    """Return the field for log-ratios; an infinite one counts for nothing where p is 0."""
    found = field.of_ratio(ratio)
    return found if field.form == "bounded" or field.clip < torch.inf else found.masked_fill_(p == 0, 0.0)


def _named(teacher_logits: Tensor, auxiliary_logits: Tensor) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    return ("teacher_logits", teacher_logits), ("auxiliary_logits", auxiliary_logits)


def _rows(name: str, logits: Tensor, count: int) -> Tensor:
    """Return teacher or auxiliary logits as rows without gradient, (B L, V) or (K, V)."""
    if logits.ndim == 2 and len(logits) != count:
        raise fail(
            f"{name} must have a row for each of the K = {count} positions read.",
            f"Take them with {name}[read], or pass {name} as (B, L, V).",
            **{name: logits},
        )
    return logits.detach().flatten(0, -2)


def _checked(
    logits: Tensor, teacher_logits: Tensor, auxiliary_logits: Tensor, read: Tensor | None, mask_id: int | None
) -> Tensor | None:
    """Apply the input rules; return the positions read as bool."""
    check_floating("logits", check_tensor("logits", logits, ("B", "L", "V")))
    check_mask_id(mask_id, logits.shape[-1])
    check_same_device("logits", logits, **dict(_named(teacher_logits, auxiliary_logits)), read=read)
    for name, side in _named(teacher_logits, auxiliary_logits):
        if not isinstance(side, Tensor) or side.ndim not in (2, 3) or side.shape[-1] != logits.shape[-1]:
            raise fail(
                f"{name} must have shape (B, L, V) or (K, V), with V = {logits.shape[-1]} as the student's logits.",
                "Student, teacher and auxiliary model must share one vocabulary.",
                **{name: side, "logits": logits},
            )
        check_floating(name, side)
        if side.ndim == 3 and side.shape != logits.shape:
            raise fail(f"{name} must have the shape of the logits.", **{name: side, "logits": logits})
    return None if read is None else check_mask("read", read, logits.shape[:2])
