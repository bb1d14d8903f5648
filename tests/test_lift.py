"""Laws of the soft-token lift: e = softmax(logits) E, without ever keeping the softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes

from tokendrift import TokenDriftError, soft_token_lift
from tokendrift._lift_ops import soft_lift
from tokendrift.lift import straight_through_lift

CASES = ["base", "sharp", "large_vocab"]
TINY = 1e-6  # MiB: forces the smallest chunks, 64 rows


def lifted_by_hand(logits, embedding, noisy_ids=None, predicted=None, mask_id=None):
    if mask_id is not None:
        logits = logits.index_fill(-1, torch.tensor(mask_id), -torch.inf)
    soft = logits.softmax(-1) @ embedding
    return soft if predicted is None else torch.where(predicted[..., None], soft, embedding[noisy_ids])


def lift_inputs(rows=2, length=5, vocab=11, width=7, *, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, vocab, generator=generator, dtype=dtype) * scale
    embedding = torch.randn(vocab, width, generator=generator, dtype=dtype)
    noisy_ids = torch.randint(vocab, (rows, length), generator=generator)
    predicted = torch.rand(rows, length, generator=generator) < 0.5
    return logits, embedding, noisy_ids, predicted


# ------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("workspace_mib", [TINY, 256.0])
@pytest.mark.parametrize("case", CASES)
def test_lift_and_both_gradients_have_the_golden_values(golden, case, workspace_mib):
    numbers = golden("lift")
    logits, embedding = (numbers[f"{case}.{name}"].clone().requires_grad_() for name in ("logits", "E"))
    lifted = soft_token_lift(logits, embedding, workspace_mib=workspace_mib)
    lifted.backward(numbers[f"{case}.upstream_grad"])
    numbers.assert_matches(lifted, f"{case}.e")
    numbers.assert_matches(logits.grad, f"{case}.grad_logits")
    numbers.assert_matches(embedding.grad, f"{case}.grad_E")


@pytest.mark.parametrize("case", CASES)
def test_observed_positions_and_a_closed_entry_have_the_golden_values(golden, case):
    numbers = golden("lift")
    logits, observed = numbers[f"{case}.logits"].clone().requires_grad_(), numbers[f"{case}.observed"].bool()
    closed = numbers[f"{case}.excluded_id"].item()
    lifted = soft_token_lift(
        logits, numbers[f"{case}.E"], noisy_ids=numbers[f"{case}.x_t"], predicted=~observed, mask_id=closed
    )
    lifted.backward(numbers[f"{case}.upstream_grad"])
    numbers.assert_matches(lifted, f"{case}.e_observed")
    numbers.assert_matches(logits.grad, f"{case}.grad_logits_observed")
    assert torch.equal(logits.grad[observed], torch.zeros_like(logits.grad[observed]))  # exactly, not nearly
    assert torch.equal(logits.grad[..., closed], torch.zeros_like(logits.grad[..., closed]))


# ------------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("mask_id", [None, 0, 4])
@pytest.mark.parametrize("partly", [False, True])
def test_gradients_are_those_of_finite_differences(mask_id, partly):
    logits, embedding, noisy_ids, predicted = lift_inputs(2, 3, 5, 4)
    options = {"noisy_ids": noisy_ids % 5, "predicted": predicted} if partly else {}
    assert not partly or 0 < predicted.sum() < predicted.numel()

    def lift(logits, embedding):
        return soft_token_lift(logits, embedding, mask_id=mask_id, **options)

    embedding.requires_grad_(not partly)  # of observed rows the table gets a gradient too, outside the operator
    assert torch.autograd.gradcheck(lift, (logits.requires_grad_(), embedding), fast_mode=False)


def test_the_embedding_of_observed_positions_gets_its_gradient():
    logits, embedding, noisy_ids, predicted = lift_inputs()
    mine, theirs = embedding.clone().requires_grad_(), embedding.clone().requires_grad_()
    upstream = torch.randn(2, 5, 7, dtype=torch.float64)
    soft_token_lift(logits, mine, noisy_ids=noisy_ids, predicted=predicted).backward(upstream)
    lifted_by_hand(logits, theirs, noisy_ids, predicted).backward(upstream)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@given(
    rows=st.integers(1, 40),
    length=st.integers(1, 9),
    vocab=st.integers(2, 9),
    seed=st.integers(0, 2**31 - 1),
    partly=st.booleans(),
    masked=st.booleans(),
)
def test_chunks_change_nothing(rows, length, vocab, seed, partly, masked):
    """Up to 360 rows in chunks of 64: full chunks, a part chunk, no chunk."""
    logits, embedding, noisy_ids, predicted = lift_inputs(rows, length, vocab, 3, seed=seed)
    options = {"mask_id": vocab - 1 if masked else None}
    if partly:
        options |= {"noisy_ids": noisy_ids, "predicted": predicted}
    upstream = torch.randn(rows, length, 3, dtype=torch.float64)
    found = []
    for workspace_mib in (TINY, 64.0):
        leaf = logits.clone().requires_grad_()
        out = soft_token_lift(leaf, embedding, workspace_mib=workspace_mib, **options)
        out.backward(upstream)
        found.append((out.detach(), leaf.grad))
    leaf = logits.clone().requires_grad_()
    by_hand = lifted_by_hand(leaf, embedding, **options)
    by_hand.backward(upstream)
    for out, gradient in found:
        torch.testing.assert_close(out, by_hand.detach(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-13)


@given(shift=st.floats(-1e4, 1e4), seed=st.integers(0, 2**31 - 1))
def test_a_constant_added_to_the_logits_of_a_position_changes_nothing(shift, seed):
    logits, embedding, *_ = lift_inputs(seed=seed)
    moved = soft_token_lift(logits + shift, embedding)
    # The sum rounds to 1e4 * 2^-53 = 1e-12.
    torch.testing.assert_close(moved, soft_token_lift(logits, embedding), rtol=0, atol=1e-10)


def test_certain_logits_look_the_token_up():
    _, embedding, ids, _ = lift_inputs()
    certain = torch.nn.functional.one_hot(ids, 11).double() * 1e4
    assert torch.equal(soft_token_lift(certain, embedding), embedding[ids])


def test_the_closed_entry_may_hold_anything():
    logits, embedding, *_ = lift_inputs()
    expected = soft_token_lift(logits, embedding, mask_id=3)
    wild = logits.clone()
    wild[..., 3] = 1e6
    assert torch.equal(soft_token_lift(wild, embedding, mask_id=3), expected)
    assert wild[0, 0, 3] == 1e6  # read, not written


def test_no_predicted_position_is_a_look_up_with_zero_gradient():
    logits, embedding, noisy_ids, _ = lift_inputs()
    logits.requires_grad_()
    lifted = soft_token_lift(logits, embedding, noisy_ids=noisy_ids, predicted=torch.zeros(2, 5, dtype=torch.bool))
    assert torch.equal(lifted, embedding[noisy_ids])
    lifted.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("partly", [False, True])
def test_the_memory_layout_of_the_logits_does_not_matter(layout, partly):
    dense, embedding, noisy_ids, predicted = lift_inputs()
    leaf = dense.clone().requires_grad_()
    if layout == "transposed":
        logits = leaf.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        logits = torch.cat([leaf, leaf], dim=-1)[..., :11]
    else:
        logits = leaf[:1].expand(2, -1, -1)
    assert not logits.is_contiguous()
    options = {"noisy_ids": noisy_ids, "predicted": predicted} if partly else {}
    upstream = torch.randn(2, 5, 7, dtype=torch.float64)
    out = soft_token_lift(logits, embedding, **options)
    out.backward(upstream)
    mine, leaf.grad = leaf.grad, None
    by_hand = lifted_by_hand(logits, embedding, **options)
    torch.testing.assert_close(out, by_hand, rtol=1e-12, atol=1e-13)
    by_hand.backward(upstream)
    torch.testing.assert_close(mine, leaf.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("partly", [False, True])
def test_half_precision_logits_are_lifted_in_float32(dtype, partly):
    logits, embedding, noisy_ids, predicted = lift_inputs(dtype=torch.float32)
    options = {"noisy_ids": noisy_ids, "predicted": predicted} if partly else {}
    half = logits.to(dtype).requires_grad_()
    lifted = soft_token_lift(half, embedding, mask_id=2, **options)
    assert lifted.dtype == torch.float32
    exact = half.detach().float().requires_grad_()
    expected = soft_token_lift(exact, embedding, mask_id=2, **options)
    torch.testing.assert_close(lifted, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(2, 5, 7)
    lifted.backward(upstream)
    expected.backward(upstream)
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, exact.grad.to(dtype), rtol=1e-2, atol=1e-3)  # one rounding to half


def test_a_half_precision_embedding_is_read_exactly():
    logits, embedding, *_ = lift_inputs(dtype=torch.float32)
    rounded = embedding.bfloat16()
    assert torch.equal(soft_token_lift(logits, rounded), soft_token_lift(logits, rounded.float()))


@pytest.mark.parametrize("partly", [False, True])
def test_the_operators_keep_the_contract_of_torch_library(partly):
    logits, embedding, _, predicted = lift_inputs(2, 3, 5, 4)
    rows, index = logits.reshape(6, 5).requires_grad_(), predicted.reshape(-1).nonzero()[:, 0] if partly else None
    torch.library.opcheck(soft_lift, (rows, embedding.requires_grad_(), index, 2, 64))
    lifted = soft_lift(rows.detach(), embedding.detach(), index, 2, 64)
    for needed in ((True, True), (True, False), (False, True)):
        arguments = (torch.ones_like(lifted), rows.detach(), embedding.detach(), index, 2, 64, list(needed))
        torch.library.opcheck(torch.ops.tokendrift.soft_token_lift_backward.default, arguments)


def test_backward_keeps_no_softmax():
    """What autograd saves beside its inputs is (T, D), not (T, V)."""
    logits, embedding, *_ = lift_inputs(4, 32, 500, 6)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        soft_token_lift(logits.requires_grad_(), embedding)
    kept = [x for x in saved if x.data_ptr() not in (logits.data_ptr(), embedding.data_ptr())]
    assert sum(x.numel() for x in kept) <= 4 * 32 * 6


def test_lifting_under_functional_compilation_equals_eager():
    logits, embedding, noisy_ids, predicted = lift_inputs()

    def lift(logits):
        return soft_token_lift(logits, embedding, noisy_ids=noisy_ids, predicted=predicted, mask_id=1)

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    lift(eager).square().sum().backward()
    torch.compile(lift, backend="aot_eager")(compiled).square().sum().backward()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-12, atol=1e-13)


def test_a_graph_may_hold_a_number_of_predicted_positions_known_only_when_run():
    logits, embedding, noisy_ids, predicted = lift_inputs()

    def lift(logits, predicted):
        return soft_token_lift(logits, embedding, noisy_ids=noisy_ids, predicted=predicted)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lift, backend="aot_eager", fullgraph=True)
        for which in (predicted, ~predicted):
            assert torch.equal(compiled(logits, which), lift(logits, which))


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_gradient_alone_is_the_one_of_both_together(partly, dtype):
    logits, embedding, _, predicted = lift_inputs(4, 20, 30, 8, dtype=dtype)
    index = predicted.reshape(-1).nonzero()[:, 0] if partly else None

    def gradients(of_logits, of_embedding):
        rows, table = (x.detach().clone() for x in (logits.view(80, 30), embedding))
        lifted = soft_lift(rows.requires_grad_(of_logits), table.requires_grad_(of_embedding), index, 3, 64)
        lifted.backward(torch.linspace(-1, 1, lifted.numel(), dtype=lifted.dtype).view_as(lifted))
        return rows.grad, table.grad

    both = gradients(True, True)
    assert torch.equal(gradients(True, False)[0], both[0])
    assert torch.equal(gradients(False, True)[1], both[1])


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("mask_id", [None, 5])
@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize(("dtype", "table_dtype"), [("bfloat16",) * 2, ("bfloat16", "float32"), ("float16",) * 2])
def test_half_precision_is_no_worse_than_the_plain_form(dtype, table_dtype, partly, mask_id):
    """Against float64 on the same inputs; the error of softmax(logits) @ E in half precision is the allowance."""
    half = getattr(torch, dtype)
    logits, embedding, noisy_ids, predicted = lift_inputs(4, 32, 800, 24, dtype=half)
    embedding = embedding.to(getattr(torch, table_dtype))
    options = {"noisy_ids": noisy_ids, "predicted": predicted} if partly else {}
    upstream = torch.randn(4, 32, 24, generator=torch.Generator().manual_seed(1)).to(half)

    def results(lift, *data):
        leaves = [x.clone().requires_grad_() for x in data]
        lifted = lift(*leaves, mask_id=mask_id, **options)
        lifted.backward(upstream.to(lifted.dtype))
        return [x.double() for x in (lifted.detach(), *(leaf.grad for leaf in leaves))]

    exact = results(lifted_by_hand, logits.double(), embedding.double())
    naive = results(lifted_by_hand, logits, embedding.to(half))
    mine = results(soft_token_lift, logits, embedding)
    for name, own, other, truth in zip(("e", "logits", "embedding"), mine, naive, exact, strict=True):
        own_error, naive_error = ((x - truth).norm() / truth.norm() for x in (own, other))
        assert 0 < own_error <= naive_error * 1.02, (name, own_error, naive_error)  # 2 %: chance of equal roundings


def test_under_autocast_the_result_is_that_outside():
    logits, embedding, noisy_ids, predicted = lift_inputs(dtype=torch.float32)
    found = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (logits, embedding)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            lifted = soft_token_lift(*leaves, noisy_ids=noisy_ids, predicted=predicted, mask_id=2)
            lifted.square().sum().backward()
        found.append((lifted, *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(outside, inside) for outside, inside in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------------ bytes and products

F32, BF16 = torch.float32, torch.bfloat16
SIZES = [(50258, 768), (30522, 384)]


class HalfPredicted(LiveBytes):
    """A count for which every second position is predicted: meta tensors have no values to tell which."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty(args[0].numel() // 2, 1, dtype=torch.int64)
        return super().__torch_dispatch__(func, types, args, kwargs)


