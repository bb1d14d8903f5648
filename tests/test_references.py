"""Laws of the feature queues: first in, first out, part of state_dict; and of references that weigh."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import DriftField, FeatureQueue, TokenDriftError
from tokendrift.references import guidance_weight


def numbered(start, count, width=2):
    """Features that carry their serial number."""
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(-1, width)


@given(capacity=st.integers(0, 7), pushes=st.lists(st.integers(1, 12), max_size=8))
def test_a_queue_holds_the_newest_features_oldest_first(capacity, pushes):
    queue, total = FeatureQueue(capacity), 0
    for count in pushes:
        queue.push(numbered(total, count))
        total += count
        kept = min(total, capacity)
        assert len(queue) == kept
        if capacity:
            assert torch.equal(queue.features(), numbered(total - kept, kept))
        else:
            assert len(queue.features()) == 0


def test_a_queue_that_begins_in_inference_mode_goes_on_outside():
    queue = FeatureQueue(4)
    with torch.inference_mode():
        queue.push(numbered(0, 2))
    queue.push(numbered(2, 1))
    assert torch.equal(queue.features(), numbered(0, 3))


def test_pushed_features_are_copies_without_graph():
    queue, features = FeatureQueue(4), torch.ones(2, 3, requires_grad=True)
    queue.push(features * 2)
    assert not queue.features().requires_grad
    with torch.no_grad():
        features.zero_()
    assert torch.equal(queue.features(), torch.full((2, 3), 2.0))


def test_half_precision_features_are_kept_in_float32_and_float64_in_float64():
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        queue = FeatureQueue(4)
        queue.push(torch.ones(2, 3, dtype=dtype))
        assert queue.features().dtype == kept


@pytest.mark.parametrize("pushes", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("width", [None, 2])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_copied_queue_goes_on_where_the_original_stood(way, width, pushes):
    queue = FeatureQueue(4, width)
    if pushes:
        queue.push(numbered(0, pushes))
    if way == "state_dict":
        other = FeatureQueue(4)
        other.load_state_dict(queue.state_dict())
    else:
        other = copy.deepcopy(queue) if way == "deepcopy" else pickle.loads(pickle.dumps(queue))
    assert torch.equal(other.features(), queue.features())
    for each in (queue, other):
        each.push(numbered(pushes, 3))
    assert torch.equal(other.features(), queue.features())
    assert len(other) == min(pushes + 3, 4)


def test_an_empty_state_empties_a_queue_that_was_filled():
    queue = FeatureQueue(4)
    empty = copy.deepcopy(queue.state_dict())
    queue.push(numbered(0, 3))
    queue.load_state_dict(empty)
    assert len(queue) == 0
    queue.push(numbered(5, 1, width=3))  # and takes features of another width
    assert torch.equal(queue.features(), numbered(5, 1, width=3))


def test_the_dtype_of_the_features_survives_a_state_dict():
    queue, other = FeatureQueue(4), FeatureQueue(4)
    queue.push(torch.full((2, 3), 1 / 3, dtype=torch.float64))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.features(), queue.features())


def test_a_queue_moves_with_to():
    queue = FeatureQueue(4)
    queue.push(numbered(0, 3))
    queue.to(torch.float64)
    assert queue.features().dtype == torch.float64
    assert queue.pushed.dtype == torch.int64
    queue.push(numbered(3, 3))
    assert torch.equal(queue.features(), numbered(2, 4).double())


@pytest.mark.parametrize("pushed", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_queue_stays_in_float32_where_its_owner_goes_to_half_precision(dtype, pushed):
    """Features rounded to bfloat16 are off by 0.2 in the logits of the field at tau = 0.02."""
    queue, features = FeatureQueue(4, 2), torch.full((3, 2), 1 / 3)
    if pushed:
        queue.push(features)
    torch.nn.ModuleList([queue]).to(dtype)
    assert torch.equal(queue.features(), features[:pushed])
    queue.push(features)
    assert torch.equal(queue.features()[-3:], features)


def test_a_queue_moves_to_a_device():
    queue = FeatureQueue(4)
    queue.push(numbered(0, 3))
    for dtype in (torch.float32, torch.bfloat16):
        assert copy.deepcopy(queue).to("meta", dtype).features().device.type == "meta"


def test_a_queue_begins_on_the_device_of_its_first_features():
    queue = FeatureQueue(4)
    queue.push(torch.empty(3, 2, device="meta"))
    assert queue.buffer.device.type == queue.pushed.device.type == "meta"


def test_features_on_another_device_are_refused_and_change_nothing():
    queue = FeatureQueue(4)
    queue.push(numbered(0, 3))
    with pytest.raises(TokenDriftError, match="features is on meta but queue is on cpu"):
        queue.push(numbered(3, 1).to("meta"))
    assert torch.equal(queue.features(), numbered(0, 3))


def test_a_state_dict_is_loaded_strictly_in_both_directions():
    queue = FeatureQueue(4)
    queue.push(numbered(0, 3))
    state = copy.deepcopy(queue.state_dict())
    assert state.keys() == {"buffer", "pushed"}
    with pytest.raises(RuntimeError, match="Missing key"):
        queue.load_state_dict({"buffer": state["buffer"]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        queue.load_state_dict(state | {"cursor": torch.tensor(3)})
    for assign in (False, True):
        other = FeatureQueue(4)
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert all(torch.equal(other.state_dict()[name], state[name]) for name in state)


def test_pushes_wait_until_a_frozen_queue_thaws():
    queue = FeatureQueue(4)
    queue.push(numbered(0, 3))
    with queue.frozen():
        features = numbered(3, 1).clone()
        queue.push(features)
        features.zero_()  # a push is a copy here as well
        queue.push(numbered(4, 2))
        assert torch.equal(queue.features(), numbered(0, 3))
    assert torch.equal(queue.features(), numbered(2, 4))
    queue.push(numbered(6, 1))
    assert torch.equal(queue.features(), numbered(3, 4))


def test_a_frozen_queue_forgets_what_was_pushed_before_an_error():
    queue = FeatureQueue(4)
    with contextlib.suppress(ZeroDivisionError), queue.frozen():
        queue.push(numbered(0, 1))
        _ = 1 / 0
    assert len(queue) == 0
    queue.push(numbered(1, 1))
    assert torch.equal(queue.features(), numbered(1, 1))


def test_a_queue_is_frozen_once():
    queue = FeatureQueue(4)
    with queue.frozen(), pytest.raises(TokenDriftError, match="the queue is already frozen"), queue.frozen():
        pass


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_never_enter(bad):
    queue, expected = FeatureQueue(4), FeatureQueue(4)
    for start in range(0, 12, 3):
        features = numbered(start, 3).clone()
        features[1, 0] = bad
        queue.push(features)
        expected.push(features[::2])
        assert torch.equal(queue.features(), expected.features())
        assert len(queue) == len(expected)


def test_where_the_device_alone_counts_rows_the_oldest_stand_in_for_those_that_were_dropped():
    queue = FeatureQueue(4)
    queue.push(torch.full((2, 2), torch.nan))
    queue._pushed = 2  # as an accelerator, which is not waited for, would leave it
    assert queue.features().isnan().all()
    queue.push(numbered(1, 1))
    queue._pushed = 3
    assert torch.equal(queue.features(), numbered(1, 1).expand(3, -1))
    queue.push(numbered(2, 2))
    queue._pushed = 5
    assert queue.features()[:, 0].tolist() == [1, 2, 3, 1]
    queue.push(numbered(4, 2))
    queue._pushed = 7
    assert torch.equal(queue.features(), numbered(2, 4))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"buffer": torch.full((4, 2), torch.nan)}, "not finite"),
        ({"pushed": torch.tensor(-1)}, "pushed"),
        ({"pushed": torch.tensor([3])}, "pushed"),
        ({"pushed": torch.tensor(2.5)}, "pushed"),
        ({"buffer": torch.zeros(4, 0)}, "pushed"),
        ({"buffer": torch.zeros(4)}, "floating point of shape"),
        ({"buffer": torch.zeros(4, 2, dtype=torch.int64)}, "floating point of shape"),
    ],
)
def test_a_state_that_no_queue_has_is_refused(changes, named):
    queue = FeatureQueue(4)
    queue.push(numbered(0, 3))
    with pytest.raises(TokenDriftError, match=named):
        FeatureQueue(4).load_state_dict(queue.state_dict() | changes)


def test_pushing_features_of_another_width_is_refused_and_changes_nothing():
    queue = FeatureQueue(4)
    queue.push(numbered(0, 2))
    with pytest.raises(TokenDriftError, match="features has width M = 3 but the queue holds M = 2") as caught:
        queue.push(numbered(2, 1, width=3))
    assert "build a new loss for a new one" in str(caught.value)
    assert torch.equal(queue.features(), numbered(0, 2))


def test_a_state_of_another_capacity_is_refused_with_the_way_out():
    with pytest.raises(TokenDriftError, match="room for 3 features but this one for 4") as caught:
        FeatureQueue(4).load_state_dict(FeatureQueue(3).state_dict())
    assert "queue_size=3" in str(caught.value)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3), r"features must have shape \(K, M\)"),
        (torch.zeros(0, 3), "features is empty: K is 0"),
        ([1.0], r"features must be a tensor of shape \(K, M\)"),
    ],
)
def test_bad_features_are_refused(features, message):
    with pytest.raises(TokenDriftError, match=message):
        FeatureQueue(4).push(features)


@pytest.mark.parametrize("capacity", [-1, 2.5, True, "8"])
def test_a_capacity_that_is_no_count_is_refused(capacity):
    with pytest.raises(TokenDriftError, match="capacity must be an integer of at least 0"):
        FeatureQueue(capacity)


def test_guidance_rests_where_the_generator_overshoots_the_condition():
    """alpha = 2, p(.|c) half on a and half on b, p(.) all on a: the fixed point 2 p(.|c) - p(.) is all on b."""
    a, b = torch.tensor([[0.0, 0.0]]).double(), torch.tensor([[1.0, 0.0]]).double()
    generated, unconditional = b.expand(4, 2), a.expand(2, 2)
    weight = guidance_weight(2.0, negatives=4, unconditional=2)
    assert weight == 1.5
    for guided in (True, False):
        drift = DriftField((0.5,), rms_normalize=False)(
            generated,
            torch.cat([a, b]),
            torch.cat([generated, unconditional]),
            exclude_negative=torch.arange(4),
            negative_weights=torch.tensor([1.0] * 4 + [weight if guided else 0.0] * 2),
        )
        assert (drift.norm() < 1e-15) == guided


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 4, 2), r"guidance \(alpha\) must be at least 1"),
        ((2.0, 1, 2), "negatives must be an integer of at least 2"),
        ((2.0, 4, 0), "unconditional must be an integer of at least 1"),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(TokenDriftError, match=message):
        guidance_weight(arguments[0], negatives=arguments[1], unconditional=arguments[2])


def test_a_queue_that_was_stored_in_bfloat16_is_read_into_float32():
    queue, copied = FeatureQueue(3), FeatureQueue(3)
    queue.push(numbered(0, 2))
    copied.load_state_dict({"buffer": queue.buffer.bfloat16(), "pushed": queue.pushed})
    assert copied.buffer.dtype == torch.float32
    assert torch.equal(copied.features(), numbered(0, 2))
    copied.load_state_dict({"buffer": queue.buffer.bfloat16(), "pushed": queue.pushed}, assign=True)
    assert copied.buffer.dtype == torch.float32
