"""What a sampler costs beyond the network, against the published algorithm with dense float64 Gumbels, as ratios.

Overhead is the time of a run less the time inside the network, a backbone so small that it hardly counts. The dense
form is a plain port of the published steps: the law of the next token as a float64 tensor (B, L, V), and a Gumbel
variable for each of its entries. Its steps all cost the same, so a few are timed and counted N-fold; the other runs
are whole. Every repetition times all forms one after the other, in an order that turns, and a ratio is taken within a
repetition. Shown are medians and the range; bytes are counted, not timed: the most that one step holds beyond the
logits and what the network uses.

    python benchmarks/sampling.py                                # V=50258, L=1024, 64 steps, both processes
    python benchmarks/sampling.py --device cuda --rows 16 --dtype bf16
    python benchmarks/sampling.py --quick                        # small sizes: only shows that it runs
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from lift import machine, synchronize
from live_bytes import LiveBytes
from torch import Tensor

from tokendrift.diffusion import MaskedDiffusion, Mixture, Process, UniformDiffusion
from tokendrift.models import DiT, DiTConfig
from tokendrift.sampling import Chain, ReMDM, sample

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Form = Callable[[], tuple[float, float]]  # seconds in all, seconds inside the network


class Timed:
    """A denoiser with a stopwatch; its head is hidden, so that both forms get the same logits."""

    def __init__(self, model: DiT, device: str) -> None:
        self.model, self.device, self.seconds, self.calls, self.largest = model, device, 0.0, 0, 0

    def __call__(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        synchronize(self.device)
        start = time.perf_counter()
        logits = self.model(x_t, sigma)
        synchronize(self.device)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        self.largest = max(self.largest, logits.nbytes)
        return logits


class TimedHead(Timed):
    """The same with the head asked for some positions."""

    def logits_at(self, x_t: Tensor, sigma: Tensor, wanted: Tensor) -> Tensor:
        synchronize(self.device)
        start = time.perf_counter()
        logits = self.model.logits_at(x_t, sigma, wanted)
        synchronize(self.device)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return logits


def gumbel_draw(weights: Tensor) -> Tensor:
    """Draw from unnormalised weights (B, L, V) as the published samplers do, in the precision of the weights."""
    return (weights / (1e-10 - (torch.rand_like(weights) + 1e-10).log())).argmax(dim=-1)


def dense_step(process: Process, logits: Tensor, x: Tensor, t: float, s: float) -> Tensor:
    """Take one published reverse step with float64 tensors (B, L, V)."""
    alpha_t, alpha_s = process.levels(t, s)
    if process.mask_id is not None:
        logits = logits.double()
        logits[..., process.mask_id] = -torch.inf
        weights = logits.log_softmax(dim=-1).exp() * (alpha_s - alpha_t)
        weights[..., process.mask_id] = 1 - alpha_s
        return torch.where(x == process.mask_id, gumbel_draw(weights), x)
    size, ratio = process.vocab_size, alpha_t / alpha_s
    p = logits.double().log_softmax(dim=-1).exp()
    here = torch.nn.functional.one_hot(x, size)
    top = alpha_t * size * p * here + (ratio - alpha_t) * here + (alpha_s - alpha_t) * p
    top = top + (1 - ratio) * (1 - alpha_s) / size
    return gumbel_draw(top / (alpha_t * size * p.gather(-1, x[..., None]) + 1 - alpha_t))


def main() -> None:
    """Print one row for each process and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=50258, help="V; default 50258")
    parser.add_argument("--length", type=int, default=1024, help="L; default 1024")
    parser.add_argument("--rows", type=int, default=1, help="B; default 1")
    parser.add_argument("--steps", type=int, default=64, help="N; default 64")
    parser.add_argument("--dense-steps", type=int, default=2, help="steps of the dense form that are timed; default 2")
    parser.add_argument("--runs", type=int, default=3, help="repetitions; default 3")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test")
    options = parser.parse_args()
    if options.quick:
        options.vocab, options.length, options.steps, options.runs = 2000, 64, 8, 2
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        for kind in (MaskedDiffusion, UniformDiffusion):
            for line in rows(kind(options.vocab), options):
                print(line, flush=True)
    print(machine(options.device))


