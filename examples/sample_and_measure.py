"""The samplers and the measurements on their own: what sampling steps and temperature buy, and what they cost.

A small uniform-state model learns Python's language reference, character by character, for a few seconds; then it is
sampled at 4 and 16 function evaluations. Gen.-PPL is read beside the entropy of the samples and beside real text, never
alone: the row with a lower temperature has a lower Gen.-PPL and is the same model.

The judge is any callable from ids to logits; here it counts character triples in text that the model never saw. In
earnest it is a causal language model of transformers, by name: ``generative_perplexity(texts, "gpt2-large")``.
"""

from __future__ import annotations

import pydoc_data.topics

import torch
from torch import Tensor

from tokendrift.diffusion import UniformDiffusion
from tokendrift.evaluation import generative_perplexity, sample_entropy
from tokendrift.models import DiT, DiTConfig
from tokendrift.sampling import sample

VOCAB, LENGTH, BATCH, STEPS, SAMPLES = 95, 32, 16, 100, 128

torch.set_num_threads(1)  # at this size, threads would only wait for one another
torch.manual_seed(0)
text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
ids = torch.tensor([ord(c) - 32 for c in text if 32 <= ord(c) < 127])
half = len(ids) // 2 // LENGTH * LENGTH
model_text, held_out, judge_text = ids[:half].view(-1, LENGTH), ids[half : half + 20_000], ids[half + 20_000 :]


class TripleCounts:
    """A judge: logits of the next character from how often it followed the last two in its own text."""

    def __init__(self, ids: Tensor) -> None:
        triples = (ids[:-2] * VOCAB + ids[1:-1]) * VOCAB + ids[2:]
        counts = torch.bincount(triples, minlength=VOCAB**3).view(VOCAB, VOCAB, VOCAB).float()
        share = (counts.sum(dim=(0, 1)) + 1) / (counts.sum() + VOCAB)
        self.table = (counts + 2 * share).log()  # what was never seen falls back on single characters

    def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)
        return self.table[before, ids]


judge = TripleCounts(judge_text)
process = UniformDiffusion(VOCAB)
model = DiT(
    DiTConfig(
        vocab_size=VOCAB,
        model_length=LENGTH,
        hidden_dim=64,
        cond_dim=32,
        n_blocks=2,
        n_heads=4,
        dropout=0.0,
        time_conditioning=True,
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(STEPS):
    x0 = model_text[torch.randint(len(model_text), (BATCH,))]
    noisy = process.corrupt(x0)
    loss = process.nelbo(model(noisy.x_t, noisy.sigma), x0, noisy.x_t, noisy.t).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()


def row(name: str, ids: Tensor) -> tuple[float, float]:
    """Print and return Gen.-PPL and mean sample entropy in nats."""
    perplexity = generative_perplexity(ids, judge, protocol="all").perplexity
    entropy = float(sample_entropy(ids).mean())
    text = "".join(chr(32 + token) for token in ids[7].tolist())
    print(f"{name:22s}  {perplexity:8.1f}  {entropy:8.2f}   {text}")
    return perplexity, entropy


print(f"{'':22s}  Gen.-PPL   entropy   one sample")
results = {}
for steps, temperature in ((4, 1.0), (4, 0.7), (16, 1.0)):
    drawn = sample(
        model,
        process,
        (SAMPLES, LENGTH),
        steps=steps,
        temperature=temperature,
        seed=1,
    )
    assert drawn.nfe == steps, "what was promised and what was spent differ"
    results[steps, temperature] = row(f"{drawn.nfe} NFE, temperature {temperature}", drawn.ids)
real = row("real text", held_out[: len(held_out) // LENGTH * LENGTH].view(-1, LENGTH)[:SAMPLES])

assert results[4, 0.7][0] < results[4, 1.0][0], "a lower temperature lowers Gen.-PPL"
assert results[4, 0.7][1] < results[4, 1.0][1], "and entropy with it"
assert real[0] < results[16, 1.0][0], "real text is best under a fair judge"
print("ok")
