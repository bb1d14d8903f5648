"""The probes on languages whose law is known, and on the shipped models."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tokendrift import TokenDriftError, cli
from tokendrift.demo import PRETRAINED
from tokendrift.diffusion import MaskedDiffusion, UniformDiffusion
from tokendrift.evaluation import GenerativePerplexity
from tokendrift.evaluation.bootstrap import Interval
from tokendrift.markov import ExactDenoiser, MarkovLanguage
from tokendrift.models import load_denoiser, save_denoiser
from tokendrift.probes import (
    decay_table,
    information_decay,
    marginal_trap,
    matched_temperature,
    plot_decay,
    plot_trap,
    probe_checkpoints,
    trap_change,
    trap_table,
    unigram_law,
)
from tokendrift.probes.probe import _change_in_words

A, B, C, D, MASK = range(5)
RIGHT, WRONG = math.log(0.9), math.log(0.1)
PAIRS = MaskedDiffusion(5)
LANGUAGE = MarkovLanguage.random(words=6, successors=2, length=8, seed=0)


def two_words(ids, sigma):
    """The exact denoiser of a language in which every second word follows from the first: AB or CD, half each."""
    logits = torch.full((*ids.shape, 5), -40.0, dtype=torch.float64)
    logits[..., [A, C]] = 0.0  # a first word, or one that nothing is known about
    for row, words in enumerate(ids.tolist()):
        for l in range(1, len(words), 2):
            first = words[l - 1]
            logits[row, l] = -40.0
            logits[row, l, [B, D] if first == MASK else [B if first == A else D]] = 0.0
    return logits


def two_words_judge(ids, attention_mask):
    """After A comes B with 0.9 and D with 0.1; after C the other way round; first words half each."""
    table = torch.full((4, 4), -40.0, dtype=torch.float64)
    table[A, B], table[A, D], table[C, B], table[C, D] = RIGHT, WRONG, WRONG, RIGHT
    table[B, [A, C]] = table[D, [A, C]] = math.log(0.5)
    return table[ids]


def language_judge():
    return GenerativePerplexity(LANGUAGE.judge(smoothing=0.01), protocol="all")


JUDGE = GenerativePerplexity(two_words_judge, protocol="all")
PROMPTS = torch.tensor([[A, B], [C, D]]).repeat(32, 1)
ALIKE = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0])

# ------------------------------------------------------------------------------------------------ marginal trap


def test_two_words_drawn_at_once_are_wrong_half_of_the_time():
    draws = 8
    trap = marginal_trap(two_words, PAIRS, PROMPTS, JUDGE, sizes=(1, 2), draws=draws)
    assert trap.gap[0] == (0, 0, 0)
    # Drawn in turn the pair is right; at once it is wrong with 1/2, and then costs log 0.9 - log 0.1, over 2 positions.
    expected, step = (RIGHT - WRONG) / 4, (RIGHT - WRONG) / 2
    error = step / 2 / math.sqrt(len(PROMPTS) * draws)  # of a mean of coin tosses
    assert trap.gap[1].estimate == pytest.approx(expected, abs=4 * error)
    assert trap.gap[1].high - trap.gap[1].low == pytest.approx(2 * 1.96 * error, rel=0.3)
    assert trap.sequential[1] == pytest.approx((math.log(0.5) + RIGHT) / 2, abs=1e-6)
    assert trap.parallel[1] == pytest.approx(trap.sequential[1] - trap.gap[1].estimate, abs=1e-9)
    assert trap.entropy == pytest.approx([math.log(2), math.log(2)], abs=1e-9)
    # Where the pair is right the two draws are the same, and ties count half.
    wrong = trap.gap[1].estimate / step
    assert trap.less_likely[1] == pytest.approx(wrong + (1 - wrong) / 2, abs=1e-9)


def test_the_gap_of_each_prompt_is_counted_in_whole_mistakes():
    trap = marginal_trap(two_words, PAIRS, PROMPTS, JUDGE, sizes=(2,), draws=1)
    mistakes = trap.prompt_gaps / ((RIGHT - WRONG) / 2)
    torch.testing.assert_close(mistakes, mistakes.round(), atol=1e-6, rtol=0)
    assert set(mistakes.round().flatten().tolist()) == {0, 1}


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_one_token_has_no_trap_and_more_have_more(kind):
    process = LANGUAGE.process(kind)
    trap = marginal_trap(
        ExactDenoiser(LANGUAGE, process), process, LANGUAGE.sample(64, seed=0)[:, :3], language_judge(), sizes=(1, 2, 4)
    )
    assert trap.gap[0] == (0, 0, 0) and trap.less_likely[0] == 0.5
    assert trap.gap[1].low > 0 and trap.gap[1].estimate < trap.gap[2].estimate


def test_the_gap_of_an_exact_denoiser_is_what_enumeration_gives():
    """Two masked words after w: at once from their marginals, in turn from the law, under the smoothed judge."""
    process, prompts = LANGUAGE.process("masked"), torch.arange(6)[:, None].repeat(30, 1)
    trap = marginal_trap(ExactDenoiser(LANGUAGE, process), process, prompts, language_judge(), sizes=(2,), draws=20)
    step = LANGUAGE.transitions
    log_judge = (0.99 * step + 0.01 / 6).log()
    gaps = []
    for w in range(6):
        joint = step[w][:, None] * step
        product = step[w][:, None] * (step[w] @ step)
        gaps.append(((joint - product) * (log_judge[w][:, None] + log_judge)).sum().item() / 2)
    expected = sum(gaps) / 6
    error = trap.prompt_gaps.std().item() / math.sqrt(len(prompts))
    assert expected > 0.1 and trap.gap[0].estimate == pytest.approx(expected, abs=4 * error)


def test_a_low_temperature_closes_the_trap_at_the_price_of_variety():
    process = LANGUAGE.process("masked")
    denoiser, prompts = ExactDenoiser(LANGUAGE, process), LANGUAGE.sample(64, seed=1)[:, :2]
    options = {"prompts": prompts, "judge": language_judge(), "sizes": (4,)}
    warm, cold = (marginal_trap(denoiser, process, temperature=t, **options) for t in (1.0, 0.1))
    (change,) = trap_change(warm, cold)
    assert change.low > 0 and cold.entropy[0] < 0.5 * warm.entropy[0]
    assert cold.drawn_entropy[0] < warm.drawn_entropy[0]
    found = matched_temperature(denoiser, process, prompts, cold.entropy[0], positions=4)
    assert found == pytest.approx(0.1, abs=2e-3)
    assert matched_temperature(denoiser, process, prompts, 10.0, positions=4) == 1


def test_the_same_seed_gives_the_same_figures_whatever_the_batch():
    process, prompts = LANGUAGE.process("uniform"), LANGUAGE.sample(20, seed=2)[:, :3]
    options = {"judge": language_judge(), "sizes": (1, 3), "draws": 2}
    first, second = (
        marginal_trap(ExactDenoiser(LANGUAGE, process), process, prompts, batch_size=size, **options)
        for size in (64, 7)
    )
    torch.testing.assert_close(first.prompt_gaps, second.prompt_gaps, atol=1e-6, rtol=0)
    assert trap_change(first, first) == [(0, 0, 0)] * 2


def test_texts_are_scored_whole_under_a_judge_of_another_vocabulary():
    class Letters:
        """Reads letters one by one: more tokens than the denoiser's, one for each."""

        def __call__(self, texts, **options):
            return {"input_ids": [["abcd".index(letter) for letter in text] for text in texts]}

    judge = GenerativePerplexity(two_words_judge, Letters(), protocol="all")
    texts = lambda ids: ["".join("abcd"[token] for token in row) for row in ids.tolist()]  # noqa: E731
    by_ids = marginal_trap(two_words, PAIRS, PROMPTS, JUDGE, sizes=(2,), draws=2)
    by_text = marginal_trap(two_words, PAIRS, PROMPTS, judge, decode=texts, sizes=(2,), draws=2)
    torch.testing.assert_close(by_text.prompt_gaps, by_ids.prompt_gaps, atol=1e-12, rtol=0)
    assert by_text.sequential == pytest.approx(by_ids.sequential)
    with pytest.raises(TokenDriftError, match=r"fewer than 2 tokens\.\n  Use longer prompts"):
        marginal_trap(two_words, PAIRS, PROMPTS, judge, decode=lambda ids: ["a"] * len(ids))


