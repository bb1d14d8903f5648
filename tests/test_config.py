"""Configurations: what is written can be read, what is unknown or impossible is refused with the nearest way out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendrift import TokenDriftError
from tokendrift.training import (
    OBJECTIVES,
    PRESETS,
    DriftConfig,
    MatchingConfig,
    PairsConfig,
    RefineConfig,
    make_config,
    parse_settings,
)
from tokendrift.training.config import setting_help

numbers = st.floats(1e-9, 1e9)


@given(
    checkpoint=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    rate=numbers,
    temperatures=st.lists(numbers, min_size=1, max_size=4),
    window=st.none() | st.integers(1, 9),
    wrap=st.booleans(),
)
def test_a_configuration_comes_back_from_its_toml(tmp_path_factory, checkpoint, rate, temperatures, window, wrap):
    objective = DriftConfig(temperatures=tuple(temperatures), window=window)
    made = RefineConfig(checkpoint, objective=objective, learning_rate=rate, wrap=wrap, text=("a", "b\\c"))
    file = tmp_path_factory.mktemp("toml") / "config.toml"
    file.write_text(made.as_toml(), encoding="utf-8")
    assert make_config(file=file) == made


@pytest.mark.parametrize(("preset", "rate"), [("mdlm-owt", 3e-5), ("duo-owt", 5e-5)])
def test_presets_have_the_values_of_the_paper(preset, rate):
    made = make_config(preset=preset)
    assert made.checkpoint == {"mdlm-owt": "kuleshov-group/mdlm-owt", "duo-owt": "s-sahoo/duo"}[preset]
    assert (made.steps, made.batch_size, made.micro_batch, made.learning_rate) == (13_000, 512, 2, rate)
    assert made.objective == DriftConfig(temperatures=(0.02, 0.05, 0.2), queue_size=1024, drift_scale=1.0)
    assert made.accumulation(processes=4) == 64
    peers = {"idlm", "d-mmd", "sdtt-owt", "dcd-owt"}
    assert set(PRESETS) == {"tokendrift", "mdlm-owt", "duo-owt", "pairs", "matching"} | peers
    named = {"checkpoint": made.checkpoint, "learning_rate": rate}
    assert make_config(preset="tokendrift", values=named) == made


def test_the_preset_of_pairs_serves_any_checkpoint_at_twice_the_rate():
    with pytest.raises(TokenDriftError, match="no checkpoint to refine"):
        make_config(preset="pairs")
    with pytest.raises(TokenDriftError, match="no checkpoint to refine"):
        make_config(values={"checkpoint": None})
    made = make_config(preset="pairs", values={"checkpoint": "base", "text": ["a.txt"]})
    assert made.objective == PairsConfig(chains=(2, 4), base_weight=0.1, pair_decay=0.95)
    assert made.learning_rate == 2 * RefineConfig("base").learning_rate
    assert (made.dataset, made.judge, made.steps) == (None, None, RefineConfig("base").steps)


def test_the_preset_of_matching_leaves_to_the_process_what_depends_on_it():
    made = make_config(preset="matching", values={"checkpoint": "base"})
    assert made.objective == MatchingConfig(base_weight=0.1, field_clip=5.0, auxiliary_rate=1e-3)
    assert (made.learning_rate, made.schedule, made.ema, made.betas) == (5e-4, "cosine", 0.99, (0.9, 0.98))
    again = make_config(values=made.settings())
    assert again == made and again.settings()["random_input"] is None


def test_the_presets_of_released_distillations_have_their_settings():
    sdtt, dcd = make_config(preset="sdtt-owt"), make_config(preset="dcd-owt")
    for made, steps, ema in ((sdtt, 70_000, 0.9999), (dcd, 50_000, 0.999)):
        assert (made.steps, made.ema, made.learning_rate, made.batch_size) == (steps, ema, 6e-5, 128)
        assert made.objective.divergence == "kl_student_teacher" and made.objective.round_steps == 10_000
    assert (sdtt.objective.teacher_steps, sdtt.objective.inner_steps, sdtt.objective.fewest_steps) == (1024, 2, 8)
    assert (dcd.objective.teacher_steps, dcd.objective.gamma_min, dcd.objective.gamma_max) == (512, -4.0, -1.0)


@pytest.mark.parametrize("preset", ["idlm", "d-mmd"])
def test_the_presets_of_others_learned_fields_come_back_from_their_toml(preset, tmp_path):
    made = make_config(preset=preset, values={"checkpoint": "base"})
    assert made.objective.student_inputs == "text" and made.objective.field_clip == math.inf
    assert made.objective.pair_weight == made.objective.base_weight == 0
    (tmp_path / "config.toml").write_text(made.as_toml())
    assert make_config(file=tmp_path / "config.toml") == made


@pytest.mark.parametrize(
    ("objective", "given", "weight"),
    [
        ("drift", None, None),
        ("drift", 1.0, None),
        ("drift", 0.0, None),
        ("combined", None, 1.0),
        ("pairs", None, 0.1),
        ("pairs", 0.0, 0.0),
        ("pairs", 2.0, 2.0),
    ],
)
def test_the_weight_of_the_base_is_that_of_the_objective_unless_it_is_given(objective, given, weight):
    made = make_config(values={"checkpoint": "base", "objective": objective, "base_weight": given})
    assert made.settings().get("base_weight") == weight


def test_later_sources_win_and_a_text_replaces_the_dataset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "duo-owt"\nsteps = 5\nseed = 1\ntext = ["mine.txt"]\n')
    made = make_config(file=file, values={"seed": 2})
    assert (made.steps, made.seed, made.text, made.dataset) == (5, 2, ("mine.txt",), None)
    assert make_config(file=file, values={"dataset": "theirs"}).text == ()


def test_settings_have_the_types_of_their_keys():
    assert parse_settings(["betas=0.9, 0.95", "wrap=no", "window=none", "seed=3", "judge=gpt2"]) == {
        "betas": (0.9, 0.95),
        "wrap": False,
        "window": None,
        "seed": 3,
        "judge": "gpt2",
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objctive": "drift"}, "unknown key 'objctive'; the nearest is 'objective'"),
        ({"zzz": 1}, "unknown key 'zzz'; the settings are checkpoint, output"),
        (
            {"objective": "gan"},
            "must be one of 'drift', 'continuation', 'combined', 'pairs', 'matching', 'mirror-kl', 'mirror-mse'",
        ),
        ({"steps": 1.5}, "steps must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"wrap": "yes"}, "wrap must be true or false"),
        ({"text": "a.txt"}, "text must be a list in which each entry is a text"),
        ({"text": ["a"], "dataset": "b"}, "text and dataset cannot both be given"),
        ({"judge_tokenizer": "a"}, "judge_tokenizer needs a judge"),
        ({"batch_size": 9, "micro_batch": 2}, "batch_size must be a multiple of micro_batch"),
        ({"encoder_time": 1.0}, r"encoder_time must lie in \[0, 1\)"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number above 0"),
        ({"length": 2}, "length must be an integer of at least 3"),
        ({"dropout": 1.5}, r"dropout must lie in \[0, 1\)"),
        ({"entropy_tolerance": 5}, r"entropy_tolerance must lie in \[0, 1\): a share"),
        ({"objective": "combined", "base_weight": 0.0}, "base_weight must be a finite number above 0"),
        ({"chains": ()}, "chains must name at least one number of steps"),
        ({"chains": (2, 0)}, "chains must be an integer of at least 1"),
        ({"pair_decay": 1.0}, r"pair_decay must lie in \[0, 1\)"),
        ({"pair_buckets": 1}, "pair_buckets must be an integer of at least 2"),
        ({"precision": "fp16"}, "precision must be one of 'fp32', 'bf16'"),
    ],
)
def test_what_is_unknown_or_impossible_is_refused(values, message):
    with pytest.raises(TokenDriftError, match=message):
        make_config(values={"checkpoint": "base", **values})


def test_paths_may_stand_for_their_names():
    made = RefineConfig(Path("base"), output=Path("refined"), text=(Path("a.txt"),))
    assert (made.checkpoint, made.output, made.text) == ("base", "refined", ("a.txt",))
    assert 'checkpoint = "base"' in made.as_toml()


def test_what_cannot_be_read_is_refused(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("steps = = 3")
    with pytest.raises(TokenDriftError, match=r"run.toml cannot be read as TOML: .*\n.*Write strings in quotes"):
        make_config(file=file)
    with pytest.raises(TokenDriftError, match="no checkpoint to refine"):
        make_config()
    with pytest.raises(TokenDriftError, match=r"a setting must have the form KEY=VALUE, but 'steps' has no value"):
        parse_settings(["steps"])
    with pytest.raises(TokenDriftError, match="seed must be an integer"):
        parse_settings(["seed=x"])


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(TokenDriftError, match=r"multiple of micro_batch times 3 processes, 24"):
        RefineConfig("base", batch_size=64, micro_batch=8).accumulation(processes=3)


def test_settings_of_other_objectives_have_no_effect():
    plain = make_config(values={"checkpoint": "base"})
    assert make_config(values={"checkpoint": "base", "chains": (8,), "mirror_step": 3.0}) == plain
    assert "chains" not in plain.settings() and plain.settings()["objective"] == "drift"
    assert plain.replace(objective="pairs", chains=(8,)).objective == PairsConfig(chains=(8,))
    assert RefineConfig("base", objective="pairs") == plain.replace(objective="pairs")


def test_a_configuration_written_before_objectives_had_settings_of_their_own_is_read(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(
        'checkpoint = "base"\nobjective = "pairs"\nbaseline = false\nchains = [2, 8]\npair_decay = 0.9\n'
        "pair_classes = 4096\npair_sequences = 4096\ntemperatures = [0.02]\nqueue_size = 8\ndrift_scale = 1.0\n"
        'normalization = "joint"\nkernel = "gaussian"\nexclude_paired_positive = false\nencoder_time = 0.0\n'
        "mirror_step = 1.0\nfreeze_queues = false\nsteps = 7\n"
    )
    made = make_config(file=file)
    assert (made.objective, made.steps) == (PairsConfig(chains=(2, 8), pair_decay=0.9), 7)


@pytest.mark.parametrize("name", ["steps", "batch_size", "learning_rate", "tokenizer", "judge", "objective"])
def test_every_setting_has_its_help_and_its_default(name):
    text = setting_help(name)
    assert text[0].isupper() and "Default: " in text and text.endswith(".")
    if name == "objective":
        assert all(objective in text for objective in OBJECTIVES)


def test_the_help_states_the_default_of_the_command_where_its_preset_has_another():
    assert setting_help("steps").endswith("Default: 1500 in the preset matching; 1000 without a preset.")
    assert setting_help("objective").endswith("Default: matching in the preset matching; drift without a preset.")
    assert setting_help("batch_size").endswith("Default: 64.")
