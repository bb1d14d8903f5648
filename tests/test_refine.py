"""A refinement ends with the same bits whatever interrupts it, and leaves what others read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import refine_worker as worker
import torch
from forked import run_all
from typer.testing import CliRunner

from tokendrift import TokenDriftError
from tokendrift.cli import app
from tokendrift.evaluation import GenerativePerplexity
from tokendrift.models import load_denoiser, save_denoiser
from tokendrift.models.random_input import random_numbers
from tokendrift.training import Drift, Refined, evaluation_table, make_config, read_log, refine
from tokendrift.training.checkpointing import load_checkpoint
from tokendrift.training.few_step import FewStepEvaluation
from tokendrift.training.records import Records


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a tiny masked checkpoint and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    worker.make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def whole(inputs):
    """The folder of a run that nothing has interrupted."""
    return run(inputs, "whole").folder


def run(inputs, name, *, on_step=None, judge=None, **changes):
    """Refine into a folder of that name."""
    return refine(
        worker.config(inputs, output=str(inputs / name), **changes), judge=judge, progress=False, on_step=on_step
    )


def interrupt(at):
    """Return what interrupts a run after a step."""

    def on_step(step):
        if step == at:
            raise KeyboardInterrupt

    return on_step


def assert_same_model(one, other):
    for name in ("model.safetensors", "config.json", "log.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(inputs, whole):
    for stop in (1, 2, 5):  # before the first checkpoint, after it, and between two
        with pytest.raises(KeyboardInterrupt):
            run(inputs, "stopped", on_step=interrupt(stop))
    assert_same_model(whole, run(inputs, "stopped").folder)


def test_a_signal_to_stop_costs_no_step(inputs, whole):
    for at, number in ((3, signal.SIGTERM), (5, signal.SIGINT)):
        before = signal.getsignal(number)
        if before == signal.SIG_IGN:
            continue  # as SIGINT is for a process in the background
        with pytest.raises(KeyboardInterrupt):
            run(inputs, "ended", on_step=lambda step, at=at, n=number: step == at and os.kill(os.getpid(), n))
        assert (inputs / "ended" / "checkpoints" / f"step-{at:08d}").is_dir()
        assert signal.getsignal(number) == before
    assert_same_model(whole, run(inputs, "ended").folder)


def killed(tmp_path, kills, seed, **settings):
    (done,) = run_all(partial(worker.kill, **settings), [(tmp_path, kills, seed)])
    assert_same_model(tmp_path / "whole", tmp_path / "killed")
    return done


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs, to start them quickly")
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path):
    assert killed(tmp_path, 2, 0) == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs, to start them quickly")
def test_kills_change_no_law_and_no_chain(tmp_path):
    assert killed(tmp_path, 2, 0, objective="pairs", pair_sequences=40) == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs, to start them quickly")
def test_fifty_kills_change_no_bit(tmp_path):
    assert killed(tmp_path, 50, 1) == 50


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(inputs, whole):
    with pytest.raises(KeyboardInterrupt):
        run(inputs, "damaged", on_step=interrupt(5))
    last = inputs / "damaged" / "checkpoints" / "step-00000004"
    file = last / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"(?s)optimizer.safetensors was changed after it was written: its SHA-256.*previous"
    ):
        folder = run(inputs, "damaged").folder
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert "optimizer.safetensors was changed after it was written" in read_log(folder, "message")[0]["message"]
    assert (last.parent / "broken-step-00000004").exists()


@contextmanager
def disk():
    """Let files grow to a size and no further: the system refuses the rest, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_checkpoints_and_no_more(inputs, whole):
    def fill(step):
        limit(20_000 if step in (3, 4) else None)
        if step == 5:
            raise KeyboardInterrupt

    with (
        disk() as limit,
        pytest.warns(UserWarning, match="checkpoint of step 4 could not be written.*continues"),
        pytest.raises(KeyboardInterrupt),
    ):
        run(inputs, "full", on_step=fill)
    assert [path.name for path in (inputs / "full" / "checkpoints").iterdir()] == ["step-00000002"]
    folder = run(inputs, "full").folder
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_model_that_cannot_be_written_is_not_lost(inputs, whole):
    with disk() as limit, pytest.raises(TokenDriftError, match=r"(?s)cannot be written.*run the same command again"):
        run(inputs, "unwritten", on_step=lambda step: limit(20_000 if step == 6 else None))
    assert not (inputs / "unwritten" / "model.safetensors").exists()
    assert_same_model(whole, run(inputs, "unwritten").folder)


