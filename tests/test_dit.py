"""Laws of the MDLM / DUO backbone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import LinearLogits, TokenDriftError
from tokendrift.diffusion.soft_inputs import soft_embedding
from tokendrift.models import DiT, DiTConfig
from tokendrift.models.layers import LayerNorm

CASES = [
    ("dit_mdlm", "no_time", False),
    ("dit_mdlm", "time", True),
    ("dit_mdlm", "short_time", True),
    ("dit_duo", "ids", True),
    ("dit_duo", "ids_no_time", False),
    ("dit_duo", "soft", True),
    ("dit_duo", "topk", True),
]


def golden_dit(numbers, time_conditioning):
    model = DiT(DiTConfig(23, 12, 32, 8, 2, 4, time_conditioning=time_conditioning))
    prefix = "state_dict."
    # strict: the names are upstream's, none missing and none added
    model.load_state_dict({k.removeprefix(prefix): v for k, v in numbers.data.items() if k.startswith(prefix)})
    return model.eval()


def golden_input(numbers, case):
    """Return the case's input and, for weighted ids, its weights."""
    if case == "topk":
        return numbers["topk_input"], numbers["topk_weights"]
    x = numbers["soft_input"] if case == "soft" else numbers["input_ids"]
    return x[:, : numbers[f"{case}.logits"].shape[1]], None


def logits_of(model, x, sigma=None, *, weights=None):
    """Return the logits of ids (B, L), of input logits (B, L, V), or of ids (B, L, K) with their weights."""
    if x.ndim == 2:
        return model(x, sigma)
    hard = torch.zeros(x.shape[:2], dtype=torch.int64)
    return model(hard, sigma, embed=lambda embedding: soft_embedding(x, weights, embedding))


@pytest.mark.parametrize(("fixture", "case", "time_conditioning"), CASES)
def test_logits_and_hidden_states_have_the_golden_values(golden, fixture, case, time_conditioning):
    numbers = golden(fixture)
    model, (x, weights) = golden_dit(numbers, time_conditioning), golden_input(numbers, case)
    numbers.assert_matches(logits_of(model, x, numbers["sigma"], weights=weights), f"{case}.logits")
    matrix = model.vocab_embed.embedding
    embeds = model.vocab_embed(x) if x.ndim == 2 else soft_embedding(x, weights, matrix)
    hidden = model.hidden_states(embeds, numbers["sigma"])
    assert len(hidden) == 3
    for layer, states in enumerate(hidden):
        numbers.assert_matches(states, f"{case}.hidden.{layer}")


@pytest.mark.parametrize(("fixture", "case", "time_conditioning"), CASES)
def test_float64_logits_have_the_golden_values(golden, fixture, case, time_conditioning):
    numbers = golden(fixture)
    model, (x, weights) = golden_dit(numbers, time_conditioning).double(), golden_input(numbers, case)
    x = x.double() if x.is_floating_point() else x
    logits = logits_of(model, x, numbers["sigma"].double(), weights=weights)
    numbers.assert_matches(logits, f"{case}.logits_float64", tolerance=numbers.tolerance["float64"])


# ------------------------------------------------------------------------------------------------ laws


def test_certain_input_logits_equal_their_ids(backbone):
    model, ids = backbone(), torch.randint(13, (2, 8))
    soft = torch.nn.functional.one_hot(ids, 13).float() * 1e4
    torch.testing.assert_close(logits_of(model, soft), model(ids), rtol=1e-5, atol=1e-5)


def test_one_id_of_weight_one_equals_that_id(backbone):
    model, ids = backbone(), torch.randint(13, (2, 8))
    weighted = logits_of(model, ids[..., None], weights=torch.ones(2, 8, 1))
    torch.testing.assert_close(weighted, model(ids), rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 2**31 - 1))