# ------------------------------------------------------------------------------------------------ information decay


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_the_exact_denoiser_forgets_its_prompt_as_the_chain_does(kind):
    process, prompts = LANGUAGE.process(kind), LANGUAGE.sample(128, seed=0)[:, :3]
    law = nn.functional.pad(LANGUAGE.stationary, (0, process.vocab_size - 6))
    probe = information_decay(ExactDenoiser(LANGUAGE, process), process, prompts, law, positions=10, draws=16)
    assert probe.corpus_entropy == pytest.approx(LANGUAGE.unigram_entropy)
    if kind == "masked":  # d steps after the last word of the prompt: the law is that of the d-th power
        power = LANGUAGE.transitions
        for entropy, divergence in zip(probe.entropy, probe.divergence, strict=True):
            rows = power[prompts[:, -1]]
            expected = torch.special.entr(rows).sum(dim=1).mean().item()
            assert entropy.estimate == pytest.approx(expected, abs=1e-5)  # float32 logits
            relative = (torch.special.xlogy(rows, rows) - torch.special.xlogy(rows, LANGUAGE.stationary)).sum(dim=1)
            assert divergence.estimate == pytest.approx(relative.mean().item(), abs=1e-5)
            power = power @ LANGUAGE.transitions
        assert probe.draws == 1
    else:
        assert probe.draws == 16 and probe.divergence[0].low > probe.divergence[-2].high
    likely = probe.top[0][0]
    assert 0 <= likely.token < 6 and likely.probability >= probe.top[0][1].probability


