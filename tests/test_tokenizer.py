"""Text to ids and back, and what makes two tokenizers the same."""

from __future__ import annotations

import hashlib
import json

import pytest
from tokenizers import Tokenizer

from tokendrift import TokenDriftError
from tokendrift.demo import PRETRAINED
from tokendrift.models.tokenizer import (
    decode,
    encode,
    end_of_text,
    find_tokenizer,
    load_tokenizer,
    require_tokenizer,
    same_tokenizer,
    start_of_text,
    text_tokenizer,
    tokenizer_identity,
)

FILE = PRETRAINED / "tokenizer.json"
TEXTS = ["a token of a real text .", "", "the end<eos>"]


class Slow:
    """A tokenizer of transformers without a fast backend."""

    def __init__(self):
        self.fast = load_tokenizer(FILE)

    def __call__(self, texts, **options):
        return self.fast(texts, **options)

    def get_vocab(self):
        return self.fast.get_vocab()


def test_every_kind_of_tokenizer_gives_the_same_ids_and_texts():
    fast, bare = load_tokenizer(FILE), Tokenizer.from_file(str(FILE))
    ids = encode(fast, TEXTS)
    assert ids == encode(bare, TEXTS) == encode(Slow(), TEXTS)
    assert decode(fast, ids) == decode(bare, ids) == TEXTS


def test_what_the_file_says_of_length_is_not_followed():
    fast, bare = load_tokenizer(FILE), Tokenizer.from_file(str(FILE))
    whole = encode(fast, TEXTS)
    fast.backend_tokenizer.enable_truncation(2)
    fast.backend_tokenizer.enable_padding()
    assert encode(fast, TEXTS) == whole
    bare.enable_padding()
    assert encode(bare, TEXTS) == whole
    bare.enable_truncation(2)
    with pytest.raises(TokenDriftError, match="the tokenizer truncates"):
        encode(bare, TEXTS)


@pytest.mark.parametrize("use", [lambda: encode(3, ["a"]), lambda: decode(3, [[1]])])
def test_what_is_no_tokenizer_is_refused(use):
    with pytest.raises(TokenDriftError, match=r"tokenizer must be a transformers tokenizer or a tokenizers\.Tokenizer"):
        use()


def test_copies_are_the_same_and_another_rule_of_splitting_is_not(tmp_path):
    fast, bare = load_tokenizer(FILE), Tokenizer.from_file(str(FILE))
    fast.save_pretrained(tmp_path)
    assert same_tokenizer(fast, bare) and same_tokenizer(fast, load_tokenizer(tmp_path / "tokenizer.json"))
    bare.enable_truncation(7)
    assert same_tokenizer(fast, bare)  # of no account: encode does not follow it
    content = json.loads(FILE.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "lower.json").write_text(json.dumps(content), encoding="utf-8")
    lower = load_tokenizer(tmp_path / "lower.json")
    assert lower.get_vocab() == fast.get_vocab() and not same_tokenizer(fast, lower)
    assert tokenizer_identity(Slow()) == tokenizer_identity(Slow())


def test_the_identity_that_earlier_checkpoints_stored_is_accepted(tmp_path):
    tokenizer = text_tokenizer(FILE, tmp_path, 1024)
    earlier = json.dumps([sorted(tokenizer.tokenizer.get_vocab().items()), tokenizer.bos_id, tokenizer.eos_id])
    assert tokenizer.has_identity(tokenizer.identity())
    assert tokenizer.has_identity(hashlib.sha256(earlier.encode()).hexdigest())
    assert not tokenizer.has_identity(tokenizer._replace(eos_id=5).identity())


def test_a_tokenizer_by_name_comes_before_that_of_the_folder(tmp_path):
    assert find_tokenizer(tmp_path, 1024) is None
    tokenizer, place = require_tokenizer(tmp_path, 1024, source=FILE)
    assert place == str(FILE) and (start_of_text(tokenizer), end_of_text(tokenizer)) == (0, 0)
    assert end_of_text(Tokenizer.from_file(str(FILE))) is None
    with pytest.raises(TokenDriftError, match="has no tokenizer"):
        require_tokenizer(tmp_path, 1024)


@pytest.mark.parametrize("make", [lambda: load_tokenizer(FILE), lambda: Tokenizer.from_file(str(FILE)), Slow])
def test_a_special_token_written_in_a_text_is_text_unless_it_is_asked_for(make):
    tokenizer, end = make(), load_tokenizer(FILE).eos_token_id
    for _ in range(2):
        assert end not in encode(tokenizer, ["the end<eos>"])[0]
        assert encode(tokenizer, ["the end<eos>"], special_tokens=True)[0][-1] == end


@pytest.mark.parametrize("make", [lambda: load_tokenizer(FILE), lambda: Tokenizer.from_file(str(FILE))])
def test_ids_that_the_tokenizer_does_not_have_are_reported(make):
    tokenizer = make()
    (known,) = encode(tokenizer, ["a token"])
    with pytest.warns(UserWarning, match=r"2 of \d+ ids, such as 70000, are not in the vocabulary of the tokenizer"):
        assert decode(tokenizer, [[70000, *known, 70001]]) == ["\ufffda token\ufffd"]
