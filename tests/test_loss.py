"""Laws of the drifting losses: parity, gradients, references, reductions, what is frozen, and errors."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokendrift
from tokendrift import DriftField, MirrorTeacherLoss, PooledFeatures, TokenDriftError, TokenDriftLoss, _objective
from tokendrift._objective import LIFTS
from tokendrift.features import IdentityFeatures
from tokendrift.loss import token_entropy
from tokendrift.variants import ExtendedDriftField

B, L, V, D = 3, 5, 7, 4
CASES = ["absorbing", "absorbing_plain_softmax", "uniform", "uniform_separate", "uniform_nopair"]


def feature_map(embeds, attention_mask=None):
    """Unit vectors from two pooled layers without parameters; a module-level function, so that it pickles."""
    weight = torch.ones_like(embeds[..., :1]) if attention_mask is None else attention_mask[..., None].to(embeds)
    first = torch.tanh(embeds * torch.arange(1, embeds.shape[-1] + 1).to(embeds))
    second = torch.tanh(first.cumsum(-1))
    pooled = torch.cat([(x * weight).sum(1) / weight.sum(1) for x in (first, second)], dim=-1)
    return nn.functional.normalize(pooled, dim=-1)


def loss_inputs(seed=0, *, dtype=torch.float64, rows=B):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, L, V, generator=generator, dtype=torch.float64)
    clean = torch.randint(V - 1, (rows, L), generator=generator)
    predicted = torch.rand(rows, L, generator=generator) < 0.6
    predicted[:, 0], predicted[:, 1] = True, False  # at least one of either kind in every row
    noisy = torch.where(predicted, V - 1, clean)
    return logits.to(dtype), clean, noisy, predicted


def table(dtype=torch.float64):
    return torch.randn(V, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64).to(dtype)


def build(cls=TokenDriftLoss, *, dtype=torch.float64, filled=True, **options):
    loss = cls(table(dtype), feature_map, **({"queue_size": 5} | options))
    if filled and loss.queue_real.capacity:
        generator = torch.Generator().manual_seed(7)
        for queue in (loss.queue_real, loss.queue_generated):
            queue.push(nn.functional.normalize(torch.randn(4, 2 * D, generator=generator, dtype=dtype), dim=-1))
    return loss


def gradient(loss, logits, *arguments, **options):
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, *arguments, **options)
    value.sum().backward()
    return value.detach(), leaf.grad


# ------------------------------------------------------------------------------------------------ parity


class GoldenStep:
    """The fixture's step, built through the public interface."""

    def __init__(self, numbers, case):
        self.numbers, self.case = numbers, case
        self.arguments = {"noisy_ids": numbers[f"{case}.x_t"], "predicted": numbers[f"{case}.predicted"]}

    def features(self, embeds):
        first = torch.tanh(embeds @ self.numbers["W1"])
        second = torch.tanh(first @ self.numbers["W2"])
        return nn.functional.normalize(torch.cat([first.mean(1), second.mean(1)], dim=-1), dim=-1)

    def loss(self, cls, *, field=None, **options):
        normalization = "separate" if self.case == "uniform_separate" else "joint"
        loss = cls(
            self.numbers["E"],
            self.features,
            field=field or DriftField(normalization=normalization),
            mask_id=self.numbers.params["mask_id"] if self.case == "absorbing" else None,
            exclude_paired_positive=self.case == "uniform_nopair",
            **({"queue_size": 9} | options),
        )
        loss.queue_real.push(self.numbers["queue_real"])
        loss.queue_generated.push(self.numbers["queue_gen"])
        return loss


class Recorder:
    """A field that keeps what it was asked and what it answered."""

    def __init__(self, field):
        self.field = field

    def __call__(self, anchors, positives, negatives, **options):
        self.anchors, self.options = anchors, options
        self.positives, self.negatives = positives.clone(), negatives.clone()  # may be the queues, which move on
        self.raw, _ = self.field.raw(anchors, positives, negatives, *options.values())
        self.drift = self.field(anchors, positives, negatives, **options)
        return self.drift


@pytest.mark.parametrize("case", CASES)
def test_one_training_step_has_the_golden_values(golden, case):
    step = GoldenStep(golden("tokendrift_step"), case)
    numbers, loss = step.numbers, step.loss(TokenDriftLoss)
    logits = numbers["logits"].clone().requires_grad_()
    out = loss(logits, numbers["x0"], return_diagnostics=True, **step.arguments)
    out.loss.backward()
    numbers.assert_matches(out.loss, f"{case}.loss")
    numbers.assert_matches(logits.grad, f"{case}.grad_logits")
    rms = (out.diagnostics.field.rms.square() + numbers.params["eps"]).sqrt()
    numbers.assert_matches(rms, f"{case}.s")
    observed = ~step.arguments["predicted"].bool()
    assert torch.equal(logits.grad[observed], torch.zeros_like(logits.grad[observed]))
    if case == "absorbing":
        assert torch.equal(logits.grad[..., 16], torch.zeros_like(logits.grad[..., 16]))


@pytest.mark.parametrize("case", CASES)
def test_features_drift_and_target_have_the_golden_values(golden, case):
    step = GoldenStep(golden("tokendrift_step"), case)
    numbers, loss = step.numbers, step.loss(TokenDriftLoss)
    loss.field = recorder = Recorder(loss.field)
    value = loss(numbers["logits"], numbers["x0"], **step.arguments)
    numbers.assert_matches(value, f"{case}.loss")
    numbers.assert_matches(recorder.anchors, f"{case}.h")
    numbers.assert_matches(recorder.positives[:4], f"{case}.u")
    numbers.assert_matches(recorder.raw, f"{case}.V_tau")
    numbers.assert_matches(recorder.drift, f"{case}.V")
    numbers.assert_matches(recorder.anchors + recorder.drift, f"{case}.target")
    numbers.assert_matches(-recorder.drift / 4, f"{case}.grad_h")


@pytest.mark.parametrize("case", CASES)
def test_the_queues_after_the_push_have_the_golden_values(golden, case):
    step = GoldenStep(golden("tokendrift_step"), case)
    numbers, loss = step.numbers, step.loss(TokenDriftLoss)
    loss(numbers["logits"], numbers["x0"], **step.arguments)
    numbers.assert_matches(loss.queue_real.features(), f"{case}.queue_real_after")
    kept = numbers.params["n_queue_gen"]  # the fixture's queues differ in size: 9 real, 7 generated
    numbers.assert_matches(loss.queue_generated.features()[-kept:], f"{case}.queue_gen_after")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_the_mirror_teacher_has_the_golden_values(golden, case, distance):
    step = GoldenStep(golden("tokendrift_step"), case)
    numbers = step.numbers
    loss = step.loss(MirrorTeacherLoss, distance=distance, step_size=numbers.params["eta"])
    value, grad = gradient(loss, numbers["logits"], numbers["x0"], **step.arguments)
    numbers.assert_matches(value, f"{case}.mirror_{distance}")
    numbers.assert_matches(grad, f"{case}.mirror_{distance}_grad_logits")


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
@given(seed=st.integers(0, 2**31 - 1), masked=st.booleans(), some=st.booleans())
def test_the_gradient_is_zero_exactly_on_observed_positions(cls, seed, masked, some):
    logits, clean, noisy, predicted = loss_inputs(seed)
    loss = build(cls, mask_id=V - 1 if masked else None)
    everything = {"noisy_ids": torch.full_like(clean, V - 1)} if masked else {}
    arguments = {"noisy_ids": noisy, "predicted": predicted} if some else everything
    _, grad = gradient(loss, logits, clean, **arguments)
    moved = (grad != 0).any(dim=-1)
    assert torch.equal(moved, predicted if some else torch.ones_like(predicted))
    if masked:
        assert torch.equal(grad[..., V - 1], torch.zeros(B, L).double())
    torch.testing.assert_close(grad.sum(-1), torch.zeros(B, L).double(), rtol=0, atol=1e-13)  # softmax: no mean part


