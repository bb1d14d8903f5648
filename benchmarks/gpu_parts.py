"""The parts of `gpu.py`, each a function with a budget of seconds: ``gpu_parts.py PART FILE --seconds N``.

A part writes its rows into the file after each of them. It leaves out what it has no time for, and what does not fit
into the memory of the device, and says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from equality import cases, compare, differing_ids, field_under_tf32, tf32
from field import dense, unit_vectors
from lift import interleaved, machine, synchronize
from objectives import duo, mdlm
from sampling import Timed, TimedHead, dense_step
from step import PlainPort, seeded
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from tokendrift import DriftField, PairDriftLoss, linear_soft_token_lift, soft_token_lift
from tokendrift.diffusion import MaskedDiffusion, Process, UniformDiffusion
from tokendrift.distribution_matching import distribution_matching_loss
from tokendrift.models import DiT, DiTConfig
from tokendrift.sampling import sample
from tokendrift.training import OBJECTIVES, LoopConfig, Objective, ObjectiveSetup, Optimization

QUEUE = 1024
Form = Callable[[], object]
NO_TIME = "left out: no time"


@dataclass
class Bench:
    """What a part runs with: its device, the end of its time, and the rows that it writes.

    Attributes:
        file: JSON file of the rows.
        device: Device that is measured.
        end: Moment, on the monotonic clock, when the part should be done.
        dry: Whether sizes are tiny.
        text: Text files for the refinement.
        rows: Rows so far.
    """

    file: Path
    device: str
    end: float
    dry: bool = False
    text: list[Path] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def add(self, **row: Any) -> None:
        """Add a row to the file."""
        self.rows.append(row)
        self.file.write_text(json.dumps({"machine": machine(self.device), "rows": self.rows}), encoding="utf-8")

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function compiled for one set of shapes; a dry run checks the graph without a compiler."""
        return torch.compile(function, dynamic=False, backend="aot_eager" if self.dry else "inductor")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--text", nargs="+", type=Path, default=[])
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    bench = Bench(options.file, options.device, end, options.dry, options.text)
    PARTS[options.part](bench)
    if any("failed" in row.get("note", "") for row in bench.rows):
        raise SystemExit("some forms have failed; their rows say why")


# ---------------------------------------------------------------------------------------------- time and memory


def measure(bench: Bench, case: str, forms: dict[str, Form], *, runs: int = 7) -> None:
    """Add a row for each form: time, also as a multiple of the first form's, and peak memory beyond what was there."""
    if bench.left() < 2:
        bench.add(case=case, note=NO_TIME)
        return
    peaks: dict[str, float | str] = {}
    for name, form in forms.items():
        try:
            form()  # compiles, and fills the caches of the allocator
            peaks[name] = peak_mib(form, bench.device)
        except Exception as error:  # the others are still worth their time
            bench.add(case=case, note=f"{name} {reason(error)}")
    if not peaks:
        return
    took = interleaved({name: forms[name] for name in peaks}, runs, bench.device)
    first = next(iter(took), "")
    for name, seconds in took.items():
        ratios = [own / theirs for own, theirs in zip(seconds, took[first], strict=True)]
        bench.add(
            case=case,
            form=name,
            ms=1e3 * statistics.median(seconds),
            times_the_first=statistics.median(ratios),
            range=f"{min(ratios):.2f}-{max(ratios):.2f}",
            peak_mib=peaks[name],
        )


