"""What the cards of judge and denoiser say of each other: the same training data, or one made from the other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def card_entries(folder: str, key: str) -> set[str]:
    """Return the values of a key in the front matter of ``README.md``; none where there is no such file or key.

    Args:
        folder: Folder of the model. A hub name has no card here.
        key: ``"datasets"`` or ``"base_model"``: one value, ``[a, b]``, or a list of lines ``- a``.
    """
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(rf"^{key}:(.*(?:\n *- .*)*)", front[1], re.MULTILINE) if front else None
    return {value.strip(" -'\"") for value in re.split(r"[\n,\[\]]", found[1])} - {""} if found else set()


def judge_notes(judges: Iterable[str], checkpoints: Iterable[tuple[str, str]]) -> list[str]:
    """Return a sentence for each judge that is no stranger to a denoiser, as far as their cards tell.

    Args:
        judges: Names or folders of the judges.
        checkpoints: Name and folder of each denoiser.
    """
    notes = []
    pairs = [(judge, name, folder) for judge in judges for name, folder in checkpoints]
    for judge, name, folder in pairs:
        if shared := card_entries(judge, "datasets") & card_entries(folder, "datasets"):
            data = " and ".join(sorted(shared))
            notes.append(f"{name}: warning: the judge {judge} was trained on {data} as well, and flatters such text.")
        if {judge, *card_entries(judge, "base_model")} & {folder, *card_entries(folder, "base_model")}:
            notes.append(f"{name}: warning: it was made from the judge {judge}, or both from one model.")
    return notes