@given(seed=st.integers(0, 2**31 - 1), alpha=st.sampled_from([0.25, 1.0, 3.0]))
def test_the_gradient_is_minus_alpha_over_b_times_the_pulled_back_drift(seed, alpha):
    """dL/dlogits = -alpha/B J^T V, with J from autograd on the plain form of the lift."""
    logits, clean, *_ = loss_inputs(seed)
    loss = build(drift_scale=alpha)
    loss.field = recorder = Recorder(DriftField((0.2, 1.0)))
    value, grad = gradient(loss, logits, clean)
    leaf = logits.clone().requires_grad_()
    features = feature_map(leaf.softmax(-1) @ loss.embedding)
    (pulled,) = torch.autograd.grad(features, leaf, recorder.drift)
    torch.testing.assert_close(grad, -alpha / B * pulled, rtol=1e-9, atol=1e-13)
    expected = 0.5 * alpha**2 * recorder.drift.square().sum(-1).mean()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


def test_one_small_step_moves_the_features_along_the_drift():
    """<h(l+) - h(l), V> = gamma alpha ||J^T V||^2 + O(gamma^2) (appendix C.2)."""
    logits, clean, *_ = loss_inputs()
    loss = build(reduction="sum")
    loss.field = recorder = Recorder(DriftField((0.2, 1.0)))
    _, grad = gradient(loss, logits, clean)
    size = 1e-6
    before, after = (feature_map(x.softmax(-1) @ loss.embedding) for x in (logits, logits - size * grad))
    gain = ((after - before) * recorder.drift).sum()
    torch.testing.assert_close(gain, size * grad.square().sum(), rtol=1e-4, atol=0)


def test_no_gradient_reaches_embedding_or_references():
    logits, clean, *_ = loss_inputs()
    loss = build()
    loss(logits.requires_grad_(), clean).backward()
    assert loss.embedding.grad is None
    assert not loss.queue_real.features().requires_grad
    assert not loss.queue_generated.features().requires_grad
    assert list(loss.parameters()) == []


def test_the_mirror_teacher_solves_its_problem():
    """p* = softmax(l + eta g) maximises <g, q> - KL(q || p)/eta over the simplex (D.1)."""
    logits, clean, *_ = loss_inputs()
    eta = 2.0
    loss = build(MirrorTeacherLoss, step_size=eta, distance="kl")
    loss.field = recorder = Recorder(DriftField((0.2, 1.0)))
    _, grad = gradient(loss, logits, clean)
    p = logits.softmax(-1)
    teacher = p - B * grad  # the gradient of KL(p* || p) to the logits is p - p*
    leaf = logits.clone().requires_grad_()
    (g,) = torch.autograd.grad(feature_map(leaf.softmax(-1) @ loss.embedding), leaf, recorder.drift)
    torch.testing.assert_close(teacher, (logits + eta * g).softmax(-1), rtol=1e-9, atol=1e-12)

    def objective(q):
        return ((g * q) - q * (q / p).log() / eta).sum(-1)

    best = objective(teacher)
    for seed in range(20):
        other = torch.randn(B, L, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mixed = 0.99 * teacher + 0.01 * other.softmax(-1)
        assert (objective(mixed) < best).all()


@pytest.mark.parametrize("distance", ["kl", "mse"])
@pytest.mark.parametrize("mask_id", [None, V - 1])
def test_without_drift_the_mirror_teacher_teaches_nothing(distance, mask_id):
    logits, clean, noisy, predicted = loss_inputs()
    loss = build(MirrorTeacherLoss, distance=distance, mask_id=mask_id, field=lambda h, *_, **__: torch.zeros_like(h))
    value, grad = gradient(loss, logits, clean, noisy_ids=noisy, predicted=predicted)
    assert value.item() == pytest.approx(0, abs=1e-15)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-15)


@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
@pytest.mark.parametrize("mask_id", [None, V - 1])
def test_the_straight_through_lift_is_that_of_table_3(cls, mask_id):
    """y = onehot(argmax p) - sg(p) + p in place of p; everything behind it is the same."""
    logits, clean, noisy, predicted = loss_inputs()
    arguments = {"noisy_ids": noisy, "predicted": predicted}
    loss = build(cls, lift="straight_through", mask_id=mask_id)
    value, grad = gradient(loss, logits, clean, **arguments)

    def hard(leaf, embedding, *, noisy_ids, predicted, mask_id, workspace_mib):
        if mask_id is not None:
            leaf = leaf.index_fill(-1, torch.tensor(mask_id), -torch.inf)
        p = leaf.softmax(-1)
        y = nn.functional.one_hot(p.argmax(-1), V) - p.detach() + p
        return torch.where(predicted[..., None], y @ embedding, embedding[noisy_ids])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LIFTS, "soft", hard)
        expected, plain = gradient(build(cls, mask_id=mask_id), logits, clean, **arguments)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, plain, rtol=1e-10, atol=1e-14)
    assert (grad[predicted] != 0).any(-1).all()
    soft, _ = gradient(build(cls, mask_id=mask_id), logits, clean, **arguments)
    assert (value - soft).abs() > 1e-3 * soft  # and it is not the soft one


# ------------------------------------------------------------------------------------------------ references


def test_the_batch_stands_first_the_queue_behind_and_the_anchor_is_hidden_from_itself():
    logits, clean, *_ = loss_inputs()
    for paired in (False, True):
        loss = build(exclude_paired_positive=paired)
        real, generated = loss.queue_real.features().clone(), loss.queue_generated.features().clone()
        loss.field = recorder = Recorder(DriftField())
        loss(logits, clean)
        h, u = feature_map(logits.softmax(-1) @ loss.embedding), feature_map(loss.embedding[clean])
        torch.testing.assert_close(recorder.anchors, h)
        torch.testing.assert_close(recorder.negatives, torch.cat([h, generated]))
        torch.testing.assert_close(recorder.positives, torch.cat([u, real]))
        assert recorder.options["exclude_negative"].tolist() == [0, 1, 2]
        pair = recorder.options["exclude_positive"]
        assert pair.tolist() == [0, 1, 2] if paired else pair is None


