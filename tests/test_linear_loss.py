"""Laws of the drifting loss from hidden states: all is as with their logits, which never exist."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from test_loss import L, V, assert_same_state, build, feature_map, loss_inputs
from torch.nn.functional import linear

from tokendrift import LinearLogits, MirrorTeacherLoss, TokenDriftError, TokenDriftLoss
from tokendrift.loss import token_entropy

H = 3
NAMES = ("hidden", "weight", "bias")


def operands(seed=0, *, dtype=torch.float64, biased=True):
    """The operands of an output layer, with the ids that `batch` gives to the same seed."""
    _, clean, noisy, predicted = loss_inputs(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((*clean.shape, H), (V, H), (V,))
    )
    return LinearLogits(hidden, weight, bias if biased else None), clean, noisy, predicted


def gradients(loss, form, data, *arguments, **options):
    """Return the loss and the gradient of each operand."""
    leaves = LinearLogits(*(None if part is None else part.detach().clone().requires_grad_() for part in data))
    value = loss(form(leaves), *arguments, **options)
    value.sum().backward()
    return value.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def product(data):
    return linear(*data)


def untouched(data):
    return data


# ------------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@given(
    seed=st.integers(0, 2**31 - 1),
    biased=st.booleans(),
    partly=st.booleans(),
    masked=st.booleans(),
    padded=st.booleans(),
)
def test_loss_gradients_and_queues_are_those_of_the_logits(reduction, seed, biased, partly, masked, padded):
    data, clean, noisy, predicted = operands(seed, biased=biased)
    everything = {"noisy_ids": torch.full_like(clean, V - 1)} if masked else {}
    arguments = {"noisy_ids": noisy, "predicted": predicted} if partly else everything
    if padded:
        arguments["attention_mask"] = torch.arange(L) < torch.tensor([[L], [L - 1], [2]])
    theirs, mine = (build(reduction=reduction, mask_id=V - 1 if masked else None) for _ in range(2))
    expected, wanted = gradients(theirs, product, data, clean, **arguments)
    value, found = gradients(mine, untouched, data, clean, **arguments)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    assert wanted[0].abs().max() > 0
    for name, own, other in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    for queue in ("queue_real", "queue_generated"):
        own, other = (getattr(loss, queue).features() for loss in (mine, theirs))
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


def test_gradients_of_observed_positions_are_exactly_zero():
    data, clean, noisy, predicted = operands()
    _, (hidden, *_) = gradients(build(), untouched, data, clean, noisy_ids=noisy, predicted=predicted)
    assert torch.equal(hidden[~predicted], torch.zeros_like(hidden[~predicted]))
    assert hidden[predicted].abs().min() > 0


def test_nothing_predicted_is_a_loss_of_zero_with_zero_gradients():
    data, clean, noisy, predicted = operands()
    nothing = {"noisy_ids": noisy, "predicted": torch.zeros_like(predicted)}
    value, found = gradients(build(), untouched, data, clean, **nothing)
    assert value == 0
    assert not any(gradient.any() for gradient in found)
    assert build()(data, clean, **nothing, return_diagnostics=True).diagnostics.token_entropy == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_diagnostics_are_those_of_the_logits(masked, biased):
    data, clean, noisy, predicted = operands(biased=biased)
    options = {"noisy_ids": noisy, "predicted": predicted, "return_diagnostics": True}
    mine, theirs = (build(mask_id=V - 1 if masked else None)(x, clean, **options) for x in (data, product(data)))
    torch.testing.assert_close(mine.diagnostics.token_entropy, theirs.diagnostics.token_entropy, rtol=1e-12, atol=0)
    for own, other in zip(mine.diagnostics.field, theirs.diagnostics.field, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
    assert mine.diagnostics[2:] == theirs.diagnostics[2:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_logits_of_that_dtype(dtype):
    """Against float64 on the same operands, in the mean over 20 seeds."""
    errors = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(20):
        data, clean, *_ = operands(seed, dtype=dtype)
        exact = LinearLogits(*(part.double() for part in data))
        _, wanted = gradients(build(queue_size=0), product, exact, clean)
        for row, form in enumerate((untouched, product)):
            value, found = gradients(build(queue_size=0, dtype=torch.float32), form, data, clean)
            assert value.dtype == torch.float32
            assert {own.dtype for own in found} == {dtype}
            each = [(own.double() - other).norm() / other.norm() for own, other in zip(found, wanted, strict=True)]
            errors[row] += torch.stack(each) / 20
    mine, theirs = errors
    assert (mine < 0.02).all()
    assert (mine <= 1.1 * theirs).all(), errors


@pytest.mark.slow
def test_the_compiled_loss_equals_eager():
    torch.compiler.reset()
    eager, inner = build(filled=False), build(filled=False)
    compiled = torch.compile(inner, backend="aot_eager")
    for seed in range(2):
        data, clean, noisy, predicted = operands(seed)
        arguments = {"noisy_ids": noisy, "predicted": predicted}
        expected, wanted = gradients(eager, untouched, data, clean, **arguments)
        value, found = gradients(compiled, untouched, data, clean, **arguments)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        for own, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("diagnose", [False, True])
def test_nothing_of_the_size_of_the_logits_is_held(diagnose):
    rows, length, vocab = 64, 64, 8192
    shapes = ((rows, length, H), (vocab, H), (vocab,))
    data = LinearLogits(*(torch.randn(shape).requires_grad_() for shape in shapes))
    clean = torch.randint(vocab, (rows, length))
    loss = TokenDriftLoss(torch.randn(vocab, 4), feature_map, queue_size=8)
    with LiveBytes() as count:
        out = loss(data, clean, return_diagnostics=diagnose)
        (out.loss if diagnose else out).backward()
    assert 0 < count.peak < 0.25 * rows * length * vocab * 4  # two blocks of the lift, 64 rows of the entropy


@given(seed=st.integers(0, 2**31 - 1), masked=st.booleans())
def test_the_entropy_of_hidden_states_is_that_of_their_logits(seed, masked):
    data, _, _, predicted = operands(seed)
    mask_id = V - 1 if masked else None
    expected = token_entropy(product(data), predicted, mask_id)
    torch.testing.assert_close(token_entropy(data, predicted, mask_id), expected, rtol=1e-12, atol=0)


def test_the_entropy_takes_a_few_rows_at_a_time():
    logits = torch.randn(64, 64, 512)
    with LiveBytes() as count:
        token_entropy(logits)
    assert 0 < count.peak < 0.1 * logits.nbytes


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(L, H)}, r"hidden must have shape \(B, L, H\), but it has 2 axes"),
        ({"hidden": torch.zeros(3, L, H + 1)}, r"hidden has width 4 \(H\) but weight has 3 columns \(H\)"),
        ({"hidden": torch.zeros(3, L + 1, H)}, r"clean_ids must have shape \(B, L\) = \(3, 6\)"),
        ({"weight": torch.zeros(V + 1, H)}, r"weight has 8 rows \(V\) but embedding has 7 rows \(V\)"),
        ({"bias": torch.zeros(V + 1)}, "bias must have V = 7 entries"),
        ({"weight": torch.zeros(V, H, device="meta")}, "weight is on meta but hidden is on cpu"),
        ({"hidden": torch.full((3, L, H), torch.nan)}, "hidden, weight or bias contain NaN"),
        ({"bias": torch.full((V,), torch.inf)}, "the features of the logits are not finite"),
    ],
)
def test_bad_operands_are_refused_before_anything_is_pushed(arguments, message):
    data, clean, *_ = operands(dtype=torch.float32)
    loss = build(dtype=torch.float32)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with pytest.raises(TokenDriftError, match=message):
        loss(data._replace(**arguments), clean)
    assert_same_state(loss, before)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (build(lift="straight_through"), r"lift='straight_through' needs the logits themselves[\s\S]*linear\(\*logits"),
        (
            build(MirrorTeacherLoss),
            r"the mirror teacher needs the logits themselves, but was given LinearLogits[\s\S]*linear\(\*logits",
        ),
    ],
)
def test_what_needs_the_logits_says_so(loss, message):
    data, clean, *_ = operands()
    with pytest.raises(TokenDriftError, match=message):
        loss(data, clean)
    assert loss(product(data), clean) > 0
