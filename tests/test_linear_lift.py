"""Laws of the lift of hidden states: e = softmax(W h + b) E, without ever holding the logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from torch.nn.functional import linear

from tokendrift import TokenDriftError, linear_soft_token_lift, soft_token_lift
from tokendrift._linear_lift_ops import linear_lift

TINY = 1e-6  # MiB: forces the smallest chunks, 64 tokens
NAMES = ("hidden", "weight", "bias", "embedding")


def linear_lift_inputs(rows=2, length=5, vocab=11, inner=6, width=7, *, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, length, inner), (vocab, inner), (vocab,), (vocab, width))
    data = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    data[0] *= scale
    noisy_ids = torch.randint(vocab, (rows, length), generator=generator)
    predicted = torch.rand(rows, length, generator=generator) < 0.5
    upstream = torch.randn(rows, length, width, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in data], noisy_ids, predicted, upstream


def gradients(lift, data, upstream):
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in data]
    lifted = lift(*leaves)
    lifted.backward(upstream.to(lifted.dtype))
    return lifted.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def unfused(**options):
    return lambda hidden, weight, bias, table: soft_token_lift(linear(hidden, weight, bias), table, **options)


def fused(**options):
    return lambda *data: linear_soft_token_lift(*data, **options)


# ------------------------------------------------------------------------------------------------ laws


@given(
    rows=st.integers(1, 40),
    length=st.integers(1, 9),
    vocab=st.integers(2, 9),
    seed=st.integers(0, 2**31 - 1),
    partly=st.booleans(),
    masked=st.booleans(),
    biased=st.booleans(),
    block=st.integers(1, 10),
)
def test_blocks_of_tokens_and_vocabulary_change_nothing(rows, length, vocab, seed, partly, masked, biased, block):
    """Up to 360 tokens in chunks of 64, up to 9 blocks of the vocabulary; the lift of the logits is the truth."""
    data, noisy_ids, predicted, upstream = linear_lift_inputs(rows, length, vocab, 4, 3, seed=seed)
    data[2] = data[2] if biased else None
    options = {"mask_id": seed % vocab if masked else None}
    if partly:
        options |= {"noisy_ids": noisy_ids, "predicted": predicted}
    expected, expected_gradients = gradients(unfused(**options), data, upstream)
    for workspace_mib in (TINY, 64.0):
        lifted, found = gradients(fused(workspace_mib=workspace_mib, vocab_block=block, **options), data, upstream)
        torch.testing.assert_close(lifted, expected, rtol=1e-12, atol=1e-13)
        for name, mine, theirs in zip(NAMES, found, expected_gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mask_id", [None, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_those_of_finite_differences(mask_id, biased):
    (hidden, weight, bias, table), *_ = linear_lift_inputs(2, 2, 5, 3, 4)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias, table)]

    def lift(hidden, weight, bias, table):
        return linear_soft_token_lift(hidden, weight, bias if biased else None, table, mask_id=mask_id, vocab_block=2)

    assert torch.autograd.gradcheck(lift, inputs if biased else [*inputs[:2], bias.detach(), table], fast_mode=False)


@pytest.mark.parametrize("trained", NAMES)
def test_each_gradient_alone_is_the_one_of_all_together(trained):
    data, _, _, upstream = linear_lift_inputs()
    _, together = gradients(fused(vocab_block=4), data, upstream)
    which = NAMES.index(trained)
    data[which] = data[which].clone().requires_grad_()
    linear_soft_token_lift(*data, vocab_block=4).backward(upstream)
    assert torch.equal(data[which].grad, together[which])


@given(shift=st.floats(-1e4, 1e4), seed=st.integers(0, 2**31 - 1))
def test_a_constant_added_to_the_bias_changes_nothing(shift, seed):
    (hidden, weight, bias, table), *_ = linear_lift_inputs(seed=seed)
    moved = linear_soft_token_lift(hidden, weight, bias + shift, table, vocab_block=3)
    # The sum rounds to 1e4 * 2^-53 = 1e-12.
    torch.testing.assert_close(moved, linear_soft_token_lift(hidden, weight, bias, table), rtol=0, atol=1e-10)


def test_far_logits_neither_overflow_nor_lose_the_normalisation():
    data, _, _, upstream = linear_lift_inputs(scale=1e4, dtype=torch.float32)
    lifted, found = gradients(fused(vocab_block=3), data, upstream)
    expected, wanted = gradients(unfused(), data, upstream)
    torch.testing.assert_close(lifted, expected, rtol=1e-5, atol=1e-5)
    # Gradients to the weight are sums of hidden states of 1e4 times differences that cancel to 1e-7.
    for mine, theirs, atol in zip(found, wanted, (1e-5, 1e-1, 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("closed", [[0, 1], [4, 5], [9, 10]])
def test_a_block_whose_every_entry_is_closed_is_passed_over(closed):
    data, _, _, upstream = linear_lift_inputs()
    data[2][closed[0]] = -torch.inf
    lifted, found = gradients(fused(vocab_block=2 if closed[0] != 9 else 9, mask_id=closed[1]), data, upstream)
    expected, wanted = gradients(unfused(mask_id=closed[1]), data, upstream)
    torch.testing.assert_close(lifted, expected, rtol=1e-12, atol=1e-13)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_of_observed_positions_are_exactly_zero():
    data, noisy_ids, predicted, upstream = linear_lift_inputs()
    lifted, found = gradients(fused(noisy_ids=noisy_ids, predicted=predicted), data, upstream)
    assert torch.equal(lifted[~predicted], data[3][noisy_ids[~predicted]])
    assert torch.equal(found[0][~predicted], torch.zeros_like(found[0][~predicted]))
    assert found[0][predicted].abs().min() > 0


def test_no_predicted_position_is_a_look_up():
    data, noisy_ids, predicted, upstream = linear_lift_inputs()
    options = {"noisy_ids": noisy_ids, "predicted": torch.zeros_like(predicted)}
    lifted, found = gradients(fused(**options), data, upstream)
    assert torch.equal(lifted, data[3][noisy_ids])
    assert all(not gradient.any() for gradient in found[:3])


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_plain_form(dtype):
    """Against float64 on the same inputs; in every gradient the error of the plain form is the allowance."""
    data, _, _, upstream = linear_lift_inputs(4, 32, 800, 48, 24, dtype=dtype, scale=0.3)
    upstream = upstream.to(dtype)

    def plain(hidden, weight, bias, table):
        return torch.softmax(linear(hidden, weight, bias), dim=-1) @ table

    truth, true_gradients = gradients(plain, [tensor.double() for tensor in data], upstream)
    naive, naive_gradients = gradients(plain, data, upstream)
    mine, my_gradients = gradients(fused(vocab_block=128), data, upstream)
    assert mine.dtype == torch.float32
    results = zip(
        ("e", *NAMES), [mine, *my_gradients], [naive, *naive_gradients], [truth, *true_gradients], strict=True
    )
    for name, own, other, exact in results:
        own_error, naive_error = ((x.double() - exact).norm() / exact.norm() for x in (own, other))
        assert 0 < own_error <= naive_error * 1.02, (name, own_error, naive_error)  # 2 %: chance of equal roundings


def test_under_autocast_the_result_is_that_outside():
    data, _, _, upstream = linear_lift_inputs(dtype=torch.float32)
    expected, wanted = gradients(fused(), data, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lifted, found = gradients(fused(), data, upstream)
    assert torch.equal(lifted, expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


# ------------------------------------------------------------------------------------------------ torch


@pytest.mark.parametrize("biased", [False, True])
def test_the_operators_keep_the_contract_of_torch_library(biased):
    data, *_ = linear_lift_inputs(2, 3, 5, 4, 6)
    hidden, weight, bias, table = data[0].view(6, 4), data[1], data[2] if biased else None, data[3]
    leaves = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias, table)]
    torch.library.opcheck(linear_lift, (*leaves, 1, 64, 2))
    lifted, scale = linear_lift(hidden, weight, bias, table, 1, 64, 2)
    need = (True, False, biased, True)
    arguments = (torch.ones_like(lifted), hidden, weight, bias, table, 1, 64, 2, lifted, scale, list(need))
    torch.library.opcheck(torch.ops.tokendrift.linear_soft_token_lift_backward.default, arguments)


def test_lifting_under_functional_compilation_equals_eager():
    data, noisy_ids, predicted, upstream = linear_lift_inputs()
    lift = fused(noisy_ids=noisy_ids, predicted=predicted, mask_id=1, vocab_block=4)
    expected, wanted = gradients(lift, data, upstream)
    lifted, found = gradients(torch.compile(lift, backend="aot_eager"), data, upstream)
    torch.testing.assert_close(lifted, expected, rtol=1e-12, atol=1e-13)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ bytes and products


def counted(tokens, vocab, inner, width, dtype=torch.float32, **options):
    shapes = ((1, tokens, inner), (vocab, inner), (vocab,), (vocab, width))
    hidden, weight, bias, table = (torch.empty(shape, device="meta", dtype=dtype) for shape in shapes)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    upstream = torch.empty(1, tokens, width, device="meta")
    with LiveBytes() as count:
        linear_soft_token_lift(*leaves, table, **options).backward(upstream)
    answer = sum(leaf.grad.nbytes for leaf in leaves)
    return count, answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_id", [None, 7])
def test_peak_memory_has_no_term_of_tokens_times_vocabulary(dtype, mask_id):
    """Bytes are linear in tokens at any vocabulary, with the same slope: twice both adds twice each, no product."""
    sizes = {}
    for tokens in (4096, 8192):
        for vocab in (8192, 16384):
            options = {"mask_id": mask_id, "workspace_mib": 64.0, "vocab_block": 4096}
            sizes[tokens, vocab] = counted(tokens, vocab, 768, 768, dtype, **options)[0].peak
    cross = sizes[8192, 16384] - sizes[8192, 8192] - sizes[4096, 16384] + sizes[4096, 8192]
    assert cross == 0
    assert sizes[8192, 16384] > sizes[4096, 8192] > 0


def test_workspace_and_a_few_tensors_of_tokens_are_all_that_is_held():
    count, answer = counted(8192, 50258, 768, 768, workspace_mib=64.0, vocab_block=4096)
    of_tokens = 8192 * 768 * 4
    blocks = 2 * 4096 * 768 * 4
    assert count.peak - answer <= 1.5 * 64 * 2**20 + 6 * of_tokens + blocks
    assert count.peak - answer < 0.2 * 8192 * 50258 * 4  # the plain form holds three times the logits


def test_products_are_the_bare_ones_and_the_logits_once_more():
    tokens, vocab, inner, width = 1000, 5000, 96, 64
    count, _ = counted(tokens, vocab, inner, width, vocab_block=512, workspace_mib=1.0)
    assert count.flops == 2 * tokens * vocab * (4 * inner + 2 * width)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(5, 6)}, r"hidden must have shape \(B, L, H\), but it has 2 axes"),
        ({"hidden": torch.zeros(2, 5, 7)}, r"hidden has width 7 \(H\) but weight has 6 columns \(H\)"),
        ({"hidden": torch.zeros(2, 5, 6, dtype=torch.int64)}, "hidden must be floating point"),
        ({"hidden": torch.zeros(2, 5, 6, device="meta")}, "weight is on cpu but hidden is on meta"),
        ({"weight": torch.zeros(12, 6)}, r"weight has 12 rows \(V\) but embedding has 11 rows \(V\)"),
        ({"bias": torch.zeros(10)}, "bias must have V = 11 entries, one for each row of weight"),
        ({"bias": torch.zeros(11, 1)}, r"bias must have shape \(V,\)"),
        ({"embedding": torch.zeros(11)}, r"embedding must have shape \(V, D\)"),
        ({"mask_id": 11}, r"mask_id must lie in \[0, V\) with V = 11"),
        ({"workspace_mib": -1.0}, "workspace_mib must be a finite number above 0"),
        ({"vocab_block": 0}, "vocab_block must be an integer of at least 1"),
        ({"noisy_ids": None}, "predicted was given without noisy_ids"),
        ({"predicted": torch.ones(2, 4, dtype=torch.bool)}, r"predicted must have shape \(B, L\) = \(2, 5\)"),
    ],
)
def test_bad_input_is_refused_with_what_came(arguments, message):
    data, noisy_ids, predicted, _ = linear_lift_inputs(dtype=torch.float32)
    good = dict(zip(NAMES, data, strict=True)) | {"noisy_ids": noisy_ids, "predicted": predicted}
    with pytest.raises(TokenDriftError, match=message):
        linear_soft_token_lift(**(good | arguments))