def test_a_denoiser_of_unigrams_has_no_divergence_anywhere():
    law = unigram_law([A] * 5 + [B] * 3 + [C], PAIRS)
    blind = lambda ids, sigma: law.clamp_min(1e-30).log().expand(*ids.shape, 5)  # noqa: E731
    probe = information_decay(blind, PAIRS, PROMPTS, law, positions=3)
    for entropy, divergence in zip(probe.entropy, probe.divergence, strict=True):
        assert entropy == pytest.approx([torch.special.entr(law).sum().item()] * 3, abs=1e-9)
        assert divergence == pytest.approx([0, 0, 0], abs=1e-9)
    assert [share.token for share in probe.top[0]] == [A, B, C]


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_the_denoiser_is_told_the_noise_that_it_sees(kind):
    process, seen = LANGUAGE.process(kind), []

    def asked(ids, sigma):
        seen.append(1 - torch.exp(-sigma[0]).item())
        return torch.zeros(*ids.shape, process.vocab_size)

    law = unigram_law(LANGUAGE.sample(100, seed=0), process)
    information_decay(asked, process, LANGUAGE.sample(4, seed=0)[:, :6], law, positions=2)
    assert seen == pytest.approx([2 / 8], abs=1e-6)
    seen.clear()
    marginal_trap(asked, process, LANGUAGE.sample(4, seed=0)[:, :6], language_judge(), sizes=(2,), draws=1)
    assert seen == pytest.approx([2 / 8, 1 / 8], abs=1e-6)


def test_dropout_is_off_and_the_mode_comes_back():
    class Dropping(nn.Module):
        def forward(self, ids, sigma):
            return nn.functional.dropout(torch.ones(*ids.shape, 5), 0.5, self.training)

    model = Dropping().train()
    probe = information_decay(model, PAIRS, PROMPTS, ALIKE, positions=2)
    assert probe.entropy[0].estimate == pytest.approx(math.log(4), abs=1e-6) and model.training


# ------------------------------------------------------------------------------------------------ what is shown


def shown(table):
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().replace("\u00a0", " ")


def test_tables_json_and_plots_hold_the_same_numbers():
    decay = information_decay(two_words, PAIRS, PROMPTS, ALIKE, positions=4)
    trap = marginal_trap(two_words, PAIRS, PROMPTS, JUDGE, sizes=(1, 2, 4), draws=2)
    text = shown(decay.table("abcd?".__getitem__))
    assert "'a' 0.50" in text and f"{decay.entropy[1].estimate:.2f}" in text
    assert f"{trap.gap[1].estimate:.3f}" in shown(trap.table())
    both = shown(trap_table({"base": trap, "refined": trap})) + shown(decay_table({"base": decay, "refined": decay}))
    assert both.count("refined") >= 6

    plain = json.loads(json.dumps({"decay": decay.to_dict(), "trap": trap.to_dict()}))
    assert plain["decay"]["distance"] == [1, 2, 3, 4]
    assert plain["decay"]["top"][0][0] == decay.top[0][0]._asdict()
    assert plain["trap"]["gap"][1] == trap.gap[1]._asdict() and len(plain["trap"]["prompt_gaps"]) == len(PROMPTS)

    fig, ax = trap.plot()
    (line, _zero) = ax.get_lines()
    assert list(line.get_ydata()) == [interval.estimate for interval in trap.gap] and ax.get_xlabel() and fig
    _, ax = plot_decay({"base": decay, "refined": decay})
    assert [entry.get_text() for entry in ax.get_legend().get_texts()][:2] == ["entropy, base", "KL, base"]
    _, ax = decay.heat_map("abcd?".__getitem__)
    grid = ax.get_images()[0].get_array()
    assert grid.shape == (len(ax.get_yticklabels()), 4)
    assert grid[0, 0] == pytest.approx(decay.top[0][0].probability)
    plot_trap({"base": trap})
    figure, ax = decay.plot()
    assert decay.plot(ax) == (figure, ax)


