"""Laws of the distribution-matching loss: signs, fixed point, gradients, exact expectations, and what it holds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from torch.utils.checkpoint import checkpoint

from tokendrift.distribution_matching import ConditionalField, distribution_matching_loss, positions_to_match
from tokendrift.errors import TokenDriftError

FORMS = ["log_ratio", "bounded"]
F64 = torch.float64


def three_logits(seed=0, shape=(2, 3, 5), dtype=F64, scale=1.0):
    """Logits of student, teacher and auxiliary model."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(3, *shape, generator=generator, dtype=F64)).to(dtype).unbind()


def gradient(logits, teacher, auxiliary, read=None, **options):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(distribution_matching_loss(leaf, teacher, auxiliary, read, **options), leaf)[0]


# ------------------------------------------------------------------------------------------------ the field


@given(st.integers(0, 1000), st.sampled_from(FORMS), st.floats(0.1, 20))
def test_the_field_changes_its_sign_when_teacher_and_auxiliary_change_places(seed, form, clip):
    student, teacher, auxiliary = three_logits(seed, scale=5.0)
    field = ConditionalField(form, clip)
    assert torch.equal(field(teacher, auxiliary), -field(auxiliary, teacher))
    assert torch.equal(
        gradient(student, teacher, auxiliary, field=field), -gradient(student, auxiliary, teacher, field=field)
    )


@given(st.integers(0, 1000), st.sampled_from(FORMS))
def test_nothing_moves_where_the_two_laws_agree(seed, form):
    student, teacher, _ = three_logits(seed)
    options = {"field": ConditionalField(form), "mask_id": 4}
    assert (gradient(student, teacher, teacher.clone(), **options) == 0).all()
    # Logits of one law may differ by a constant.
    assert gradient(student, teacher, teacher + 3, **options).abs().max() < 1e-15


@given(st.integers(0, 1000))
def test_the_field_stays_within_its_bounds(seed):
    _, teacher, auxiliary = three_logits(seed, scale=30.0)
    assert ConditionalField(clip=2.0)(teacher, auxiliary).abs().max() == 2
    assert ConditionalField("bounded")(teacher, auxiliary).abs().max() <= 2
    plain = ConditionalField(clip=math.inf)(teacher, auxiliary)
    torch.testing.assert_close(plain, teacher.log_softmax(-1) - auxiliary.log_softmax(-1))


def test_the_bounded_form_is_that_of_the_pair_drift():
    _, teacher, auxiliary = three_logits()
    real, generated = teacher.softmax(-1), auxiliary.softmax(-1)
    expected = 2 * (real - generated) / (real + generated)
    torch.testing.assert_close(ConditionalField("bounded")(teacher, auxiliary), expected)


def test_small_differences_give_one_field_in_both_forms():
    _, teacher, noise = three_logits()
    fields = [ConditionalField(form)(teacher, teacher + 1e-4 * noise) for form in FORMS]
    torch.testing.assert_close(*fields, atol=1e-11, rtol=0)


def test_closed_entries_of_both_laws_have_no_field():
    _, teacher, auxiliary = three_logits()
    teacher[..., 1] = auxiliary[..., 1] = -math.inf
    teacher[..., 2] = -math.inf
    found = ConditionalField()(teacher, auxiliary, mask_id=4)
    assert (found[..., [1, 4]] == 0).all() and (found[..., 2] == -5).all() and found.isfinite().all()


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_id", [None, 2])
def test_it_is_the_expected_field_of_drawn_completions(form, mask_id):
    """By enumeration of all completions of two positions and three tokens."""
    student, teacher, auxiliary = three_logits(shape=(1, 2, 3))
    field = ConditionalField(form)
    closed = [torch.tensor(()) if mask_id is None else torch.tensor([mask_id])][0].long()
    p = student.index_fill(-1, closed, -math.inf).softmax(-1)[0]
    v = field(teacher, auxiliary, mask_id)[0]
    expected = 0.0
    for tokens in itertools.product(range(3), repeat=2):
        chance = p[range(2), tokens].prod()
        expected -= chance * v[range(2), tokens].mean()
    found = distribution_matching_loss(student, teacher, auxiliary, field=field, mask_id=mask_id)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_id", [None, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_are_those_of_the_value(form, mask_id, reduction):
    student, teacher, auxiliary = three_logits()
    read = torch.tensor([[True, False, True], [False, False, True]])
    student.requires_grad_()

    def loss(logits):
        options = {"field": ConditionalField(form), "mask_id": mask_id, "reduction": reduction}
        return distribution_matching_loss(logits, teacher, auxiliary, read, **options)

    assert torch.autograd.gradcheck(loss, student)


def test_teacher_and_auxiliary_receive_no_gradient():
    student, teacher, auxiliary = (x.requires_grad_() for x in three_logits())
    distribution_matching_loss(student, teacher, auxiliary).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None and auxiliary.grad is None


