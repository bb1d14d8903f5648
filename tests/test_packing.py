"""Text as training sees it: every token once a pass, in an order fixed by the seed, resumable anywhere."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tokendrift import TokenDriftError
from tokendrift.demo import PRETRAINED
from tokendrift.evaluation import read_samples
from tokendrift.files import read_text
from tokendrift.text_files import read_documents
from tokendrift.training import DatasetRows, PackedText, Piece, TextFiles, text_tokenizer


class Letters:
    """A source of documents in memory; a place is the number of the document."""

    def __init__(self, texts):
        self.texts = texts

    def read(self, start=None):
        for number in range(start["n"] if start else 0, len(self.texts)):
            yield Piece(self.texts[number], number % 3 != 1, {"n": number})


class Code:
    """A tokenizer of one id a character, with BOS 1 and EOS 0."""

    bos_id, eos_id = 1, 0

    def encode(self, texts):
        return [[ord(letter) - 90 for letter in text] for text in texts]


def packed(texts, **options):
    return PackedText(Letters(texts), Code(), **{"length": 5, "wrap": False, "shuffle": 4, **options})


texts = st.lists(st.text("abcdefgh", min_size=1, max_size=12), min_size=1, max_size=150)


@given(texts=texts, before=st.integers(0, 30), wrap=st.booleans(), shuffle=st.integers(1, 7))
def test_a_stream_goes_on_from_any_position(texts, before, wrap, shuffle):
    options = {"wrap": wrap, "shuffle": shuffle, "seed": 3}
    stream = packed(texts, **options)
    if before:
        stream.take(before)
    position = json.loads(json.dumps(stream.position()))
    resumed = packed(texts, **options)
    resumed.restore(position)
    for count in (1, 5, 2 * shuffle):
        assert torch.equal(stream.take(count), resumed.take(count))
        assert stream.position() == resumed.position()


@given(texts=texts, sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_how_much_is_taken_at_once_does_not_matter(texts, sizes):
    whole = packed(texts).take(sum(sizes))
    stream = packed(texts)
    assert torch.equal(torch.cat([stream.take(size) for size in sizes]), whole)


@given(texts=texts)
def test_a_pass_holds_every_token_once_and_eos_after_every_document(texts):
    stream = [ord(letter) - 90 for n, text in enumerate(texts) for letter in text + ("Z" if n % 3 != 1 else "")]
    rows = len(stream) // 5
    if rows:
        taken = packed(texts, shuffle=rows).take(rows)
        assert Counter(taken.flatten().tolist()) == Counter(stream[: 5 * rows])
        assert torch.equal(packed(texts, shuffle=1).take(rows).flatten(), torch.tensor(stream[: 5 * rows]))


def test_wrapped_sequences_begin_with_bos_and_end_with_eos():
    rows = packed(["abcdefg", "hh"], wrap=True, shuffle=1).take(4)
    assert rows.tolist() == [[1, 7, 8, 9, 0], [1, 10, 11, 12, 0], [1, 13, 0, 14, 0], [1, 14, 7, 8, 0]]


def test_the_seed_decides_the_order_within_a_block_and_nothing_else():
    first, again, other = (packed(["abcdefgh" * 20], shuffle=8, seed=seed).take(8) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sorted(first.tolist()) == sorted(other.tolist())


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(TokenDriftError, match="gives id 9, but the checkpoint's vocabulary V has 8 entries"):
        packed(["abc"], vocab_size=8).take(1)
    with pytest.raises(TokenDriftError, match="gives id 8, which is the mask token of the checkpoint"):
        packed(["abc"], mask_id=8).take(1)
    with pytest.raises(TokenDriftError, match="the source contains no text"):
        packed([]).take(1)


FILE = "one\ntwo\n\n\nthree\n  four\n"


@pytest.mark.parametrize(
    ("documents", "pieces"),
    [
        ("file", [(FILE, True)]),
        ("paragraph", [("one\ntwo", True), ("three\n  four", True)]),
        ("line", [("one", True), ("two", True), ("three", True), ("  four", True)]),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_documents_of_text_files(tmp_path, documents, pieces, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(FILE.encode()) if suffix.endswith("gz") else FILE.encode())
    source = TextFiles([path, path], documents=documents)
    read = list(source.read())
    assert [(piece.text, piece.ends) for piece in read] == 2 * pieces
    for number, piece in enumerate(read):  # every piece says where reading gives it first
        assert list(source.read(piece.start)) == read[number:]


def test_long_files_come_in_pieces_that_end_with_a_line(tmp_path):
    path = tmp_path / "long.txt"
    lines = [f"{n} " + "x" * (n % 900) + "\n" for n in range(900)]
    path.write_text("".join(lines))
    read = list(TextFiles([path]).read())
    assert "".join(piece.text for piece in read) == "".join(lines)
    assert len(read) > 2
    assert [piece.ends for piece in read] == [False] * (len(read) - 1) + [True]
    assert list(TextFiles([path]).read(read[1].start)) == read[1:]


def test_json_lines_give_the_named_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": " "}\n{"body": "two"}\n')
    assert [piece.text for piece in TextFiles([path], field="body").read()] == ["one", "two"]
    with pytest.raises(TokenDriftError, match=r"a.jsonl, line 1 is not a JSON object with a text in the field 'text'"):
        list(TextFiles([path]).read())


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "A.JSONL", "a.json.gz", "A.Json.GZ"])
def test_json_lines_are_known_by_any_of_their_suffixes(tmp_path, name):
    content = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert [piece.text for piece in TextFiles([tmp_path / name]).read()] == ["one", "two"]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.TSV", "a.csv.gz", "a.jsonl.zst", "a.arrow"])
def test_files_of_other_kinds_are_refused_before_anything_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(TokenDriftError, match=r"(?s)is not a text file: its suffix is \.\w+\.\n.*pass that as dataset"):
        TextFiles([tmp_path / name])


@pytest.mark.parametrize("documents", ["file", "paragraph", "line"])
@pytest.mark.parametrize("word", ["quick ", "qui\u00e7k"], ids=["words", "no spaces"])
def test_a_line_without_end_comes_in_pieces_that_lose_nothing(tmp_path, documents, word):
    path, content = tmp_path / "text8.txt", word * 200_000
    path.write_text(content + "\n\nend", encoding="utf-8")
    read = list(TextFiles([path], documents=documents).read())
    first = [piece for piece in read if "end" not in piece.text or documents == "file"]
    assert max(len(piece.text) for piece in read) <= 1 << 18
    whole = "".join(piece.text for piece in first)
    assert whole == {"file": content + "\n\nend", "paragraph": content.rstrip(), "line": content}[documents]
    assert [piece.ends for piece in first] == [False] * (len(first) - 1) + [True]
    for number in (0, 1, len(read) - 1):
        assert list(TextFiles([path], documents=documents).read(read[number].start)) == read[number:]


@pytest.mark.parametrize("documents", ["file", "paragraph", "line"])
def test_a_text_of_white_space_is_no_document(tmp_path, documents):
    (tmp_path / "blank.txt").write_text(" \n\n \t\n" + " \n" * 100_000)
    assert list(TextFiles([tmp_path / "blank.txt"], documents=documents).read()) == []


def test_line_ends_and_a_byte_order_mark_are_not_text(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\r\n")
    assert [piece.text for piece in TextFiles([tmp_path / "dos.txt"]).read()] == ["one\ntwo\nthree\n"]
    assert read_text(tmp_path / "dos.txt") == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"generative_ppl": 40.1, "generated_seqs": ["one", "", "two"], "other": ["x"]}, indent=4),
        json.dumps({"texts": ["one", "two"]}),
        json.dumps(["one", None, "two"], indent=1),
        '\n\ufeff["one", {"text": "two"}]'.lstrip(),
        '"one"\n{"text": null}\n"two"\n',
        '{"tokendrift": {"steps": 4}}\n{"text": "one", "ids": [1]}\n{"text": "two"}\n',
    ],
    ids=["object of lists", "one list", "indented list", "list with a mark", "strings", "samples"],
)
def test_json_of_every_form_gives_its_texts(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    source = TextFiles([tmp_path / "a.json"])
    read = list(source.read())
    assert [piece.text for piece in read] == ["one", "two"]
    assert list(source.read(read[1].start)) == read[1:]
    assert read_documents(tmp_path / "a.json") == ["one", "two"]
    samples = read_samples(tmp_path / "a.json", skip_blank=True)
    assert samples.texts == ["one", "two"]


def test_an_object_with_a_text_or_ids_is_one_entry_whatever_lists_it_has(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "tags": ["a", "b"]}')
    assert read_samples(path).texts == read_documents(path) == ["one"]
    path.write_text('{"body": "one", "tags": ["a", "b"]}')
    assert [piece.text for piece in TextFiles([path], field="body").read()] == ["one"]
    path.write_text('{"ids": [1, 2], "tokens": ["a", "b"]}')
    assert read_samples(path).ids == [[1, 2]]


def test_of_several_lists_the_right_one_must_be_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ["one"], "b": ["two"]}')
    with pytest.raises(TokenDriftError, match=r"several lists of texts: a, b[\s\S]*generated_seqs"):
        list(TextFiles([tmp_path / "a.json"]).read())


def test_a_text_is_another_one_when_it_is_edited_or_longer(tmp_path):
    path = tmp_path / "a.txt"
    found = []
    for content in ("one two", "one six", "one two ", "one two"):
        path.write_text(content)
        found.append(TextFiles([path]).identity())
    assert found[0] == found[3]
    assert found[0] != found[1] and found[0] != found[2]


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(TokenDriftError, match=r"bad.txt, line 2 is not UTF-8"):
        list(TextFiles([tmp_path / "bad.txt"]).read())
    with pytest.raises(TokenDriftError, match=r"these text files do not exist: .*gone.txt"):
        TextFiles([tmp_path / "gone.txt"])
    with pytest.raises(TokenDriftError, match="text must name files, and these are folders or pipes: "):
        TextFiles([tmp_path])


def test_rows_of_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["one", "", "two", None, "three"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows["text"]))
    for name in ("saved", "files"):
        source = DatasetRows(str(tmp_path / name))
        read = list(source.read())
        assert [piece.text for piece in read] == ["one", "two", "three"]
        assert list(source.read(read[1].start)) == read[1:]
    with pytest.raises(TokenDriftError, match=r"has no column 'body'.\n.*Its columns are text"):
        DatasetRows(str(tmp_path / "saved"), field="body")
    with pytest.raises(TokenDriftError, match=r"split 'train', cannot be opened"):
        DatasetRows(str(tmp_path / "gone"))


def test_a_tokenizer_is_found_read_and_written(tmp_path):
    tokenizer = text_tokenizer(PRETRAINED / "tokenizer.json", tmp_path, 1024)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 0)
    tokenizer.save(tmp_path)
    again = text_tokenizer(None, tmp_path, 1024)
    assert again.encode(["a token", ""]) == tokenizer.encode(["a token", ""])
    assert again.tokenizer.decode(again.encode(["a token"])[0]) == "a token"
    assert (again.bos_id, again.eos_id) == (0, 0)
    cutting = Tokenizer.from_file(str(PRETRAINED / "tokenizer.json"))
    cutting.enable_truncation(2)
    cutting.enable_padding()
    cutting.save(str(tmp_path / "cutting.json"))
    texts = ["a token of a real text", "a"]
    assert text_tokenizer(tmp_path / "cutting.json", tmp_path, 1024).encode(texts) == tokenizer.encode(texts)
    with pytest.raises(TokenDriftError, match=r"has no tokenizer, and GPT-2's .* not its own \(V = 9\)"):
        text_tokenizer(None, tmp_path / "a" / "b", 9)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenDriftError, match="no tokenizer can be read from"):
        text_tokenizer(tmp_path, tmp_path, 9)