def test_the_last_checkpoints_and_the_best_are_kept(inputs, monkeypatch):
    monkeypatch.setattr(FewStepEvaluation, "score", lambda self, rows: abs(rows[0]["step"] - 4.0))
    folder = run(inputs, "best", steps=10, keep=1, evaluate_every=2).folder
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000004", "step-00000010"}
    best, last = load_denoiser(folder / "best")[0], load_denoiser(folder)[0]
    assert not torch.equal(best.vocab_embed.embedding, last.vocab_embed.embedding)
    assert "| refined | 6 |" not in (folder / "best" / "README.md").read_text()


def test_a_judge_scores_every_evaluation(inputs):
    judge = GenerativePerplexity(lambda ids, attention_mask: torch.zeros(*ids.shape, 1025), protocol="all")
    rows = run(inputs, "judged", judge=judge, steps=1, evaluate_nfe=(1, 2)).evaluations
    assert [(row["step"], row["nfe"]) for row in rows] == [(0, None), (0, 1), (0, 2), (1, 1), (1, 2)]
    assert [row["gen_ppl"] for row in rows] == pytest.approx([1025.0] * 5, rel=1e-4)
    assert {"sample_entropy", "unigram_entropy", "distinct_3", "repetition_4"} <= rows[0].keys()


@pytest.mark.parametrize("objective", ["continuation", "combined", "mirror-kl", "mirror-mse"])
def test_every_objective_trains_both_kinds_of_model(tmp_path, objective):
    worker.make_inputs(tmp_path, masked=objective != "combined")
    changes = {"steps": 2, "precision": "bf16", "freeze_queues": True, "evaluate_nfe": (), "window": 4}
    folder = run(tmp_path, "run", objective=objective, **changes).folder
    record = read_log(folder, "train")[-1]
    expected = {"continuation": {"nelbo"}, "combined": {"nelbo", "drift"}}.get(objective, {"drift"})
    assert expected <= record.keys()
    base, refined = load_denoiser(tmp_path / "base")[0], load_denoiser(folder)[0]
    assert not torch.equal(base.vocab_embed.embedding, refined.vocab_embed.embedding)


@pytest.mark.parametrize("masked", [True, False])
def test_pairs_are_counted_ahead_and_trained_on_chains_of_either_kind(tmp_path, masked):
    worker.make_inputs(tmp_path, masked=masked)
    changes = {"steps": 2, "precision": "bf16", "freeze_queues": True, "evaluate_nfe": (), "pair_buckets": 100}
    folder = run(tmp_path, "run", objective="pairs", pair_sequences=40, **changes).folder
    assert {"drift", "nelbo", "total_variation", "divergence"} <= read_log(folder, "train")[-1].keys()
    laws = load_checkpoint(folder / "checkpoints" / "step-00000002").tensors["objective"]
    assert laws["real"].shape == (1, 100) and len(laws["generated"]) == (4 if masked else 5)
    pairs_of_a_sequence, sequences = worker.LENGTH - 1, 40 + 2 * 8  # ahead, and in two steps
    assert laws["real_weight"].tolist() == [pairs_of_a_sequence * sequences]
    assert laws["generated_weight"].sum() == 4  # micro-batches
    assert "on its own few-step chains" in (folder / "README.md").read_text()