@given(st.integers(0, 1000))
def test_only_positions_that_are_read_count(seed):
    student, teacher, auxiliary = three_logits(seed)
    read = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = gradient(student, teacher, auxiliary, read, reduction="sum")
    assert (found[~read] == 0).all()
    torch.testing.assert_close(found[read], gradient(student, teacher, auxiliary, reduction="sum")[read])
    values = distribution_matching_loss(student, teacher, auxiliary, read, reduction="none")
    assert (values[~read] == 0).all()
    mean = distribution_matching_loss(student, teacher, auxiliary, read)
    torch.testing.assert_close(mean, values.sum() / max(1, int(read.sum())))


@given(st.integers(0, 1000), st.sampled_from(FORMS))
def test_laws_at_the_positions_alone_are_enough(seed, form):
    student, teacher, auxiliary = three_logits(seed)
    read = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
    options = {"field": ConditionalField(form), "mask_id": 0}
    whole = gradient(student, teacher, auxiliary, read, **options)
    assert torch.equal(whole, gradient(student, teacher[read], auxiliary[read], read, **options))


def test_without_positions_the_loss_is_zero_and_attached():
    student, teacher, auxiliary = three_logits()
    nowhere = torch.zeros(2, 3, dtype=torch.bool)
    assert (gradient(student, teacher, auxiliary, nowhere) == 0).all()
    out = distribution_matching_loss(student, teacher, auxiliary, nowhere, return_diagnostics=True)
    assert out.loss == 0 and out.diagnostics.positions == 0


def test_a_constant_of_a_position_in_the_field_moves_nothing():
    """What the normalisers of the laws are does not matter, such as those of what a uniform state shows."""
    student, teacher, auxiliary = three_logits()
    evidence = three_logits(seed=7)[0]
    shown = gradient(student, teacher + evidence, auxiliary + evidence, field=ConditionalField(clip=math.inf))
    torch.testing.assert_close(shown, gradient(student, teacher, auxiliary, field=ConditionalField(clip=math.inf)))


@pytest.mark.parametrize("form", FORMS)
def test_descent_on_free_logits_finds_the_law_of_the_teacher(form):
    """The auxiliary law is the student's own here, as one that has been trained to the end."""
    _, teacher, start = three_logits()
    logits = torch.nn.Parameter(start.clone())
    for _ in range(150):
        loss = distribution_matching_loss(
            logits, teacher, logits.detach(), field=ConditionalField(form), reduction="sum"
        )
        (slope,) = torch.autograd.grad(loss, logits)
        logits.data -= 2 * slope
    torch.testing.assert_close(logits.softmax(-1), teacher.softmax(-1), atol=1e-3, rtol=0)