def reason(error: Exception) -> str:
    """Return why a form has no figures; memory that it leaves behind is given back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit into memory"
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def peak_mib(form: Form, device: str) -> float | str:
    """Return the most MiB that a form held at a time, without what was allocated before it; unknown on a CPU."""
    if not device.startswith("cuda"):
        form()
        return "-"
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    form()
    synchronize(device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def with_gradient(function: Callable[..., Tensor], *leaves: Tensor) -> Form:
    """Return a form that computes a function of leaves and its gradient, that of the sum of a tensor."""

    def run() -> None:
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        out = function(*inputs)
        out.backward(torch.ones_like(out))

    return run


# ---------------------------------------------------------------------------------------------- lift, field, objectives


def losses(bench: Bench) -> None:
    """Measure the parts of the losses at the paper's size, in both dtypes."""
    vocab, width, tokens = (600, 32, 128) if bench.dry else (50258, 768, 8192)
    for dtype in (torch.bfloat16, torch.float32):
        lifts(bench, vocab, width, tokens, dtype)
        hidden_lifts(bench, vocab, width, tokens, dtype)
        likelihoods(bench, vocab, tokens, dtype)
    drift_field(bench)
    pairs_and_matching(bench, vocab, tokens, torch.bfloat16)


def normal(bench: Bench, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    """Return normal numbers on the device."""
    return torch.randn(shape, device=bench.device).mul_(scale).to(dtype)


def lifts(bench: Bench, vocab: int, width: int, tokens: int, dtype: torch.dtype) -> None:
    """Measure the lift of logits, forward and backward, beside the bare products and the plain form."""
    torch.manual_seed(0)
    logits, table = normal(bench, dtype, 1, tokens, vocab), normal(bench, dtype, vocab, width, scale=0.02)
    slope = normal(bench, dtype, tokens, width)
    ids = torch.randint(vocab, (1, tokens), device=bench.device)
    half = torch.rand(1, tokens, device=bench.device) < 0.5

    def bare() -> None:
        torch.mm(logits[0], table)
        torch.mm(slope, table.T)

    def plain(logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=-1) @ table

    def of_half(logits: Tensor) -> Tensor:
        return soft_token_lift(logits, table, noisy_ids=ids, predicted=half)

    forms = {
        "lift": with_gradient(lambda x: soft_token_lift(x, table), logits),
        "lift of half of the positions": with_gradient(of_half, logits),
        "bare products": bare,
        "softmax(logits) @ E": with_gradient(plain, logits),
        "the same, compiled": with_gradient(bench.compiled(plain), logits),
    }
    measure(bench, f"lift, T={tokens} V={vocab} D={width} {name_of(dtype)}", forms)


def hidden_lifts(bench: Bench, vocab: int, width: int, tokens: int, dtype: torch.dtype) -> None:
    """Measure the lift of hidden states beside that of their logits, and the plain form."""
    torch.manual_seed(0)
    table, weight = (normal(bench, dtype, vocab, width, scale=scale) for scale in (0.02, width**-0.5))
    hidden = normal(bench, dtype, 1, tokens, width)

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_soft_token_lift(hidden, weight, None, table)

    def unfused(hidden: Tensor, weight: Tensor) -> Tensor:
        return soft_token_lift(linear(hidden, weight), table)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.softmax(linear(hidden, weight), dim=-1) @ table

    forms = {
        "lift of hidden states": with_gradient(fused, hidden, weight),
        "logits, then lift": with_gradient(unfused, hidden, weight),
        "softmax(W h) @ E": with_gradient(plain, hidden, weight),
        "the same, compiled": with_gradient(bench.compiled(plain), hidden, weight),
    }
    measure(bench, f"lift of hidden states, T={tokens} V={vocab} D={width} {name_of(dtype)}", forms)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype."""
    return str(dtype).removeprefix("torch.")


def likelihoods(bench: Bench, vocab: int, tokens: int, dtype: torch.dtype) -> None:
    """Measure the objectives of both processes beside the published forms."""
    draw, rows = torch.Generator(bench.device).manual_seed(0), 8
    logits = torch.randn(rows, tokens // rows, vocab, generator=draw, device=bench.device).to(dtype)
    x0 = torch.randint(vocab - 1, logits.shape[:2], generator=draw, device=bench.device)
    t = torch.linspace(0.05, 0.95, rows, device=bench.device)
    for process, published in ((MaskedDiffusion(vocab), mdlm), (UniformDiffusion(vocab), duo)):
        x_t = process.corrupt(x0, t, generator=draw).x_t

        def ours(logits: Tensor, own: Process = process, x_t: Tensor = x_t) -> Tensor:
            return own.nelbo(logits, x0, x_t, t)

        def theirs(logits: Tensor, own: Process = process, x_t: Tensor = x_t, form: Any = published) -> Tensor:
            return form(own, logits, x0, x_t, t)

        forms = {
            "nelbo": with_gradient(ours, logits),
            "published form": with_gradient(theirs, logits),
            "the same, compiled": with_gradient(bench.compiled(theirs), logits),
        }
        measure(bench, f"NELBO, {type(process).__name__}, T={tokens} V={vocab} {name_of(dtype)}", forms)


def drift_field(bench: Bench) -> None:
    """Measure the field beside its dense form."""
    count, references, width = (4, 64, 16) if bench.dry else (16, 2 * QUEUE + 32, 1536)
    points, _ = unit_vectors(count, references, width, bench.device)
    positives, negatives = points.chunk(2)
    form, own = DriftField(), torch.arange(count, device=bench.device)
    compiled = bench.compiled(dense)
    measure(
        bench,
        f"field, N={count} P+Q={references} M={width} float32",
        {
            "field": lambda: form(negatives[:count], positives, negatives, exclude_negative=own),
            "cdist and softmax": lambda: dense(form, negatives[:count], positives, negatives),
            "the same, compiled": lambda: compiled(form, negatives[:count], positives, negatives),
        },
    )


def pairs_and_matching(bench: Bench, vocab: int, tokens: int, dtype: torch.dtype) -> None:
    """Measure the pair loss, and the loss of distribution matching beside its plain form."""
    draw, rows = torch.Generator(bench.device).manual_seed(0), 8
    process, shape = MaskedDiffusion(vocab), (rows, tokens // rows)
    logits, teacher, auxiliary = (
        torch.randn(*shape, vocab, generator=draw, device=bench.device).to(dtype) for _ in range(3)
    )
    clean = torch.randint(vocab - 1, shape, generator=draw, device=bench.device)
    noisy = process.corrupt(clean, torch.full((rows,), 0.5, device=bench.device), generator=draw).x_t
    pairs = PairDriftLoss(vocab, mask_id=process.mask_id).to(bench.device)
    what = f"T={tokens} V={vocab} {name_of(dtype)}"
    measure(
        bench,
        f"pairs, {what}",
        {"pair loss": with_gradient(lambda x: pairs(x, clean, noisy_ids=noisy), logits)},
        runs=3,
    )

    def plain(logits: Tensor) -> Tensor:
        p, real, own = (x.float().log_softmax(dim=-1) for x in (logits, teacher, auxiliary))
        return -(p.exp() * (real - own).clamp(-5, 5)).sum(dim=-1).mean()

    forms = {
        "matching loss": with_gradient(lambda x: distribution_matching_loss(x, teacher, auxiliary), logits),
        "log_softmax": with_gradient(plain, logits),
        "the same, compiled": with_gradient(bench.compiled(plain), logits),
    }
    measure(bench, f"distribution matching, {what}", forms)


# ---------------------------------------------------------------------------------------------- training steps

STEPS = ("continuation", "drift", "drift, TF32", "plain port", "pairs", "matching")


def steps(bench: Bench) -> None:
    """Measure whole training steps of a masked model: corruption, network, loss, clipping, AdamW and average."""
    vocab, length = (300, 16) if bench.dry else (50258, 1024)
    sizes = {"hidden_dim": 32, "n_blocks": 1, "n_heads": 2} if bench.dry else {}
    process = MaskedDiffusion(vocab)
    torch.manual_seed(0)
    base = DiT(DiTConfig(vocab, length, dropout=0.0, mask_id=process.mask_id, **sizes))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # some are made zero
    for compiled in (False, True):
        for batch in (2, 8):
            for name in STEPS:
                one_step(bench, base.to(bench.device), process, name, batch, compiled)


def one_step(bench: Bench, base: DiT, process: Process, name: str, batch: int, compiled: bool) -> None:
    """Add the row of one objective at one batch size."""
    length = base.config.model_length
    case = {"batch": f"{batch}x{length}", "step": name, "compiled": "blocks" if compiled else "no"}
    if bench.left() < 4:
        bench.add(**case, note=NO_TIME)
        return
    x0 = torch.randint(process.vocab_size - 1, (batch, length), device=bench.device)
    try:
        with tf32() if "TF32" in name else nullcontext():
            optimization, objective = prepared(bench, base, process, name.partition(",")[0])
            if compiled:
                compile_blocks(
                    bench, optimization.model, *(getattr(objective, key, None) for key in ("module", "encoder"))
                )
            took: list[float] = []
            for repetition in range(3 if bench.dry else 10):
                if repetition == 2 and bench.device.startswith("cuda"):
                    torch.cuda.reset_peak_memory_stats()
                synchronize(bench.device)
                start = time.perf_counter()
                optimization.step(repetition, objective, [x0])
                synchronize(bench.device)
                took.append(time.perf_counter() - start)
                if repetition > 2 and bench.left() < 2:
                    break
    except Exception as error:
        bench.add(**case, note=reason(error))
        return
    median = statistics.median(took[2:])
    peak = torch.cuda.max_memory_allocated() / 2**20 if bench.device.startswith("cuda") else "-"
    spread = f"{1e3 * min(took[2:]):.1f}-{1e3 * max(took[2:]):.1f}"
    bench.add(
        **case, ms=1e3 * median, range=spread, tokens_a_second=x0.numel() / median, peak_mib=peak, first_s=took[0]
    )


def prepared(bench: Bench, base: DiT, process: Process, name: str) -> tuple[Optimization, Objective]:
    """Return a copy of the network with its optimiser, and an objective that is ready to be called."""
    model, device = copy.deepcopy(base), torch.device(bench.device)
    if name == "plain port":
        queues = torch.randn(2, QUEUE, 2 * base.config.hidden_dim, device=device)
        filling = normalize(queues, dim=-1)
        frozen = copy.deepcopy(base).requires_grad_(False)
        objective: Objective = PlainPort(process, frozen, (filling[0], filling[1]), seeded(device))
    else:
        config = OBJECTIVES[name]().for_process(process)
        config.prepare(model)
        setup = ObjectiveSetup(base, process, base.config.model_length, seeded(device), autocast=torch.bfloat16)
        objective = config.build(setup)
        if objective.module is not None:
            objective.module.to(device)
        if name == "drift":
            for queue in (objective.module.queue_real, objective.module.queue_generated):
                queue.push(normalize(torch.randn(QUEUE, 2 * base.config.hidden_dim, device=device), dim=-1))
    loop = LoopConfig(100, learning_rate=1e-5, warmup=0)
    return Optimization(model.to(device), loop, autocast=torch.bfloat16), objective


def compile_blocks(bench: Bench, *modules: nn.Module | None) -> None:
    """Compile every transformer block in place: they have one code, so that it is compiled once."""
    for module in modules:
        parts = [] if module is None else [*module.modules()]
        frozen = getattr(module, "feature_map", None)  # that of a drifting loss is not one of its modules
        parts += list(frozen.modules()) if isinstance(frozen, nn.Module) else []
        for part in parts:
            if isinstance(part, DiT):
                for block in part.blocks:
                    block.compile(backend="aot_eager" if bench.dry else "inductor")


# ---------------------------------------------------------------------------------------------- sampling


def sampling(bench: Bench) -> None:
    """Measure sampling runs of the paper's size in bfloat16 beside a few steps of the dense form, counted N-fold."""
    vocab, length, rows = (300, 16, 2) if bench.dry else (50258, 1024, 16)
    sizes = {"hidden_dim": 32, "n_blocks": 1, "n_heads": 2} if bench.dry else {}
    for kind, counts in ((MaskedDiffusion, (4, 16, 64, 1024)), (UniformDiffusion, (4, 16, 64))):
        process = kind(vocab)
        torch.manual_seed(0)
        config = DiTConfig(vocab, length, mask_id=process.mask_id, time_conditioning=process.mask_id is None, **sizes)
        model = DiT(config)
        nn.init.normal_(model.output_layer.linear.weight, std=4 * config.hidden_dim**-0.5)
        model = model.to(bench.device, torch.bfloat16).eval()
        dense_seconds, dense_peak = dense_steps(bench, process, model, (rows, length))
        for count in counts:
            # The head computes the logits of wanted positions alone, as samplers do it by themselves.
            watch = TimedHead if process.mask_id is not None else Timed
            sampling_run(bench, process, watch(model, bench.device), (rows, length), count, dense_seconds, dense_peak)


def sampling_run(
    bench: Bench,
    process: Process,
    timed: Timed,
    shape: tuple[int, int],
    count: int,
    dense_seconds: float,
    dense_peak: float | str,
) -> None:
    """Add the row of one number of steps."""
    case = {"process": type(process).__name__, "batch": f"{shape[0]}x{shape[1]}", "steps": count}
    if bench.left() < (12 if count > 64 else 3):
        bench.add(**case, note=NO_TIME)
        return

    def run() -> None:
        sample(timed, process, shape, steps=count, seed=0, device=bench.device)

    if count <= 64:
        run()
    timed.seconds, timed.calls = 0.0, 0
    start = time.perf_counter()
    peak = peak_mib(run, bench.device)
    synchronize(bench.device)
    seconds = time.perf_counter() - start
    own = seconds - timed.seconds
    bench.add(
        **case,
        seconds=seconds,
        in_network=timed.seconds,
        beyond_it_ms_a_step=1e3 * own / count,
        dense_beyond_it_ms_a_step=1e3 * dense_seconds,
        times_the_dense=own / count / dense_seconds if dense_seconds > 0 else "-",
        peak_mib=peak,
        dense_peak_mib=dense_peak,
    )


@torch.no_grad()
def dense_steps(
    bench: Bench, process: Process, model: DiT, shape: tuple[int, int], count: int = 2
) -> tuple[float, float | str]:
    """Return the seconds of a dense float64 step beyond the network, and the peak memory; 0 if it does not fit."""
    timed, took = Timed(model, bench.device), [0.0]
    x, times = process.prior(shape, device=bench.device), torch.linspace(1, 0.9, count + 2).tolist()
    sigma = process.sigma(torch.full(shape[:1], 0.9)).to(bench.device)
    peak: float | str = "-"
    with suppress(torch.OutOfMemoryError):
        for number in range(count):
            logits = timed(x, sigma)

            def step(number: int = number, logits: Tensor = logits) -> None:
                synchronize(bench.device)
                start = time.perf_counter()
                dense_step(process, logits, x, times[number], times[number + 1])
                synchronize(bench.device)
                took.append(time.perf_counter() - start)

            peak = peak_mib(step, bench.device)
    return took[-1], peak


# ---------------------------------------------------------------------------------------------- equality


def equality(bench: Bench) -> None:
    """Compare losses, gradients and samples with those of the CPU, and with themselves under other settings."""
    for name, case in cases().items():
        for dtype in (torch.float32, torch.bfloat16):
            off = compare(case, bench.device, dtype)
            bench.add(loss=name, dtype=name_of(dtype), off_in_value=off.value, off_in_gradient=off.gradient)
    for name, share in differing_ids(bench.device).items():
        bench.add(samples=name, share_of_other_ids=share)
    bench.add(field="TF32 switched on", largest_difference=field_under_tf32(bench.device))


def refinement(bench: Bench) -> None:
    """Train a base and refine it, see `gpu_refine`."""
    from gpu_refine import refine_all

    refine_all(bench)


PARTS: dict[str, Callable[[Bench], None]] = {
    "losses": losses,
    "step": steps,
    "sampling": sampling,
    "equality": equality,
    "refine": refinement,
}


if __name__ == "__main__":
    main()
