"""The configuration of a refinement: one frozen dataclass, from flags or a TOML file, with the paper's presets."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokendrift._checks import check_choice, check_count, check_positive, fail
from tokendrift.field import NORMALIZATIONS
from tokendrift.training.loop import LoopConfig

OBJECTIVES = ("drift", "continuation", "combined", "mirror-kl", "mirror-mse")
DOCUMENTS = ("file", "paragraph", "line")
PRECISIONS = ("fp32", "bf16")
KERNELS = ("gaussian", "laplace", "sharp_laplace")
# What may differ when a run goes on: it changes what is told and kept, not what is learned.
BOOKKEEPING = frozenset(
    (
        *("output", "log_every", "checkpoint_every", "keep", "tensorboard", "wandb", "judge", "entropy_tolerance"),
        "baseline",
        *("evaluate_every", "evaluate_samples", "evaluate_nfe", "evaluate_batch"),
    )
)


@dataclass(frozen=True)
class RefineConfig:
    """Everything a refinement depends on.

    Attributes:
        checkpoint: What `load_denoiser` takes: a hub id, a folder or a file. Also the frozen encoder.
        output: Folder for the refined model, its checkpoints and its log.
        revision: Branch, tag or commit of a hub id.
        text: Text files (``.txt`` and others) and JSON lines (``.jsonl``), either of them gzipped (``.gz``) or not.
        dataset: Name of a Hugging Face dataset, or a folder that ``datasets`` has saved; instead of ``text``.
        dataset_config: Configuration of that dataset.
        dataset_split: Split of that dataset.
        text_field: Field of JSON lines and of the dataset that holds the text.
        documents: What one document of a text file is: the ``"file"``, a ``"paragraph"`` or a ``"line"``. An
            end-of-text token stands after each.
        tokenizer: Folder, ``tokenizer.json`` or hub id; by default the checkpoint's own, GPT-2's for a checkpoint
            without one and of GPT-2's vocabulary.
        length: L; by default that of the checkpoint.
        wrap: Begin every sequence with BOS and end it with EOS, as the released checkpoints were trained.
        shuffle: Sequences in a block that is shuffled as a whole; 1 keeps the order of the text.
        objective: ``"drift"``; ``"continuation"``, the backbone's own objective; ``"combined"``, both; ``"mirror-kl"``
            and ``"mirror-mse"``, the paper's teachers in logit space.
        baseline: First train the checkpoint by its own objective on the same batches and noise, into the folder
            ``continuation`` of the output, and show both.
        base_weight: Weight of the backbone's own objective in ``"combined"``.
        temperatures: tau of the field.
        queue_size: Features in each queue.
        drift_scale: alpha.
        normalization: That of `DriftField`.
        kernel: That of `DriftField`.
        exclude_paired_positive: Hide an anchor's own clean sequence from its positives.
        window: Positions pooled into one feature; the whole sequence by default, as in the paper.
        encoder_time: Diffusion time that a time-conditioned encoder is told; 0 is clean.
        mirror_step: eta of the mirror teachers.
        freeze_queues: Let all micro-batches of a step see the same queues (see `TokenDriftLoss`); by default each is
            pushed at once, as in the paper.
        steps: Optimiser steps.
        batch_size: Sequences an optimiser step, over all processes and micro-batches.
        micro_batch: Sequences a forward call of one process; the batch must be a multiple of it times the processes.
        learning_rate: Peak rate of AdamW.
        schedule: ``"constant"``, ``"cosine"`` (to 2 % of the peak) or ``"linear"`` (to 0), after the warm-up.
        warmup: Linear warm-up steps.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip: Largest gradient norm.
        ema: Decay of the average of the weights, which is the model that is evaluated and written; 0 for none.
        dropout: Dropout probability; by default the checkpoint's.
        precision: ``"fp32"``, or ``"bf16"`` for the network under autocast; losses are float32 in either.
        seed: Of data order, noise, dropout and evaluation.
        log_every: Steps between lines of the log.
        checkpoint_every: Steps between checkpoints.
        keep: Checkpoints kept, beside the one that was best.
        evaluate_every: Steps between evaluations; 0 for none but the first and the last.
        evaluate_samples: Sequences sampled at each number of function evaluations.
        evaluate_nfe: Numbers of function evaluations.
        evaluate_batch: Sequences sampled at a time.
        judge: Name or folder of the causal language model behind Gen.-PPL; without one, entropy and diversity alone.
        entropy_tolerance: Warn when the sample entropy falls by more than this share below that of real text.
        tensorboard: Write curves for TensorBoard, where it is installed.
        wandb: Project of Weights & Biases, where it is installed.
    """

    checkpoint: str
    output: str = "refined"
    revision: str | None = None
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
    objective: Literal["drift", "continuation", "combined", "mirror-kl", "mirror-mse"] = "drift"
    baseline: bool = False
    base_weight: float = 1.0
    temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)
    queue_size: int = 1024
    drift_scale: float = 1.0
    normalization: Literal["joint", "separate", "two_sided", "sinkhorn"] = "joint"
    kernel: Literal["gaussian", "laplace", "sharp_laplace"] = "gaussian"
    exclude_paired_positive: bool = False
    window: int | None = None
    encoder_time: float = 0.0
    mirror_step: float = 1.0
    freeze_queues: bool = False
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
    keep: int = 2
    evaluate_every: int = 0
    evaluate_samples: int = 64
    evaluate_nfe: tuple[int, ...] = (4, 8)
    evaluate_batch: int = 16
    judge: str | None = None
    entropy_tolerance: float = 0.02
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            object.__setattr__(self, name, _converted(name, getattr(self, name), kind))
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("documents", self.documents, DOCUMENTS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("kernel", self.kernel, KERNELS)
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        for name in ("shuffle", "micro_batch", "checkpoint_every", "keep", "evaluate_batch"):
            check_count(name, getattr(self, name), least=1)
        for name in ("queue_size", "evaluate_every", "seed"):
            check_count(name, getattr(self, name))
        check_count("evaluate_samples", self.evaluate_samples, least=2)
        for nfe in self.evaluate_nfe:
            check_count("evaluate_nfe", nfe, least=1)
        if self.length is not None:
            check_count("length", self.length, least=3 if self.wrap else 1)
        check_positive("base_weight", self.base_weight)
        if not 0 <= self.encoder_time < 1:
            raise fail("encoder_time must lie in [0, 1): a diffusion time, 0 is clean.", encoder_time=self.encoder_time)
        if self.batch_size % self.micro_batch:
            raise fail(
                "batch_size must be a multiple of micro_batch (times the number of processes).",
                "Gradients accumulate over the micro-batches of a step.",
                batch_size=self.batch_size,
                micro_batch=self.micro_batch,
            )
        if self.text and self.dataset is not None:
            raise fail("text and dataset exclude each other.", "Pass one source of text.", dataset=self.dataset)
        self.loop()  # its rules are ours

    def loop(self) -> LoopConfig:
        """Return the part that the optimiser reads."""
        names = {field.name for field in dataclasses.fields(LoopConfig)}
        return LoopConfig(**{name: value for name, value in dataclasses.asdict(self).items() if name in names})

    def accumulation(self, processes: int) -> int:
        """Return the micro-batches of a step for each process.

        Raises:
            TokenDriftError: If the batch cannot be split so.
        """
        micro, rest = divmod(self.batch_size, self.micro_batch * processes)
        if rest:
            raise fail(
                f"batch_size must be a multiple of micro_batch times {processes} processes, "
                f"{self.micro_batch * processes}.",
                "Change one of the two.",
                batch_size=self.batch_size,
                micro_batch=self.micro_batch,
            )
        return micro

    def replace(self, **changes: Any) -> RefineConfig:
        """Return the configuration with some values changed; an unknown name is an error that names the nearest."""
        return dataclasses.replace(self, **known(changes))

    def as_toml(self) -> str:
        """Return the configuration as a TOML file; what is None is left out.

        >>> print(RefineConfig("kuleshov-group/mdlm-owt").as_toml().splitlines()[0])
        checkpoint = "kuleshov-group/mdlm-owt"
        """
        pairs = dataclasses.asdict(self).items()
        return "".join(f"{name} = {_toml(value)}\n" for name, value in pairs if value is not None)


# What the paper states (section 4 and appendix F): batch, steps, rate, queues, temperatures, alpha, no base loss,
# micro-batches of 2. Which backbone had which of its two rates it does not say. Warm-up, clipping, averaging and
# precision are those that the backbones were trained with (mdlm and duo, configs/config.yaml).
_PAPER = {
    "dataset": "Skylion007/openwebtext",
    "objective": "drift",
    "steps": 13_000,
    "batch_size": 512,
    "micro_batch": 2,
    "queue_size": 1024,
    "temperatures": (0.02, 0.05, 0.2),
    "drift_scale": 1.0,
    "schedule": "constant",
    "warmup": 2500,
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "clip": 1.0,
    "ema": 0.9999,
    "precision": "bf16",
    "judge": "gpt2-large",
    "evaluate_every": 1000,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mdlm-owt": {"checkpoint": "kuleshov-group/mdlm-owt", "learning_rate": 3e-5, **_PAPER},
    "duo-owt": {"checkpoint": "s-sahoo/duo", "learning_rate": 5e-5, **_PAPER},
}


def make_config(
    *, preset: str | None = None, file: str | Path | None = None, values: Mapping[str, Any] | None = None
) -> RefineConfig:
    """Build a configuration from a preset, a TOML file over it, and single values over both.

    A file may name its preset itself: ``preset = "mdlm-owt"``. A source of text replaces the preset's.

    Raises:
        TokenDriftError: For an unknown key (the nearest one is named), a value of the wrong type or out of range, a
            file that is no TOML, or no checkpoint.

    >>> make_config(preset="duo-owt", values={"steps": 100}).learning_rate
    5e-05
    >>> make_config(values={"checkpoint": "base", "learning_rat": 1e-4})
    Traceback (most recent call last):
    tokendrift.errors.TokenDriftError: unknown key 'learning_rat'; the nearest is 'learning_rate'.
    """
    stated = {} if file is None else read_toml(Path(file))
    preset = preset if preset is not None else stated.get("preset")
    stated = {name: value for name, value in stated.items() if name != "preset"}
    if preset is not None:
        check_choice("preset", preset, tuple(PRESETS))
    chosen: dict[str, Any] = dict(PRESETS[preset]) if preset is not None else {}
    for layer in (stated, dict(values or {})):
        if layer.get("text"):
            chosen.pop("dataset", None)
        if layer.get("dataset"):
            chosen.pop("text", None)
        chosen |= known(layer)
    if "checkpoint" not in chosen:
        raise fail("no checkpoint to refine.", "Name one, in the command, the TOML file or by a preset.")
    return RefineConfig(**chosen)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail(f"{path} cannot be read as TOML: {error}.", "Texts stand in quotes, lists in brackets.") from None


def known(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values, all of whose names are fields; refuse others and name the nearest field."""
    names = list(_KINDS)
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"; the nearest is {near[0]!r}." if near else f"; known are {', '.join(names)}."
            raise fail(f"unknown key {name!r}{hint}")
    return values


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Return the values of settings written ``KEY=VALUE``; see `parse_value`.

    >>> parse_settings(["wrap=false", "evaluate_nfe=4,16"])
    {'wrap': False, 'evaluate_nfe': (4, 16)}
    """
    pairs = [setting.partition("=") for setting in settings]
    for name, sign, _ in pairs:
        if not sign:
            raise fail(f"a setting must have the form KEY=VALUE, and {name!r} has not.")
    return {name.strip(): parse_value(name.strip(), text.strip()) for name, _, text in pairs}


def parse_value(name: str, text: str) -> Any:
    """Return the value of a key given as text, as on a command line; lists are separated by commas.

    >>> parse_value("temperatures", "0.1,0.5"), parse_value("wrap", "false"), parse_value("window", "none")
    ((0.1, 0.5), False, None)
    """
    known({name: text})
    kind = _KINDS[name]
    if kind.optional and text.lower() == "none":
        return None
    if kind.many:
        return tuple(_parsed(name, part.strip(), kind.base) for part in text.split(",") if part.strip())
    return _parsed(name, text, kind.base)


class _Kind(typing.NamedTuple):
    """Type of a field: its base type, whether None is allowed, whether it is a tuple of the base."""

    base: type
    optional: bool
    many: bool


def _kind(annotation: Any) -> _Kind:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _kind(next(each for each in arguments if each is not type(None)))._replace(optional=True)
    if origin is tuple:
        return _Kind(arguments[0], False, True)
    return _Kind(str if origin is Literal else annotation, False, False)


_KINDS = {name: _kind(annotation) for name, annotation in typing.get_type_hints(RefineConfig).items()}
_WORDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}


def _converted(name: str, value: Any, kind: _Kind) -> Any:
    """Return the value in the type of its field; refuse what would have to be guessed."""
    if value is None and kind.optional:
        return None
    if kind.many:
        if not isinstance(value, (list, tuple)):
            raise fail(f"{name} must be a list, each entry {_WORDS[kind.base]}.", **{name: value})
        return tuple(_converted(name, each, kind._replace(many=False)) for each in value)
    fits = isinstance(value, (int, float) if kind.base is float else kind.base)
    if not fits or (isinstance(value, bool) and kind.base is not bool):
        raise fail(f"{name} must be {_WORDS[kind.base]}.", **{name: value})
    return float(value) if kind.base is float else value


def _parsed(name: str, text: str, base: type) -> Any:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return words[text.lower()] if base is bool else base(text)
    except (KeyError, ValueError):
        raise fail(f"{name} must be {_WORDS[base]}.", **{name: text}) from None


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else repr(value)