def rows(process: Process, options: argparse.Namespace) -> list[str]:
    """Return the rows of one process."""
    torch.manual_seed(0)
    masked = process.mask_id is not None
    sizes = DiTConfig(
        process.vocab_size,
        options.length,
        hidden_dim=16,
        cond_dim=8,
        n_blocks=1,
        n_heads=2,
        time_conditioning=not masked,
    )
    model = DiT(sizes)
    torch.nn.init.normal_(model.output_layer.linear.weight)
    model = model.to(options.device, DTYPES[options.dtype]).eval()
    shape, steps = (options.rows, options.length), options.steps
    forwards: dict[str, float] = {}

    def ours(name: str, watch: type[Timed], **settings: object) -> Form:
        def run() -> tuple[float, float]:
            timed = watch(model, options.device)
            synchronize(options.device)
            start = time.perf_counter()
            found = sample(timed, process, shape, steps=steps, seed=0, device=options.device, **settings)
            synchronize(options.device)
            forwards[name] = found.row_nfe.double().mean().item()
            return time.perf_counter() - start, timed.seconds

        return run

    def dense() -> tuple[float, float]:
        timed = Timed(model, options.device)
        x = process.prior(shape, device=options.device)
        times = torch.linspace(1, 1e-5, steps + 1).tolist()
        synchronize(options.device)
        start = time.perf_counter()
        for t, s in pairwise(times[: options.dense_steps + 1]):
            sigma = process.sigma(torch.full(shape[:1], t)).to(options.device)
            x = dense_step(process, timed(x, sigma), x, t, s)
        synchronize(options.device)
        share = steps / options.dense_steps
        return (time.perf_counter() - start) * share, timed.seconds * share

    forms: dict[str, Form] = {"dense": dense, "ancestral": ours("ancestral", Timed)}
    if masked:
        forms["head"] = ours("head", TimedHead)
        forms["ReMDM"] = ours("ReMDM", Timed, sampler=ReMDM())

    took: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    names = list(forms)
    for name in names[1:]:
        forms[name]()  # dropped: the first run pays for what later ones find ready
    for repetition in range(options.runs):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            took[name].append(forms[name]())
    kind = "masked" if masked else "uniform"
    what = f"{kind:7s} B={shape[0]} L={shape[1]} V={process.vocab_size} N={steps} {options.dtype}"
    lines = []
    for name in names[1:]:
        pairs = list(zip(took[name], took["dense"], strict=True))
        overhead = ratios([(a - b) / (c - d) for (a, b), (c, d) in pairs])
        whole = ratios([a / c for (a, _), (c, _) in pairs])
        line = f"{name:10s} {what}   overhead {overhead} dense   whole run {whole} dense   "
        line += f"{forwards[name]:.1f} forwards a row   {options.runs} runs"
        if name == "ancestral":
            mine, theirs = bytes_of_a_step(process, model, shape, steps, options.device)
            line += f"   one step holds {mine:.2f}x logits (dense {theirs:.1f}x)"
        lines.append(line)
    return lines


def bytes_of_a_step(
    process: Process, model: DiT, shape: tuple[int, int], steps: int, device: str
) -> tuple[float, float]:
    """Return what one step holds at most, as a multiple of the logits: the sampler's, and that of the dense form."""
    x, times = process.prior(shape, device=device), (1.0, 1 - 1 / steps)
    logits = model(x, torch.ones(shape[0], device=device))  # plays the network: nothing but the sampler's own counts

    def first_step(chain: Chain, steps: int | None) -> Iterator[Mixture]:
        yield chain.posterior(*times)

    with LiveBytes() as mine:
        sample(lambda x, sigma: logits, process, shape, sampler=first_step, seed=0, device=device)
    with LiveBytes() as theirs:
        dense_step(process, logits, x, *times)
    return mine.peak / logits.nbytes, theirs.peak / logits.nbytes


def ratios(values: list[float]) -> str:
    """Return median and range."""
    return f"{statistics.median(values):.4f}x ({min(values):.4f}-{max(values):.4f})"


if __name__ == "__main__":
    main()
