"""Time of Gen.-PPL against plain loops, as ratios of one run, with the deviation of the result beside them.

1,000 samples of up to 128 tokens under a judge of about a million parameters, in float32. Every repetition times all
forms one after the other, in an order that turns, and a ratio is taken within a repetition. Shown are the medians and
the range: above 1, ours is faster. The baselines:

* ``evaluate`` style, as the perplexity measurement of the package ``evaluate`` and the evaluators of discrete diffusion
  do it: all samples padded to the longest, batches of 16 in the order given, all logits copied for the shift, their
  cross-entropy over the transposed logits, the key-value cache on.
* ``one by one``: the plainest loop, a forward for each sample, a full log-softmax.

The last ratio is that of the same call with the judge's weights in bfloat16, which a result records, to the first
baseline in float32; it pays on CPUs and GPUs that multiply bfloat16.

    python benchmarks/generative_perplexity.py             # three laws of length, float32
    python benchmarks/generative_perplexity.py --threads 8
    python benchmarks/generative_perplexity.py --quick     # few samples: only shows that it runs

Lengths: ``equal`` 128 tokens each, ``uniform`` 8 to 128, ``long tail`` log-normal with median 24 and at most 128, as
texts that end by themselves have. With equal lengths there is no padding to save and the judge's own products are all.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from lift import interleaved, machine
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tokendrift.evaluation import generative_perplexity

VOCABULARY, LONGEST, BATCH = 1024, 128, 16
Form = Callable[[], float]


def main() -> None:
    """Print one row for each law of length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="n; default 1000")
    parser.add_argument("--runs", type=int, default=5, help="repetitions after the first, which is dropped; default 5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="40 samples and 3 repetitions: a smoke test")
    options = parser.parse_args()
    count, runs = (40, 3) if options.quick else (options.samples, options.runs)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LONGEST, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    judge = GPT2LMHeadModel(sizes).eval().to(options.device)
    for name, lengths in laws(count).items():
        print(row(name, lengths, judge, options.device, runs), flush=True)
    parameters = sum(parameter.numel() for parameter in judge.parameters())
    print(f"judge of {parameters:,} parameters; {machine(options.device)}")


def laws(count: int) -> dict[str, list[int]]:
    """Return lengths of samples by name."""
    generator = torch.Generator().manual_seed(0)
    tail = (torch.randn(count, generator=generator) * 0.7).exp() * 24
    return {
        "equal": [LONGEST] * count,
        "uniform": torch.randint(8, LONGEST + 1, (count,), generator=generator).tolist(),
        "long tail": tail.round().clamp(8, LONGEST).int().tolist(),
    }


def row(name: str, lengths: list[int], judge: nn.Module, device: str, runs: int) -> str:
    """Return the ratios for one law of length."""
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
    narrow = copy.deepcopy(judge).bfloat16()
    forms: dict[str, Form] = {
        "ours": lambda: generative_perplexity(samples, judge, protocol="all").perplexity,
        "bfloat16": lambda: generative_perplexity(samples, narrow, protocol="all").perplexity,
        "evaluate": lambda: in_evaluate_style(samples, judge, device),
        "single": lambda: one_by_one(samples, judge, device),
    }
    values = {key: form() for key, form in forms.items()}
    off = max(abs(values[key] / values["ours"] - 1) for key in ("evaluate", "single"))
    rough = abs(values["bfloat16"] / values["ours"] - 1)
    took = interleaved(forms, runs, device)
    cells = [
        ratio(took, "ours", "evaluate", "evaluate style, batch 16"),
        ratio(took, "ours", "single", "one by one"),
        ratio(took, "bfloat16", "evaluate", "evaluate style in float32, by bfloat16"),
    ]
    seconds = statistics.median(took["ours"])
    padding = len(lengths) * max(lengths) / sum(lengths)
    return (
        f"Gen.-PPL, n={len(lengths)}, {name:9s}   {'   '.join(cells)}   {runs} runs   {seconds:.2f} s   "
        f"padded/own tokens {padding:.2f}   deviation {off:.0e}, bfloat16 {rough:.0e}"
    )


def in_evaluate_style(samples: list[Tensor], judge: nn.Module, device: str) -> float:
    """Return corpus perplexity the usual way: pad to the longest of all, batches of 16, transposed cross-entropy."""
    ids = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(sample) for sample in samples])[:, None]
    loss = nn.CrossEntropyLoss(reduction="none")
    total, count = 0.0, 0.0
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH].to(device)
        seen = mask[start : start + BATCH].long().to(device)
        with torch.no_grad():
            logits = judge(batch, attention_mask=seen).logits
        shifted = logits[..., :-1, :].contiguous()
        nll = loss(shifted.transpose(1, 2), batch[..., 1:].contiguous()) * seen[..., 1:]
        total += nll.sum().item()
        count += seen[..., 1:].sum().item()
    return float(torch.tensor(total / count).exp())


def one_by_one(samples: list[Tensor], judge: nn.Module, device: str) -> float:
    """Return corpus perplexity with a forward for each sample."""
    total, count = 0.0, 0
    for sample in samples:
        ids = sample[None].to(device)
        with torch.no_grad():
            log_p = judge(ids).logits[:, :-1].log_softmax(dim=-1)
        total -= log_p.gather(-1, ids[:, 1:, None]).sum().item()
        count += len(sample) - 1
    return float(torch.tensor(total / count).exp())


def ratio(took: dict[str, list[float]], name: str, baseline: str, label: str) -> str:
    """Return how many times faster a form is than a baseline: median and range over the repetitions."""
    ratios = [theirs / ours for ours, theirs in zip(took[name], took[baseline], strict=True)]
    return f"{statistics.median(ratios):.2f}x {label} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    main()