# ------------------------------------------------------------------------------------------------ bad input

UNIFORM = UniformDiffusion(4)
FOLLOWS = torch.full((4, 4), -torch.inf)
FOLLOWS[[A, C], [B, D]], FOLLOWS[B], FOLLOWS[D] = 0.0, 0.0, 0.0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: information_decay(two_words, PAIRS, PROMPTS[0], ALIKE), r"prompts must have shape \(B, L\)"),
        (lambda: information_decay(two_words, PAIRS, PROMPTS[:1], ALIKE), "needs at least 2 of them"),
        (lambda: information_decay(two_words, PAIRS, PROMPTS + 3, ALIKE), "prompts has ids from 3 to 6"),
        (lambda: information_decay(two_words, PAIRS, torch.full((2, 2), MASK), ALIKE), "prompts hold the mask"),
        (lambda: information_decay(two_words, PAIRS, PROMPTS, ALIKE[:4]), "unigram must be a law over V = 5 tokens"),
        (lambda: information_decay(two_words, PAIRS, PROMPTS, ALIKE.flip(0)), "may be 0 only at the mask"),
        (lambda: information_decay(two_words, PAIRS, PROMPTS, ALIKE, positions=0), "positions must be an integer"),
        (lambda: information_decay(two_words, PAIRS, PROMPTS, ALIKE, temperature=0), "temperature must be a finite"),
        (lambda: information_decay(two_words, UNIFORM, PROMPTS, ALIKE[:4]), r"must return logits \(B, L, V\) = "),
        (lambda: marginal_trap(two_words, PAIRS, PROMPTS, JUDGE, sizes=()), "sizes is empty"),
        (lambda: marginal_trap(two_words, PAIRS, PROMPTS, JUDGE, sizes=(0,)), "sizes must be an integer of at least 1"),
        (lambda: marginal_trap(two_words, PAIRS, PROMPTS, JUDGE, draws=0), "draws must be an integer of at least 1"),
        (
            lambda: marginal_trap(two_words, PAIRS, PROMPTS, GenerativePerplexity(two_words_judge, protocol="sdtt")),
            "its protocol is 'sdtt'",
        ),
        (
            lambda: trap_change(*(marginal_trap(two_words, PAIRS, PROMPTS, JUDGE, sizes=(k,)) for k in (1, 2))),
            r"before has sizes \(1,\) and after has \(2,\)",
        ),
        (
            lambda: trap_change(*(marginal_trap(two_words, PAIRS, PROMPTS[:n], JUDGE, sizes=(1,)) for n in (4, 6))),
            "different numbers of prompts",
        ),
        (
            lambda: marginal_trap(
                two_words, PAIRS, PROMPTS, GenerativePerplexity(lambda ids, mask: FOLLOWS[ids], protocol="all")
            ),
            "probability zero to some draws",
        ),
        (lambda: unigram_law([], PAIRS), "there is no corpus to count"),
        (lambda: unigram_law([7], PAIRS), "ids has ids from 7 to 7"),
    ],
)
def test_what_cannot_be_probed_is_named(call, says):
    with pytest.raises(TokenDriftError, match=says):
        call()


# ------------------------------------------------------------------------------------------------ checkpoints

