"""The configuration of a refinement: one frozen dataclass that refuses what cannot work."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokendrift._checks import check_choice, check_count, check_positive, fail
from tokendrift.field import NORMALIZATIONS
from tokendrift.training.optimization import LoopConfig

OBJECTIVES = ("drift", "continuation", "combined", "pairs", "mirror-kl", "mirror-mse")
BASE_WEIGHTS = {"combined": 1.0, "pairs": 0.1}  # unless it is given; no other objective has one
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
# What no other objective than "pairs" reads.
PAIR_SETTINGS = frozenset(("chains", "pair_decay", "pair_classes", "pair_sequences"))


@dataclass(frozen=True)
class RefineConfig:
    """Everything a refinement depends on.

    Attributes:
        checkpoint: What `load_denoiser` takes: a hub id, a folder or a file. Also the frozen encoder.
        output: Folder for the refined model, its checkpoints and its log.
        revision: Branch, tag or commit of a hub id.
        text: Text files (``.txt`` and others) and JSON lines (``.jsonl``, ``.ndjson``, ``.json``), either of them
            gzipped (``.gz``) or not.
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
        objective: ``"drift"``; ``"continuation"``, the backbone's own objective; ``"combined"``, both; ``"pairs"``,
            `PairDriftLoss` on the model's own few-step chains (`OwnTrajectories`); ``"mirror-kl"`` and
            ``"mirror-mse"``, the paper's teachers in logit space.
        baseline: First train the checkpoint by its own objective on the same batches and noise, into the folder
            ``continuation`` of the output, and show both.
        base_weight: Weight of the backbone's own objective beside the drift; by default 1 in ``"combined"`` and 0.1 in
            ``"pairs"``, where 0 leaves it out.
        chains: Numbers of steps of the chains in ``"pairs"``.
        pair_decay: Share of the law of generated pairs that a micro-batch keeps.
        pair_classes: Without effect. Pairs of more than 4,096 tokens are counted in buckets (`PairDriftLoss`).
        pair_sequences: Sequences of the text whose pairs are counted before the first step; training goes on counting.
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
    objective: Literal["drift", "continuation", "combined", "pairs", "mirror-kl", "mirror-mse"] = "drift"
    baseline: bool = False
    base_weight: float | None = None
    chains: tuple[int, ...] = (2, 4)
    pair_decay: float = 0.95
    pair_classes: int = 4096
    pair_sequences: int = 4096
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
        for name, kind in KINDS.items():
            object.__setattr__(self, name, _converted(name, getattr(self, name), kind))
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("documents", self.documents, DOCUMENTS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("kernel", self.kernel, KERNELS)
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        for name in ("shuffle", "micro_batch", "checkpoint_every", "keep", "evaluate_batch"):
            check_count(name, getattr(self, name), least=1)
        for name in ("queue_size", "pair_sequences", "evaluate_every", "seed"):
            check_count(name, getattr(self, name))
        check_count("evaluate_samples", self.evaluate_samples, least=2)
        for nfe in self.evaluate_nfe:
            check_count("evaluate_nfe", nfe, least=1)
        if self.length is not None:
            check_count("length", self.length, least=3 if self.wrap else 1)
        if self.base_weight is not None and (self.base_weight or self.objective == "combined"):
            check_positive("base_weight", self.base_weight)
        if not self.chains:
            raise fail("chains must name at least one number of steps, such as (2, 4).", chains=self.chains)
        for steps in self.chains:
            check_count("chains", steps, least=1)
        check_count("pair_classes", self.pair_classes, least=2)
        if not 0 <= self.pair_decay < 1:
            raise fail("pair_decay must lie in [0, 1).", pair_decay=self.pair_decay)
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise fail("dropout must lie in [0, 1), or be left out for that of the checkpoint.", dropout=self.dropout)
        if not 0 <= self.entropy_tolerance < 1:
            raise fail(
                "entropy_tolerance must lie in [0, 1): a share of the entropy of real text.",
                entropy_tolerance=self.entropy_tolerance,
            )
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

    def weight_of_base(self) -> float:
        """Return the weight of the backbone's own objective beside the drift; 0 where there is none.

        >>> RefineConfig("base", objective="pairs").weight_of_base()
        0.1
        """
        default = BASE_WEIGHTS.get(self.objective, 0.0)
        return self.base_weight if default and self.base_weight is not None else default

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


def known(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values, all of whose names are fields; refuse others and name the nearest field."""
    names = list(KINDS)
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"; the nearest is {near[0]!r}." if near else f"; known are {', '.join(names)}."
            raise fail(f"unknown key {name!r}{hint}")
    return values


class Kind(typing.NamedTuple):
    """Type of a field: its base type, whether None is allowed, whether it is a tuple of the base."""

    base: type
    optional: bool
    many: bool


def _kind(annotation: Any) -> Kind:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _kind(next(each for each in arguments if each is not type(None)))._replace(optional=True)
    if origin is tuple:
        return Kind(arguments[0], False, True)
    return Kind(str if origin is Literal else annotation, False, False)


KINDS = {name: _kind(annotation) for name, annotation in typing.get_type_hints(RefineConfig).items()}
WORDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}


def _converted(name: str, value: Any, kind: Kind) -> Any:
    """Return the value in the type of its field; refuse what would have to be guessed."""
    if value is None and kind.optional:
        return None
    if kind.many:
        if not isinstance(value, (list, tuple)):
            raise fail(f"{name} must be a list, each entry {WORDS[kind.base]}.", **{name: value})
        return tuple(_converted(name, each, kind._replace(many=False)) for each in value)
    if kind.base is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    fits = isinstance(value, (int, float) if kind.base is float else kind.base)
    if not fits or (isinstance(value, bool) and kind.base is not bool):
        raise fail(f"{name} must be {WORDS[kind.base]}.", **{name: value})
    return float(value) if kind.base is float else value


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else repr(value)
