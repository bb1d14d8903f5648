"""A checkpoint's samples in a file: what the command ``tokendrift sample`` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokendrift
from tokendrift._checks import check_choice, check_count, fail
from tokendrift.devices import resolve_device
from tokendrift.files import exclusive, weight_digest
from tokendrift.models import build, checkpoint_fields, read_checkpoint
from tokendrift.models.tokenizer import decode, encode, find_tokenizer
from tokendrift.sampling.cost import flops_per_evaluation
from tokendrift.sampling.loop import NOISE_REMOVAL, Samples, sample, window_views
from tokendrift.sampling.named import named_sampler
from tokendrift.sampling.sample_file import SampleFile
from tokendrift.sampling.shaping import Shaping

MOST = {"n": 10**7, "batch_size": 10**6, "steps": 10**6, "length": 10**6, "stride": 10**6}
MOST_TOKENS = 2**32  # of all samples of a file
# Settings that are options of `sample` under the same name.
SHAPING = ("temperature", "top_k", "top_p", "nucleus")
PASSED_ON = ("steps", *SHAPING, "noise_removal", "batch_size", "stride", "seed", "device")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class SampleConfig:
    """What a file of samples depends on, apart from the weights.

    The descriptions are also the help texts of the command. ``device="auto"`` becomes the name of the chosen device.

    Attributes:
        checkpoint: Hub id, folder, safetensors file or Lightning .ckpt.
        n: Number of samples. Default: 64.
        steps: Number of reverse steps, for each window. Required by all samplers except first-hitting.
        sampler: Name of a sampler, see `named_sampler`. Default: ancestral.
        eta: Probability with which a ReMDM sampler masks a token again; ignored by other samplers. Default: 0.02.
        temperature: Number by which the logits are divided; values below 1 sharpen the predictions. Default: 1.
        top_k: Number of likeliest tokens that can be drawn. Default: all tokens.
        top_p: Total probability of the likeliest tokens that can be drawn. Default: 1, all tokens.
        nucleus: Whether the token that crosses top_p can be drawn: keep (it can) or drop (it cannot). Default: keep.
        noise_removal: How the remaining noise is removed at the end: ancestral (by the last step), greedy (with the
            likeliest tokens, in one more function evaluation) or none. Default: ancestral.
        length: Length of a sample in tokens. Samples that are longer than the model are drawn window by window.
            Default: the length of the model.
        stride: Number of new tokens in each further window. Default: half of the length of the model.
        prefix: Text that every sample begins with. Default: none.
        seed: Random seed. Each sample derives its own seed from it, so that results do not depend on the batch size.
            Default: 0.
        batch_size: Number of samples that are drawn together. Default: 32.
        revision: Branch, tag or commit of a hub id. Default: the main branch.
        checkpoint_config: Field of the checkpoint's configuration to add or replace, as KEY=VALUE, such as mask_id=103;
            repeatable. trust_remote_code=true permits running the code that is part of a model of transformers.
        tokenizer: Tokenizer: a tokenizer.json, a folder or a hub id. Default: that of the checkpoint, or that of GPT-2
            if the vocabulary has its size.
        dtype: Data type of the parameters: float32, bfloat16, float16 or float64. Default: float32.
        device: Device such as cpu or cuda:0; auto takes cuda if it is available, else cpu. Default: auto.

    Raises:
        TokenDriftError: If an option is out of range.
    """

    checkpoint: str
    n: int = 64
    steps: int | None = None
    sampler: str = "ancestral"
    eta: float = 0.02
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    nucleus: str = "keep"
    noise_removal: str = "ancestral"
    length: int | None = None
    stride: int | None = None
    prefix: str | None = None
    seed: int = 0
    batch_size: int = 32
    revision: str | None = None
    checkpoint_config: tuple[str, ...] = ()
    tokenizer: str | None = None
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=1, most=most)
        check_count("seed", self.seed)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("noise_removal", self.noise_removal, NOISE_REMOVAL)
        Shaping(self.temperature, self.top_k, self.top_p, self.nucleus)
        object.__setattr__(self, "device", str(resolve_device(self.device, needs_float64=True)))
        sets_steps = getattr(named_sampler(self.sampler, eta=self.eta), "sets_steps", False)
        if (self.steps is None) != sets_steps:
            raise fail(
                "all samplers except first-hitting require steps; first-hitting takes one step for each mask.",
                "Leave steps out for this sampler." if sets_steps else "Pass steps, the number of reverse steps.",
                sampler=self.sampler,
                steps=self.steps,
            )


class CheckpointSampler:
    """A loaded checkpoint with its tokenizer, ready to draw the samples of a run.

    Args:
        config: What to load and how to draw.

    Attributes:
        settings: The header of the file: configuration, versions, and what the checkpoint turned out to be.
        steps: Steps of a batch, of all windows together.
    """

    def __init__(self, config: SampleConfig) -> None:
        self.config = config
        # 1. The network, its process and its tokenizer.
        fields = checkpoint_fields(config.checkpoint_config)
        found = read_checkpoint(config.checkpoint, revision=config.revision, config=fields)
        self.model, self.process = build(found, dtype=getattr(torch, config.dtype), device=config.device)
        fetch, size = found.revision is not None, self.process.vocab_size
        own = find_tokenizer(found.folder, size, source=config.tokenizer, fetch=fetch, trusted=found.trusted)
        self.tokenizer: Any = None if own is None else own[0]
        # 2. The length of a sample and what it begins with.
        self.window = self.model.config.model_length
        self.length = check_count("length", config.length or self.window, least=1, most=MOST["length"])
        if config.n * self.length > MOST_TOKENS:
            raise fail(
                f"{config.n:,} samples of {self.length:,} tokens are more than the {MOST_TOKENS:,} tokens of a file.",
                "Draw several files with different seeds.",
            )
        self.prefix = self._prefix_ids()
        # 3. The number of steps; a sampler that sets it itself takes one for each mask.
        windows = len(window_views(self.length, self.window, config.stride))
        self.steps = windows * ((config.steps or 0) + (config.noise_removal == "greedy"))
        if config.steps is None:
            self.steps += self.length - len(self.prefix)
        self.settings = {
            "version": tokendrift.__version__,
            "torch": torch.__version__,
            **dataclasses.asdict(config),
            "revision": found.revision,
            "weights": weight_digest(self.model)[:16],
            "process": repr(self.process),
            "length": self.length,
            "tokenizer": None if own is None else own[1],
            "prefix_ids": self.prefix,
        }
        if not config.checkpoint_config:
            del self.settings["checkpoint_config"]  # files begun by earlier versions do not have it

    def draw(
        self,
        first: int,
        count: int,
        *,
        progress: Callable[[int], object] | None = None,
        on_batch: Callable[[Samples], object] | None = None,
    ) -> Samples:
        """Draw samples ``first`` to ``first + count - 1`` of the run, batch by batch."""
        config = self.config
        # Every row begins with the prefix.
        given, given_mask = torch.zeros(self.length, dtype=torch.int64), torch.zeros(self.length, dtype=torch.bool)
        given[: len(self.prefix)] = torch.tensor(self.prefix, dtype=torch.int64)
        given_mask[: len(self.prefix)] = True
        return sample(
            self.model,
            self.process,
            (count, self.length),
            sampler=named_sampler(config.sampler, eta=config.eta),
            given=given.expand(count, -1),
            given_mask=given_mask.expand(count, -1),
            window=self.window,
            first_row=first,
            progress=progress,
            on_batch=on_batch,
            **{name: getattr(config, name) for name in PASSED_ON},
        )

    def lines(self, drawn: Samples) -> list[dict[str, Any]]:
        """Return samples as the lines of the file."""
        ids, calls = drawn.ids.tolist(), drawn.row_nfe.tolist()
        texts = [{}] * len(ids) if self.tokenizer is None else [{"text": text} for text in decode(self.tokenizer, ids)]
        return [{"ids": row, **text, "nfe": nfe} for row, text, nfe in zip(ids, texts, calls, strict=True)]

    def _prefix_ids(self) -> list[int]:
        """Return the ids of the prefix, none without one."""
        if self.config.prefix is None:
            return []
        if self.tokenizer is None:
            raise fail("prefix is text, but the checkpoint has no tokenizer.", "Pass one as tokenizer.")
        (ids,) = encode(self.tokenizer, [self.config.prefix], special_tokens=True)
        if len(ids) >= self.length:
            raise fail(
                f"prefix has {len(ids)} tokens, but a sample has only {self.length}.",
                "Shorten the prefix, or increase length.",
            )
        wrong = [token for token in ids if token >= self.process.vocab_size or token == self.process.mask_id]
        if wrong:
            raise fail(
                f"prefix contains id {wrong[0]}, which is the mask of the model or is not in its vocabulary.",
                "Leave the mask out of the prefix, or pass the tokenizer that belongs to the model.",
            )
        return ids


def sample_to_file(
    config: SampleConfig, path: str | Path, *, progress: Callable[[float], object] | None = None
) -> SampleFile:
    """Draw samples into a file, or resume a file that was begun with the same settings.

    Batches are written as they are drawn. A file that was interrupted is resumed at the start of a batch, so that in
    the end it has the bytes of an uninterrupted run.

    Args:
        config: What to draw.
        path: A JSON Lines file, see `SampleFile`.
        progress: Called with the number of samples drawn, which includes fractions of samples within a batch.

    Raises:
        TokenDriftError: If the checkpoint cannot be read, the configuration does not fit it, the file belongs to
            other settings, or another process is writing it.
    """
    source, place = CheckpointSampler(config), Path(path)
    with exclusive(place.with_name(f".{place.name}.lock"), place):
        file = SampleFile(place, source.settings)
        if not file.complete:
            _fill(file, source, progress)
    return file


def _fill(file: SampleFile, source: CheckpointSampler, progress: Callable[[float], object] | None) -> None:
    """Draw the samples that a file lacks."""
    config = source.config
    # The last batch may be short; any other that is not whole is drawn again.
    file.keep(config.n if file.count >= config.n else file.count - file.count % config.batch_size)
    taken = 0

    def step_taken(steps: int) -> None:
        nonlocal taken
        taken += steps
        if progress is not None:
            progress(file.count + min(config.batch_size, config.n - file.count) * taken / source.steps)

    def batch_drawn(drawn: Samples) -> None:
        nonlocal taken
        file.append(source.lines(drawn))
        taken = 0

    if file.count < config.n:
        source.draw(file.count, config.n - file.count, progress=step_taken, on_batch=batch_drawn)
    file.finish(flops_per_evaluation(source.model, source.process, min(source.length, source.window)))
