"""A checkpoint's samples in a file: what the command ``tokendrift sample`` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokendrift
from tokendrift._checks import check_choice, check_count, check_device, fail
from tokendrift.diffusion import Process
from tokendrift.files import weight_digest
from tokendrift.models import DiT, build, read_checkpoint
from tokendrift.models.tokenizer import find_tokenizer, load_tokenizer
from tokendrift.sampling.loop import NOISE_REMOVAL, Samples
from tokendrift.sampling.named import named_sampler
from tokendrift.sampling.sample_file import SampleFile
from tokendrift.sampling.semi_autoregressive import semi_autoregressive, window_starts
from tokendrift.sampling.shaping import Shaping

AS_IT_IS = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class SampleConfig:
    """What a file of samples depends on, apart from the weights.

    Attributes:
        checkpoint: Hub id, folder or file.
        n: Samples.
        steps: Reverse steps; None for ``first-hitting``.
        sampler: A name that `named_sampler` knows.
        eta: Chance of remasking, of the ReMDM samplers.
        temperature, top_k, top_p, nucleus, noise_removal: As in `sample`.
        length: Tokens a sample; the model's own length by default. A longer one is drawn window by window.
        stride: New tokens a window; half of one by default.
        prefix: Text that every sample begins with.
        seed: Seed of the run.
        batch_size: Rows a forward call.
        revision: Branch, tag or commit of a hub id.
        tokenizer: ``tokenizer.json``, folder or hub name; by default the checkpoint's.
        dtype: Dtype of the parameters.
        device: Where to sample.
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
    tokenizer: str | None = None
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_count("n", self.n, least=1)
        check_count("batch_size", self.batch_size, least=1)
        check_count("seed", self.seed)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("noise_removal", self.noise_removal, NOISE_REMOVAL)
        Shaping(self.temperature, self.top_k, self.top_p, self.nucleus)
        named_sampler(self.sampler, eta=self.eta)
        check_device(self.device)
        if (self.steps is None) != (self.sampler == "first-hitting"):
            raise fail(
                "steps belongs to every sampler but first-hitting, which takes one a mask.",
                "Pass steps, or leave them out with first-hitting.",
                sampler=self.sampler,
                steps=self.steps,
            )


class Source:
    """A loaded checkpoint with its tokenizer, ready to draw the rows of a run.

    Args:
        config: What to load and how to draw.

    Attributes:
        settings: The header of the file: configuration, versions, and what the checkpoint turned out to be.
        steps: Steps of a batch, all windows together.
    """

    def __init__(self, config: SampleConfig) -> None:
        found = read_checkpoint(config.checkpoint, revision=config.revision)
        self.config = config
        self.model: DiT
        self.process: Process
        self.model, self.process = build(found, dtype=getattr(torch, config.dtype), device=config.device)
        self.window = self.model.config.model_length
        self.length = self.window if config.length is None else check_count("length", config.length, least=1)
        self.tokenizer: Any = None
        where: str | None = None
        if config.tokenizer is not None:
            self.tokenizer, where = load_tokenizer(config.tokenizer), config.tokenizer
        elif (
            own := find_tokenizer(found.folder, self.process.vocab_size, fetch=found.revision is not None)
        ) is not None:
            self.tokenizer, where = own
        self.prefix = self._prefix_ids()
        windows = len(window_starts(self.length, self.window, config.stride))
        steps = (config.steps or 0) + (config.noise_removal == "greedy")
        # First-hitting takes one step a mask.
        self.steps = windows * steps if config.steps else self.length - len(self.prefix) + windows * steps
        self.settings = {
            "version": tokendrift.__version__,
            "torch": torch.__version__,
            **dataclasses.asdict(config),
            "revision": found.revision,
            "weights": weight_digest(self.model)[:16],
            "process": repr(self.process),
            "length": self.length,
            "tokenizer": where,
            "prefix_ids": self.prefix,
        }

    def rows(self, first: int, count: int, progress: Callable[[int], object] | None) -> list[dict[str, Any]]:
        """Return some samples of the run as the lines of the file."""
        config = self.config
        given = torch.zeros(count, self.length, dtype=torch.int64)
        given_mask = torch.zeros_like(given, dtype=torch.bool)
        given[:, : len(self.prefix)] = torch.tensor(self.prefix, dtype=torch.int64)
        given_mask[:, : len(self.prefix)] = True
        found: Samples = semi_autoregressive(
            self.model,
            self.process,
            (count, self.length),
            window=self.window,
            stride=config.stride,
            steps=config.steps,
            sampler=named_sampler(config.sampler, eta=config.eta),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            nucleus=config.nucleus,
            noise_removal=config.noise_removal,
            given=given,
            given_mask=given_mask,
            seed=config.seed,
            first_row=first,
            device=config.device,
            progress=progress,
        )
        lines: list[dict[str, Any]] = []
        for ids, nfe in zip(found.ids.tolist(), found.row_nfe.tolist(), strict=True):
            text = {} if self.tokenizer is None else {"text": self.tokenizer.decode(ids, **AS_IT_IS)}
            lines.append({"ids": ids, **text, "nfe": nfe})
        return lines

    def _prefix_ids(self) -> list[int]:
        """Return the ids of the prefix, none without one."""
        if self.config.prefix is None:
            return []
        if self.tokenizer is None:
            raise fail("prefix is text, and the checkpoint has no tokenizer.", "Name one with tokenizer.")
        ids: list[int] = list(self.tokenizer(self.config.prefix, add_special_tokens=False)["input_ids"])
        if len(ids) >= self.length:
            raise fail(f"prefix has {len(ids)} tokens, a sample {self.length}.", "Shorten it, or raise length.")
        return ids


def sample_to_file(
    config: SampleConfig, path: str | Path, *, progress: Callable[[float], object] | None = None
) -> SampleFile:
    """Draw samples into a file, or go on with a file that was begun with the same settings.

    Batches are written as they come. A file that was interrupted goes on at the start of a batch, so that in the end
    it has the bytes of an uninterrupted run.

    Args:
        config: What to draw.
        path: A JSONL file, see `SampleFile`.
        progress: Called with the number of samples drawn, in parts of samples within a batch.

    Raises:
        TokenDriftError: If the checkpoint cannot be read, the configuration does not fit it, or the file belongs to
            other settings.
    """
    source = Source(config)
    file = SampleFile(Path(path), source.settings)
    if file.complete:
        return file
    # The last batch may be short; any other that is not whole is drawn again.
    file.keep(file.count if file.count >= config.n else file.count - file.count % config.batch_size)
    while file.count < config.n:
        size, done = min(config.batch_size, config.n - file.count), float(file.count)

        def tick(steps: int, size: int = size) -> None:
            nonlocal done
            done += size * steps / source.steps
            if progress is not None:
                progress(done)

        file.append(source.rows(file.count, size, tick))
    file.finish()
    return file
