"""Measure a base over the number of function evaluations, by pretrained judges.

python examples/study/curve.py BASES masked --judges JUDGES/smol JUDGES/gemma --out curve.json

BASES/masked is a folder that `bases.py` wrote; a judge is a folder with a causal language model and its tokenizer, as
transformers saves them. Each row is written as soon as it is known, and a row that the file already has is not measured
again; with ``--table`` the whole file is written as a Markdown table too. Sampling and judging run in float32.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bases import LENGTH, encode
from corpora import held_out_chapters
from tokenizers import Tokenizer
from torch import Tensor

from tokendrift.models import load_denoiser
from tokendrift.sampling import SamplingSetting, denoiser_samples
from tokendrift.training import windows

PLAIN = tuple((nfe, 1.0) for nfe in (64, 4, 128, 16, 8, 32, 256))
COOLED = ((4, 0.9), (4, 0.8), (64, 0.9), (64, 0.8))


@dataclass
class Judge:
    """A pretrained causal language model.

    Attributes:
        name: Name of its folder.
        model: The network.
        tokenizer: Its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Read a judge in float32."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(folder.name, model.eval(), AutoTokenizer.from_pretrained(folder))

    @torch.inference_mode()
    def score(self, texts: Sequence[str], rows: int = 16) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihood of each text in nats, float64 (n,), and its tokens, int64 (n,).

        The first token is scored after the token that begins a text.
        """
        begin = self.tokenizer.bos_token_id
        begin = self.tokenizer.eos_token_id if begin is None else begin
        ids = [[begin, *self.tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
        nats = torch.zeros(len(ids), dtype=torch.float64)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
        for chosen in (order[start : start + rows] for start in range(0, len(order), rows)):
            width = max(len(ids[i]) for i in chosen)
            batch = torch.tensor([ids[i] + [begin] * (width - len(ids[i])) for i in chosen])
            length = torch.tensor([len(ids[i]) for i in chosen])
            real = torch.arange(width) < length[:, None]
            hidden = self.model.model(input_ids=batch, attention_mask=real.long()).last_hidden_state
            for i, states, row, n in zip(chosen, hidden, batch, length.tolist(), strict=True):
                # Row by row, since the logits of a whole batch over a large vocabulary would take gigabytes.
                nats[i] = F.cross_entropy(self.model.lm_head(states[: n - 1]), row[1:n], reduction="sum")
        return nats, torch.tensor([len(row) - 1 for row in ids])


def entropy(ids: Tensor) -> float:
    """Return the entropy of the ids' frequencies in nats."""
    share = torch.bincount(ids.flatten()).double() / ids.numel()
    return torch.special.entr(share).sum().item()


def measured(ids: Tensor, tokenizer: Tokenizer, judges: Sequence[Judge]) -> dict[str, float]:
    """Return what there is to say of sequences of ids (n, L).

    Returns:
        ``entropy`` is the mean over sequences of their unigram entropy and ``unigram_entropy`` that of all together, in
        nats. Of each judge: bits per byte of UTF-8 text with one standard error over texts, and the perplexity per
        token of the judge.
    """
    texts = [tokenizer.decode(row) for row in ids.tolist()]
    size = torch.tensor([len(text.encode()) for text in texts], dtype=torch.float64)
    row = {
        "samples": len(ids),
        "entropy": sum(map(entropy, ids)) / len(ids),
        "unigram_entropy": entropy(ids),
        "bytes": size.mean().item(),
    }
    for judge in judges:
        nats, tokens = judge.score(texts)
        bits = nats / math.log(2)
        bpb = bits.sum() / size.sum()
        error = (bits - bpb * size).std() / size.mean() / len(ids) ** 0.5  # of a ratio of means
        row[f"{judge.name} bpb"], row[f"{judge.name} bpb error"] = bpb.item(), error.item()
        row[f"{judge.name} perplexity"] = math.exp(nats.sum() / tokens.sum())
    return {name: round(value, 4) for name, value in row.items()}


def held_out(tokenizer: Tokenizer, count: int) -> Tensor:
    """Return windows of text that no base was trained on, (count, L)."""
    return next(windows(encode(held_out_chapters(), tokenizer), LENGTH, count, seed=0))


def curve(folder: Path, judges: Sequence[Judge], settings: Sequence[tuple[int, float]], count: int, out: Path) -> None:
    """Measure real text and samples of a base at each (NFE, temperature), and add the rows to a JSON file."""
    rows = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    known = {(row["text"], row.get("nfe"), row.get("temperature")) for row in rows}
    model, process = load_denoiser(folder)
    model.float().eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    draw = denoiser_samples(model, process, LENGTH, batch_size=64, seed=0)

    def add(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        rows.append(row)
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    if ("real", None, None) not in known:
        add({"text": "real", **measured(held_out(tokenizer, count), tokenizer, judges)})
    for nfe, temperature in settings:
        if (folder.name, nfe, temperature) not in known:
            ids = torch.tensor(
                [list(map(int, row)) for row in draw(SamplingSetting(nfe, temperature), count).ids or []]
            )
            row = {"text": folder.name, "nfe": nfe, "temperature": temperature}
            add({**row, **measured(ids, tokenizer, judges)})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: real text first, then each base by temperature and NFE.

    What a judge has not seen stays empty.
    """
    real = next(row for row in rows if row["text"] == "real")
    judges = [name.removesuffix(" bpb") for name in real if name.endswith(" bpb")]
    heads = ["text", "NFE", "T", "H", "U", "samples"]
    for judge in judges:
        heads += [f"{judge} bpb", "over real", f"{judge} PPL"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]

    def place(row: dict[str, Any]) -> tuple[bool, str, float, int]:
        return row["text"] != "real", row["text"], -row.get("temperature", 1.0), row.get("nfe", 0)

    for row in sorted(rows, key=place):
        cells = [row["text"], str(row.get("nfe", "")), str(row.get("temperature", ""))]
        cells += [f"{row['entropy']:.3f}", f"{row['unigram_entropy']:.3f}", str(row["samples"])]
        for judge in judges:
            bpb = row.get(f"{judge} bpb")
            if bpb is None:
                cells += [""] * 3
                continue
            cells.append(f"{bpb:.3f} ± {row[f'{judge} bpb error']:.3f}")
            cells.append("" if row is real else f"{bpb / real[f'{judge} bpb']:.2f}")
            cells.append(f"{row[f'{judge} perplexity']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bases", type=Path, help="Folder of the bases.")
    parser.add_argument("kind", choices=("masked", "uniform"), help="Which base to measure.")
    parser.add_argument("--judges", type=Path, nargs="+", required=True, help="Folders of the judges.")
    parser.add_argument("--samples", type=int, default=256, help="Sequences a row. Default: 256.")
    parser.add_argument("--nfe", type=int, nargs="*", help="Function evaluations; temperature 1 alone. Default: all.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows are added to it.")
    parser.add_argument("--table", type=Path, help="Markdown file for all rows of the JSON file.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    places = tuple((nfe, 1.0) for nfe in options.nfe) if options.nfe else PLAIN + COOLED
    curve(options.bases / options.kind, list(map(Judge.load, options.judges)), places, options.samples, options.out)
    if options.table:
        options.table.write_text(table(json.loads(options.out.read_text(encoding="utf-8"))), encoding="utf-8")