def test_the_queues_alone_can_be_the_references():
    logits, clean, *_ = loss_inputs()
    loss = build(batch_as_references=False)
    real, generated = loss.queue_real.features().clone(), loss.queue_generated.features().clone()
    loss.field = recorder = Recorder(DriftField())
    loss(logits, clean)
    assert torch.equal(recorder.positives, real)
    assert torch.equal(recorder.negatives, generated)
    assert recorder.options == {"exclude_positive": None, "exclude_negative": None}
    assert len(loss.queue_real) == len(loss.queue_generated) == 5  # and the batch is pushed all the same


@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
def test_with_empty_queues_alone_the_first_step_has_no_drift_and_fills_them(cls):
    logits, clean, *_ = loss_inputs()
    loss = build(cls, filled=False, batch_as_references=False)
    leaf = logits.clone().requires_grad_()
    first = loss(leaf, clean, return_diagnostics=True)
    first.loss.backward()
    assert first.loss == 0
    assert first.diagnostics.field is None
    # Softmax minus itself: rounding of log_softmax in the teacher's gradient.
    torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=1e-15)
    second = loss(logits, clean, return_diagnostics=True)
    assert second.loss > 0
    assert second.diagnostics.field.pair_weight.isnan().all()  # the pair of an anchor is not among its references


# ------------------------------------------------------------------------------------------------ accumulation

# An anchor's drift depends on the anchor and the queues alone.
ANCHOR_BY_ANCHOR = {
    "reduction": "sum",
    "batch_as_references": False,
    "field": DriftField((0.2, 1.0), rms_normalize=False),
}
MICRO_BATCHES = (slice(0, 2), slice(2, 3), slice(3, 6))  # of unequal size


def accumulate(loss, logits, clean):
    """Loss and gradient summed over micro-batches in which the queues stand still."""
    with loss.frozen_queues():
        parts = [gradient(loss, logits[rows], clean[rows]) for rows in MICRO_BATCHES]
    return sum(value.sum() for value, _ in parts), torch.cat([grad for _, grad in parts])


@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
@pytest.mark.parametrize("normalization", ["joint", "separate"])
@pytest.mark.parametrize("kernel", ["gaussian", "laplace", "sharp_laplace"])
def test_micro_batches_with_frozen_queues_are_one_batch(cls, normalization, kernel):
    logits, clean, *_ = loss_inputs(rows=6)
    field = ExtendedDriftField((0.2, 1.0), kernel=kernel, normalization=normalization, rms_normalize=False)
    whole, parts = (build(cls, **(ANCHOR_BY_ANCHOR | {"field": field})) for _ in range(2))
    expected, grad = gradient(whole, logits, clean)
    actual, summed = accumulate(parts, logits, clean)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(summed, grad, rtol=1e-10, atol=1e-16)
    for name in ("queue_real", "queue_generated"):
        torch.testing.assert_close(getattr(parts, name).features(), getattr(whole, name).features(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_as_references": True},
        {"field": DriftField((0.2, 1.0))},
        {"field": DriftField((0.2, 1.0), rms_normalize=False, normalization="two_sided")},
        {"field": ExtendedDriftField((0.2, 1.0), rms_normalize=False, normalization="sinkhorn")},
        {"field": ExtendedDriftField((0.2, 1.0), rms_normalize=False, feature_scaling=True)},
        {"field": ExtendedDriftField((0.2, 1.0), rms_normalize=False, subtract_noise=True)},
    ],
    ids=["batch_as_references", "rms_normalize", "two_sided", "sinkhorn", "feature_scaling", "subtract_noise"],
)
def test_micro_batches_are_not_one_batch_where_the_anchors_of_a_call_count(changes):
    logits, clean, *_ = loss_inputs(rows=6)
    _, grad = gradient(build(**(ANCHOR_BY_ANCHOR | changes)), logits, clean)
    _, summed = accumulate(build(**(ANCHOR_BY_ANCHOR | changes)), logits, clean)
    assert (summed - grad).norm() > 1e-3 * grad.norm()


def test_micro_batches_are_not_one_batch_where_the_queues_take_them_in_at_once():
    logits, clean, *_ = loss_inputs(rows=6)
    _, grad = gradient(build(**ANCHOR_BY_ANCHOR), logits, clean)
    loss = build(**ANCHOR_BY_ANCHOR)
    summed = torch.cat([gradient(loss, logits[rows], clean[rows])[1] for rows in MICRO_BATCHES])
    assert (summed - grad).norm() > 1e-3 * grad.norm()


def test_queues_are_pushed_after_the_loss_and_in_training_mode_only():
    logits, clean, *_ = loss_inputs()
    loss = build(filled=False).eval()
    loss(logits, clean)
    assert len(loss.queue_real) == len(loss.queue_generated) == 0
    loss.train()
    first = loss(logits, clean, return_diagnostics=True)
    assert (first.diagnostics.queue_real, first.diagnostics.queue_generated) == (0, 0)
    second = loss(logits, clean, return_diagnostics=True)
    assert (second.diagnostics.queue_real, second.diagnostics.queue_generated) == (3, 3)
    assert len(loss.queue_real) == len(loss.queue_generated) == 5
    torch.testing.assert_close(loss.queue_real.features()[-3:], feature_map(loss.embedding[clean]))
    torch.testing.assert_close(loss.queue_generated.features()[-3:], feature_map(logits.softmax(-1) @ loss.embedding))


def test_one_sequence_without_queues_has_no_negative_and_no_drift():
    logits, clean, *_ = loss_inputs(rows=1)
    value, grad = gradient(build(queue_size=0), logits, clean)
    assert value == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_run_goes_on_exactly_from_a_copy(way, steps):
    loss = build(filled=False)
    for seed in range(steps):
        logits, clean, *_ = loss_inputs(seed)
        loss(logits, clean)
    if way == "state_dict":
        other = build(filled=False)
        result = other.load_state_dict(loss.state_dict())
        assert not result.missing_keys
        assert not result.unexpected_keys
    else:
        other = copy.deepcopy(loss) if way == "deepcopy" else pickle.loads(pickle.dumps(loss))
    for seed in range(10, 13):
        logits, clean, *_ = loss_inputs(seed)
        one, another = (gradient(each, logits, clean) for each in (loss, other))
        assert torch.equal(one[0], another[0])
        assert torch.equal(one[1], another[1])


def test_only_the_queues_are_in_the_state_dict(backbone):
    loss = TokenDriftLoss.from_encoder(backbone(), queue_size=4)
    assert {name.split(".")[0] for name in loss.state_dict()} == {"queue_real", "queue_generated"}
    assert list(loss.parameters()) == []
    assert list(loss.named_modules())  # and its modules can still be listed


# ------------------------------------------------------------------------------------------------ reductions


def test_reductions_agree():
    logits, clean, *_ = loss_inputs()
    none, total, mean = (build(reduction=name)(logits, clean) for name in ("none", "sum", "mean"))
    assert none.shape == (B,)
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(none.mean(), mean)


EVERY_LOSS = [
    (TokenDriftLoss, {}),
    (MirrorTeacherLoss, {"distance": "kl"}),
    (MirrorTeacherLoss, {"distance": "mse"}),
]


