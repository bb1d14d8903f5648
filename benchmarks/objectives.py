"""Time and memory of the objectives of diffusion models against the published form, as ratios of one run.

    python benchmarks/objectives.py                     # T=1024 tokens, V=50258, float32 and bfloat16 logits
    python benchmarks/objectives.py --quick             # small sizes: only shows that it runs

The published form normalises all logits in float32, with autograd. The workspace is what either holds at its peak
beyond the gradient of the logits, in multiples of float32 logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from lift import beyond, interleaved, machine, row
from torch import Tensor

from tokendrift.diffusion import MaskedDiffusion, Process, UniformDiffusion

Loss = Callable[[Tensor], Tensor]


def main() -> None:
    """Print one row for each process and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="T; default 1024")
    parser.add_argument("--vocab", type=int, default=50258, help="V; default 50258")
    parser.add_argument("--runs", type=int, default=7, help="repetitions after the first, which is dropped; default 7")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small sizes and 3 repetitions: a smoke test")
    options = parser.parse_args()
    tokens, vocab, runs = (512, 2000, 3) if options.quick else (options.tokens, options.vocab, options.runs)
    torch.set_num_threads(options.threads)
    for dtype in (torch.float32, torch.bfloat16):
        for process, published in ((MaskedDiffusion(vocab), mdlm), (UniformDiffusion(vocab), duo)):
            print(measured(process, published, tokens, dtype, options.device, runs), flush=True)
    print(machine(options.device))


def measured(
    process: Process, published: Callable[..., Tensor], tokens: int, dtype: torch.dtype, device: str, runs: int
) -> str:
    """Return the row of one process and dtype."""
    generator = torch.Generator().manual_seed(0)
    size, rows = process.vocab_size, 8
    logits = torch.randn(rows, tokens // rows, size, generator=generator).to(device, dtype)
    x0 = torch.randint(size - 1, logits.shape[:2], generator=generator)  # the mask, if any, is the last
    t = torch.linspace(0.05, 0.95, rows)
    x_t = process.corrupt(x0, t, generator=generator).x_t
    x0, x_t, t = (x.to(device) for x in (x0, x_t, t))

    def backward(loss: Loss, leaf: Tensor) -> Callable[[], None]:
        def run() -> None:
            leaf.grad = None
            loss(leaf).mean().backward()

        return run

    leaf = logits.requires_grad_()
    forms = {
        "ours": backward(lambda x: process.nelbo(x, x0, x_t, t), leaf),
        "published": backward(lambda x: published(process, x, x0, x_t, t), leaf),
    }
    took = interleaved(forms, runs, device)
    ours, theirs = (beyond(forms[name], [leaf]) / (4 * logits.numel()) for name in ("ours", "published"))
    what = f"{type(process).__name__} fwd+bwd, T={tokens} V={size} {str(dtype).removeprefix('torch.'):8s}"
    return row(what, took, "ours", {"published": "published form"}) + f"   workspace {ours:.2f}, published {theirs:.2f}"


def mdlm(process: Process, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return MDLM's NELBO as its authors write it: SUBS over all logits, then a gather."""
    logits = logits.float()
    closed = logits - 1e6 * (torch.arange(process.vocab_size, device=logits.device) == process.mask_id)
    log_p = closed - torch.logsumexp(closed, dim=-1, keepdim=True)
    nll = -log_p.gather(-1, x0[..., None])[..., 0]
    return torch.where(x_t == process.mask_id, nll / t[:, None], 0.0)


def duo(process: Process, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return DUO's NELBO as its authors write it: logarithms of sums over all logits."""
    size, alpha = process.vocab_size, process.schedule.alpha(t)[:, None]
    level = size * alpha[..., None] * torch.log_softmax(logits.float(), dim=-1).exp() + 1 - alpha[..., None]
    same = (x0 == x_t).float()
    at_noisy, at_clean = (level.gather(-1, ids[..., None])[..., 0] for ids in (x_t, x0))
    share = (1 - alpha) / (size * alpha + 1 - alpha)
    first = size * (1 / (1 - alpha + size * alpha * same) - 1 / at_noisy)
    second = (
        -(same * share + 1 - same) * (level.log().sum(-1) - size * at_noisy.log())
        - (1 - same) * size * alpha / (1 - alpha) * (at_clean.log() - at_noisy.log())
        + ((size - 1) * share * same - (1 - same) / share) * share.log()
    )
    return process.schedule.dalpha(t)[:, None] / (size * alpha) * (first - second)


if __name__ == "__main__":
    main()