def resumed_to_the_bit(tmp_path, **changes):
    """Run whole and interrupted, assert that models and states are equal, and return the whole run."""
    changes = {"evaluate_nfe": ()} | changes
    folder = run(tmp_path, "whole", **changes).folder
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "stopped", on_step=interrupt(3), **changes)
    assert_same_model(folder, run(tmp_path, "stopped", **changes).folder)
    last = f"step-{changes['steps']:08d}"
    states = [
        load_checkpoint(tmp_path / name / "checkpoints" / last).tensors["objective"] for name in ("whole", "stopped")
    ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    return folder


MATCHING = {"objective": "matching", "pair_sequences": 41, "pair_buckets": 100, "dropout": 0.0, "steps": 4}


@pytest.mark.parametrize(("masked", "rank"), [(True, 0), (False, 2)])
def test_matching_trains_both_kinds_of_model_and_is_resumed_to_the_bit(tmp_path, masked, rank):
    worker.make_inputs(tmp_path, masked=masked)
    changes = MATCHING | {"auxiliary_rank": rank}
    folder = resumed_to_the_bit(tmp_path, **changes)
    assert {"matching", "drift", "nelbo", "total_variation", "auxiliary_nelbo"} <= read_log(folder, "train")[-1].keys()
    # The configuration that is written has what was chosen for the process, and the model its random input.
    chosen = make_config(file=folder / "config.toml").objective
    found = (chosen.chains, chosen.pair_weight, chosen.random_input)
    assert found == (((1, 2, 4), 0.2, 32) if masked else ((2, 4), 1.0, 0))
    model = load_denoiser(folder)[0]
    assert model.config.random_input == random_numbers(model) == (32 if masked else 0)
    assert ("random_input" in json.loads((folder / "config.json").read_text())) == masked
    assert ("32 random numbers at each masked" in (folder / "README.md").read_text()) == masked
    if masked:  # refined again, by any objective, it keeps the random input, and there is no second one
        again = run(tmp_path, "again", checkpoint=str(folder), **MATCHING | {"steps": 1}).folder
        assert load_denoiser(again)[0].config == model.config
        with pytest.raises(TokenDriftError, match="random input of 32 numbers already"):
            run(tmp_path, "twice", checkpoint=str(folder), **MATCHING, random_input=8)


ROUNDS = {"round_steps": 2, "teacher_steps": 8, "dropout": 0.0, "steps": 5}


@pytest.mark.parametrize(
    ("objective", "more"), [("sdtt", {"fewest_steps": 4, "drift_weight": 0.5}), ("dcd", {"teacher_average": True})]
)
def test_distillation_in_rounds_is_resumed_to_the_bit(tmp_path, objective, more):
    worker.make_inputs(tmp_path, masked=objective == "sdtt")
    changes = ROUNDS | more | {"objective": objective}
    folder = resumed_to_the_bit(tmp_path, **changes)
    log = read_log(folder, "train")
    assert [entry["teacher_steps"] for entry in log] == [8, 8, 4, 4, 4 if objective == "sdtt" else 2]
    assert all("distillation" in entry and ("drift" in entry) == ("drift_weight" in more) for entry in log)


def test_the_model_before_refinement_is_evaluated_without_the_random_input(inputs):
    before = {"steps": 1, "evaluate_nfe": (2, 4)}
    names = ("continuation", "matching")
    rows = [run(inputs, f"before-{name}", objective=name, **before).evaluations for name in names]
    assert rows[0][:3] == rows[1][:3]


def test_a_random_input_needs_masks(tmp_path):
    worker.make_inputs(tmp_path, masked=False)
    with pytest.raises(TokenDriftError, match="random_input gives numbers to masked positions"):
        run(tmp_path, "run", objective="matching", random_input=8)


def test_chains_without_a_position_are_refused_before_any_work(inputs):
    with pytest.raises(TokenDriftError, match=r"steps must name a chain of .* 2 for masked models"):
        run(inputs, "no_position", objective="pairs", chains=(1,))
    assert not (inputs / "no_position").exists()


@pytest.mark.parametrize(("objective", "held"), [("drift", False), ("combined", True), ("mirror-kl", True)])
def test_logits_are_held_only_where_something_reads_them(inputs, monkeypatch, objective, held):
    asked = []

    def recorded(*args, hold_logits, **options):
        asked.append(hold_logits)
        return Drift(*args, hold_logits=hold_logits, **options)

    monkeypatch.setattr("tokendrift.training.objectives.drift.Drift", recorded)
    run(inputs, f"held-{objective}", objective=objective, steps=1, evaluate_nfe=())
    assert asked == [held]


def test_the_folder_is_what_others_read(whole):
    from transformers import AutoTokenizer

    model, process = load_denoiser(whole)
    assert process.mask_id == 1024
    assert model.config.model_length == worker.LENGTH
    tokenizer = AutoTokenizer.from_pretrained(whole)
    assert tokenizer.decode(tokenizer("the drift of a token")["input_ids"]) == "the drift of a token"
    assert tokenizer.eos_token == "<eos>"
    assert make_config(file=whole / "config.toml") == make_config(values=json_config(whole))
    card = (whole / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: tokendrift\n")
    for part in ("| real text |", "| before | 0 | 2 |", "| refined | 6 | 2 |", "learning_rate = 0.01", "## Limits"):
        assert part in card


def json_config(folder):
    state = json.loads((folder / "checkpoints" / "step-00000006" / "state.json").read_text())
    return state["config"]


def test_the_log_has_every_step_with_the_diagnostics_of_each_temperature(whole):
    records = read_log(whole, "train")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert {"drift", "token_entropy", "raw_drift_rms", "grad_norm", "learning_rate"} <= records[0].keys()
    assert {"raw_drift_rms/0.02", "positive_mass/0.05", "effective_references/0.2"} <= records[0].keys()
    assert [record["queue"] for record in records] == [2, 10, 18, 24, 24, 24]
    assert [row["step"] for row in read_log(whole, "evaluation")] == [0, 6]
    assert read_log(whole, "real_text")[0]["sample_entropy"] > 0


def test_the_log_holds_no_number_that_json_does_not_know(tmp_path):
    with Records(tmp_path, 0, 1, progress=False) as records:
        records.figures("train", 1, {"pair_weight/0.02": float("nan"), "drift": 0.5})
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert read_log(tmp_path) == [{"kind": "train", "step": 1, "pair_weight/0.02": None, "drift": 0.5}]


def test_curves_are_written_where_tensorboard_is_installed(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Records(tmp_path, 0, 2, tensorboard=True, progress=False) as records:
        for step in (1, 2):
            records.figures("train", step, {"drift": 0.5 * step})
        records.figures("evaluation", 2, {"nfe": 4, "gen_ppl": 80.0})
    curves = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in curves.Scalars("train/drift")] == [(1, 0.5), (2, 1.0)]
    assert curves.Scalars("evaluation_4_nfe/gen_ppl")[0].value == 80.0


def test_the_matched_continuation_stands_beside(inputs):
    refined = run(inputs, "both", baseline=True, steps=2)
    models = [row.get("model") for row in refined.evaluations]
    assert models == [None, None, None, "continuation"]
    assert "| continuation | 2 | 2 |" in (refined.folder / "README.md").read_text()
    load_denoiser(refined.folder / "continuation")
    table = evaluation_table(refined.evaluations)
    assert [column.header for column in table.columns][:3] == ["model", "step", "NFE"]
    assert table.row_count == 4


def test_falling_entropy_is_warned_of(tmp_path):
    worker.make_inputs(tmp_path)
    model, process = load_denoiser(tmp_path / "base")
    with torch.no_grad():
        model.output_layer.linear.bias[7] += 20  # says little else
    save_denoiser(model, tmp_path / "base", process)
    with pytest.warns(UserWarning, match=r"after [01] steps, at 2 function evaluations .* an entropy of 0\.\d\d nats"):
        run(tmp_path, "run", steps=1)
    assert "the model repeats itself" in read_log(tmp_path / "run", "message")[0]["message"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, r"contains a run with another configuration: learning_rate was 0.01 and is 0.001"),
        (
            {"micro_batch": 2},
            r"a forward call of all processes had 4 .* and has 2; pass micro_batch=4.*\n.*Choose another output",
        ),
    ],
)
def test_a_folder_belongs_to_one_configuration(inputs, whole, changes, message):
    with pytest.raises(TokenDriftError, match=message):
        run(inputs, "whole", **changes)