@pytest.mark.parametrize(("cls", "options"), EVERY_LOSS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_predicted_is_zero_loss_attached_to_the_graph(cls, options, reduction):
    logits, clean, noisy, _ = loss_inputs()
    logits.requires_grad_()
    nothing = torch.zeros(B, L, dtype=torch.bool)
    loss = build(cls, reduction=reduction, **options)
    out = loss(logits, clean, noisy_ids=noisy, predicted=nothing, return_diagnostics=True)
    assert out.loss.requires_grad
    assert torch.equal(out.loss, torch.zeros_like(out.loss))
    out.loss.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert out.diagnostics.token_entropy.item() == 0


def test_a_batch_of_padding_alone_is_zero_loss(backbone):
    logits, clean, *_ = loss_inputs(dtype=torch.float32)
    logits.requires_grad_()
    mask = torch.ones(B, L, dtype=torch.bool)
    for padded_rows in (slice(1, 2), slice(None)):
        mask[padded_rows] = False
        value = TokenDriftLoss.from_encoder(backbone(vocab_size=V), reduction="none")(
            logits, clean, attention_mask=mask
        )
        assert torch.equal(value == 0, ~mask[:, 0])
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert grad.isfinite().all()
        assert torch.equal(grad[padded_rows], torch.zeros_like(grad[padded_rows]))


@pytest.mark.parametrize("window", [1, None])
@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
def test_a_batch_of_padding_alone_has_no_features_and_pushes_none(cls, window, backbone):
    features = PooledFeatures(backbone(vocab_size=V), window=window)
    loss = cls(backbone(vocab_size=V).vocab_embed.embedding.detach(), features, queue_size=4)
    logits, clean, *_ = loss_inputs(dtype=torch.float32)
    leaf = logits.requires_grad_()
    out = loss(leaf, clean, attention_mask=torch.zeros(B, L, dtype=torch.bool), return_diagnostics=True)
    out.loss.backward()
    assert out.loss == 0
    assert out.diagnostics.field is None
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert len(loss.queue_real) == len(loss.queue_generated) == 0


def test_the_mirror_teacher_says_why_it_cannot_run_in_inference_mode():
    logits, clean, *_ = loss_inputs()
    loss = MirrorTeacherLoss(torch.eye(V, dtype=logits.dtype), feature_map).eval()
    with torch.no_grad():
        expected = loss(logits, clean)
    assert expected.isfinite()
    with torch.inference_mode(), pytest.raises(TokenDriftError, match=r"Use torch\.no_grad, not inference_mode"):
        loss(logits, clean)


def test_a_row_without_predicted_position_counts_as_zero():
    logits, clean, noisy, predicted = loss_inputs()
    predicted[1] = False
    value, grad = gradient(build(reduction="none"), logits, clean, noisy_ids=noisy, predicted=predicted)
    assert value[1] == 0
    assert value[0] > 0
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))


def test_predicted_defaults_to_the_masks_in_the_noisy_ids():
    logits, clean, noisy, predicted = loss_inputs()
    implied = build(mask_id=V - 1)(logits, clean, noisy_ids=noisy)
    named = build(mask_id=V - 1)(logits, clean, noisy_ids=noisy, predicted=predicted)
    assert torch.equal(implied, named)
    every = build()(logits, clean, noisy_ids=noisy)
    assert torch.equal(every, build()(logits, clean))


def test_padding_changes_nothing():
    logits, clean, noisy, predicted = loss_inputs()
    loss, padded_loss = build(), build()
    mask = torch.ones(B, L + 2, dtype=torch.int64)
    mask[:, L:] = 0

    def padded(x, value):
        return torch.cat([x, torch.full((B, 2, *x.shape[2:]), value, dtype=x.dtype)], dim=1)

    expected, grad = gradient(loss, logits, clean, noisy_ids=noisy, predicted=predicted)
    actual, padded_grad = gradient(
        padded_loss,
        padded(logits, 3.0),
        padded(clean, 0),
        noisy_ids=padded(noisy, 1),
        predicted=padded(predicted, True),
        attention_mask=mask,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded_grad[:, :L], grad, rtol=1e-10, atol=1e-15)
    assert torch.equal(padded_grad[:, L:], torch.zeros_like(padded_grad[:, L:]))
    torch.testing.assert_close(padded_loss.queue_real.features(), loss.queue_real.features())


# ---------------------------------------------------------------------------------------- precision and layout


@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
def test_the_loss_is_float32_for_half_precision_logits(cls):
    logits, clean, *_ = loss_inputs(dtype=torch.bfloat16)
    value, grad = gradient(build(cls, dtype=torch.float32), logits, clean)
    assert value.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    expected, exact = gradient(build(cls, dtype=torch.float32), logits.float(), clean)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad.float(), exact, rtol=2e-2, atol=1e-4)


def test_under_autocast_the_loss_stays_close_to_float32(backbone):
    model = backbone(vocab_size=V)
    logits, clean, *_ = loss_inputs(dtype=torch.float32)
    expected = TokenDriftLoss.from_encoder(model)(logits, clean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = TokenDriftLoss.from_encoder(model)(logits, clean)
        free = build(dtype=torch.float32)(logits, clean)
    assert actual.dtype == free.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0)  # the encoder itself runs in bfloat16
    # Without a network only the float32 island is left, where autocast must not reach.
    torch.testing.assert_close(free, build(dtype=torch.float32)(logits, clean), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
def test_the_memory_layout_of_the_logits_does_not_matter(cls):
    logits, clean, noisy, predicted = loss_inputs()
    expected = gradient(build(cls), logits, clean, noisy_ids=noisy, predicted=predicted)
    strided = logits.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    leaf = strided.detach().requires_grad_()
    value = build(cls)(leaf, clean, noisy_ids=noisy, predicted=predicted)
    value.backward()
    torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(leaf.grad, expected[1], rtol=1e-10, atol=1e-15)
    row = logits[:1].clone().requires_grad_()
    expanded = build(cls)(row.expand(B, -1, -1), clean)
    dense = build(cls)(row.expand(B, -1, -1).contiguous(), clean)
    torch.testing.assert_close(expanded, dense, rtol=1e-12, atol=0)
    expanded.backward()
    assert row.grad.isfinite().all()


def test_moving_the_loss_to_another_dtype_moves_everything(backbone):
    loss = TokenDriftLoss.from_encoder(backbone(vocab_size=V), queue_size=4)
    logits, clean, *_ = loss_inputs(dtype=torch.float32)
    loss(logits, clean)
    loss.to(torch.float64)
    assert loss.embedding.dtype == torch.float64
    assert {parameter.dtype for parameter in loss.feature_map.parameters()} == {torch.float64}
    assert loss.queue_real.features().dtype == torch.float64
    assert loss(logits.double(), clean).dtype == torch.float64


def test_an_embedding_of_its_own_moves_with_the_loss():
    loss = build(dtype=torch.float32, filled=False).to(torch.float64)
    assert loss.embedding.dtype == torch.float64
    logits, clean, *_ = loss_inputs()
    expected = build(filled=False)(logits, clean)
    torch.testing.assert_close(loss(logits, clean), expected, rtol=1e-5, atol=0)  # E was rounded, over tau = 0.02


def test_integer_dtypes_of_ids_mean_the_same():
    logits, clean, noisy, predicted = loss_inputs()
    expected = build()(logits, clean, noisy_ids=noisy, predicted=predicted)
    actual = build()(logits, clean.int(), noisy_ids=noisy.to(torch.uint8), predicted=predicted.int())
    assert torch.equal(actual, expected)


# ---------------------------------------------------------------------------------------- frozen encoder


def test_from_encoder_freezes_a_copy(backbone):
    model = backbone(vocab_size=V).train()
    loss = TokenDriftLoss.from_encoder(model, queue_size=0)
    logits, clean, *_ = loss_inputs(dtype=torch.float32)
    before = loss(logits, clean)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(clean).square().mean().backward()
    optimizer.step()
    assert torch.equal(loss(logits, clean), before)
    assert not torch.equal(TokenDriftLoss.from_encoder(model, queue_size=0)(logits, clean), before)


def test_train_leaves_the_encoder_in_evaluation_mode(backbone):
    loss = TokenDriftLoss.from_encoder(backbone(vocab_size=V))
    nn.ModuleList([loss]).train()
    assert loss.training
    assert not any(part.training for part in loss.feature_map.modules())


def test_from_encoder_equals_the_parts_given_by_hand(backbone):
    model = backbone(vocab_size=V)
    logits, clean, *_ = loss_inputs(dtype=torch.float32)
    whole = TokenDriftLoss.from_encoder(model, layers=(1, 2))(logits, clean)
    parts = TokenDriftLoss(model.vocab_embed.embedding.detach(), PooledFeatures(model, layers=(1, 2)))(logits, clean)
    assert torch.equal(whole, parts)


def test_from_encoder_reads_input_embeddings_of_other_libraries():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(V, D)

        def get_input_embeddings(self):
            return self.words

        def hidden_states(self, embeds, *, attention_mask=None):
            return [embeds, embeds.tanh()]

    logits, clean, *_ = loss_inputs(dtype=torch.float32)
    assert TokenDriftLoss.from_encoder(Other())(logits, clean).isfinite()


def test_a_model_without_hidden_states_and_embedding_is_told_of_both_at_once():
    with pytest.raises(TokenDriftError, match=r"hidden_states\(embeds[\s\S]*vocab_embed.embedding") as caught:
        TokenDriftLoss.from_encoder(nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V)))
    assert "TokenDriftLoss(embedding, feature_map)" in str(caught.value)


