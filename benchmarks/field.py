"""Time and memory of one field evaluation against the dense form in plain PyTorch, as ratios of one run.

The dense form is what one writes down first: `torch.cdist`, a softmax over the whole matrix, products with the
weights. Each repetition times both, in turning order, and takes their ratio: what slows the machine for a while slows
both sides. Shown are median and range of the ratios and the median time of one evaluation. The workspace is counted,
not timed: peak bytes beyond the references and the result, of the field and of the dense form, the latter without the
copies of the references that `torch.cdist` makes inside.

    python benchmarks/field.py                                  # 8 anchors, 2,048 references, width 1536
    python benchmarks/field.py --references 1000000 --runs 3 --forms 1     # the references alone are 5.7 GiB
    python benchmarks/field.py --quick                          # a small size: only shows that it runs

References are half positives, half negatives, the anchors among these and excluded from their own; unit vectors about a
common direction, as pooled features are.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from lift import interleaved, machine, row
from live_bytes import LiveBytes
from torch import Tensor

from tokendrift import DriftField

FORMS = [("gaussian", "joint"), ("gaussian", "separate"), ("gaussian", "two_sided"), ("laplace", "joint")]


def main() -> None:
    """Print one row for each form of the field."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=int, default=8, help="N; default 8")
    parser.add_argument("--references", type=int, default=2048, help="P + Q; default 2048")
    parser.add_argument("--width", type=int, default=1536, help="M; default 1536")
    parser.add_argument(
        "--runs", type=int, default=21, help="repetitions after the first, which is dropped; default 21"
    )
    parser.add_argument("--forms", type=int, default=len(FORMS), help="how many of the forms; default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a small size and 3 repetitions: a smoke test")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = (4, 256, 64) if options.quick else (options.anchors, options.references, options.width)
    clouds = unit_vectors(*sizes, options.device)
    for kernel, normalization in FORMS[: options.forms]:
        print(measure(kernel, normalization, clouds, 3 if options.quick else options.runs, options.device), flush=True)
    if sys.platform == "linux":
        import resource

        resident, held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, clouds[0].nbytes / 2**30
        print(f"peak resident memory {resident:.1f} GiB with the copies of the dense form, references {held:.1f} GiB")
    print(machine(options.device))


def unit_vectors(anchors: int, references: int, width: int, device: str) -> tuple[Tensor, int]:
    """Return the references (P + Q, M) in one piece, and N: the anchors stand where the negatives begin."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(references, width, generator=generator).mul_(0.25 * width**-0.5)
    points += torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    points /= torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    return points.to(device), anchors


def measure(kernel: str, normalization: str, clouds: tuple[Tensor, int], runs: int, device: str) -> str:
    """Return the row of one form."""
    references, count = clouds
    half = len(references) // 2
    field = DriftField(kernel=kernel, normalization=normalization)

    def evaluate(points: Tensor) -> Tensor:
        negatives, own = points[half:], torch.arange(count, device=points.device)
        return field(negatives[:count], points[:half], negatives, exclude_negative=own)

    def evaluate_dense(points: Tensor) -> Tensor:
        return dense(field, points[half : half + count], points[:half], points[half:])

    gap = (evaluate(references) - evaluate_dense(references)).abs().max()
    if gap > 1e-3:
        raise SystemExit(f"the two forms differ by {gap:.2g}")
    took = interleaved(
        {"field": lambda: evaluate(references), "dense": lambda: evaluate_dense(references)}, runs, device
    )
    name = f"{kernel} {normalization}, N={count} P+Q={len(references)} M={references.shape[1]} fp32"
    return (
        row(f"field {name}", took, "field", {"dense": "cdist and softmax"})
        + f"   {1000 * statistics.median(took['field']):.1f} ms"
        + f"   workspace {beyond(evaluate, references):.1f} MiB (dense {beyond(evaluate_dense, references):.1f})"
    )


@torch.no_grad()
def dense(field: DriftField, anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Return the drift (N, M) from full matrices (N, P + Q); anchor i is negative i, which it does not see."""
    own = torch.arange(len(anchors), device=anchors.device)
    distances = torch.cat([torch.cdist(anchors, positives), torch.cdist(anchors, negatives)], dim=1)
    if field.kernel == "gaussian":
        distances = distances.square()
    distances[own, own + len(positives)] = torch.inf
    total = torch.zeros_like(anchors)
    for temperature in field.temperatures:
        logits = distances / -temperature
        if field.normalization == "separate":
            plus, minus = (side.softmax(dim=1) for side in logits.split([len(positives), len(negatives)], dim=1))
        else:
            weights = logits.softmax(dim=1)
            if field.normalization == "two_sided":
                weights = (weights * logits.softmax(dim=0)).sqrt()
            plus, minus = weights.split([len(positives), len(negatives)], dim=1)
            plus, minus = plus * minus.sum(dim=1, keepdim=True), minus * plus.sum(dim=1, keepdim=True)
        drift = plus @ positives - minus @ negatives
        total += drift / drift.square().sum(dim=-1).mean().sqrt()
    return total / len(field.temperatures)


def beyond(run: Callable[[Tensor], Tensor], points: Tensor) -> float:
    """Return the peak MiB of a run, its result not counted."""
    with LiveBytes() as count:
        result = run(points)
    return (count.peak - result.nbytes) / 2**20


if __name__ == "__main__":
    main()
