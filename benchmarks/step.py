"""Time and memory of a whole training step: drift against continuation and against a plain port, as ratios of one run.

A step is corruption, forward, loss, backward, clipping, AdamW and weight average. The plain port is Algorithm 1 of
TokenDrift written down as it stands: softmax @ E by autograd at all positions, the clean features with their graph, the
field dense over all references at once. It gives the same loss, which is checked before anything is timed. Each
repetition times all, in turning order; shown are the medians of the ratios and their range. The drift step has two
rows: from logits, and from hidden states (``Drift(hold_logits=False)``), where no tensor (B, L, V) is made.

Memory is counted, not timed: peak bytes that a step makes, gradients included; weights, AdamW's moments and the
average, which all hold, are not in it.

    python benchmarks/step.py                                   # 8 x 64 tokens, V=50258, width 128, 4 blocks
    python benchmarks/step.py --width 768 --blocks 12 --length 1024 --batch 2 --device cuda     # the paper's
    python benchmarks/step.py --quick                           # small sizes: only shows that it runs

With V = 50258 and a narrow, shallow network the vocabulary weighs more than in the released ones; more blocks bring the
time of a drift step up toward twice the continuation's, since the frozen encoder runs three passes for the network's
three.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lift import interleaved, machine, row
from live_bytes import LiveBytes
from torch import Tensor, nn

from tokendrift import TokenDriftLoss
from tokendrift.diffusion import MaskedDiffusion, Process, UniformDiffusion
from tokendrift.models import DiT, DiTConfig
from tokendrift.training import Continuation, Drift, LoopConfig, Objective, Optimization, StepLoss

QUEUE = 1024
DTYPES = ("fp32", "bf16")
NAMES = {"continuation": "continuation", "plain": "plain port"}
FORMS = {"drift": "drift step", "hidden": "drift step from hidden states"}


@dataclass
class PlainPort:
    """Algorithm 1 as it stands; the queues are given and stay."""

    process: Process
    encoder: DiT
    queues: tuple[Tensor, Tensor]
    generator: torch.Generator

    def __call__(self, model: nn.Module, x0: Tensor, /, *, log: bool = False) -> StepLoss:
        """Return the drift loss of a batch."""
        corrupted = self.process.corrupt(x0, generator=self.generator)
        logits = model(corrupted.x_t, corrupted.sigma).float()
        if self.process.mask_id is not None:
            logits[..., self.process.mask_id] += -1e6  # in place, as upstream
        table = self.encoder.vocab_embed.embedding
        soft = torch.softmax(logits, dim=-1) @ table
        soft = torch.where(corrupted.predicted[..., None], soft, table[corrupted.x_t])
        h = self.features(soft)
        u = self.features(table[x0].requires_grad_())  # with its graph, as where nobody switched it off
        drift = self.drift(h.detach(), torch.cat([u.detach(), self.queues[0]]), torch.cat([h.detach(), self.queues[1]]))
        loss = 0.5 * (h - (h.detach() + drift)).square().sum(dim=1).mean()
        return StepLoss(loss, {"drift": loss.detach()})

    def features(self, embeds: Tensor) -> Tensor:
        """Return the pooled last two layers, unit length."""
        hidden = self.encoder.hidden_states(embeds)
        return nn.functional.normalize(torch.cat([layer.mean(dim=1) for layer in hidden[-2:]], dim=-1), dim=-1)

    @staticmethod
    def drift(anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """Return the joint, cross-weighted, RMS-normalised field, averaged over the paper's temperatures."""
        total = torch.zeros_like(anchors)
        away = (anchors[:, None] - torch.cat([positives, negatives])).square().sum(dim=-1)
        own = torch.arange(len(anchors), device=anchors.device)
        away[own, len(positives) + own] = torch.inf
        for tau in (0.02, 0.05, 0.2):
            weights = torch.softmax(-away / tau, dim=1)
            pull, push = weights[:, : len(positives)], weights[:, len(positives) :]
            raw = pull * push.sum(dim=1, keepdim=True) @ positives - push * pull.sum(dim=1, keepdim=True) @ negatives
            total += raw / raw.square().sum(dim=1).mean().sqrt() / 3
        return total