def test_from_encoder_without_an_embedding_is_refused():
    class Bare(nn.Module):
        def hidden_states(self, embeds, *, attention_mask=None):
            return [embeds, embeds]

    with pytest.raises(TokenDriftError, match="encoder has no input embedding"):
        TokenDriftLoss.from_encoder(Bare())


# ------------------------------------------------------------------------------------------------ diagnostics


def test_diagnostics_are_detached_and_do_not_change_the_loss():
    logits, clean, noisy, predicted = loss_inputs()
    plain = build()(logits, clean, noisy_ids=noisy, predicted=predicted)
    out = build()(logits.requires_grad_(), clean, noisy_ids=noisy, predicted=predicted, return_diagnostics=True)
    assert torch.equal(out.loss, plain)
    assert not any(part.requires_grad for part in out.diagnostics.field)
    assert not out.diagnostics.token_entropy.requires_grad
    p = logits.detach().softmax(-1)[predicted]
    torch.testing.assert_close(out.diagnostics.token_entropy, -(p * p.log()).sum(-1).mean())
    h, u = feature_map_of(logits, noisy, predicted), feature_map(table()[clean])
    assert out.diagnostics.field.pair_weight.shape == (3,)
    squared = (h[:, None] - torch.cat([u, build().queue_real.features()])).square().sum(-1)
    expected = (-squared / 0.2).softmax(-1)[:, :B].diagonal().mean()
    torch.testing.assert_close(out.diagnostics.field.pair_weight[2], expected)


def feature_map_of(logits, noisy, predicted):
    return feature_map(torch.where(predicted[..., None], logits.detach().softmax(-1) @ table(), table()[noisy]))


def test_a_field_of_the_users_own_is_asked_and_has_no_diagnostics():
    logits, clean, *_ = loss_inputs()
    mine = lambda h, positives, negatives, **_: positives.mean(0) - negatives.mean(0) + 0 * h  # noqa: E731
    out = build(field=mine)(logits, clean, return_diagnostics=True)
    assert out.diagnostics.field is None
    assert out.loss > 0


@given(seed=st.integers(0, 2**31 - 1), masked=st.booleans())
def test_the_entropy_of_tokens_lies_between_zero_and_log_v(seed, masked):
    logits, _, _, predicted = loss_inputs(seed)
    mask_id = V - 1 if masked else None
    open_entries = V - 1 if masked else V
    assert 0 < token_entropy(logits, predicted, mask_id) <= torch.tensor(open_entries).double().log() + 1e-12
    flat = token_entropy(torch.zeros_like(logits), predicted, mask_id)
    torch.testing.assert_close(flat, torch.tensor(open_entries).double().log())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 2),), r"logits must have shape \(B, L, V\)"),
        ((torch.zeros(2, 3, 2), torch.ones(2, 2, dtype=torch.bool)), r"predicted must have shape \(B, L\) = \(2, 3\)"),
        ((torch.zeros(2, 3, 2), None, 2), r"mask_id must lie in \[0, V\) with V = 2"),
    ],
)
def test_the_entropy_of_what_is_no_batch_of_logits_is_refused(arguments, message):
    with pytest.raises(TokenDriftError, match=message):
        token_entropy(*arguments)