def test_what_is_told_and_kept_may_change(inputs, whole):
    run(inputs, "whole", keep=1, judge=None, evaluate_samples=4)


def test_a_text_too_short_for_one_sequence_is_refused(inputs, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(TokenDriftError, match=r"the text has \d tokens, too few for one sequence of 10"):
        run(inputs, "short", text=(str(tmp_path / "short.txt"),))
    assert not (inputs / "short").exists()


def test_a_model_of_another_making_is_not_overwritten(inputs):
    with pytest.raises(TokenDriftError, match=r"base contains a model that was not written by refine"):
        run(inputs, "base")


def test_a_changed_base_is_noticed(tmp_path):
    worker.make_inputs(tmp_path)
    run(tmp_path, "run", steps=2)
    model, process = load_denoiser(tmp_path / "base")
    with torch.no_grad():
        model.vocab_embed.embedding[0, 0] += 1
    save_denoiser(model, tmp_path / "base", process)
    with pytest.raises(TokenDriftError, match="the weights of the checkpoint to refine have changed"):
        run(tmp_path, "run", steps=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ()}, "no text to train on"),
        ({"window": 5}, "window must divide the length of a sequence, 12"),
        ({"encoder_time": 0.5}, "the checkpoint is not conditioned on time"),
        ({"tokenizer": "/no/where"}, "no tokenizer can be read from /no/where"),
        ({"checkpoint": "/nowhere"}, "does not exist"),
        ({"output": "/dev/null/run"}, "output /dev/null/run cannot be written"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(inputs, changes, message):
    with pytest.raises(TokenDriftError, match=message):
        refine(worker.config(inputs, **{"output": str(inputs / "refused"), **changes}), progress=False)
    assert not (inputs / "refused").exists()


def launched(folder, ranks, *, mode="run", **changes):
    """Refine on several processes, as ``torchrun`` starts them; return the number of evaluations that each has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return run_all(worker.rank, [(environment, mode, folder, changes) for environment in environments])


@pytest.fixture(scope="module")
def pair(inputs):
    """The folder of a run of two processes."""
    changes = {"output": str(inputs / "pair"), "dropout": 0.0, "micro_batch": 2, "steps": 4}
    assert launched(inputs, 2, **changes) == [3, 0]
    return inputs / "pair"


def assert_close(one, two):
    assert (one["kind"], one.get("nfe")) == (two["kind"], two.get("nfe"))
    for name in one.keys() - {"kind", "nfe"}:
        assert two[name] == pytest.approx(one[name], abs=1e-5, rel=1e-5), name


def test_two_processes_train_like_one(inputs, pair):
    """The same global micro-batches, noise and references; the bound is that of float32 sums in another order."""
    alone, both = read_log(run(inputs, "one", dropout=0.0, steps=4).folder), read_log(pair)
    assert len(alone) == len(both) == 7
    for one, two in zip(alone, both, strict=True):
        assert one.keys() == two.keys()
        assert_close(one, two)


def test_a_run_of_two_processes_goes_on_as_one(inputs, pair):
    """A checkpoint does not depend on the number of processes that wrote it."""
    shutil.copytree(pair, inputs / "shrinks")
    shutil.rmtree(inputs / "shrinks" / "checkpoints" / "step-00000004")
    shrunk = run(inputs, "shrinks", dropout=0.0, steps=4).folder
    for one, two in zip(read_log(shrunk, "train"), read_log(pair, "train"), strict=True):
        assert two["drift"] == pytest.approx(one["drift"], abs=1e-5)


CHAINS = {"objective": "pairs", "pair_sequences": 41, "dropout": 0.0, "steps": 4}


@pytest.fixture(scope="module")
def chains(inputs):
    """The folder of a run on its own chains."""
    return run(inputs, "chains", **CHAINS).folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["run", "shard"])
def test_two_processes_draw_the_chains_and_keep_the_laws_of_one(inputs, chains, mode):
    launched(inputs, 2, mode=mode, output=str(inputs / f"chains-{mode}"), micro_batch=2, **CHAINS)
    for one, two in zip(read_log(chains), read_log(inputs / f"chains-{mode}"), strict=True):
        assert_close(one, two)
    kept = [
        load_checkpoint(folder / "checkpoints" / "step-00000004").tensors["objective"]
        for folder in (chains, inputs / f"chains-{mode}")
    ]
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("mode", ["run", pytest.param("shard", marks=pytest.mark.slow)])
def test_two_processes_match_distributions_like_one(inputs, mode):
    one = run(inputs, "matching", **MATCHING).folder
    two = inputs / f"matching-{mode}"
    launched(inputs, 2, mode=mode, output=str(two), micro_batch=2, **MATCHING)
    for alone, both in zip(read_log(one), read_log(two), strict=True):
        assert_close(alone, both)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["run", "shard"])
def test_two_processes_distil_like_one(inputs, mode):
    changes = ROUNDS | {"objective": "sdtt", "fewest_steps": 4, "steps": 4}
    one = run(inputs, f"sdtt-one-{mode}", **changes).folder
    launched(inputs, 2, mode=mode, output=str(inputs / f"sdtt-{mode}"), micro_batch=2, **changes)
    for alone, both in zip(read_log(one), read_log(inputs / f"sdtt-{mode}"), strict=True):
        assert_close(alone, both)


@pytest.mark.slow
def test_a_sharded_model_trains_like_a_whole_one_and_shares_its_checkpoints(inputs, pair):
    """FSDP2: other collectives, sharded moments and averages, the same numbers and files."""
    changes = {"dropout": 0.0, "micro_batch": 2, "steps": 4}
    shutil.copytree(pair, inputs / "sharded")
    shutil.rmtree(inputs / "sharded" / "checkpoints" / "step-00000004")
    for folder in ("sharded", "sharded_from_start"):
        launched(inputs, 2, mode="shard", output=str(inputs / folder), **changes)
        for one, two in zip(read_log(inputs / folder), read_log(pair), strict=True):
            assert_close(one, two)


@pytest.mark.slow
def test_only_the_main_process_of_a_resumed_run_has_evaluations(inputs, pair):
    shutil.copytree(pair, inputs / "again")
    assert launched(inputs, 2, output=str(inputs / "again"), dropout=0.0, micro_batch=2, steps=4) == [3, 0]


@pytest.mark.slow
def test_evaluating_a_sharded_model_does_not_change_its_training(inputs, pair):
    changes = {"dropout": 0.0, "micro_batch": 2, "steps": 4, "evaluate_every": 1}
    launched(inputs, 2, mode="shard", output=str(inputs / "sharded_evaluated"), **changes)
    for one, two in zip(read_log(inputs / "sharded_evaluated", "train"), read_log(pair, "train"), strict=True):
        assert_close(one, two)


def test_the_command_shows_its_settings_and_names_the_nearest_key():
    command = CliRunner()
    shown = command.invoke(app, ["refine", "base", "--preset", "duo-owt", "--set", "evaluate_nfe=2", "--show"])
    assert shown.exit_code == 0
    assert 'checkpoint = "base"' in shown.stdout
    assert "learning_rate = 5e-05" in shown.stdout
    assert "evaluate_nfe = [2]" in shown.stdout
    wrong = command.invoke(app, ["refine", "base", "--set", "stepz=3"])
    assert wrong.exit_code == 2
    assert "unknown key 'stepz'; the nearest is 'steps'" in wrong.stderr


def test_the_command_takes_the_best_preset_unless_something_else_is_named():
    def shown(*flags):
        return CliRunner().invoke(app, ["refine", "base", "--show", *flags])

    assert 'objective = "matching"' in shown().stdout and "steps = 1500" in shown("--set", "wrap=no").stdout
    assert 'objective = "drift"' in shown("--objective", "drift", "--set", "window=2").stdout
    assert 'objective = "pairs"' in shown("--preset", "pairs").stdout
    foreign = shown("--set", "window=2")
    assert foreign.exit_code == 2 and "window is a setting of the objective drift, " in foreign.stderr
    assert "Pass --objective drift" in foreign.stderr


def test_the_command_refines_and_tells_where(inputs):
    flags = ["--text", str(inputs / "text.txt"), "--output", str(inputs / "by_command"), "--steps", "1"]
    flags += ["--batch-size", "2", "--micro-batch", "2"]
    for setting in (f"tokenizer={worker.PRETRAINED / 'tokenizer.json'}", "shuffle=4", "evaluate_samples=2"):
        flags += ["--set", setting]
    done = CliRunner().invoke(app, ["refine", str(inputs / "base"), *flags, "--set", "tensorboard=no"])
    assert done.exit_code == 0, done.stderr
    assert "few-step generation" in done.stdout
    assert f"refined model: {inputs / 'by_command'}" in done.stdout
    load_denoiser(inputs / "by_command")


@pytest.mark.parametrize("main", [True, False])
def test_the_command_tells_where_without_evaluations_and_on_one_process_alone(inputs, monkeypatch, main):
    monkeypatch.setattr("tokendrift.training.refine", lambda config, **_: Refined(Path(config.output), []))
    monkeypatch.setattr("accelerate.PartialState", lambda: SimpleNamespace(is_main_process=main))
    done = CliRunner().invoke(app, ["refine", "base", "--output", "there", "--set", "evaluate_nfe="])
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ("refined model: there\n" if main else "")