def main() -> None:
    """Print two rows for each process and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="sequences; default 8")
    parser.add_argument("--length", type=int, default=64, help="L; default 64")
    parser.add_argument("--vocab", type=int, default=50258, help="V; default 50258")
    parser.add_argument("--width", type=int, default=128, help="D; default 128")
    parser.add_argument("--blocks", type=int, default=4, help="default 4")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="bf16 is autocast")
    parser.add_argument("--runs", type=int, default=9, help="repetitions after the first, which is dropped; default 9")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small sizes and 3 repetitions: a smoke test")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.length, options.vocab, options.width, options.blocks = 4, 16, 600, 32, 2
        options.runs = 3
    torch.set_num_threads(options.threads)
    for dtype in options.dtypes:
        for process in (MaskedDiffusion(options.vocab), UniformDiffusion(options.vocab)):
            print(*measured(process, options, dtype), sep="\n", flush=True)
    print(machine(options.device))


def measured(process: Process, options: argparse.Namespace, dtype: str) -> list[str]:
    """Return the rows of one process in one precision."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    masked = process.mask_id is not None
    sizes = {"hidden_dim": options.width, "n_blocks": options.blocks, "n_heads": max(1, options.width // 64)}
    base = DiT(DiTConfig(options.vocab, options.length, dropout=0.0, time_conditioning=not masked, **sizes)).to(device)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # some are made zero
        base.output_layer.linear.weight.normal_(std=4 * options.width**-0.5)  # predictions that differ
    batch = torch.randint(options.vocab - 1, (options.batch, options.length), device=device)
    drift = TokenDriftLoss.from_encoder(base, queue_size=QUEUE, mask_id=process.mask_id).to(device)
    texts = torch.randint(options.vocab - 1, (2, QUEUE, options.length), device=device)
    filling = torch.stack([features(drift, ids) for ids in texts])
    drift.queue_real.push(filling[0])
    drift.queue_generated.push(filling[1])
    port = PlainPort(process, copy.deepcopy(base).requires_grad_(False), (filling[0], filling[1]), seeded(device))
    for hold in (True, False):
        form = Drift(process, copy.deepcopy(drift), generator=seeded(device), hold_logits=hold)
        check_same_loss(base, form, port, batch)
    objectives: dict[str, Objective] = {
        "drift": Drift(process, drift, generator=seeded(device)),
        "hidden": Drift(process, copy.deepcopy(drift), generator=seeded(device), hold_logits=False),
        "continuation": Continuation(process, seeded(device)),
        "plain": port,
    }
    steps = {name: one_step(base, objective, batch, bf16=dtype == "bf16") for name, objective in objectives.items()}
    took = interleaved(steps, options.runs, options.device)
    peak = {name: counted(step) for name, step in steps.items()}
    kind = "masked" if masked else "uniform"
    size = f"{options.batch}x{options.length} V={options.vocab} D={options.width} {options.blocks} blocks"
    rows = []
    for form, title in FORMS.items():
        memory = "   ".join(f"{peak[form] / peak[name]:.2f}x {label}" for name, label in NAMES.items())
        rows.append(
            row(f"{title}, {kind}, {size} {dtype}", took, form, NAMES)
            + f"   {1e3 * statistics.median(took[form]):.0f} ms   peak {memory}   {peak[form] / 2**20:.0f} MiB"
        )
    return rows


@torch.no_grad()
def features(drift: TokenDriftLoss, ids: Tensor) -> Tensor:
    """Return the features of random texts, which fill a queue."""
    return torch.cat([drift.feature_map(drift.embedding[part]) for part in ids.split(64)])


def seeded(device: torch.device) -> torch.Generator:
    """Return a generator in the same state for every form."""
    return torch.Generator(device).manual_seed(0)


def one_step(base: DiT, objective: Objective, batch: Tensor, *, bf16: bool) -> Callable[[], object]:
    """Return a function that takes a step with a copy of the network."""
    autocast = torch.bfloat16 if bf16 else None
    optimization = Optimization(copy.deepcopy(base), LoopConfig(1, learning_rate=1e-5, warmup=0), autocast=autocast)
    return lambda: optimization.step(0, objective, [batch])


def counted(step: Callable[[], object]) -> int:
    """Return the peak bytes of a step; the first one, which makes AdamW's moments, is behind it."""
    with LiveBytes() as count:
        step()
    return count.peak


def check_same_loss(base: DiT, drift: Drift, port: PlainPort, batch: Tensor) -> None:
    """Stop if the two forms of the loss differ in value or gradient."""
    found = []
    for objective in (drift, port):
        model = copy.deepcopy(base)
        state = objective.generator.get_state()
        loss = objective(model, batch).loss
        loss.backward()
        objective.generator.set_state(state)
        found.append((loss.detach(), torch.cat([each.grad.flatten() for each in model.parameters()])))
    (loss, gradient), (other, reference) = found
    error = float((gradient - reference).norm() / reference.norm())
    if abs(float(loss - other)) > 1e-3 * abs(float(other)) or error > 1e-2:
        raise SystemExit(f"the two forms differ: loss {float(loss)} and {float(other)}, gradients by {error:.1e}")


if __name__ == "__main__":
    main()