@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
def test_a_feature_map_that_takes_no_mask_is_named(cls):
    logits, clean, *_ = loss_inputs()
    loss = cls(table(), lambda embeds: embeds.mean(dim=1))
    with pytest.raises(TokenDriftError, match="feature_map must take the keyword argument attention_mask"):
        loss(logits, clean, attention_mask=torch.ones(B, L, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------ compilation


@pytest.mark.parametrize(
    ("cls", "partly"), [(TokenDriftLoss, True), pytest.param(MirrorTeacherLoss, False, marks=pytest.mark.slow)]
)
def test_the_compiled_loss_equals_eager_over_steps_with_queues(cls, partly):
    compare_with_compiled(cls, partly, backend="aot_eager", filled=True)  # compiled once less than from empty queues


@pytest.mark.slow
def test_the_loss_compiled_for_any_size_equals_eager():
    compare_with_compiled(TokenDriftLoss, True, backend="aot_eager", dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
@pytest.mark.parametrize("partly", [False, True])
def test_the_loss_compiled_by_inductor_equals_eager(cls, partly):
    compare_with_compiled(cls, partly, backend="inductor")


def compare_with_compiled(cls, partly, backend, *, filled=False, **options):
    torch.compiler.reset()
    eager, inner = build(cls, filled=filled), build(cls, filled=filled)
    before = len(inner.queue_real)
    compiled = torch.compile(inner, backend=backend, **options)
    for seed in range(3):  # the queues fill up to 5 of 5, so the number of references changes
        logits, clean, noisy, predicted = loss_inputs(seed)
        arguments = {"noisy_ids": noisy, "predicted": predicted} if partly else {}
        expected, actual = (gradient(each, logits, clean, **arguments) for each in (eager, compiled))
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-9, atol=1e-12)
        assert len(inner.queue_real) == len(eager.queue_real) == min(before + 3 * (seed + 1), 5)
        torch.testing.assert_close(inner.queue_generated.features(), eager.queue_generated.features())


# ------------------------------------------------------------------------------------------------ errors


def trainable():
    return nn.Sequential(nn.Linear(D, D), nn.Flatten())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"embedding": torch.zeros(V, D, requires_grad=True)},
            r"embedding requires grad[\s\S]*soft_token_lift yourself",
        ),
        ({"embedding": torch.zeros(V)}, r"embedding must have shape \(V, D\)"),
        ({"embedding": torch.zeros(V, D, dtype=torch.int64)}, "embedding must be floating point"),
        ({"feature_map": None}, r"feature_map must be a callable \(B, L, D\) -> \(B, M\)"),
        ({"feature_map": trainable()}, r"feature_map must be frozen, but it has 2 parameters that require grad"),
        ({"feature_map": trainable().requires_grad_(False)}, "feature_map must be frozen, but it has training mode"),
        ({"reduction": "batchmean"}, "reduction must be one of 'mean', 'sum', 'none'"),
        ({"mask_id": V}, r"mask_id must lie in \[0, V\) with V = 7"),
        ({"mask_id": -1}, r"mask_id must lie in \[0, V\) with V = 7"),
        ({"mask_id": "6"}, r"mask_id must lie in \[0, V\) with V = 7: an id"),
        ({"mask_id": 6.0}, r"mask_id must lie in \[0, V\) with V = 7: an id"),
        ({"mask_id": True}, r"mask_id must lie in \[0, V\) with V = 7: an id"),
        ({"queue_size": -1}, "queue_size must be an integer of at least 0"),
        ({"queue_size": 2.0}, "queue_size must be an integer of at least 0"),
        ({"queue_size": 0, "batch_as_references": False}, "anchors would have no references"),
        ({"lift": "hard"}, "lift must be one of 'soft', 'straight_through'"),
        ({"drift_scale": 0.0}, r"drift_scale \(alpha\) must be a finite number above 0"),
        ({"drift_scale": float("nan")}, r"drift_scale \(alpha\) must be a finite number above 0"),
        ({"workspace_mib": -1.0}, "workspace_mib must be a finite number above 0"),
    ],
)
def test_bad_parts_are_refused_at_construction(arguments, message):
    good = {"embedding": torch.zeros(V, D), "feature_map": feature_map}
    with pytest.raises(TokenDriftError, match=message):
        TokenDriftLoss(**(good | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance": "l1"}, "distance must be one of 'kl', 'mse'"),
        ({"step_size": 0.0}, r"step_size \(eta\) must be a finite number above 0"),
    ],
)
def test_bad_mirror_options_are_refused_at_construction(arguments, message):
    with pytest.raises(TokenDriftError, match=message):
        MirrorTeacherLoss(torch.zeros(V, D), feature_map, **arguments)


