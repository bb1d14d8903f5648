"""Time and memory of the drift of token pairs against the drift of features, as ratios of one run.

    python benchmarks/pairs.py                                  # 1 x 1024 tokens, V=50258, D=768, 12 blocks
    python benchmarks/pairs.py --batch 8 --device cuda
    python benchmarks/pairs.py --quick                          # small sizes: only shows that it runs

Both losses get the same logits, of a masked model at mixed noise levels, and each repetition takes the loss and its
gradient with respect to them, in turning order. Beside the loss of pairs that a vocabulary of this size has by default
there are rows for other numbers of buckets, for two lags and for n-grams of three tokens. The frozen encoder of
`TokenDriftLoss` has the given width and depth. Memory is counted, not timed: the peak bytes of a loss and its backward
pass, the gradient of the logits included, also as a multiple of float32 logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from lift import interleaved, machine, row
from live_bytes import LiveBytes

from tokendrift import PairDriftLoss, TokenDriftLoss
from tokendrift.diffusion import MaskedDiffusion
from tokendrift.models import DiT, DiTConfig

QUEUE = 1024
FORMS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "pairs, 16384 buckets": {"buckets": 16384},
    "pairs, 4096 buckets": {"buckets": 4096},
    "pairs, 2 lags": {"lags": (1, 2)},
    "triples": {"order": 3},
}


def main() -> None:
    """Print a row for each form of the loss of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="sequences; default 1")
    parser.add_argument("--length", type=int, default=1024, help="L; default 1024")
    parser.add_argument("--vocab", type=int, default=50258, help="V; default 50258")
    parser.add_argument("--width", type=int, default=768, help="D of the encoder; default 768")
    parser.add_argument("--blocks", type=int, default=12, help="of the encoder; default 12")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the logits")
    parser.add_argument("--runs", type=int, default=5, help="repetitions after the first, which is dropped; default 5")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small sizes and 3 repetitions: a smoke test")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.length, options.vocab, options.width, options.blocks = 2, 32, 5000, 32, 2
        options.runs = 3
    torch.set_num_threads(options.threads)
    print(*measured(options), sep="\n")
    print(machine(options.device))


def measured(options: argparse.Namespace) -> list[str]:
    """Return the rows."""
    torch.manual_seed(0)
    process, device = MaskedDiffusion(options.vocab), torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    logits = (3 * torch.randn(options.batch, options.length, options.vocab)).to(device, dtype).requires_grad_()
    clean = torch.randint(options.vocab - 1, (options.batch, options.length), device=device)
    noisy = process.corrupt(clean, torch.full((options.batch,), 0.5, device=device)).x_t

    # The encoder pools the features of all sequences once: its queues are full from the start.
    sizes = {"hidden_dim": options.width, "n_blocks": options.blocks, "n_heads": max(1, options.width // 64)}
    config = DiTConfig(options.vocab, options.length, dropout=0.0, time_conditioning=False, **sizes)
    drift = TokenDriftLoss.from_encoder(DiT(config).to(device), queue_size=QUEUE, mask_id=process.mask_id).to(device)
    filling = torch.randn(2, QUEUE, 2 * options.width, device=device)
    drift.queue_real.push(torch.nn.functional.normalize(filling[0], dim=-1))
    drift.queue_generated.push(torch.nn.functional.normalize(filling[1], dim=-1))

    def step(loss: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            logits.grad = None
            loss(logits, clean, noisy_ids=noisy).backward()

        return run

    chosen = {name: FORMS[name] for name in options.forms}
    losses = {name: PairDriftLoss(options.vocab, mask_id=process.mask_id, **form) for name, form in chosen.items()}
    steps = {"drift": step(drift)} | {name: step(loss.to(device)) for name, loss in losses.items()}
    took = interleaved(steps, options.runs, options.device)
    peak = {name: counted(run) for name, run in steps.items()}
    size = f"{options.batch}x{options.length} V={options.vocab} D={options.width} {options.blocks} blocks"
    return [
        row(f"{name} fwd+bwd, {size} {options.dtype}", took, name, {"drift": "drift of features"})
        + f"   peak {peak[name] / peak['drift']:.2f}x drift of features, {peak[name] / 4 / logits.numel():.2f}x logits"
        for name in losses
    ]


def counted(run: Callable[[], None]) -> int:
    """Return the peak bytes of a loss and its gradient."""
    with LiveBytes() as live:
        run()
    return live.peak


if __name__ == "__main__":
    main()