def counted(tokens, vocab, width, dtype=F32, table_dtype=F32, *, trained=False, partly=False, mask_id=None):
    """Return the count of a lift forward and backward, and the bytes of logits."""
    logits = torch.empty(1, tokens, vocab, device="meta", dtype=dtype, requires_grad=True)
    embedding = torch.empty(vocab, width, device="meta", dtype=table_dtype, requires_grad=trained)
    upstream = torch.empty(1, tokens, width, device="meta")
    options = {}
    if partly:
        options["noisy_ids"] = torch.empty(1, tokens, device="meta", dtype=torch.int64)
        options["predicted"] = torch.empty(1, tokens, device="meta", dtype=torch.bool)
    with HalfPredicted() if partly else LiveBytes() as count:
        soft_token_lift(logits, embedding, mask_id=mask_id, **options).backward(upstream)
    return count, logits.nbytes


@pytest.mark.parametrize(
    ("partly", "mask_id"),
    [(False, None), (True, 7), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((True, None), (False, 7)))],
)
@pytest.mark.parametrize("tokens", [2048, pytest.param(8192, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("vocab", "width"), SIZES)
@pytest.mark.parametrize(("dtype", "table_dtype", "share"), [(F32, F32, 0.10), (BF16, F32, 0.20), (BF16, BF16, 0.20)])
def test_peak_memory_is_logits_and_gradient_and_little_more(
    dtype, table_dtype, share, vocab, width, tokens, partly, mask_id
):
    """What is alive beyond the gradient of the logits, the output included: 10 %, or 20 % with float32 scratch."""
    count, logits = counted(tokens, vocab, width, dtype, table_dtype, partly=partly, mask_id=mask_id)
    assert logits < count.peak <= (1 + share) * logits


@pytest.mark.parametrize(("vocab", "width"), SIZES)
@pytest.mark.parametrize("partly", [False, True])
def test_products_are_the_bare_ones(vocab, width, partly):
    """One for the lift and one for each gradient, over predicted positions alone; nothing is computed twice."""
    one = 2 * (256 if partly else 512) * vocab * width
    assert counted(512, vocab, width, partly=partly)[0].flops == 2 * one
    assert counted(512, vocab, width, partly=partly, trained=True)[0].flops == 3 * one
    assert counted(512, vocab, width, BF16, BF16, partly=partly)[0].flops == 2 * one


def test_the_count_knows_the_plain_form():
    """The measure measures: softmax(logits) @ E peaks at three times the logits, in the same products."""
    tokens, vocab, width = 2048, 50258, 768
    logits = torch.empty(tokens, vocab, device="meta", requires_grad=True)
    embedding = torch.empty(vocab, width, device="meta")
    with LiveBytes() as count:
        lifted = logits.softmax(dim=-1) @ embedding
        lifted.backward(torch.empty_like(lifted))
    assert count.flops == 2 * 2 * tokens * vocab * width
    assert 3.0 * logits.nbytes <= count.peak <= 3.05 * logits.nbytes


# ------------------------------------------------------------------------------------------------ straight through


@pytest.mark.parametrize("mask_id", [None, 0, 4, 10])
@pytest.mark.parametrize("partly", [False, True])
def test_the_hard_lift_has_the_value_of_the_likeliest_token_and_the_gradient_of_the_soft_one(mask_id, partly):
    logits, embedding, noisy_ids, predicted = lift_inputs(4, 9)
    if mask_id is not None:
        logits[..., mask_id] = 9.0  # the likeliest, were it not closed
    options = {"noisy_ids": noisy_ids, "predicted": predicted} if partly else {}
    hard, soft, by_hand = (logits.clone().requires_grad_() for _ in range(3))
    mine, theirs = embedding.clone().requires_grad_(), embedding.clone().requires_grad_()
    upstream = torch.randn(4, 9, 7, dtype=torch.float64)
    lifted = straight_through_lift(hard, mine, mask_id=mask_id, **options)
    lifted.backward(upstream)
    soft_token_lift(soft, embedding, mask_id=mask_id, **options).backward(upstream)
    assert torch.equal(hard.grad, soft.grad)

    closed = by_hand if mask_id is None else by_hand.index_fill(-1, torch.tensor(mask_id), -torch.inf)
    p = closed.softmax(dim=-1)
    y = torch.nn.functional.one_hot(p.argmax(dim=-1), 11) - p.detach() + p
    expected = y @ theirs
    expected = torch.where(predicted[..., None], expected, theirs[noisy_ids]) if partly else expected
    expected.backward(upstream)
    torch.testing.assert_close(lifted, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(hard.grad, by_hand.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_the_hard_lift_is_an_embedding_row_to_the_bit():
    logits, embedding, *_ = lift_inputs(dtype=torch.float32)
    assert torch.equal(straight_through_lift(logits, embedding), embedding[logits.argmax(dim=-1)])


def test_the_hard_lift_under_functional_compilation_equals_eager():
    logits, embedding, noisy_ids, predicted = lift_inputs()

    def lift(logits):
        return straight_through_lift(logits, embedding, noisy_ids=noisy_ids, predicted=predicted, mask_id=1)

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    lift(eager).square().sum().backward()
    torch.compile(lift, backend="aot_eager")(compiled).square().sum().backward()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-12, atol=1e-13)


def test_the_hard_lift_refuses_what_the_soft_one_refuses():
    logits, embedding, *_ = lift_inputs()
    with pytest.raises(TokenDriftError, match=r"mask_id must lie in \[0, V\) with V = 11"):
        straight_through_lift(logits, embedding, mask_id=11)
    with pytest.raises(TokenDriftError, match=r"embedding must be a tensor of shape \(V, D\)"):
        straight_through_lift(logits, [[1.0]])


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 5)}, r"logits must have shape \(B, L, V\), but it has 2 axes"),
        ({"logits": torch.zeros(0, 5, 11)}, "logits is empty: B is 0"),
        ({"logits": torch.zeros(2, 0, 11)}, "logits is empty: L is 0"),
        ({"logits": torch.zeros(2, 5, 11, dtype=torch.int64)}, "logits must be floating point"),
        ({"logits": [[1.0]]}, r"logits must be a tensor of shape \(B, L, V\)"),
        ({"logits": torch.zeros(2, 5, 12)}, r"logits has 12 columns \(V\) but embedding has 11 rows \(V\)"),
        ({"logits": torch.zeros(2, 5, 11, device="meta")}, "logits is on meta but embedding is on cpu"),
        ({"embedding": torch.zeros(11)}, r"embedding must have shape \(V, D\)"),
        ({"embedding": torch.zeros(11, 7, dtype=torch.int32)}, "embedding must be floating point"),
        ({"mask_id": 11}, r"mask_id must lie in \[0, V\) with V = 11"),
        ({"mask_id": -1}, r"mask_id must lie in \[0, V\) with V = 11"),
        ({"workspace_mib": 0.0}, "workspace_mib must be a finite number above 0"),
        ({"noisy_ids": None}, "predicted was given without noisy_ids"),
        ({"predicted": torch.ones(2, 4, dtype=torch.bool)}, r"predicted must have shape \(B, L\) = \(2, 5\)"),
        ({"predicted": torch.ones(2, 5)}, "predicted must be boolean"),
        ({"predicted": torch.ones(2, 5, dtype=torch.bool, device="meta")}, "predicted is on meta"),
        ({"noisy_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"noisy_ids must have shape \(B, L\) = \(2, 5\)"),
        ({"noisy_ids": torch.zeros(2, 5)}, "noisy_ids must hold integer token ids"),
        ({"noisy_ids": torch.full((2, 5), 11)}, "noisy_ids has ids from 11 to 11, but the vocabulary V has 11"),
        ({"noisy_ids": torch.full((2, 5), -100)}, "labels of -100 are not ids"),
        ({"noisy_ids": torch.zeros(2, 5, dtype=torch.int64, device="meta")}, "noisy_ids is on meta"),
    ],
)
def test_bad_input_is_refused_with_what_came(arguments, message):
    logits, embedding, noisy_ids, predicted = lift_inputs(dtype=torch.float32)
    good = {"logits": logits, "embedding": embedding, "noisy_ids": noisy_ids, "predicted": predicted}
    with pytest.raises(TokenDriftError, match=message):
        soft_token_lift(**(good | arguments))


@given(dtype=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]))
def test_ids_of_any_integer_dtype_mean_the_same(dtype):
    logits, embedding, noisy_ids, predicted = lift_inputs()
    expected = soft_token_lift(logits, embedding, noisy_ids=noisy_ids, predicted=predicted)
    actual = soft_token_lift(logits, embedding, noisy_ids=noisy_ids.to(dtype), predicted=predicted.to(torch.uint8))
    assert torch.equal(actual, expected)
