"""Time and memory of the lifts against the bare matrix products and the plain form, as ratios of one run.

Every repetition times all forms one after the other, in an order that turns, and a ratio is taken within a
repetition: what slows the machine for a while slows both sides. Shown are the medians and the range. The workspace is
counted, not timed: peak bytes beyond the gradients, in per cent of the logits.

    python benchmarks/lift.py                                   # T=2048, both sizes, float32 and bfloat16
    python benchmarks/lift.py --tokens 8192 --threads 8
    python benchmarks/lift.py --quick                           # small sizes: only shows that it runs

The bare products are those of the unfused form with a frozen embedding: one each for the lift and its gradient,
and for the lift of hidden states three more for the output layer. In mixed precision (bfloat16 logits, float32
embedding) the plain form widens the logits: softmax(logits.float()) @ E.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from live_bytes import LiveBytes
from torch import Tensor
from torch.nn.functional import linear

from tokendrift import linear_soft_token_lift, soft_token_lift

SIZES = [(50258, 768), (30522, 384)]
QUICK_SIZES = [(1000, 64), (600, 32)]
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16/fp32": (torch.bfloat16, torch.float32),  # logits / embedding
}
Form = Callable[[], object]


def main() -> None:
    """Print one row for each size, dtype and lift."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="T; default 2048")
    parser.add_argument("--runs", type=int, default=9, help="repetitions after the first, which is dropped; default 9")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--predicted", type=float, default=0.5, help="share of positions in the third row; default 0.5")
    parser.add_argument("--quick", action="store_true", help="small sizes and 3 repetitions: a smoke test")
    options = parser.parse_args()
    tokens, runs, sizes = (256, 3, QUICK_SIZES) if options.quick else (options.tokens, options.runs, SIZES)
    torch.set_num_threads(options.threads)
    for (vocab, width), dtype in product(sizes, options.dtypes):
        for line in rows(tokens, vocab, width, dtype, options.device, runs, options.predicted):
            print(line, flush=True)
    print(machine(options.device))


