"""The text that needs no download: what counts as prose, which split it goes to, and what is refused."""

from pydoc_data import topics

import pytest

from tokendrift import TokenDriftError, corpus
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


def words(documents):
    return {name: sum(len(text.split()) for text in part) for name, part in split(documents)._asdict().items()}


@pytest.mark.slow
def test_python_carries_enough_english():
    found = words(python_documents())
    assert found["denoiser"] > 80_000 and found["judge"] > 50_000 and found["held_out"] > 10_000


def test_the_language_reference_alone_is_enough_to_split():
    assert all(count > 2_000 for count in words(topics.topics.values()).values())


def test_the_text_of_python_is_its_topics_and_the_docstrings_of_its_library(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "test").mkdir()
    for name in ("module.py", "package/other.py", "test/skipped.py"):
        (tmp_path / name).write_text(f'"The text of {name}."\n', encoding="utf-8")
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    found = python_documents.__wrapped__()
    assert found == (*topics.topics.values(), "The text of module.py.", "The text of package/other.py.")


def test_too_little_text_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(TokenDriftError, match=r"words of prose, but 20,000 are needed"):
        split(sentences(3))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TokenDriftError, match="is not UTF-8 text"):
        list(file_documents([tmp_path / "latin.txt"]))


def test_files_take_the_place_of_the_text_of_python(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(sentences(3000)), encoding="utf-8")
    assert sum(map(len, read_splits([tmp_path / "book.txt"]))) == 3000