@pytest.mark.parametrize(
    ("call", "label", "nearest"),
    [
        (TokenDriftLoss.from_encoder, "TokenDriftLoss.from_encoder", True),
        (lambda model, **options: TokenDriftLoss(torch.eye(V), feature_map, **options), "TokenDriftLoss", True),
        (lambda model, **options: MirrorTeacherLoss(torch.eye(V), feature_map, **options), "MirrorTeacherLoss", True),
        (lambda model, **options: TokenDriftLoss(torch.eye(V), feature_map, **options), "TokenDriftLoss", False),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_one(backbone, call, label, nearest):
    name = "mask_idd" if nearest else "xyz"
    with pytest.raises(TypeError) as caught:
        call(backbone(), **{name: 3})
    assert isinstance(caught.value, TokenDriftError)
    assert str(caught.value).startswith(f"{label} has no option '{name}'.\n  got {name} int 3\n")
    assert ("Did you mean 'mask_id'?" in str(caught.value)) == nearest
    assert "exclude_paired_positive" in str(caught.value)


def test_signatures_show_every_option_with_its_default():
    for function in (TokenDriftLoss, TokenDriftLoss.from_encoder, MirrorTeacherLoss):
        options = inspect.signature(function).parameters.values()
        keywords = {option.name: option.default for option in options if option.kind is option.KEYWORD_ONLY}
        assert not any(option.kind is option.VAR_KEYWORD for option in options)
        assert keywords["mask_id"] is None
        assert keywords["queue_size"] == 1024
        assert inspect.Parameter.empty not in keywords.values()


SNIPPET = """
import torch
from tokendrift.loss import MirrorTeacherLoss, TokenDriftLoss
def good(model: torch.nn.Module) -> TokenDriftLoss:
    return TokenDriftLoss.from_encoder(model, mask_id=3, lift="soft", reduction="none")
def bad(model: torch.nn.Module, table: torch.Tensor) -> None:
    TokenDriftLoss.from_encoder(model, mask_idd=3)
    TokenDriftLoss(table, torch.nn.Identity(), lift="hard")
    MirrorTeacherLoss(table, torch.nn.Identity(), queue_size="all")
"""


def test_mypy_refuses_wrong_options(tmp_path):
    """The modules of the signatures are read and nothing that they import, which takes a second or two."""
    api = pytest.importorskip("mypy.api")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    package = Path(tokendrift.__file__).parent
    files = [str(package / f"{name}.py") for name in ("loss", "_objective", "_checks")]
    options = ["--follow-imports=skip", "--ignore-missing-imports", "--config-file=", f"--cache-dir={tmp_path}"]
    found, errors, _ = api.run([*options, *files, str(tmp_path / "snippet.py")])
    lines = [line.partition("snippet.py:")[2] for line in found.splitlines() if "snippet.py:" in line]
    assert not errors
    assert [line.partition(":")[0] for line in lines if "error" in line] == ["7", "8", "9"], found
    assert 'Unexpected keyword argument "mask_idd" for "from_encoder" of "TokenDriftLoss"' in lines[0]


def test_a_printed_loss_shows_its_settings():
    shown = repr(build(mask_id=V - 1, queue_size=5, filled=False))
    for setting in ("V=7, D=4", "mask_id=6", "drift_scale=1.0", "queue_size=5", "field=DriftField(temperatures=(0.02"):
        assert setting in shown
    assert "feature_map: feature_map" in shown
    assert "distance='mse'" in repr(build(MirrorTeacherLoss, distance="mse"))


# ------------------------------------------------------------------------------------------------ slips


@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
def test_a_mask_without_noisy_ids_is_refused(cls):
    logits, clean, *_ = loss_inputs()
    with pytest.raises(TokenDriftError, match=r"neither noisy_ids nor predicted[\s\S]*Pass noisy_ids=x_t"):
        build(cls, mask_id=V - 1)(logits, clean)


def test_swapped_ids_are_refused():
    logits, clean, noisy, _ = loss_inputs()
    loss = build(mask_id=V - 1)
    before = copy.deepcopy(loss.state_dict())
    with pytest.raises(TokenDriftError, match=r"clean_ids contain the mask token \(mask_id = 6\)"):
        loss(logits, noisy, noisy_ids=clean)
    assert_same_state(loss, before)
    padded = torch.where(torch.arange(L) == L - 1, V - 1, clean)  # padding may be written with the mask
    loss(logits, padded, noisy_ids=noisy, attention_mask=(torch.arange(L) < L - 1).expand(B, L))


def test_probabilities_are_reported_once_and_log_probabilities_are_logits():
    logits, clean, *_ = loss_inputs()
    expected = build()(logits, clean)
    loss = build()
    with pytest.warns(UserWarning, match="logits look like probabilities"):
        loss(logits.softmax(dim=-1), clean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(logits.softmax(dim=-1), clean)  # once for each loss
        torch.testing.assert_close(build()(logits.log_softmax(dim=-1), clean), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: loss,
        torch.nn.DataParallel,
        torch.autocast("cpu"),
        lambda loss: torch.compile(lambda *each: torch.compiler.disable(loss)(*each).sum(), backend="eager"),
    ],
    ids=["plain", "module", "decorator", "compiled"],
)
def test_a_warning_names_the_line_of_the_user(wrap):
    logits, clean, *_ = loss_inputs()
    called = wrap(build())
    with pytest.warns(UserWarning, match="logits look like probabilities") as caught:
        called(logits.softmax(dim=-1), clean)
    assert caught[0].filename == __file__


META = torch.device("meta")


@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(L, V)}, r"logits must have shape \(B, L, V\), but it has 2 axes[\s\S]*batch axis"),
        ({"logits": torch.zeros(0, L, V)}, "logits is empty: B is 0[\\s\\S]*Skip empty batches"),
        (
            {"logits": torch.zeros(B, L, V + 1)},
            r"logits has 8 columns \(V\) but embedding has 7 rows[\s\S]*remove that column",
        ),
        ({"logits": torch.zeros(B, L, V, dtype=torch.int64)}, "logits must be floating point"),
        ({"logits": torch.zeros(B, L, V, device=META)}, "embedding is on cpu but logits is on meta"),
        ({"clean_ids": torch.zeros(B, L + 1, dtype=torch.int64)}, r"clean_ids must have shape \(B, L\) = \(3, 5\)"),
        ({"clean_ids": torch.zeros(B, L)}, r"clean_ids must hold integer token ids[\s\S]*clean_ids.long\(\)"),
        ({"clean_ids": torch.full((B, L), V)}, "clean_ids has ids from 7 to 7, but the vocabulary V has 7 entries"),
        ({"clean_ids": torch.full((B, L), -100)}, "labels of -100 are not ids"),
        ({"clean_ids": torch.zeros(B, L, dtype=torch.int64, device=META)}, "clean_ids is on meta but logits is on cpu"),
        ({"noisy_ids": torch.full((B, L), V)}, "noisy_ids has ids from 7 to 7, but the vocabulary V has 7 entries"),
        ({"noisy_ids": torch.full((B, L), -1)}, "noisy_ids has ids from -1 to -1"),
        ({"noisy_ids": torch.zeros(B, dtype=torch.int64)}, r"noisy_ids must have shape \(B, L\)"),
        ({"noisy_ids": torch.zeros(B, L, dtype=torch.int64, device=META)}, "noisy_ids is on meta but logits is on cpu"),
        ({"noisy_ids": None}, "predicted was given without noisy_ids[\\s\\S]*Pass noisy_ids=x_t"),
        ({"predicted": torch.ones(B, L)}, "predicted must be boolean"),
        ({"predicted": torch.ones(B, 1, dtype=torch.bool)}, r"predicted must have shape \(B, L\) = \(3, 5\)"),
        ({"predicted": torch.ones(B, L, dtype=torch.bool, device=META)}, "predicted is on meta but logits is on cpu"),
        ({"attention_mask": torch.ones(B, L + 1)}, r"attention_mask must have shape \(B, L\) = \(3, 5\)"),
        ({"attention_mask": torch.ones(B, L)}, "attention_mask must be boolean"),
        ({"attention_mask": torch.ones(B, L, dtype=torch.bool, device=META)}, "attention_mask is on meta"),
    ],
)
def test_bad_input_is_refused_before_anything_is_pushed(cls, arguments, message):
    logits, clean, noisy, predicted = loss_inputs(dtype=torch.float32)
    good = {"logits": logits, "clean_ids": clean, "noisy_ids": noisy, "predicted": predicted}
    loss = build(cls, dtype=torch.float32)
    before = copy.deepcopy(loss.state_dict())
    with pytest.raises(TokenDriftError, match=message):
        loss(**(good | arguments))
    assert_same_state(loss, before)


@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_refused_and_not_pushed(cls, value):
    logits, clean, *_ = loss_inputs()
    logits[1, 2, 3] = value
    loss = build(cls)
    before = copy.deepcopy(loss.state_dict())
    message = "logits contain NaN" if value != value else "the features of the logits are not finite"  # noqa: PLR0124
    with pytest.raises(TokenDriftError, match=message) as caught:
        loss(logits, clean)
    assert "nothing was pushed" in str(caught.value)
    assert_same_state(loss, before)


@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
def test_nan_logits_at_observed_positions_do_not_matter(cls):
    logits, clean, noisy, predicted = loss_inputs()
    expected, grad = gradient(build(cls), logits, clean, noisy_ids=noisy, predicted=predicted)
    logits[~predicted] = float("nan")
    actual, wild = gradient(build(cls), logits, clean, noisy_ids=noisy, predicted=predicted)
    assert torch.equal(actual, expected)
    assert torch.equal(wild, grad)


@pytest.mark.parametrize(("cls", "options"), EVERY_LOSS)
@pytest.mark.parametrize("mask_id", [None, V - 1])
def test_entries_of_minus_infinity_are_closed_entries(cls, options, mask_id):
    """Whoever applies SUBS before the loss hands over -inf at the mask."""
    logits, clean, noisy, predicted = loss_inputs()
    arguments = {"noisy_ids": noisy, "predicted": predicted}
    expected, grad = gradient(build(cls, mask_id=V - 1, **options), logits, clean, **arguments)
    closed = logits.index_fill(-1, torch.tensor(V - 1), -torch.inf)
    actual, other = gradient(build(cls, mask_id=mask_id, **options), closed, clean, **arguments)
    assert actual > 0
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(other, grad, rtol=1e-10, atol=1e-15)


def test_a_feature_map_of_the_wrong_shape_is_named():
    logits, clean, *_ = loss_inputs()
    with pytest.raises(TokenDriftError, match=r"feature_map\(embeds\) must have shape \(B, M\), but it has 4 axes"):
        TokenDriftLoss(table(), lambda embeds: embeds[None])(logits, clean)
    with pytest.raises(TokenDriftError, match=r"one row for each sequence: \(B, M\), or \(B, W, M\) for windows"):
        TokenDriftLoss(table(), lambda embeds: embeds.flatten(0, 1))(logits, clean)


