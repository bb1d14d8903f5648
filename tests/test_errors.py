"""Every message names the argument, the expectation, what came and, where there is one, the way out."""

from __future__ import annotations

import pytest
import torch

from tokendrift import PairDriftLoss, TokenDriftError, TokenDriftLoss
from tokendrift._checks import (
    check_choice,
    check_count,
    check_floating,
    check_ids,
    check_mask,
    check_positive,
    check_same_device,
    check_tensor,
    describe,
    fail,
)
from tokendrift.features import IdentityFeatures


def test_the_error_is_a_value_error():
    assert issubclass(TokenDriftError, ValueError)


def test_a_message_has_a_line_for_the_rule_one_for_what_came_and_one_for_the_way_out():
    error = fail("x must be small.", "Shrink it.", x=torch.zeros(2, 3), y=7)
    assert str(error) == "x must be small.\n  got x (2, 3) float32 cpu, y int 7\n  Shrink it."
    assert str(fail("x must be small.")) == "x must be small."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.bfloat16), "(2, 3) bfloat16 cpu"),
        (torch.zeros((), device="meta"), "() float32 meta"),
        ("row", "str 'row'"),
        (None, "NoneType None"),
        (type("Lines", (), {"__repr__": lambda self: "first\nsecond"})(), "Lines first second"),
    ],
)
def test_what_came_is_described_by_shape_dtype_and_device(value, text):
    assert describe(value) == text


def test_long_values_are_cut():
    assert len(describe(list(range(1000)))) <= 120


LIKE = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda: check_tensor("x", [1], ("B", "L")),
            "x must be a tensor of shape (B, L).\n  got x list [1]\n  Pass x as",
        ),
        (lambda: check_tensor("x", torch.zeros(2), ("B", "L")), "x must have shape (B, L), but it has 1 axes."),
        (lambda: check_tensor("x", torch.zeros(2, 2), ("B",)), "x must have shape (B,), but it has 2 axes."),
        (lambda: check_tensor("x", torch.zeros(2, 0), ("B", "L")), "x is empty: L is 0.\n  got x (2, 0) float32 cpu"),
        (lambda: check_floating("x", torch.zeros(2).long()), "x must be floating point.\n  got x (2,) int64 cpu"),
        (lambda: check_ids("ids", torch.zeros(2, 3), 5), "ids must hold integer token ids."),
        (lambda: check_ids("ids", torch.zeros(2, 3).bool(), 5), "ids must hold integer token ids."),
        (lambda: check_ids("ids", torch.zeros(2, 4).long(), 5, like=LIKE), "ids must have shape (B, L) = (2, 3)"),
        (lambda: check_ids("ids", torch.full((2, 3), 5), 5), "ids has ids from 5 to 5, but the vocabulary V has 5"),
        (lambda: check_ids("ids", torch.full((2, 3), -1), 5), "ids has ids from -1 to -1"),
        (lambda: check_mask("m", torch.zeros(2, 3), torch.Size([2, 3])), "m must be boolean."),
        (lambda: check_mask("m", torch.zeros(2, 4).bool(), torch.Size([2, 3])), "m must have shape (B, L) = (2, 3)."),
        (
            lambda: check_same_device("x", LIKE, y=None, z=torch.zeros(1, device="meta")),
            "z is on meta but x is on cpu.\n  got z (1,) float32 meta, x (2, 3, 5) float32 cpu\n  Move it with z.to(",
        ),
        (lambda: check_choice("kind", "c", ("a", "b")), "kind must be one of 'a', 'b'.\n  got kind str 'c'"),
        (lambda: check_positive("tau", 0.0), "tau must be a finite number above 0.\n  got tau float 0.0"),
        (lambda: check_positive("tau", True), "tau must be a finite number above 0."),
        (lambda: check_positive("tau", float("inf")), "tau must be a finite number above 0."),
        (lambda: check_positive("tau", 10**400), "tau must be a finite number above 0."),
        (lambda: check_positive("tau", "1"), "tau must be a finite number above 0."),
        (lambda: check_positive("scale", -1, symbol="alpha"), "scale (alpha) must be a finite number above 0."),
        (lambda: check_count("size", True), "size must be an integer of at least 0."),
        (lambda: check_count("size", 0, least=1), "size must be an integer of at least 1.\n  got size int 0"),
    ],
)
def test_each_rule_says_what_it_wanted_and_what_it_got(check, message):
    with pytest.raises(TokenDriftError) as caught:
        check()
    assert str(caught.value).startswith(message)


def test_good_values_pass_unchanged():
    ids = torch.tensor([[0, 4, 2]], dtype=torch.int32)
    assert check_ids("ids", ids, 5) is ids
    assert check_mask("m", torch.tensor([[0, 1]]), torch.Size([1, 2])).tolist() == [[False, True]]
    assert check_positive("tau", 2) == 2.0
    assert check_count("size", 0) == 0
    assert check_ids("ids", torch.zeros(2, 3, dtype=torch.int64, device="meta"), 5).device.type == "meta"
    check_choice("kind", "a", ("a", "b"))


@pytest.mark.parametrize("name", ["noisy_ids", "predicted", "attention_mask"])
@pytest.mark.parametrize("loss", [TokenDriftLoss(torch.eye(5), IdentityFeatures()), PairDriftLoss(5)])
def test_an_argument_that_is_no_tensor_is_named_as_such(loss, name):
    ids = torch.zeros(2, 3, dtype=torch.int64)
    options = {"noisy_ids": ids} | {name: ids.numpy()}
    with pytest.raises(TokenDriftError, match=rf"^{name} must be a tensor of shape \(B, L\)\."):
        loss(LIKE, ids, **options)
