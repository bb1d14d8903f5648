"""The configuration of a refinement, and where it comes from: presets, a TOML file, single values."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokendrift._checks import check_choice, check_count, check_fraction, check_positive, fail
from tokendrift.errors import TokenDriftError
from tokendrift.files import read_text, readable
from tokendrift.training.objectives import OBJECTIVES
from tokendrift.training.objectives.drift import DriftConfig
from tokendrift.training.objectives.objective import ObjectiveConfig
from tokendrift.training.optimization import LoopConfig
from tokendrift.training.settings import (
    Settings,
    SettingType,
    describe_setting,
    from_text,
    setting_types,
    to_toml,
)

DEFAULT_OBJECTIVE = "drift"
RETIRED = frozenset(("pair_classes",))  # settings of earlier versions, which are read and have no effect


@dataclass(frozen=True)
class RefineConfig(Settings):
    """Everything a refinement depends on.

    Settings have flat names in TOML files, flags and `make_config`: those of the objective stand beside the others.

    Attributes:
        checkpoint: Checkpoint to refine: hub id, folder or file, as for `load_denoiser`. The frozen encoder is a copy
            of it.
        output: Folder for the refined model, its checkpoints and its log.
        revision: Branch, tag or commit of a hub id. Default: the main branch.
        checkpoint_config: Fields that replace or complete those of the checkpoint's configuration, each as KEY=VALUE:
            the ``config`` of `load_denoiser`. ``trust_remote_code=true`` permits running the code that is part of a
            model of transformers.
        text: Files to train on: text (``.txt`` and others) or JSON Lines (``.jsonl``, ``.ndjson``, ``.json``), gzipped
            (``.gz``) or not. Repeatable on the command line. Default: none.
        dataset: Hugging Face dataset to train on instead of ``text``: name or folder. Default: none.
        dataset_config: Configuration of the dataset.
        dataset_split: Split of the dataset.
        text_field: Field of JSON Lines, or column of the dataset, that holds the text.
        documents: Unit of a text file that counts as one document: the ``"file"``, a ``"paragraph"`` or a ``"line"``.
            An end-of-text token follows each document.
        tokenizer: Tokenizer of the checkpoint: a ``tokenizer.json``, a folder or a hub id. Default: that of the
            checkpoint; if it has none and a vocabulary of the size of GPT-2's, that of GPT-2.
        length: Length of a sequence in tokens, L. Default: the length that the checkpoint was trained with.
        wrap: Whether every sequence begins with BOS and ends with EOS, as in the training of the released checkpoints.
        shuffle: Number of sequences that are shuffled together; 1 keeps the order of the text.
        objective: What is minimised: the settings of an objective, or a name in `OBJECTIVES` for its default settings.
        baseline: Whether to train the checkpoint with its own objective first, on the same batches and noise, and to
            show both results. This model is written to the folder ``continuation`` of the output.
        steps: Number of optimiser steps.
        batch_size: Number of sequences per optimiser step, over all processes and micro-batches.
        micro_batch: Number of sequences per forward call of one process. ``batch_size`` must be a multiple of
            ``micro_batch`` times the number of processes.
        learning_rate: Peak learning rate of AdamW.
        schedule: Learning rate after the warm-up: ``"constant"``, ``"cosine"`` (to 2 % of the peak) or ``"linear"``
            (to 0).
        warmup: Number of linear warm-up steps.
        weight_decay: Decoupled weight decay of AdamW.
        betas: Decay rates of AdamW's moments.
        clip: Largest norm of the gradient; larger gradients are scaled down to it.
        ema: Decay of the moving average of the weights, which is the model that is evaluated and written; 0 keeps no
            average.
        dropout: Dropout probability. Default: the value of the checkpoint.
        precision: ``"fp32"``, or ``"bf16"`` to run the network under autocast; losses are float32 in either.
        seed: Random seed of data order, noise, dropout and evaluation.
        log_every: Number of optimiser steps between lines of the log.
        checkpoint_every: Number of optimiser steps between checkpoints.
        checkpoint_minutes: Longest time between checkpoints, in minutes.
        keep: Number of latest checkpoints that are kept; the best one is kept as well.
        evaluate_every: Number of optimiser steps between evaluations; 0 evaluates only before the first and after the
            last step.
        evaluate_samples: Number of samples for each number of function evaluations.
        evaluate_nfe: Numbers of function evaluations at which the model is sampled.
        evaluate_batch: Number of samples that are drawn together.
        judge: Causal language model that measures Gen.-PPL: hub id or folder. Default: none; only entropy and diversity
            are measured.
        judge_tokenizer: Tokenizer of the judge: a ``tokenizer.json``, a folder or a hub id. Default: the judge's own.
        entropy_tolerance: Share, in [0, 1), by which the sample entropy may fall below that of real text without a
            warning.
        tensorboard: Whether to write curves for TensorBoard, if it is installed.
        wandb: Project of Weights & Biases to log to, if it is installed. Default: none.
    """

    checkpoint: str
    output: str = "refined"
    revision: str | None = None
    checkpoint_config: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_field: str = "text"
    documents: Literal["file", "paragraph", "line"] = "file"
    tokenizer: str | None = None
    length: int | None = None
    wrap: bool = True
    shuffle: int = 1024
    objective: ObjectiveConfig = dataclasses.field(default_factory=DriftConfig)
    baseline: bool = False
    steps: int = 1000
    batch_size: int = 64
    micro_batch: int = 8
    learning_rate: float = 3e-5
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 100
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    clip: float = 1.0
    ema: float = 0.999
    dropout: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    checkpoint_minutes: float = 10.0
    keep: int = 2
    evaluate_every: int = 0
    evaluate_samples: int = 64
    evaluate_nfe: tuple[int, ...] = (4, 8)
    evaluate_batch: int = 16
    judge: str | None = None
    judge_tokenizer: str | None = None
    entropy_tolerance: float = 0.02
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.objective, str):
            object.__setattr__(self, "objective", objective_class(self.objective)())
        check_count("shuffle", self.shuffle, least=1, most=10**7)
        for name in ("micro_batch", "checkpoint_every", "keep", "evaluate_batch"):
            check_count(name, getattr(self, name), least=1)
        for name in ("evaluate_every", "seed"):
            check_count(name, getattr(self, name))
        check_positive("checkpoint_minutes", self.checkpoint_minutes)
        if not self.output.strip():
            raise fail("output must name a folder.", "Choose a new folder, or that of the run to resume.")
        check_count("evaluate_samples", self.evaluate_samples, least=2)
        for nfe in self.evaluate_nfe:
            check_count("evaluate_nfe", nfe, least=1, most=10**6)
        if self.length is not None:
            check_count("length", self.length, least=3 if self.wrap else 1, most=10**6)
        if self.dropout is not None:
            check_fraction("dropout", self.dropout, ", or be left out for that of the checkpoint")
        check_fraction("entropy_tolerance", self.entropy_tolerance, ": a share of the entropy of real text")
        if self.text and self.dataset is not None:
            raise fail("text and dataset cannot both be given.", "Pass one source of text.", dataset=self.dataset)
        if self.judge_tokenizer is not None and self.judge is None:
            raise fail("judge_tokenizer needs a judge.", "Pass judge.", judge_tokenizer=self.judge_tokenizer)
        self.accumulation(processes=1)
        self.loop()  # checks the settings of the optimiser

    def loop(self) -> LoopConfig:
        """Return the settings of the optimiser."""
        return LoopConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(LoopConfig)})

    def accumulation(self, processes: int) -> int:
        """Return the number of micro-batches per step and process.

        Raises:
            TokenDriftError: If the batch cannot be split in this way.
        """
        micro_batches, rest = divmod(self.batch_size, self.micro_batch * processes)
        if rest:
            raise fail(
                f"batch_size must be a multiple of micro_batch times {processes} processes, "
                f"{self.micro_batch * processes}.",
                "Change batch_size or micro_batch: gradients are accumulated over the micro-batches of a step.",
                batch_size=self.batch_size,
                micro_batch=self.micro_batch,
            )
        return micro_batches

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> RefineConfig:
        """Build a configuration from settings under their flat names; None stands for the default.

        Settings that belong to another objective than the chosen one have no effect, but must be values that it takes.

        Raises:
            TokenDriftError: For an unknown name (the nearest one is named), or a value that cannot work.
        """
        check_setting_names(settings)
        given = {name: value for name, value in settings.items() if value is not None and name not in RETIRED}
        if "checkpoint" not in given:
            raise fail("no checkpoint to refine.", "Pass one on the command line, in the TOML file or by a preset.")
        objective = given.get("objective", DEFAULT_OBJECTIVE)
        if not isinstance(objective, ObjectiveConfig):
            chosen = objective_class(objective)
            objective = chosen(**{name: given[name] for name in setting_types(chosen) if name in given})
        general = {field.name for field in dataclasses.fields(cls)}
        for name in given.keys() - general - setting_types(type(objective)).keys():
            _check_unused(name, given[name])
        return cls(**{name: value for name, value in given.items() if name in general} | {"objective": objective})

    def settings(self) -> dict[str, Any]:
        """Return all settings under their flat names; ``objective`` is the name of the objective.

        >>> RefineConfig("base", objective=DriftConfig(window=8)).settings()["window"]
        8
        """
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            if field.name == "objective":
                found |= {"objective": objective_name(self.objective), **dataclasses.asdict(self.objective)}
            else:
                found[field.name] = getattr(self, field.name)
        return found

    def replace(self, **changes: Any) -> RefineConfig:
        """Return the configuration with some settings changed, under their flat names."""
        return RefineConfig.from_settings(self.settings() | changes)

    def as_toml(self) -> str:
        """Return the settings as a TOML file; those that are not set are comments.

        >>> print(RefineConfig("kuleshov-group/mdlm-owt").as_toml().splitlines()[0])
        checkpoint = "kuleshov-group/mdlm-owt"
        """
        return "".join(
            f"# {name} is not set\n" if value is None else f"{name} = {to_toml(value)}\n"
            for name, value in self.settings().items()
        )


def objective_class(name: object) -> type[ObjectiveConfig]:
    """Return the settings class of an objective."""
    check_choice("objective", name, tuple(OBJECTIVES))
    return OBJECTIVES[str(name)]


def objective_name(objective: ObjectiveConfig) -> str:
    """Return the name under which an objective is registered."""
    for name, registered in OBJECTIVES.items():
        if registered is type(objective):
            return name
    raise fail(f"{type(objective).__name__} is not registered.", "Add it to OBJECTIVES under a name.")


def all_setting_types() -> dict[str, SettingType]:
    """Return the type of every setting, under its flat name; those of all objectives are among them."""
    found = {**setting_types(RefineConfig), "objective": SettingType(str)}
    for objective in OBJECTIVES.values():
        found |= {name: kind for name, kind in setting_types(objective).items() if name not in found}
    return found


def check_setting_names(settings: Iterable[str]) -> None:
    """Require that all names are settings; the error names the nearest setting."""
    names = all_setting_types().keys()
    for name in settings:
        if name not in names and name not in RETIRED:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"; the nearest is {near[0]!r}." if near else f"; the settings are {', '.join(names)}."
            raise fail(f"unknown key {name!r}{hint}")


def _check_unused(name: str, value: Any) -> None:
    """Require that at least one objective takes a value."""
    refusals = []
    for objective in OBJECTIVES.values():
        if name in setting_types(objective):
            try:
                objective(**{name: value})
                return
            except TokenDriftError as error:
                refusals.append(error)
    raise refusals[0]


def setting_help(name: str) -> str:
    """Return the help of a setting for the command line, where the default preset may have another default value."""
    if name == "objective":
        text = f"What is minimised: {', '.join(OBJECTIVES)}. Default: {DEFAULT_OBJECTIVE}."
    else:
        text = describe_setting(RefineConfig, name)
    preset = PRESETS[DEFAULT_PRESET]
    if name not in preset or preset[name] == getattr(RefineConfig, name, None):
        return text
    about, _, without = text.partition("Default: ")
    return f"{about}Default: {preset[name]} in the preset {DEFAULT_PRESET}; {without[:-1]} without a preset."


# AdamW as all published recipes below have it.
_CONSTANT_RATE = {"schedule": "constant", "weight_decay": 0.0, "betas": (0.9, 0.999)}
# What the paper states (section 4 and appendix F): batch, steps, rate, queues, temperatures, alpha, no base loss,
# micro-batches of 2. It gives two rates and does not say which backbone had which. Warm-up, clipping, averaging and
# precision are those that the backbones were trained with (mdlm and duo, configs/config.yaml).
_PAPER = {
    **_CONSTANT_RATE,
    "dataset": "Skylion007/openwebtext",
    "objective": "drift",
    "steps": 13_000,
    "batch_size": 512,
    "micro_batch": 2,
    "queue_size": 1024,
    "temperatures": (0.02, 0.05, 0.2),
    "drift_scale": 1.0,
    "warmup": 2500,
    "clip": 1.0,
    "ema": 0.9999,
    "precision": "bf16",
    "judge": "gpt2-large",
    "evaluate_every": 1000,
}
# For either backbone: it names no checkpoint and no text, and its rate is twice the default.
_PAIRS = {
    "objective": "pairs",
    "chains": (2, 4),
    "base_weight": 0.1,
    "pair_decay": 0.95,
    "learning_rate": 2 * RefineConfig.learning_rate,
}
# For either backbone: what depends on the process (chains, weight of the pairs, random input) is left to the objective.
_MATCHING = {
    "objective": "matching",
    "steps": 1500,
    "batch_size": 64,
    "base_weight": 0.1,
    "field_clip": 5.0,
    "auxiliary_rate": 1e-3,
    "learning_rate": 5e-4,
    "schedule": "cosine",
    "warmup": 30,
    "weight_decay": 0.0,
    "betas": (0.9, 0.98),
    "clip": 1.0,
    "ema": 0.99,
    "dropout": 0.0,
}
# What IDLM's code has for masked models (its configuration and train_idlm_mdlm.sh). It leaves the number of steps open,
# clips no gradient, and warms up the auxiliary model too. The paper draws the time of re-noising independently, but in
# the code both times of a text come from the same one of 512 strata: they are equal to within 1/512.
_IDLM = {
    **_CONSTANT_RATE,
    "objective": "matching",
    "student_inputs": "text",
    "renoising": "same",
    "position_weight": "nelbo",
    "field_clip": math.inf,
    "pair_weight": 0.0,
    "base_weight": 0.0,
    "random_input": 0,
    "auxiliary_loss": "nelbo",
    "auxiliary_rate": 1e-6,
    "auxiliary_betas": (0.9, 0.999),
    "auxiliary_clip": 1e6,
    "batch_size": 512,
    "learning_rate": 1e-6,
    "warmup": 2500,
    "clip": 1e6,
    "ema": 0.9999,
    "precision": "fp32",
}
# What D-MMD's paper states of the loss, for a student of 16 steps. It has no released code: the optimisers and the
# random input of masked models are those of the preset "matching".
_D_MMD = _MATCHING | {
    "student_inputs": "text",
    "renoising_reach": 1 / 16,
    "field_clip": math.inf,
    "pair_weight": 0.0,
    "base_weight": 0.0,
    "auxiliary_loss": "cross_entropy",
    "auxiliary_teacher_weight": 1.0,
}
# The settings of the released distillations. SDTT's rate is the one reported for it, and its warm-up is that of DCD's
# script, since its configuration file has those of its base models (3e-4, 2,500 steps).
_DISTILLED = {
    **_CONSTANT_RATE,
    "dataset": "Skylion007/openwebtext",
    "batch_size": 128,
    "learning_rate": 6e-5,
    "warmup": 500,
    "clip": 1.0,
    "precision": "bf16",
    "divergence": "kl_student_teacher",
    "round_steps": 10_000,
    "teacher_average": False,
    "drift_weight": 0.0,
}
_SDTT = {
    "checkpoint": "kuleshov-group/mdlm-owt",
    "objective": "sdtt",
    "steps": 70_000,
    "ema": 0.9999,
    "teacher_steps": 1024,
    "inner_steps": 2,
    "fewest_steps": 8,
    "inner_times": "released",
}
_DCD = {
    "checkpoint": "s-sahoo/duo",
    "objective": "dcd",
    "steps": 50_000,
    "ema": 0.999,
    "teacher_steps": 512,
    "gamma_min": -4.0,
    "gamma_max": -1.0,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tokendrift": {"learning_rate": 3e-5, **_PAPER},
    "mdlm-owt": {"checkpoint": "kuleshov-group/mdlm-owt", "learning_rate": 3e-5, **_PAPER},
    "duo-owt": {"checkpoint": "s-sahoo/duo", "learning_rate": 5e-5, **_PAPER},
    "pairs": _PAIRS,
    "matching": _MATCHING,
    "idlm": _IDLM,
    "d-mmd": _D_MMD,
    "sdtt-owt": _DISTILLED | _SDTT,
    "dcd-owt": _DISTILLED | _DCD,
}
DEFAULT_PRESET = "matching"  # of the command: what lowered bits per byte at equal entropy most, see docs/study.md


def make_config(
    *, preset: str | None = None, file: str | Path | None = None, values: Mapping[str, Any] | None = None
) -> RefineConfig:
    """Build a configuration from a preset, a TOML file over it, and single values over both.

    A file may name its preset itself: ``preset = "mdlm-owt"``. A source of text replaces that of the preset.

    Args:
        preset: Name of a preset, one of `PRESETS`. Default: none.
        file: TOML file of settings. Default: none.
        values: Settings under their flat names. Default: none.

    Raises:
        TokenDriftError: For an unknown key (the nearest one is named), a value of the wrong type or out of range, a
            file that is not TOML, or a missing checkpoint.

    >>> make_config(preset="duo-owt", values={"steps": 100}).learning_rate
    5e-05
    >>> make_config(values={"checkpoint": "base", "learning_rat": 1e-4})
    Traceback (most recent call last):
    tokendrift.errors.TokenDriftError: unknown key 'learning_rat'; the nearest is 'learning_rate'.
    """
    # 1. The preset is that of the argument, or that which the file names.
    stated = {} if file is None else _read_toml(Path(file))
    preset = preset if preset is not None else stated.get("preset")
    stated = {name: value for name, value in stated.items() if name != "preset"}
    if preset is not None:
        check_choice("preset", preset, tuple(PRESETS))
    chosen: dict[str, Any] = dict(PRESETS[preset]) if preset is not None else {}
    # 2. Later layers win; text and dataset replace each other.
    for layer in (stated, dict(values or {})):
        check_setting_names(layer)
        if layer.get("text"):
            chosen.pop("dataset", None)
        if layer.get("dataset"):
            chosen.pop("text", None)
        chosen |= layer
    return RefineConfig.from_settings(chosen)


def command_config(*, preset: str | None, file: str | Path | None, values: Mapping[str, Any]) -> RefineConfig:
    """Return `make_config`, from the preset `DEFAULT_PRESET` if neither a preset, a file nor an objective is named.

    Raises:
        TokenDriftError: As `make_config`, and for a setting of other objectives than that of the default preset.
    """
    if preset is None and file is None and "objective" not in values:
        preset = DEFAULT_PRESET
        own = setting_types(objective_class(PRESETS[preset]["objective"]))
        for name in values:
            others = [key for key, objective in OBJECTIVES.items() if name in setting_types(objective)]
            if others and name not in own and name not in setting_types(RefineConfig):
                raise fail(
                    f"{name} is a setting of the objective {', '.join(others)}, and a run without --objective, "
                    f"--preset and --config takes the preset {preset}, which has no such setting.",
                    f"Pass --objective {others[0]}, or leave {name} out.",
                )
    return make_config(preset=preset, file=file, values=values)


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with readable(path, "Write strings in quotes and lists in brackets.", what="config"):
        text = read_text(path, argument="config")
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise fail(
                f"{path} cannot be read as TOML: {error}.", "Write strings in quotes and lists in brackets."
            ) from None


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Return the values of settings written as ``KEY=VALUE``; lists are separated by commas.

    >>> parse_settings(["wrap=false", "evaluate_nfe=4,16"])
    {'wrap': False, 'evaluate_nfe': (4, 16)}
    """
    found: dict[str, Any] = {}
    for setting in settings:
        name, sign, text = (part.strip() for part in setting.partition("="))
        if not sign:
            raise fail(f"a setting must have the form KEY=VALUE, but {name!r} has no value.")
        check_setting_names([name])
        found[name] = from_text(name, text, all_setting_types()[name])
    return found