def test_windows_are_one_cloud_and_a_sequence_is_the_mean_over_its_windows():
    logits, clean, *_ = loss_inputs()
    batch_size, length = clean.shape
    windows = build(queue_size=0, reduction="none")
    whole = TokenDriftLoss(windows.embedding, lambda e: e.flatten(1)[:, None], queue_size=0, reduction="none")
    flat = TokenDriftLoss(windows.embedding, lambda e: e.flatten(1), queue_size=0, reduction="none")
    torch.testing.assert_close(whole(logits, clean), flat(logits, clean))  # one window is the whole sequence
    each = TokenDriftLoss(windows.embedding, lambda e: e, queue_size=0, reduction="none")
    loose = TokenDriftLoss(windows.embedding, lambda e: e[:, 0], queue_size=0, reduction="none")
    apart = loose(logits.flatten(0, 1)[:, None], clean.flatten()[:, None])  # every position a sequence of its own
    torch.testing.assert_close(each(logits, clean), apart.view(batch_size, length).mean(dim=1))


def test_loading_queues_of_another_size_is_refused_with_the_way_out():
    with pytest.raises(TokenDriftError, match="room for 5 features but this one for 6") as caught:
        build(queue_size=6).load_state_dict(build().state_dict())
    assert "queue_size=5" in str(caught.value)


def assert_same_state(loss, before):
    after = loss.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# ------------------------------------------------------------------------------------------------ never silently wrong


@pytest.mark.parametrize("side", ["real", "generated"])
def test_a_batch_with_nan_gives_nan_where_it_cannot_be_read_and_costs_no_other_batch(monkeypatch, side):
    monkeypatch.setattr(_objective, "can_be_read", lambda values: False)  # as on an accelerator
    logits, clean, *_ = loss_inputs()
    embedding = table()
    if side == "real":
        embedding[clean[0, 0]] = torch.nan
    else:
        logits[0] = torch.nan
    loss = TokenDriftLoss(embedding, feature_map, queue_size=8)
    assert loss(logits, clean).isnan()
    assert not len(loss.queue_real) or loss.queue_real.features().isfinite().all()
    loss._frozen._embedding = table()
    value, found = gradient(loss, loss_inputs(1)[0], clean)
    assert value > 0 and found.isfinite().all() and found.abs().sum() > 0
    assert loss.queue_generated.features().isfinite().all()


def test_clean_text_without_finite_features_is_refused_on_the_cpu():
    logits, clean, *_ = loss_inputs()
    loss = TokenDriftLoss(table(), lambda e: feature_map(e) if e.requires_grad else feature_map(e) * torch.inf)
    with pytest.raises(TokenDriftError, match="the features of the clean text are not finite"):
        loss(logits.requires_grad_(), clean)
    assert len(loss.queue_real) == 0


@pytest.mark.parametrize("power", [-100, 100])
def test_the_scale_of_the_embedding_does_not_matter_to_unit_features(power):
    logits, clean, *_ = loss_inputs(dtype=torch.float32)
    small, large = (
        gradient(TokenDriftLoss(table(torch.float32) * scale, IdentityFeatures()), logits, clean)
        for scale in (1.0, 2.0**power)
    )
    assert all(torch.equal(*each) for each in zip(small, large, strict=True))


def test_features_whose_squares_overflow_are_refused():
    logits, clean, *_ = loss_inputs(dtype=torch.float32)
    with pytest.raises(TokenDriftError, match="squares overflow"):
        TokenDriftLoss(table(torch.float32) * 1e30, lambda e: e.mean(dim=1))(logits, clean)


@pytest.mark.parametrize("scale", [1e38, 1e-38])
def test_scales_that_overflow_or_vanish_are_refused(scale):
    with pytest.raises(TokenDriftError, match=r"drift_scale \(alpha\) must lie between"):
        build(drift_scale=scale)
    with pytest.raises(TokenDriftError, match=r"step_size \(eta\) must lie between"):
        build(MirrorTeacherLoss, step_size=scale)


@pytest.mark.parametrize(
    "options", [{"drift_scale": 1e-10}, {"cls": MirrorTeacherLoss, "distance": "mse", "step_size": 1e-10}]
)
def test_a_small_scale_is_not_lost_in_rounding(options):
    logits, clean, *_ = loss_inputs(dtype=torch.float32)
    whole = {name: 1.0 if isinstance(value, float) else value for name, value in options.items()}
    small, large = (gradient(build(dtype=torch.float32, **each), logits, clean)[1] for each in (options, whole))
    torch.testing.assert_close(small * 1e10, large, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "rows", "learns"),
    [
        ({"queue_size": 0}, 1, False),
        ({"queue_size": 8}, 1, True),  # its queues fill
        ({"queue_size": 0, "exclude_paired_positive": True}, 1, False),
        ({"queue_size": 0, "feature_map": lambda e: 1e-30 * feature_map(e)}, 3, False),
        ({"queue_size": 0}, 3, True),
    ],
)
def test_a_step_that_cannot_learn_says_so_once(options, rows, learns):
    logits, clean, *_ = loss_inputs(dtype=torch.float32, rows=rows)
    loss = TokenDriftLoss(table(torch.float32), **({"feature_map": feature_map} | options))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            loss(logits, clean)
    assert [str(each.message)[:30] for each in said] == [] if learns else ["the drift of this call is zero"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cls", [TokenDriftLoss, MirrorTeacherLoss])
def test_checkpointing_the_loss_is_refused_unless_its_queues_are_frozen(cls, reentrant):
    logits, clean, *_ = loss_inputs()
    plain, loss, other = (build(cls) for _ in range(3))
    expected = gradient(plain, logits, clean)
    with pytest.raises(TokenDriftError, match="computed again during the backward pass"):
        gradient(lambda *each: checkpoint(loss, *each, use_reentrant=reentrant), logits, clean)
    with other.frozen_queues():
        found = gradient(lambda *each: checkpoint(other, *each, use_reentrant=reentrant), logits, clean)
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
    for name in ("queue_real", "queue_generated"):
        assert torch.equal(getattr(other, name).features(), getattr(plain, name).features())


@pytest.mark.parametrize("form", [lambda drift: drift[:1], lambda drift: drift[:, 0], lambda drift: drift.tolist()])
def test_a_drift_that_would_be_broadcast_to_the_features_is_refused(form):
    logits, clean, *_ = loss_inputs()
    loss = build(field=lambda anchors, *_, **__: form(torch.ones_like(anchors)))
    with pytest.raises(TokenDriftError, match=r"field must return a drift for each anchor, \(N, M\)"):
        loss(logits, clean)


def test_the_queues_of_a_loss_are_built_on_the_device_of_its_embedding():
    loss = TokenDriftLoss(torch.empty(V, D, device="meta"), IdentityFeatures())
    assert {buffer.device.type for buffer in loss.buffers()} == {"meta"}


def test_the_loss_runs_on_tensors_without_data():
    with torch.device("meta"):
        loss = TokenDriftLoss(torch.empty(V, D), IdentityFeatures())
        logits = torch.empty(B, L, V, requires_grad=True)
        loss(logits, torch.empty(B, L, dtype=torch.int64)).backward()
    assert logits.grad.shape == logits.shape