UNIFORM_BASE, MASKED_BASE, JUDGE_FOLDER = (str(PRETRAINED / name) for name in ("uniform", "masked", "judge"))
SHIPPED = {"tokenizer": PRETRAINED / "tokenizer.json", "judge": JUDGE_FOLDER, "judge_reads_ids": True}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics.values())[:40_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sharper(tmp_path_factory):
    """The shipped base with doubled logits: what it is at temperature 1/2, as a checkpoint of its own."""
    model, process = load_denoiser(UNIFORM_BASE)
    with torch.no_grad():
        for parameter in model.output_layer.linear.parameters():
            parameter.mul_(2)
    folder = tmp_path_factory.mktemp("sharper") / "model"
    save_denoiser(model, folder, process)
    return folder


@pytest.fixture(scope="module")
def report(text, sharper):
    return probe_checkpoints(UNIFORM_BASE, text, compare=sharper, prompts=16, positions=4, draws=2, **SHIPPED)


def test_a_model_that_is_only_sharper_is_the_first_at_a_temperature(report):
    (name,) = (name for name in report.trap if name not in ("before", "after"))
    assert name == "before, T = 0.50"
    matched, after = report.trap[name], report.trap["after"]
    assert matched.entropy == pytest.approx(after.entropy, abs=5e-3)
    # The temperature is found to 1/4096: hardly a draw falls on another token.
    same = (matched.prompt_gaps - after.prompt_gaps).abs().amax(dim=1) < 1e-6
    assert same.double().mean() >= 0.8
    assert "'before, T = 0.50', which is as sharp" in list(report.sentences())[2]


def test_a_change_is_said_in_words():
    assert _change_in_words(Interval(1.0, 0.5, 1.5)) == "smaller by 1.00 (0.50 to 1.50), beyond chance"
    assert _change_in_words(Interval(-1.0, -1.5, -0.5)) == "larger by 1.00 (0.50 to 1.50), beyond chance"
    assert _change_in_words(Interval(0.1, -0.1, 0.3)) == "smaller by 0.10 (-0.10 to 0.30), not beyond chance"


def test_the_shipped_base_falls_into_the_trap_and_forgets_the_prompt(report):
    trap, decay = report.trap["before"], report.decay["before"]
    assert trap.sizes == (1, 2, 4) and trap.gap[0] == (0, 0, 0) and trap.gap[-1].low > 0
    assert decay.divergence[0].estimate > decay.divergence[-1].estimate
    assert decay.prompt_length == 28 and trap.judge == JUDGE_FOLDER


def test_a_report_holds_everything_as_json_and_tables(report):
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["settings"]["compare"] and plain["settings"]["positions"] == 4
    assert list(plain["marginal_trap"]) == ["before", "before, T = 0.50", "after"]
    assert plain["change"][0] == {"estimate": 0.0, "low": 0.0, "high": 0.0}
    share = plain["information_decay"]["after"]["top"][0][0]
    assert isinstance(share["text"], str) and 0 < share["probability"] < 1
    decays, traps = map(shown, report.tables())
    assert decays.count("before") == decays.count("after") == 3
    assert "before, T = 0.50" in traps


def test_the_command_prints_both_probes_and_writes_all_numbers(text, tmp_path):
    output = tmp_path / "probe.json"
    done = CliRunner().invoke(
        cli.app,
        ["probe", MASKED_BASE, "--text", str(text), "--tokenizer", str(PRETRAINED / "tokenizer.json"),
         "--judge", JUDGE_FOLDER, "--judge-reads-ids", "--prompts", "4", "--positions", "2", "-o", str(output)],
        env={"COLUMNS": "200", "TERM": "dumb"},
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for part in (
        "Information decay",
        "likeliest tokens",
        "Marginal trap",
        "Under the judge, 2 tokens drawn at once are",
    ):
        assert part in done.stdout
    assert set(json.loads(output.read_text())["marginal_trap"]) == {"before"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "none.txt"], "cannot be read"),
        (["--compare", MASKED_BASE], "the checkpoints have V = 1024 and V = 1025"),
        (["--prompts", "100000"], "too few for 100000 prompts of 16"),
        (["--positions", "20", "--prompt-length", "20"], "exceed the length of the model, 32"),
        (["--positions", "40"], "1 token of prompt and 40 positions exceed"),
        (["--tokenizer", __file__], "no tokenizer can be read from"),
        (["--judge-tokenizer", JUDGE_FOLDER], "judge_tokenizer was given, but the judge reads ids"),
    ],
)
def test_the_command_says_in_one_message_what_does_not_fit(arguments, says, text):
    known = {"--text": str(text), "--tokenizer": str(PRETRAINED / "tokenizer.json"), "--judge": JUDGE_FOLDER}
    known |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    options = [part for pair in known.items() for part in pair]
    done = CliRunner().invoke(cli.app, ["probe", UNIFORM_BASE, "--judge-reads-ids", *options], env={"TERM": "dumb"})
    assert done.exit_code == 2 and done.stderr.startswith("tokendrift: ") and says in done.stderr
    assert "Traceback" not in done.output


def test_a_checkpoint_without_a_tokenizer_asks_for_one(text, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(UNIFORM_BASE) / name, tmp_path)
    with pytest.raises(TokenDriftError, match="has no tokenizer"):
        probe_checkpoints(tmp_path, text, judge=two_words_judge)
