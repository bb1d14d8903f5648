"""The gradient moment: how far the mean gradient of a judge's loss on generated text is from that on real text.

A judge that knows real text has nearly no mean gradient on it. Text of another law would teach the judge something, and
the gradient shows it even where its likelihood is that of real text, as for one sample repeated. The figure is blind to
what the judge itself has generated: the mean gradient of a model on its own samples is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokendrift._checks import check_count, fail
from tokendrift.errors import TokenDriftError
from tokendrift.evaluation.generative_perplexity import GenerativePerplexity
from tokendrift.evaluation.samples import SampleInput
from tokendrift.evaluation.two_sample import KernelDistance, kernel_distance
from tokendrift.modes import evaluation_mode

WIDTH = 16381  # a prime, so that the entries of a column of a weight do not meet in few of the sums


def gradient_moment(
    generated: SampleInput,
    real: SampleInput,
    judge: GenerativePerplexity,
    *,
    width: int = WIDTH,
    seed: int = 0,
    **options: Any,
) -> KernelDistance:
    r"""Return the gradient moment between generated and real text, with its interval and a permutation test.

    .. math:: \Bigl\lVert \mathbb E_{x\sim\text{generated}}[\nabla_\theta L(x)]
        - \mathbb E_{y\sim\text{real}}[\nabla_\theta L(y)] \Bigr\rVert^2

    L is the judge's mean NLL per token of a sample, nats, and :math:`\theta` all its parameters that have a gradient.
    The estimate is without bias: it leaves out the product of a sample's gradient with itself, see `kernel_distance`
    with ``kernel="linear"``. It is the mean of the products of two halves, over all ways to halve both sets.

    Args:
        generated: Texts, or ids of the judge's vocabulary; at least 2 samples.
        real: Real text of the same lengths; at least 2 samples.
        judge: An evaluator whose judge has parameters.
        width: As for `gradient_features`. Default: 16381.
        seed: Random seed of the signs, the permutations and the redraws. Default: 0.
        options: Further options of `kernel_distance`, such as ``permutations``.

    Raises:
        TokenDriftError: As `gradient_features`, or if a set has fewer than 2 samples.

    Source: Hoogeboom et al., Beyond Single Tokens (arXiv 2603.20155), section 5.
    """
    features = (gradient_features(samples, judge, width=width, seed=seed) for samples in (generated, real))
    return kernel_distance(*features, kernel="linear", seed=seed, **options)


def gradient_features(
    samples: SampleInput,
    judge: GenerativePerplexity,
    *,
    width: int = WIDTH,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    r"""Return the gradient of each sample's loss in the parameters of the judge, as (n, M) on the CPU.

    The loss is the mean NLL of the tokens that the protocol counts. A gradient of more than ``width`` entries is
    projected: every entry gets a random sign, and the entries whose indices agree modulo ``width`` are added. Products
    of two projected gradients equal those of the gradients in expectation over the signs, and the squared distance of
    two means of gradients has a relative standard deviation of about :math:`\sqrt{2/M}`, 1 % by default.

    Each window of a sample takes one forward and one backward pass. Memory is needed for one gradient, one byte for
    each parameter, and the result, however many samples there are.

    Args:
        samples: Texts, or ids of the judge's vocabulary.
        judge: An evaluator whose judge has parameters. What it has accumulated does not change.
        width: Most features of a sample; at least the number of parameters for exact products. Default: 16381.
        seed: Random seed of the signs. Only features of one seed and width compare. Default: 0.
        progress: Called with the number of windows after each of them. Default: None.

    Returns:
        float32, or float64 for a judge of that precision; M is ``width`` or the number of parameters, if that is less.

    Raises:
        TokenDriftError: If the judge has no parameters that have a gradient, or a sample cannot be scored.

    >>> class Unigrams(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.logits = nn.Parameter(torch.zeros(4))
    ...     def forward(self, ids, attention_mask):
    ...         return self.logits.expand(*ids.shape, 4)
    >>> features = gradient_features([[0, 1, 1]], GenerativePerplexity(Unigrams(), protocol="all"))
    >>> features @ features.T  # the gradient is 1/4 - 1 for token 1, and 1/4 for the others
    tensor([[0.7500]])
    """
    weights = differentiable_parameters(judge)
    width = min(check_count("width", width, least=1), sum(weight.numel() for weight in weights))
    generator = torch.Generator().manual_seed(seed)
    signs = [
        torch.randint(2, weight.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1).to(weight.device)
        for weight in weights
    ]
    rows: list[Tensor] = []
    tokens: list[int] = []
    with evaluation_mode(judge.judge.model), torch.enable_grad():
        for owner, nll, count in judge.sample_losses(samples):
            if not nll.requires_grad:
                raise _no_gradient(judge)
            gradients = torch.autograd.grad(nll, weights, allow_unused=True)
            row = folded(gradients, signs, width).cpu()
            # The windows of a long sample follow each other, and the projection is linear.
            if owner == len(rows):
                rows.append(row)
                tokens.append(count)
            else:
                rows[owner] += row
                tokens[owner] += count
            if progress is not None:
                progress(1)
    return torch.stack([row / max(count, 1) for row, count in zip(rows, tokens, strict=True)])


def differentiable_parameters(judge: GenerativePerplexity) -> list[nn.Parameter]:
    """Return the parameters of a judge that have a gradient.

    Raises:
        TokenDriftError: If there are none.
    """
    model = judge.judge.model
    found = [weight for weight in model.parameters() if weight.requires_grad] if isinstance(model, nn.Module) else []
    if not found:
        raise _no_gradient(judge)
    return found


def folded(gradients: Sequence[Tensor | None], signs: Sequence[Tensor], width: int) -> Tensor:
    """Return the sums (width,) of all entries, each times its sign, whose running indices agree modulo the width.

    Args:
        gradients: Tensors of any shapes; None stands for zeros.
        signs: Tensors int8 of the same shapes, 1 and -1.
        width: Number of sums.

    >>> folded([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.tensor([1, -1]), torch.tensor([1])], 2)
    tensor([ 4., -2.])
    """
    start, sums = 0, torch.zeros(width, device=signs[0].device)
    for gradient, sign in zip(gradients, signs, strict=True):
        end = start + sign.numel()
        if gradient is not None:
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            padded = nn.functional.pad((wide * sign).flatten(), (start % width, -end % width))
            sums = sums + padded.view(-1, width).sum(dim=0)
        start = end
    return sums


def _no_gradient(judge: GenerativePerplexity) -> TokenDriftError:
    return fail(
        "the gradient moment needs a judge with parameters that have a gradient.",
        "Use a causal language model of transformers or another nn.Module; call its requires_grad_() if it is frozen.",
        judge=judge.judge.model,
    )
