"""Check a checkpoint: weights, vocabulary, tokenizer, mask id, and the NELBO on text.

This is what the command ``tokendrift doctor`` does. Every verdict states what was measured. If something is wrong, the
diagnosis names the assumption whose change gives a better NELBO.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendrift._checks import check_count, fail
from tokendrift.devices import resolve_device
from tokendrift.diffusion import MaskedDiffusion, Process
from tokendrift.doctor import probes
from tokendrift.doctor.findings import Diagnosis, Verdict
from tokendrift.doctor.probes import Alternative, Estimate
from tokendrift.errors import TokenDriftError
from tokendrift.models import DiT, LoadedDenoiser, build, read_checkpoint
from tokendrift.models.tokenizer import GPT2_VOCABULARY, encode, end_of_text, find_tokenizer, load_tokenizer
from tokendrift.text_files import read_documents

PUBLISHED = {"masked": ("MDLM", 23.2), "uniform": ("DUO", 25.2)}  # OpenWebText, MDLM and DUO papers
DISTILLED = ("distill", "sdtt", "idlm", "didi")  # in the names of models that were distilled for few steps
NEAR = 0.10  # relative distance from the published perplexity
ENOUGH = 2000  # tokens from which the entropy of the word counts can be estimated


def diagnose(
    source: str | Path,
    *,
    text: Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    tokens: int = 16_384,
    seed: int = 0,
    device: torch.device | str = "auto",
    progress: Callable[[str], object] = lambda _: None,
) -> Diagnosis:
    """Examine a checkpoint.

    Args:
        source: Hub id, folder or file, as for `load_denoiser`.
        text: UTF-8 text file to measure the NELBO on. Default: Python's own documentation.
        tokenizer: Tokenizer: a tokenizer.json, a folder or a hub id. Default: that of the checkpoint, or that of GPT-2
            if the vocabulary has its size.
        revision: Branch, tag or commit of a hub id. Default: the main branch.
        config: Fields that replace or complete those of the configuration, as for `load_denoiser`.
        tokens: Number of tokens of text to measure the NELBO on. Default: 16384.
        seed: Random seed of the noise that the NELBO is measured with. Default: 0.
        device: Device such as cpu or cuda:0; auto takes cuda if it is available, else cpu. Default: auto.
        progress: Called with a sentence about what is being done. Default: a function that does nothing.

    Raises:
        TokenDriftError: If the checkpoint, text or tokenizer that was named cannot be read, or the device not be used.
            What is wrong with a checkpoint that can be read is a finding of the diagnosis.
    """
    # 1. Read what was named, so that mistakes show before the work begins.
    check_count("tokens", tokens, least=1)
    device = resolve_device(device, needs_float64=True)
    documents = None if text is None else read_documents(text, argument="--text")
    chosen = None if tokenizer is None else (load_tokenizer(tokenizer), str(tokenizer))
    progress("reading the checkpoint")
    checkpoint = read_checkpoint(source, revision=revision, config=config)
    facts: dict[str, Any] = {"source": str(source), "revision": checkpoint.revision, "weights": checkpoint.weights}
    report = Diagnosis(facts)

    # 2. Weights against the configuration.
    try:
        model, process = build(checkpoint, device=device)
    except TokenDriftError as error:
        report.add("weights fit the configuration", "fail", str(error))
        return report
    facts |= {"configuration": dataclasses.asdict(model.config), "process": repr(process), "device": str(device)}
    facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    report.add(
        "weights fit the configuration",
        "ok",
        f"{facts['parameters']:,} parameters, all tensors are there and have the right shapes",
    )
    if not check_weights(report, model):
        return report
    if model.config.random_input:
        report.add("random input", "ok", f"{model.config.random_input} random numbers at each masked position")

    # 3. Vocabulary and mask against the tokenizer. What came from the hub may bring its tokenizer from there.
    fetch, trusted = checkpoint.revision is not None, checkpoint.trusted
    found = chosen or find_tokenizer(checkpoint.folder, process.vocab_size, fetch=fetch, trusted=trusted)
    if found is None:
        report.add(
            "tokenizer",
            "note",
            "the folder has no tokenizer; pass one with --tokenizer to check it and to measure the NELBO",
        )
        return report
    if not check_tokenizer(report, process, *found):
        return report

    # 4. The NELBO on text.
    progress("reading text")
    windows = _windows(documents or _default_documents(), found[0], process, model.config.model_length, tokens)
    if windows is None:
        report.add("NELBO", "note", "the text is too short; pass a longer one with --text")
    else:
        nelbo = partial(probes.window_nelbo, seed=check_count("seed", seed))
        check_nelbo(report, model, process, windows.to(device), found[0], progress, nelbo)
    return report


def check_weights(report: Diagnosis, model: LoadedDenoiser) -> bool:
    """Look for weights that a trained network cannot have; return whether there are none."""
    broken = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if broken:
        report.add("weights are finite", "fail", f"NaN or infinite: {', '.join(broken)}")
    elif isinstance(model, DiT) and not model.output_layer.linear.weight.any():
        report.add("weights are trained", "fail", "the output layer is all zeros, as before the first training step")
    else:
        report.add("weights are finite", "ok", "no NaN, no infinity")
        return True
    return False


def check_tokenizer(report: Diagnosis, process: Process, tokenizer: Any, where: str) -> bool:
    """Compare vocabulary and mask id with the tokenizer; return whether text can be encoded for the model."""
    count, size = len(tokenizer), process.vocab_size
    report.checkpoint["tokenizer"] = where
    if count > size:
        report.add(
            "vocabulary",
            "fail",
            f"the tokenizer ({where}) has {count} entries, the model {size}: some ids would be out of range",
        )
        return False
    # Released models have one entry more than GPT-2: MDLM's mask, DUO's [PAD].
    verdict: Verdict = "ok" if size - count <= 1 else "note"
    unused = "" if verdict == "ok" else f": {size - count} that no text uses. Is it the tokenizer of training?"
    report.add("vocabulary", verdict, f"{size} entries, the tokenizer ({where}) {count}{unused}")
    own_mask = getattr(tokenizer, "mask_token_id", None)
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
    if process.mask_id is None:
        return True
    if own_mask is not None and own_mask != process.mask_id:
        report.add("mask id", "fail", f"the model has {process.mask_id}, the tokenizer's mask token is {own_mask}")
    elif process.mask_id < count and own_mask is None and process.mask_id not in special:
        word = tokenizer.convert_ids_to_tokens(process.mask_id)
        report.add("mask id", "fail", f"{process.mask_id} is an ordinary token of the tokenizer, {word!r}")
    else:
        report.add("mask id", "ok", f"{process.mask_id}, an entry that never occurs in text")
    return True


def check_nelbo(
    report: Diagnosis,
    model: LoadedDenoiser,
    process: Process,
    windows: Tensor,
    tokenizer: Any,
    progress: Callable[[str], object],
    nelbo: Callable[..., Tensor] = probes.window_nelbo,
) -> None:
    """Measure the NELBO on windows (n, L), by ``nelbo``, and judge it."""
    # 1. The NELBO, beside the entropy of the word counts: a network that reads context lies well below it.
    progress(f"measuring the NELBO of {len(windows)} windows of {windows.shape[1]} tokens")
    values = nelbo(model, process, windows)
    found = probes.estimate(values)
    share = torch.bincount(windows.flatten().cpu(), minlength=process.vocab_size).double() / windows.numel()
    unigram = torch.special.entr(share).sum().item()
    report.figures = {
        "nelbo": found.mean,
        "nelbo_standard_error": found.error,
        "perplexity": found.perplexity,
        "unigram_perplexity": math.exp(unigram),
        "tokens": windows.numel(),
    }
    measured = (
        f"perplexity {_figure(found)} on {windows.numel():,} tokens; {math.exp(unigram):,.0f} for word counts alone"
    )
    bound = (unigram if windows.numel() >= ENOUGH else math.log(process.vocab_size)) - 0.1
    useless = found.mean > bound
    if useless and windows.numel() < ENOUGH and found.mean - 2 * found.error <= bound:
        report.add("NELBO", "note", f"{measured}: too few tokens to tell whether it reads context. Measure on more")
        return
    # 2. The same under other assumptions, on half of the windows: with another noise level, mask or process.
    few = windows[: max(8, len(windows) // 2)]
    progress("testing other assumptions")
    alternatives = _alternatives(model, process, tokenizer, useless=useless)
    base = nelbo(model, process, few, counted=False)
    better = _best_alternative(base, few, alternatives, bound if useless else None, nelbo)
    # 3. The verdict.
    if better is not None:
        alternative, other = better
        report.figures["perplexity_otherwise"] = other.perplexity
        report.add("NELBO", "fail", measured)
        without = _figure(probes.estimate(base))
        said = f"perplexity {_figure(other)} with this, {without} without, on {len(few)} windows"
        report.add("what is wrong", "fail", f"{alternative.diagnosis} ({said})")
    elif useless:
        report.add("NELBO", "fail", measured)
        report.add("what is wrong", "fail", _useless(model, process, found, share, unigram, windows.shape[1]))
    else:
        report.add("NELBO", "ok", measured)
        _compare(report, model, process, found)


def _alternatives(model: LoadedDenoiser, process: Process, tokenizer: Any, *, useless: bool) -> Iterator[Alternative]:
    yield from probes.sigma_alternatives(model, process)
    if useless:  # with a wrong process or mask nothing works, so a network that works needs no trial of others
        masks = (getattr(tokenizer, "mask_token_id", None), probes.unpredicted_id(model), process.vocab_size - 1)
        yield from probes.process_alternatives(model, process, masks)


def _best_alternative(
    base: Tensor,
    windows: Tensor,
    alternatives: Iterator[Alternative],
    bound: float | None,
    nelbo: Callable[..., Tensor],
) -> tuple[Alternative, Estimate] | None:
    """Return the best alternative that is better beyond doubt with its NELBO, None if there is none.

    With a bound, for a network that knows no more than word counts, an alternative must know more than those. Without
    one it must be better than what works already, under the same noise.
    """
    sure = []
    for each in alternatives:
        values = nelbo(each.model, each.process, windows, counted=False if bound is None else None)
        found, gain = probes.estimate(values), probes.estimate(base - values)
        if gain.mean > max(4 * gain.error, 0.005) if bound is None else found.mean + 2 * found.error < bound:
            sure.append((each, found))
    return min(sure, key=lambda better: better[1].mean, default=None)


def _useless(
    model: LoadedDenoiser, process: Process, found: Estimate, share: Tensor, unigram: float, length: int
) -> str:
    """Explain why the network knows no more than word counts, from its predictions at pure noise."""
    learned = probes.marginal(model, process, length)
    entropy = torch.special.entr(learned).sum().item()
    cost = -(share * learned.clamp_min(1e-12).log()).sum().item()
    size = process.vocab_size
    if entropy > math.log(size) - 0.3 or abs(found.mean - math.log(size)) < 0.2:
        return (
            f"weights not loaded: perplexity {found.perplexity:,.0f} is near the vocabulary of {size:,}, as for "
            f"randomly initialised weights. Something went wrong before this file was written"
        )
    if cost > unigram + 0.7:
        return (
            f"wrong vocabulary, or weights not loaded: at pure noise the network predicts {math.exp(entropy):,.0f} "
            f"tokens, but not those of this text (perplexity {math.exp(cost):,.0f} of its word counts). Check that "
            f"this tokenizer was used in training"
        )
    return (
        "the network has learned the word counts of such text but does not use context: some weights are damaged "
        "or belong to another network, or it was trained too little"
    )


def _compare(report: Diagnosis, model: LoadedDenoiser, process: Process, found: Estimate) -> None:
    """Compare the perplexity with the published one if there is one."""
    released = model.config.vocab_size == GPT2_VOCABULARY + 1 and model.config.model_length == 1024
    if not released:
        report.add("published value", "note", "none for this vocabulary and length")
        return
    name, value = PUBLISHED["masked" if isinstance(process, MaskedDiffusion) else "uniform"]
    said = f"{name} has {value} on OpenWebText with GPT-2 tokens"
    report.figures["published_perplexity"] = value
    error = found.error if math.isfinite(found.error) else 0.0  # a single window has none
    if abs(found.perplexity - value) <= (NEAR + 2 * error) * value:
        report.add("published value", "ok", f"close: {said}")
        return
    apart = f"{said}, which can only be compared on that text"
    if any(name in report.checkpoint["source"].lower() for name in DISTILLED):
        apart += "; distilled models trade likelihood for sampling in few steps, so a higher value is expected"
    report.add("published value", "note", apart)


def _figure(found: Estimate) -> str:
    if not math.isfinite(found.perplexity) or found.perplexity > 1e6:
        return "above a million"
    digits = ".1f" if found.perplexity < 1000 else ",.0f"
    error = found.perplexity * found.error
    return f"{found.perplexity:{digits}}" + (f" +- {error:{digits}}" if math.isfinite(error) else "")


def _windows(documents: list[str], tokenizer: Any, process: Process, length: int, tokens: int) -> Tensor | None:
    """Return consecutive windows (n, L) of the encoded documents, end-of-text between them, or None if too short."""
    end = end_of_text(tokenizer)
    stream: list[int] = []
    wanted = max(tokens, length)
    for document in documents:
        # Twelve characters a token are more than any text has; what is beyond the need is not encoded.
        text = document[: 12 * wanted] + ("\n\n" if end is None else "")
        stream += encode(tokenizer, [text])[0] + ([] if end is None else [end])
        if len(stream) >= wanted:
            break
    stream = stream[:wanted]
    if max(stream, default=0) >= process.vocab_size:
        raise fail(f"the tokenizer gives id {max(stream)}, the model has {process.vocab_size} entries.")
    length = min(length, len(stream))
    if length < 16:
        return None
    count = len(stream) // length
    return torch.tensor(stream[: count * length]).view(count, length)


def _default_documents() -> list[str]:
    """Return prose of CPython's documentation that the shipped models were not trained on."""
    from tokendrift.corpus import read_splits

    return read_splits().held_out