def rows(tokens: int, vocab: int, width: int, dtype: str, device: str, runs: int, share: float) -> list[str]:
    """Return the rows of one size and dtype."""
    logit_dtype, table_dtype = DTYPES[dtype]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, like: torch.dtype = logit_dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, like)

    logits, embedding = normal(1, tokens, vocab), normal(vocab, width, scale=0.02, like=table_dtype)
    hidden, weight = normal(1, tokens, width), normal(vocab, width, scale=width**-0.5)
    upstream = normal(1, tokens, width, like=torch.float32)
    noisy_ids = torch.randint(vocab, (1, tokens), generator=generator).to(device)
    predicted = (torch.rand(1, tokens, generator=generator) < share).to(device)

    def backward(lift: Callable[..., Tensor], *leaves: Tensor) -> Form:
        def run() -> None:
            inputs = [leaf.detach().requires_grad_() for leaf in leaves]
            out = lift(*inputs)
            out.backward(upstream.to(out.dtype))

        return run

    def plain(logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=-1, dtype=table_dtype) @ embedding

    def lift(logits: Tensor) -> Tensor:
        return soft_token_lift(logits, embedding)

    def lift_predicted(logits: Tensor) -> Tensor:
        return soft_token_lift(logits, embedding, noisy_ids=noisy_ids, predicted=predicted)

    def unfused(hidden: Tensor, weight: Tensor) -> Tensor:
        return soft_token_lift(linear(hidden, weight), embedding)

    def plain_linear(hidden: Tensor, weight: Tensor) -> Tensor:
        return plain(linear(hidden, weight))

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_soft_token_lift(hidden, weight, None, embedding)

    flat, inner, slope = logits[0].to(table_dtype), hidden[0], upstream[0].to(table_dtype)
    lifted, gradient = slope.new_empty(tokens, width), flat.new_empty(tokens, vocab)
    logit_buffer, weight_buffer, hidden_buffer = (torch.empty_like(x) for x in (logits[0], weight, inner))

    def bare() -> None:
        torch.mm(flat, embedding, out=lifted)
        torch.mm(slope, embedding.T, out=gradient)

    def bare_linear() -> None:
        torch.mm(inner, weight.T, out=logit_buffer)
        bare()
        torch.mm(logit_buffer, weight, out=hidden_buffer)
        torch.mm(logit_buffer.T, inner, out=weight_buffer)

    meta_logits = logits.to("meta").requires_grad_()
    meta_hidden = [x.to("meta").requires_grad_() for x in (hidden, weight)]
    table, onto = embedding.to("meta"), upstream.to("meta")
    lift_bytes = beyond(lambda: soft_token_lift(meta_logits, table).backward(onto), [meta_logits])
    # The blocks that the lift chooses by itself on the device; for meta tensors it cannot know.
    blocks = {"vocab_block": 1024, "workspace_mib": 16.0} if device == "cpu" else {"vocab_block": 8192}
    fused_bytes = beyond(
        lambda: linear_soft_token_lift(*meta_hidden, None, table, **blocks).backward(onto), meta_hidden
    )
    of_logits = 100 / logits.nbytes

    forms = {
        "bare": bare,
        "plain": backward(plain, logits),
        "lift": backward(lift, logits),
        "part": backward(lift_predicted, logits),
    }
    linear_forms = {
        "bare": bare_linear,
        "plain": backward(plain_linear, hidden, weight),
        "unfused": backward(unfused, hidden, weight),
        "fused": backward(fused, hidden, weight),
    }
    took, took_linear = interleaved(forms, runs, device), interleaved(linear_forms, runs, device)
    what = f"T={tokens} V={vocab} D={width} {dtype:9s}"
    part = f"{100 * share:.0f}% predicted"
    return [
        row(f"lift fwd+bwd, {what}", took, "lift", {"bare": "bare products", "plain": "softmax(logits) @ E"})
        + f"   workspace {lift_bytes * of_logits:.1f}% of logits",
        row(f"lift {part}, {what}", took, "part", {"lift": "all predicted", "plain": "softmax(logits) @ E"}),
        row(
            f"hidden to lift, {what}",
            took_linear,
            "fused",
            {"bare": "bare products", "unfused": "unfused", "plain": "plain"},
        )
        + f"   workspace {fused_bytes * of_logits:.1f}% of logits",
    ]


def interleaved(forms: dict[str, Form], runs: int, device: str) -> dict[str, list[float]]:
    """Return seconds of each form in each repetition; the first repetition is dropped."""
    names, took = list(forms), {name: [] for name in forms}
    for repetition in range(runs + 1):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize(device)
            start = time.perf_counter()
            forms[name]()
            synchronize(device)
            if repetition:
                took[name].append(time.perf_counter() - start)
    return took


def row(title: str, took: dict[str, list[float]], name: str, baselines: dict[str, str]) -> str:
    """Return the ratios of a form to its baselines: median, and the range over the repetitions."""
    cells = []
    for key, label in baselines.items():
        ratios = [mine / theirs for mine, theirs in zip(took[name], took[key], strict=True)]
        spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
        cells.append(f"{statistics.median(ratios):.2f}x {label} {spread}")
    return f"{title}   " + "   ".join(cells) + f"   {len(took[name])} runs"


def beyond(run: Form, leaves: list[Tensor]) -> int:
    """Return the peak bytes of a run beyond the gradients that it leaves; inputs do not count."""
    with LiveBytes() as count:
        run()
    gradients = [leaf.grad for leaf in leaves]
    return count.peak - sum(gradient.nbytes for gradient in gradients if gradient is not None)


def synchronize(device: str) -> None:
    """Wait for an accelerator."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def machine(device: str) -> str:
    """Return what the numbers were taken on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}"


def cpu_name() -> str:
    """Return the model of the CPU, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as info:  # noqa: PTH123
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
