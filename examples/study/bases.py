"""Train bases on the World English Bible: a masked and a uniform-state model, of about 3.6 million parameters.

    torchrun --nproc-per-node 2 examples/study/bases.py OUT masked --minutes 65
    torchrun --nproc-per-node 2 examples/study/bases.py OUT uniform --minutes 40 --init OUT/masked
    python examples/study/bases.py SMALL masked --minutes 25 --width 128 --vocabulary 1024 --length 32 --batch-size 64

The third line trains a model of the size of those that ship with the package. Each process runs on one CPU thread;
plain ``python`` in place of torchrun trains in one process. A training ends after the minutes given, however fast the
machine is: the learning rate follows the clock. A run that was stopped resumes from its last saved state when the same
command is given again. The finished model lies in OUT/masked or OUT/uniform, in the layout of `save_denoiser`, with its
tokenizer.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpora import Text, world_english_bible
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from tokendrift.diffusion import MaskedDiffusion, Process, UniformDiffusion
from tokendrift.models import DiT, DiTConfig, load_denoiser, save_denoiser
from tokendrift.training import windows

EOS = "<eos>"


@dataclass(frozen=True)
class Settings:
    """How a base is trained.

    Attributes:
        minutes: Length of the training by the clock.
        width: Hidden size of the model.
        vocabulary: BPE entries; the masked process adds one for its mask.
        length: Tokens a sequence; 64 tokens of 4,096 entries are about 50 words.
        batch_size: Sequences a step in each process.
        matrix_rate: Peak rate of the orthogonalised steps of the blocks' matrices.
        other_rate: Peak rate of AdamW for embeddings, vocabulary head, norms and modulation.
        warmup: Linear warm-up steps.
        weight_decay: Decoupled weight decay.
        average: Decay of the weight average, which is the model that is kept.
        bound_share: Last share of the training, on the NELBO itself in place of the NELBO times t.
        save_seconds: Seconds between saved states.
        seed: Random seed of weights, batches and noise.
    """

    minutes: float = 110.0
    width: int = 192
    vocabulary: int = 4096
    length: int = 64
    batch_size: int = 32
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.01
    average: float = 0.998
    bound_share: float = 0.15
    save_seconds: float = 120.0
    seed: int = 0

    def rate(self, step: int, progress: float) -> float:
        """Return the share of the peak rates: linear warm-up by steps, then a cosine by the clock down to 2 %."""
        return min(1.0, (step + 1) / self.warmup) * (0.51 + 0.49 * math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------------- text to tokens


def make_tokenizer(documents: Iterable[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE of that many entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(documents: list[str], tokenizer: Tokenizer) -> Tensor:
    """Return the documents as one stream of ids, each closed by a line break and the end-of-text token."""
    ends = [*tokenizer.encode("\n").ids, tokenizer.token_to_id(EOS)]
    return torch.tensor([id_ for found in tokenizer.encode_batch(documents) for id_ in (*found.ids, *ends)])


# ---------------------------------------------------------------------------------------------- model and objective


def make_process(kind: str, vocabulary: int) -> Process:
    """Return the corruption process of a kind of base."""
    return UniformDiffusion(vocabulary) if kind == "uniform" else MaskedDiffusion(vocabulary + 1)


def make_denoiser(process: Process, settings: Settings) -> DiT:
    """Return an untrained denoiser."""
    sizes = DiTConfig(
        process.vocab_size,
        settings.length,
        hidden_dim=settings.width,
        cond_dim=32,
        n_blocks=4,
        n_heads=settings.width // 32,
        dropout=0.0,
        time_conditioning=isinstance(process, UniformDiffusion),
        mask_id=process.mask_id,
    )
    return DiT(sizes)


def start_from(model: DiT, folder: Path) -> None:
    """Copy the weights of a masked base into a uniform-state model, which has no entry for the mask."""
    known = load_denoiser(folder)[0].state_dict()
    rows = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor[: rows[name][0]] for name, tensor in known.items()})


def denoising_loss(model: DiT, process: Process, x0: Tensor, generator: torch.Generator, *, bound: bool) -> Tensor:
    """Return the NELBO per token in nats, or twice the NELBO times t.

    Both have the same minimum at every noise level. The factor t takes away the weight of nearly clean text, under
    which a small model stays at unigrams for long; in masked diffusion it leaves the plain cross-entropy.
    """
    corrupted = process.corrupt(x0, generator=generator)
    t = corrupted.t[:, None].expand_as(x0)
    if process.mask_id is None:
        nelbo = process.nelbo(corrupted.denoise(model), x0, corrupted.x_t, corrupted.t)
        return nelbo.mean() if bound else 2 * (t * nelbo).mean()
    # The vocabulary head runs at masked positions alone. The mask is the last entry and never an answer.
    logits = model.logits_at(corrupted.x_t, corrupted.sigma, corrupted.predicted)[:, : process.mask_id]
    cross_entropy = F.cross_entropy(logits, x0[corrupted.predicted], reduction="none")
    return (cross_entropy / t[corrupted.predicted]).sum() / x0.numel() if bound else cross_entropy.mean()


# ---------------------------------------------------------------------------------------------------------- training


class Orthogonal(torch.optim.Optimizer):
    """Momentum whose steps are made nearly orthogonal, for weight matrices (Muon).

    Small models learn from fewer tokens with it than with AdamW. The iteration runs in float32: bfloat16 is slow on
    a CPU without instructions for it.

    Args:
        matrices: Parameters of two axes.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        momentum: Decay of the momentum.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step along the momentum, with all singular values brought near one."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                average = state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                step = orthogonalised(matrix.grad.lerp(average, group["momentum"]))
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"] * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return the matrix with its singular values brought near one, by five steps of a Newton-Schulz iteration."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def rank() -> int:
    """Return the number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def average_over_processes(tensors: list[Tensor | None]) -> None:
    """Replace tensors by their means over all processes, in one exchange; None stays."""
    if dist.is_initialized():
        found = [tensor for tensor in tensors if tensor is not None]
        flat = torch.cat([tensor.flatten() for tensor in found]) / dist.get_world_size()
        dist.all_reduce(flat)
        for tensor, mean in zip(found, flat.split([tensor.numel() for tensor in found]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def from_first_process(value: float) -> float:
    """Return the value that the first process has."""
    if not dist.is_initialized():
        return value
    sent = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(sent, src=0)
    return sent.item()


class Training:
    """A base in training, with everything that a resumed run needs.

    Args:
        kind: ``"masked"`` or ``"uniform"``.
        settings: How it is trained.
        start: Folder of a masked base to start a uniform-state one from; None for random weights.
    """

    def __init__(self, kind: str, settings: Settings, start: Path | None = None) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.process = settings, make_process(kind, settings.vocabulary)
        self.model = make_denoiser(self.process, settings)
        if start is not None:
            start_from(self.model, start)
        self.parameters = list(self.model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        matrices = [
            parameter
            for name, parameter in self.model.blocks.named_parameters()
            if parameter.ndim == 2 and "adaLN" not in name
        ]
        chosen = set(map(id, matrices))
        others = [parameter for parameter in self.parameters if id(parameter) not in chosen]
        decay = settings.weight_decay
        self.optimizers: dict[float, torch.optim.Optimizer] = {
            settings.matrix_rate: Orthogonal(matrices, settings.matrix_rate, decay),
            settings.other_rate: torch.optim.AdamW(others, settings.other_rate, (0.9, 0.98), weight_decay=decay),
        }
        self.steps, self.seconds = 0, 0.0
        self.reseed()

    @property
    def progress(self) -> float:
        """Share of the training that is over, by the clock."""
        return min(1.0, self.seconds / (60 * self.settings.minutes))

    def reseed(self) -> None:
        """Give each process, and each resumption of a run, noise of its own."""
        self.generator = torch.Generator().manual_seed(self.seed_of(1))

    def seed_of(self, purpose: int) -> int:
        """Return a seed that depends on the run's seed, the steps so far, the process and what it is for."""
        return ((self.settings.seed * 10**7 + self.steps) * 1000 + rank()) * 10 + purpose

    def step(self, x0: Tensor) -> float:
        """Take one optimiser step on clean ids (B, L) and return the loss of this process."""
        progress, rate = self.progress, self.settings.rate(self.steps, self.progress)
        bound = progress >= 1 - self.settings.bound_share
        loss = denoising_loss(self.model, self.process, x0, self.generator, bound=bound)
        loss.backward()
        average_over_processes([parameter.grad for parameter in self.parameters])
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for peak, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.settings.average, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)
        self.steps += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        """Return what `load_state` takes up."""
        return {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers.values()],
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, found in zip(self.optimizers.values(), state["optimizers"], strict=True):
            optimizer.load_state_dict(found)
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.reseed()

    def averaged(self) -> DiT:
        """Return a copy of the model with the averaged weights, in evaluation mode."""
        model = DiT(self.model.config)
        model.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), self.average, strict=True):
                parameter.copy_(value)
        return model.eval()


