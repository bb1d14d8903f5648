"""Samples from files and reports into files: what is read, what is named, and what a full disk leaves behind."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from tokendrift import TokenDriftError
from tokendrift.evaluation import read_samples
from tokendrift.files import write_atomically
from tokendrift.sampling import BadLine
from tokendrift.sampling.sample_file import SampleFile
from tokendrift.text_files import read_documents


@pytest.fixture
def jsonl(tmp_path):
    """Write lines, objects as JSON and strings as they are, into a file."""

    def write(*lines):
        path = tmp_path / "samples.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return path

    return write


def test_a_header_ids_texts_and_cost_are_read(jsonl):
    path = jsonl(
        {"tokendrift": {"model": "m", "temperature": 0.9}},
        {"ids": [1, 2], "text": "a b", "nfe": 4},
        "",
        {"ids": [3], "text": "c\u2028d", "nfe": 4},
    )
    found = read_samples(path)
    assert (found.ids, found.texts, found.nfe) == ([[1, 2], [3]], ["a b", "c\u2028d"], 4)
    assert found.metadata == {"model": "m", "temperature": 0.9}
    assert (len(found), found.scored(), found.bad_lines) == (2, ["a b", "c\u2028d"], ())


def test_what_the_samplers_write_is_what_is_read(tmp_path):
    file = SampleFile(tmp_path / "samples.jsonl", {"steps": 8, "temperature": 0.9})
    file.append([{"ids": [1, 2], "text": "a b", "nfe": 7}, {"ids": [3], "text": "c", "nfe": 8}])
    unfinished = read_samples(file.path)
    file.finish()
    found = read_samples(file.path)
    assert (found.ids, found.texts, found.nfe) == ([[1, 2], [3]], ["a b", "c"], 8)
    assert (unfinished.metadata["complete"], found.metadata["complete"]) == (False, True)
    assert found.metadata["temperature"] == 0.9


def test_plain_texts_and_plain_ids_are_enough(jsonl):
    assert read_samples(jsonl({"text": "a"}, {"text": ""})).texts == ["a", ""]
    ids = read_samples(jsonl({"ids": [1]}, {"ids": [2, 3]}))
    assert (ids.ids, ids.texts, ids.nfe, ids.scored()) == ([[1], [2, 3]], None, None, [[1], [2, 3]])


def test_rows_of_one_run_may_have_cost_less_than_the_batch(jsonl):
    header, rows = {"tokendrift": {"steps": 8}}, [{"ids": [1], "nfe": 7}, {"ids": [1], "nfe": 8}]
    assert read_samples(jsonl(header, *rows)).nfe == 8
    with pytest.raises(TokenDriftError, match=r"mixes samples of different NFE \(7, 8\)"):
        read_samples(jsonl(*rows))


def test_paragraphs_of_a_text_file_are_samples(tmp_path):
    path = tmp_path / "samples.txt"
    path.write_text("\n\none\nstill one\n\n \n\ntwo\n")
    assert read_samples(path).texts == ["one\nstill one", "two"]


def test_lines_of_a_text_file_are_samples_on_request(tmp_path):
    path = tmp_path / "samples.TXT.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n"))
    assert read_samples(path, lines=True).texts == ["one", "two", "three"]
    assert read_samples(path).texts == ["one\ntwo", "three"]


@pytest.mark.parametrize("name", ["a.csv", "a.PARQUET", "a.tsv.gz"])
def test_tables_are_refused_with_a_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"text\none\n")
    for read in (read_samples, read_documents):
        with pytest.raises(TokenDriftError, match=r"is not a text file: its suffix is [\s\S]*convert them"):
            read(tmp_path / name)


def test_a_header_is_known_whatever_the_ending(jsonl):
    path = jsonl("", {"tokendrift": {"model": "m"}}, {"ids": [1, 2], "nfe": 4})
    found = read_samples(path.rename(path.with_suffix(".json")))
    assert (found.ids, found.nfe, found.metadata) == ([[1, 2]], 4, {"model": "m"})


def test_a_text_that_merely_begins_with_a_brace_is_prose(tmp_path):
    path = tmp_path / "samples.txt"
    for text in ('{"text": "tokendrift"}', "{tokendrift", "[1]"):
        path.write_text(text)
        assert read_samples(path).texts == [text]


BAD = [
    ("{broken", "no JSON"),
    ("[1]", "a JSON object was expected, not list"),
    ("{}", 'it has neither "text" nor "ids"'),
    ('{"text": 3}', '"text" must be a string'),
    ('{"ids": [1, -1]}', '"ids" must be a list of integers of at least 0'),
    ('{"ids": [true]}', '"ids" must be a list of integers of at least 0'),
    ('{"text": "a", "nfe": "4"}', '"nfe" must be an integer of at least 0'),
    ("[" * 100_000, "no JSON"),
    ('{"ids": [1e400]}', '"ids" must be a list of integers'),
    ('{"ids": [2147483648]}', "each below 2^31"),
    ('{"ids": [1], "nfe": 9223372036854775808}', '"nfe" must be an integer of at least 0, below 2^31'),
    ('{"ids": [' + "1" * 5000 + "]}", "Exceeds the limit"),
]


@pytest.mark.parametrize(("line", "says"), BAD)
def test_a_bad_line_is_named_by_number_or_left_out_on_request(jsonl, line, says):
    path = jsonl({"text": "good"}, "", line, {"text": "also good"})
    with pytest.raises(TokenDriftError, match=r"line 3 of .*samples.jsonl holds no sample") as error:
        read_samples(path)
    assert says in str(error.value) and "skip_bad" in str(error.value)
    found = read_samples(path, skip_bad=True)
    assert found.texts == ["good", "also good"]
    (bad,) = found.bad_lines
    assert isinstance(bad, BadLine) and bad.number == 3 and says in bad.reason


def test_a_header_counts_as_such_in_the_first_line_only(jsonl):
    with pytest.raises(TokenDriftError, match=r'line 2 .* it has neither "text" nor "ids"'):
        read_samples(jsonl({"text": "a"}, {"tokendrift": {}}))
    with pytest.raises(TokenDriftError, match=r'line 1 .* the value of "tokendrift" must be an object, not list'):
        read_samples(jsonl({"tokendrift": []}))


def test_a_complete_file_holds_what_its_header_announces(jsonl):
    header, row = {"tokendrift": {"n": 2, "complete": True}}, {"text": "a"}
    assert len(read_samples(jsonl(header, row, row))) == 2
    for count in (1, 3):
        path = jsonl(header, *[row] * count)
        with pytest.raises(
            TokenDriftError, match=f"holds {count} samples, but its header announces 2[\\s\\S]*--skip-bad"
        ):
            read_samples(path)
        found = read_samples(path, skip_bad=True)
        assert (len(found), found.metadata["complete"]) == (count, False)


def test_bad_and_blank_lines_count_among_those_that_a_header_announces(jsonl):
    path = jsonl({"tokendrift": {"n": 3, "complete": True}}, {"text": "a"}, {"text": " "}, "{broken")
    assert read_samples(path, skip_bad=True, skip_blank=True).metadata["complete"]


def test_an_unfinished_file_may_hold_fewer_samples_than_it_announces_and_never_more(jsonl):
    header, row = {"tokendrift": {"n": 2, "complete": False}}, {"text": "a"}
    assert len(read_samples(jsonl(header, row))) == 1
    with pytest.raises(TokenDriftError, match="holds 3 samples, but its header announces 2"):
        read_samples(jsonl(header, row, row, row))


@pytest.mark.parametrize("entry", [{"n": "2"}, {"n": True}, {"complete": 1}, {"tokenizer": ["a"]}, {"steps": 2.5}])
def test_a_header_with_values_of_other_types_is_refused(jsonl, entry):
    with pytest.raises(TokenDriftError, match=rf'line 1 of .*"{next(iter(entry))}" in "tokendrift" must be'):
        read_samples(jsonl({"tokendrift": entry}, {"text": "a"}))


def test_limits_of_a_samples_file_are_named(jsonl, tmp_path, monkeypatch):
    with pytest.raises(TokenDriftError, match=r'line 1 .*"tokendrift" is nested too deeply'):
        read_samples(jsonl('{"tokendrift": {"a": ' + "[" * 300 + "]" * 300 + "}}", {"text": "a"}))
    monkeypatch.setattr("tokendrift.evaluation.sample_reader.LONGEST", 5)
    monkeypatch.setattr("tokendrift.evaluation.sample_reader.MOST", 2)
    assert read_samples(jsonl({"text": "12345"}, {"text": "a", "ids": [1] * 6}), skip_bad=True).texts == ["12345"]
    with pytest.raises(TokenDriftError, match=r"line 1 .*longer than 5 characters"):
        read_samples(jsonl({"text": "123456"}))
    (tmp_path / "a.txt").write_text("123456")
    (tmp_path / "b.txt").write_text("a\n\nb\n\nc")
    for path, said in (("a.txt", "a sample of more than 5 characters"), ("b.txt", "holds more than 2 samples")):
        with pytest.raises(TokenDriftError, match=said):
            read_samples(tmp_path / path)
    with pytest.raises(TokenDriftError, match="holds more than 2 samples"):
        read_samples(jsonl({"text": "a"}, "{broken", {"text": "a"}), skip_bad=True)


def test_a_packed_file_that_was_cut_is_refused(jsonl):
    whole = gzip.compress(jsonl({"text": "a" * 1000}).read_bytes())
    path = jsonl().with_name("cut.jsonl.gz")
    for content in (whole[:-9], whole[: len(whole) // 2], b"no gzip", whole[:20] + b"xxxx" + whole[24:]):
        path.write_bytes(content)
        for read in (read_samples, read_documents):
            with pytest.raises(TokenDriftError, match=r"cut\.jsonl\.gz cannot be read"):
                read(path)


def test_files_without_samples_are_named(jsonl, tmp_path):
    with pytest.raises(TokenDriftError, match=r"samples.jsonl holds no sample\."):
        read_samples(jsonl())
    with pytest.raises(TokenDriftError, match=r"holds no sample \(1 lines were left out, the first is line 2: no JSON"):
        read_samples(jsonl("", "x"), skip_bad=True)
    with pytest.raises(TokenDriftError, match=r"none.txt cannot be read: No such file"):
        read_samples(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TokenDriftError, match=r"latin.txt is not UTF-8 text"):
        read_samples(tmp_path / "latin.txt")
    with pytest.raises(TokenDriftError, match="contains some lines with only text and others with only ids"):
        read_samples(jsonl({"text": "a"}, {"ids": [1]}))


def test_a_report_is_written_whole_with_the_rights_of_any_new_file(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_atomically(path, "caf\u00e9\n")
    assert path.read_bytes() == b"caf\xc3\xa9\n"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    target, link = tmp_path / "elsewhere" / "real.json", tmp_path / "link.json"
    link.symlink_to(target)
    for text in ("first", "second"):  # what it leads to need not be there yet
        write_atomically(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert list(target.parent.iterdir()) == [target]
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(TokenDriftError, match=r"link\.json could not be written"):
        write_atomically(link, "x")


def test_a_pipe_is_written_to_and_a_folder_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "text\n")
        assert pipe.is_fifo() and os.read(reader, 99) == b"text\n"
    finally:
        os.close(reader)
    with pytest.raises(TokenDriftError, match=r"could not be written: Is a directory\.\n"):
        write_atomically(tmp_path, "x")
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("place", [(os, "fsync"), (Path, "replace")])
def test_a_full_disk_leaves_the_old_report_and_nothing_else(tmp_path, monkeypatch, place):
    path = tmp_path / "report.html"
    write_atomically(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*place, full)
    with pytest.raises(TokenDriftError, match=r"No space left on device\. The older file is unchanged"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_searched_is_an_error_of_this_package(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(TokenDriftError, match=r"report.html could not be written: Permission denied\.\n"):
        write_atomically(tmp_path / "report.html", "new")