def test_rows_are_worked_through_in_tiles_of_any_size(monkeypatch):
    student, teacher, auxiliary = three_logits(shape=(4, 8, 5))
    read = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = gradient(student, teacher, auxiliary, read)
    monkeypatch.setattr("tokendrift.distribution_matching.TILE", {"cpu": 15})
    assert torch.equal(whole, gradient(student, teacher, auxiliary, read))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_in_float32(dtype):
    student, teacher, auxiliary = three_logits(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = distribution_matching_loss(student, teacher, auxiliary)
    wide = distribution_matching_loss(student.float(), teacher.float(), auxiliary.float())
    assert found.dtype == torch.float32 and torch.equal(found, wide)
    slope = gradient(student, teacher, auxiliary)
    assert slope.dtype == dtype
    expected = gradient(student.float(), teacher.float(), auxiliary.float())
    torch.testing.assert_close(slope.float(), expected, atol=1e-6, rtol=2**-7)


def test_diagnostics_are_means_over_the_positions_read():
    student, teacher, auxiliary = three_logits(scale=6.0)
    read = torch.tensor([[True, False, True], [False, False, True]])
    out = distribution_matching_loss(student, teacher, auxiliary, read, return_diagnostics=True)
    p, ratio = student.softmax(-1)[read], (teacher.log_softmax(-1) - auxiliary.log_softmax(-1))[read]
    torch.testing.assert_close(out.diagnostics.mean_field, -out.loss.detach())
    torch.testing.assert_close(out.diagnostics.clipped_share, (p * (ratio.abs() > 5)).sum(-1).mean())
    torch.testing.assert_close(out.diagnostics.token_entropy, torch.special.entr(p).sum(-1).mean())
    assert out.diagnostics.positions == 3 and 0 < out.diagnostics.clipped_share < 1
    assert torch.equal(out.loss, distribution_matching_loss(student, teacher, auxiliary, read))


def refused(match, *sides, **options):
    with pytest.raises(TokenDriftError, match=match):
        distribution_matching_loss(*sides, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", range(3))
def test_logits_that_are_not_finite_are_refused_where_they_are_read(form, wrong, side):
    sides, name = three_logits(), ("logits", "teacher_logits", "auxiliary_logits")[side]
    sides[side][0, 0] = wrong
    for reduction in ("mean", "none"):
        refused(f"^{name} contain NaN or infinities", *sides, field=ConditionalField(form), reduction=reduction)
    read = torch.tensor([[False, True, True], [True, True, True]])
    assert gradient(*sides, read, field=ConditionalField(form)).isfinite().all()
    narrow = [sides[0], *(one[read] for one in sides[1:])]
    assert torch.equal(gradient(*narrow, read), gradient(*sides, read))


def test_all_sides_that_are_not_finite_are_named():
    student, teacher, auxiliary = three_logits()
    student[1, 1, 1] = teacher[0, 0, 0] = math.nan
    refused("^logits and teacher_logits contain NaN", student, teacher, auxiliary)


def test_numbers_that_are_none_reach_the_loss_where_they_cannot_be_read(monkeypatch):
    monkeypatch.setattr("tokendrift.distribution_matching.can_be_read", lambda values: False)
    student, teacher, auxiliary = three_logits()
    teacher[0, 0, 0] = math.nan
    assert distribution_matching_loss(student, teacher, auxiliary).isnan()
    assert gradient(student, teacher, auxiliary)[0, 0].isnan().all()


def test_an_unclipped_field_may_be_infinite_only_where_the_student_never_is():
    student, teacher, auxiliary = three_logits()
    teacher[..., 1] = -math.inf
    unclipped = ConditionalField(clip=math.inf)
    refused("the field is infinite[\\s\\S]*finite clip", student, teacher, auxiliary, field=unclipped)
    student[..., 1] = -math.inf
    kept = [0, 2, 3, 4]
    slope = gradient(student, teacher, auxiliary, field=unclipped)
    assert (slope[..., 1] == 0).all()
    own = auxiliary.log_softmax(-1)  # its other entries keep their probabilities
    rest = torch.logsumexp(own[..., kept], -1, keepdim=True)
    expected = gradient(student[..., kept], teacher[..., kept], own[..., kept] - rest, field=unclipped)
    torch.testing.assert_close(slope[..., kept], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    student, teacher, auxiliary = three_logits()
    leaf = student.clone().requires_grad_()
    checkpoint(distribution_matching_loss, leaf, teacher, auxiliary, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, gradient(student, teacher, auxiliary))


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 0.10), pytest.param(torch.bfloat16, 0.20, marks=pytest.mark.slow)]
)
def test_peak_memory_is_the_gradient_of_the_logits_and_little_more(dtype, share):
    shape = (1, 512, 50258)
    student, teacher, auxiliary = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(3))
    student.requires_grad_()
    with LiveBytes() as count:
        distribution_matching_loss(student, teacher, auxiliary, mask_id=50257, return_diagnostics=True).loss.backward()
    assert student.nbytes < count.peak <= (1 + share) * student.nbytes


# ------------------------------------------------------------------------------------------------ positions, rules


def test_masked_models_are_read_where_a_predicted_token_is_masked_again():
    completion = torch.tensor([[1, 2, 3, 4]])
    noised = torch.tensor([[9, 9, 3, 9]])
    predicted = torch.tensor([[True, False, True, True]])
    assert positions_to_match(noised, completion, predicted, mask_id=9).tolist() == [[True, False, False, True]]


def test_uniform_states_are_read_everywhere_or_where_a_token_was_replaced():
    completion, noised = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 3]])
    predicted = torch.ones(1, 3, dtype=torch.bool)
    assert positions_to_match(noised, completion, predicted).all()
    found = positions_to_match(noised, completion, predicted, replaced_only=True)
    assert found.tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 5)}, r"logits must have shape \(B, L, V\)"),
        ({"teacher_logits": torch.zeros(2, 3, 4)}, "V = 5 as the student's logits"),
        ({"auxiliary_logits": torch.zeros(2, 4, 5)}, "auxiliary_logits must have the shape of the logits"),
        ({"teacher_logits": torch.zeros(4, 5)}, "a row for each of the K = 6 positions"),
        ({"auxiliary_logits": torch.zeros(2, 3, 5).long()}, "auxiliary_logits must be floating point"),
        ({"read": torch.ones(2, 2).bool()}, "read must have shape"),
        ({"mask_id": 5}, "mask_id"),
        ({"reduction": "max"}, "reduction"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {name: torch.zeros(2, 3, 5) for name in ("logits", "teacher_logits", "auxiliary_logits")}
    with pytest.raises(TokenDriftError, match=message):
        distribution_matching_loss(**(arguments | change))


@pytest.mark.parametrize("options", [{"form": "ratio"}, {"clip": 0.0}, {"clip": -1.0}])
def test_fields_that_make_no_sense_are_refused(options):
    with pytest.raises(TokenDriftError, match=next(iter(options))):
        ConditionalField(**options)
