"""The text that needs no download: what counts as prose, which split it goes to, and what is refused."""

import pytest

from tokendrift import TokenDriftError
from tokendrift.corpus import docstrings, file_documents, prose, python_documents, read_splits, split

WORDS = "the model reads a long sentence and writes another one about fields"


def sentences(count: int, start: int = 0) -> list[str]:
    return [f"Sentence {'abcdefghij'[i % 10] * (1 + i // 10)} says that " + WORDS for i in range(start, start + count)]


def test_prose_keeps_sentences_and_drops_code_and_tables():
    document = (
        "A plain paragraph\nof several words here.\n\n>>> print(1)\n1\n\na | b | c | d | e\n\nx = {1: 2, 3: [4]}; y"
    )
    assert list(prose(document)) == ["A plain paragraph of several words here."]


def test_docstrings_are_read_without_running_the_file(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""Module text."""\nraise SystemExit\ndef f():\n    "Function text."\n')
    assert list(docstrings(path)) == ["Module text.", "Function text."]
    path.write_text("def broken(:\n")
    assert list(docstrings(path)) == []


def test_a_document_is_in_one_split_only_and_stays_there():
    documents = sentences(3000)
    first, reordered = split(documents), split(reversed(documents))
    parts = [set(part) for part in first]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == 3000
    assert [set(part) for part in reordered] == parts


def test_repeated_paragraphs_count_once():
    documents = sentences(3000)
    assert sum(map(len, split([*documents, *documents]))) == 3000


def test_python_carries_enough_english():
    parts = split(python_documents())
    words = {name: sum(len(text.split()) for text in part) for name, part in parts._asdict().items()}
    assert words["denoiser"] > 80_000 and words["judge"] > 50_000 and words["held_out"] > 10_000


def test_too_little_text_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(TokenDriftError, match=r"words of prose, but 20,000 are needed"):
        split(sentences(3))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TokenDriftError, match="is not UTF-8 text"):
        list(file_documents([tmp_path / "latin.txt"]))


def test_files_take_the_place_of_the_text_of_python(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(sentences(3000)), encoding="utf-8")
    assert sum(map(len, read_splits([tmp_path / "book.txt"]))) == 3000