def test_all_ids_with_their_probabilities_equal_soft_input(backbone, seed):
    model, logits = backbone(), torch.randn(2, 8, 13, generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(13).expand(2, 8, 13)
    torch.testing.assert_close(
        logits_of(model, ids, weights=logits.softmax(-1)), logits_of(model, logits), rtol=1e-4, atol=1e-4
    )


def test_weights_of_ids_get_gradients(backbone):
    model, weights = backbone(), torch.full((2, 8, 3), 0.3, requires_grad=True)
    logits_of(model, torch.randint(13, (2, 8, 3)), weights=weights).square().sum().backward()
    assert (weights.grad != 0).all()


def test_time_matters_only_with_time_conditioning(backbone):
    ids = torch.randint(13, (2, 8))
    early, late = torch.full((2,), 0.01), torch.full((2,), 5.0)
    blind, seeing = backbone(), backbone(time_conditioning=True)
    assert torch.equal(blind(ids, early), blind(ids, late))
    assert torch.equal(blind(ids, early), blind(ids))
    assert not torch.allclose(seeing(ids, early), seeing(ids, late), atol=1e-3)
    assert (blind.time_conditioned, seeing.time_conditioned) == (False, True)
    assert (blind.vocab_size, blind.mask_id) == (13, None)


def test_hidden_states_without_sigma_are_those_of_clean_time(backbone):
    model, embeds = backbone(time_conditioning=True), torch.randn(2, 8, 16)
    clean = model.hidden_states(embeds, torch.zeros(2))
    for one, other in zip(model.hidden_states(embeds), clean, strict=True):
        assert torch.equal(one, other)


@given(length=st.integers(1, 8), offset=st.integers(0, 5), seed=st.integers(0, 2**31 - 1))
def test_only_distances_between_positions_matter(backbone, length, offset, seed):
    """Rotary attention: hidden padding before and behind moves a text, and its states do not notice."""
    model = backbone()
    embeds = torch.randn(1, length, 16, generator=torch.Generator().manual_seed(seed))
    padded = torch.full((1, offset + length + 2, 16), 7.0)
    padded[:, offset : offset + length] = embeds
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    mask[:, offset : offset + length] = True
    alone = model.hidden_states(embeds)[-1]
    moved = model.hidden_states(padded, attention_mask=mask)[-1][:, offset : offset + length]
    torch.testing.assert_close(moved, alone, rtol=1e-4, atol=1e-4)


def test_rows_do_not_see_each_other(backbone):
    model, ids = backbone(), torch.randint(13, (3, 8))
    torch.testing.assert_close(model(ids)[1:2], model(ids[1:2]), rtol=1e-5, atol=1e-5)


def test_every_position_sees_every_other(backbone):
    model = backbone()
    embeds = torch.randn(1, 8, 16, requires_grad=True)
    for position in (0, 7):
        (grad,) = torch.autograd.grad(model.hidden_states(embeds)[-1][0, position].sum(), embeds)
        assert (grad.abs().sum(-1) > 0).all()


def test_a_fresh_network_predicts_nothing_yet():
    model = DiT(DiTConfig(11, 8, 16, 4, 1, 2))
    assert torch.equal(model(torch.zeros(2, 8, dtype=torch.int64)), torch.zeros(2, 8, 11))


def test_dropout_is_active_in_training_only(backbone):
    model, ids = backbone(), torch.randint(13, (2, 8))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_dropout_sits_on_both_branches_and_not_on_the_residual_stream():
    model, embeds = DiT(DiTConfig(11, 8, 16, 4, 2, 2, dropout=1.0)), torch.randn(2, 8, 16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.equal(model.train().hidden_states(embeds)[-1], embeds)
    assert not torch.equal(model.eval().hidden_states(embeds)[-1], embeds)


def test_autocast_and_half_precision_stay_close_to_float32(backbone):
    model, ids, sigma = backbone(time_conditioning=True), torch.randint(13, (2, 8)), torch.rand(2)
    expected = model(ids, sigma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(ids, sigma)
    half = model.bfloat16()(ids, sigma)
    assert cast.dtype == half.dtype == torch.bfloat16
    for actual in (cast, half):
        assert (actual - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_stay_apart_in_half_precision(backbone, dtype):
    """bfloat16 has no 257 and float16 no 2049: angles made in them would repeat."""
    model = backbone(length=3000).to(dtype)
    cos, sin = model.rotary_emb(3000)
    exact = backbone(length=3000).rotary_emb(3000)
    assert torch.equal(cos, exact[0]) and torch.equal(sin, exact[1])
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_parameters_stand_in_the_order_of_the_official_module(golden):
    """Lists of averaged weights carry no names: the fixture's keys stand in the official module's order."""
    numbers = golden("dit_mdlm")
    official = [key.removeprefix("state_dict.") for key in numbers.entry["keys"] if key.startswith("state_dict.")]
    assert list(golden_dit(numbers, False).state_dict()) == official


def test_layer_norm_works_in_float32_at_least():
    x = 1000 + torch.randn(4, 16)
    norm = LayerNorm(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.float32
        torch.testing.assert_close(norm(x), norm(x.double()).float(), rtol=1e-2, atol=1e-2)
    assert norm(x.double()).dtype == torch.float64


def test_all_parameters_are_trained_once_the_network_is_awake(backbone):
    model = backbone(time_conditioning=True).train()
    model(torch.randint(13, (4, 8)), torch.rand(4)).logsumexp(-1).sum().backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_gets_the_operands_of_the_logits_and_gives_the_answer(backbone, autocast):
    model, ids, sigma = backbone(time_conditioning=True), torch.randint(13, (2, 8)), torch.tensor([0.1, 2.0])

    def head(operands):
        assert isinstance(operands, LinearLogits)
        assert not torch.is_autocast_enabled("cpu")
        return operands, "anything"

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, (operands, answer) = model(ids, sigma), model(ids, sigma, head=head)
    assert answer == "anything"
    assert {operands.hidden.dtype, operands.weight.dtype, logits.dtype} == {
        torch.bfloat16 if autocast else torch.float32
    }
    product = torch.nn.functional.linear(*operands[:2], operands.bias.to(logits.dtype))
    torch.testing.assert_close(product, logits)
    wanted = [model.output_layer.linear.weight, model.blocks[0].mlp[0].weight]
    theirs, mine = (torch.autograd.grad(each.float().square().sum(), wanted) for each in (logits, product))
    for own, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own, other)


# ------------------------------------------------------------------------------------------------ errors


def test_embeddings_of_another_shape_are_refused(backbone):
    with pytest.raises(TokenDriftError, match=r"embed must return \(B, L, D\) = \(2, 8, 16\)"):
        backbone()(torch.zeros(2, 8, dtype=torch.int64), embed=lambda embedding: embedding)


@pytest.mark.parametrize(
    ("x_t", "sigma", "message"),
    [
        ((2, 8), None, r"sigma must have shape \(B,\) = \(2,\)[\s\S]*got sigma NoneType None"),
        ((2, 8), (3,), r"sigma must have shape \(B,\) = \(2,\)[\s\S]*Pass process.sigma\(t\)"),
        ((2, 8), (2, 1), r"sigma must have shape \(B,\)"),
        ((2, 8), (), r"sigma must have shape \(B,\)"),
        ((2, 8), (2, 8), r"not one value for each position"),
        ((8,), (8,), r"x_t must have shape \(B, L\), but it has 1 axes"),
        ((2, 8, 13), (2,), r"x_t must have shape \(B, L\), but it has 3 axes"),
    ],
)
def test_bad_calls_are_refused(backbone, x_t, sigma, message):
    model = backbone(time_conditioning=True)
    with pytest.raises(TokenDriftError, match=message):
        model(torch.zeros(x_t, dtype=torch.int64), None if sigma is None else torch.zeros(sigma))


@pytest.mark.parametrize("shape", [(2, 8, 12), (2, 13), (13,)])
def test_soft_input_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(TokenDriftError, match=r"float logits \(B, L, V\) with V = 13"):
        soft_embedding(torch.zeros(shape), None, torch.zeros(13, 16))


def test_ids_of_a_soft_input_need_their_weights():
    with pytest.raises(TokenDriftError, match=r"float logits \(B, L, V\)[\s\S]*Ids \(B, L, K\) need their weights"):
        soft_embedding(torch.zeros(2, 8, 13, dtype=torch.int64), None, torch.zeros(13, 16))


@pytest.mark.parametrize(
    ("soft", "weights", "message"),
    [
        (
            torch.zeros(2, 8, 3, dtype=torch.int64),
            torch.ones(2, 8),
            r"weights must be floating point of shape \(B, L, K\)",
        ),
        (torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8), r"one for each of the integer ids"),
        (torch.zeros(2, 8, 3), torch.ones(2, 8, 3), r"one for each of the integer ids"),
        (torch.zeros(2, 8, 3, dtype=torch.int64), torch.ones(2, 8, 3, dtype=torch.int64), r"weights must be floating"),
        (torch.full((2, 8, 3), 13), torch.ones(2, 8, 3), r"soft has ids from 13 to 13"),
    ],
)
def test_weights_that_do_not_belong_to_their_ids_are_refused(soft, weights, message):
    with pytest.raises(TokenDriftError, match=message):
        soft_embedding(soft, weights, torch.zeros(13, 16))


@pytest.mark.parametrize("ids", [[[0, 13]], [[-1, 0]]])
def test_ids_outside_the_vocabulary_are_refused(backbone, ids):
    with pytest.raises(TokenDriftError, match="x_t has ids from"):
        backbone()(torch.tensor(ids))


def test_hidden_states_refuse_a_misshapen_sigma(backbone):
    with pytest.raises(TokenDriftError, match=r"sigma must have shape \(B,\)"):
        backbone(time_conditioning=True).hidden_states(torch.zeros(2, 8, 16), torch.zeros(3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1"),
        ({"n_blocks": 0}, "n_blocks must be an integer of at least 1"),
        ({"hidden_dim": 18, "n_heads": 2}, r"hidden_dim must be a multiple of 2 \* n_heads = 4"),
        ({"n_heads": 1.5}, "n_heads must be an integer of at least 1"),
        ({"mask_id": 11}, r"mask_id must lie in \[0, V\) with V = 11"),
    ],
)
def test_bad_sizes_are_refused(config, message):
    with pytest.raises(TokenDriftError, match=message):
        DiTConfig(**({"vocab_size": 11} | config))