def train_base(kind: str, text: Text, out: Path, settings: Settings, start: Path | None = None) -> None:
    """Train a base and write it to ``out/kind``, at the end and whenever its state is saved.

    Args:
        kind: ``"masked"`` or ``"uniform"``.
        text: Documents; only those for training are read.
        out: Folder for both bases; made if missing.
        settings: How it is trained.
        start: See `Training`.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(text.train, settings.vocabulary)
    stream = encode(text.train, tokenizer)
    training, saved = Training(kind, settings, start), out / f"{kind}-state.pt"
    if saved.is_file():
        training.load_state(torch.load(saved))
        print(f"resuming at step {training.steps}", flush=True)
    batches = windows(stream, settings.length, settings.batch_size, seed=training.seed_of(2))
    clock = last_saved = time.monotonic()
    mean: float | None = None
    while training.progress < 1:
        loss = training.step(next(batches))
        mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        now = time.monotonic()
        training.seconds = from_first_process(training.seconds + now - clock)  # all processes have to stop together
        clock = now
        if rank() == 0 and (now - last_saved > settings.save_seconds or training.progress >= 1):
            last_saved = now
            write(training, tokenizer, out / kind, saved)
            print(f"{training.seconds / 60:6.1f} min  step {training.steps}  loss {mean:.3f}", flush=True)


def write(training: Training, tokenizer: Tokenizer, folder: Path, saved: Path) -> None:
    """Write the state of a training, whole or not at all, and the averaged model."""
    unfinished = saved.with_suffix(".tmp")
    torch.save(training.state(), unfinished)
    unfinished.replace(saved)
    save_denoiser(training.averaged(), folder, training.process, dtype=torch.float16)
    tokenizer.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="Folder for the bases.")
    parser.add_argument("kind", choices=("masked", "uniform"), help="Which base to train.")
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="Length of the training by the clock.")
    parser.add_argument("--width", type=int, default=Settings.width, help="Hidden size, a multiple of 32.")
    parser.add_argument("--vocabulary", type=int, default=Settings.vocabulary, help="BPE entries.")
    parser.add_argument("--length", type=int, default=Settings.length, help="Tokens of a sequence.")
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size, help="Sequences a step in each process.")
    parser.add_argument("--init", type=Path, help="Masked base that a uniform-state one starts from.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:  # under torchrun
        dist.init_process_group("gloo")
    sizes = {name: getattr(options, name) for name in ("minutes", "width", "vocabulary", "length", "batch_size")}
    train_base(options.kind, world_english_bible(), options.out, Settings(**sizes), options.init)
