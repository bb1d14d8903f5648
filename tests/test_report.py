"""The report of an evaluation: what the page holds, that it stands alone, and that samples cannot break out of it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from report_samples import EVIL_NAME, as_samples, hostile_report, language, make_report

from tokendrift import TokenDriftError
from tokendrift.cli import PlainConsole
from tokendrift.demo import PRETRAINED
from tokendrift.evaluation import FIGURES, Figure, SampleSet, per_sample, register_figure
from tokendrift.evaluation.report import as_json, page
from tokendrift.evaluation.report.phrases import marked, most_repeated
from tokendrift.evaluation.report.sources import (
    NamedSamples,
    common_tokenizer,
    read_real,
    real_windows,
    split_name,
    unique_names,
    warn_of_unknown_ids,
)

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(PRETRAINED / "tokenizer.json"))


@pytest.fixture(scope="module")
def report(tokenizer):
    return hostile_report(tokenizer)


class Page(HTMLParser):
    """Tags with their attributes, and the text inside of elements of interest."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        self.texts.append([tag, ""])

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        for entry in self.texts[-1:]:
            entry[1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(report):
    return page(report)


@pytest.fixture(scope="module")
def parsed(html):
    return Page(html)


def test_the_page_refers_to_nothing_outside_itself(html, parsed):
    for tag, attributes in parsed.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "audio", "video", "form"}
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "action", "srcset", "data"}:
                assert value.startswith("#"), (tag, name, value)
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    (policy,) = (tag["content"] for tag in parsed.all("meta") if "http-equiv" in tag)
    assert policy.startswith("default-src 'none'") and "'unsafe-inline'; script-src 'sha256-" in policy


def test_every_id_of_the_page_is_unique_and_every_reference_has_its_target(html, parsed):
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    for _, attributes in parsed.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            wanted |= set(attributes.get(name, "").split())
    assert wanted <= set(ids)


def test_samples_and_names_cannot_break_out(html, parsed):
    assert len(parsed.all("script")) == 1
    assert not parsed.all("img") and not parsed.all("b")
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert "<script>alert" not in html
    assert "{{ 7 * 7 }}" in html  # as text, not as a template


def test_names_with_formulas_control_characters_and_markup_are_harmless_everywhere(tokenizer):
    name = "=1+1[/red][bold]\x1b[2J\u202e\x00"
    report = make_report(tokenizer, [(name, as_samples(tokenizer, language(20), nfe=4))])
    shown = "=1+1[/red][bold]\ufffd[2J\ufffd\ufffd"
    _, line, real = csv.reader(io.StringIO(report.to_csv()))
    assert line[:4] == ["'" + shown, "'" + shown, "4", "20"] and real[0] == "real text"
    assert all(not cell.startswith("'") and float(cell) < 0 for cell in line if cell.startswith("-"))
    console = PlainConsole()
    with console.capture() as drawn:
        console.print(report.table(), name, width=400)
        console.print(*report.sentences(), soft_wrap=True)
    assert drawn.get().count(shown) >= 4
    html = page(report)
    assert html.count(shown) >= 10
    for text in (html, drawn.get(), report.to_csv()):
        assert not set(text) & set("\x1b\u202e\x00")


def test_every_plot_has_a_name_a_description_and_its_numbers(report, parsed):
    plots = parsed.all("svg")
    assert len(plots) == len(parsed.all("figure")) == 5
    assert all(svg["role"] == "img" and len(svg["aria-labelledby"].split()) == 2 for svg in plots)
    titles = [text for tag, text in parsed.texts if tag == "title"][1:]
    assert titles == [text for tag, text in parsed.texts if tag == "figcaption"]
    assert all("table" in text for tag, text in parsed.texts if tag == "desc")
    assert len(parsed.all("table")) == 5 + 2  # the figures, and how it was made
    numbers = [text for tag, text in parsed.texts if tag == "td"]
    for row in report.evaluation.rows:
        assert numbers.count(f"{row.measures.gen_ppl.estimate:.1f}") >= 4  # table and three plots


def test_gen_ppl_never_stands_without_what_belongs_beside_it(report, parsed):
    from rich.console import Console

    console = Console(width=150, file=io.StringIO())
    console.print(report.table())
    drawn = console.file.getvalue()
    headings = [text for tag, text in parsed.texts if tag == "th"]
    for name in ("Gen.-PPL", "H sample", "H unigram", "NFE", "n", "precision"):
        assert name in drawn and name in headings
    assert "real text" in drawn and "real text" in headings
    header, *lines = csv.reader(io.StringIO(report.to_csv()))
    assert {"gen_ppl", "gen_ppl_low", "sample_entropy_high", "unigram_entropy", "nfe", "samples", "precision"} <= {
        *header
    }
    sets = [f"{name}, {nfe} NFE" for name in (EVIL_NAME, "dull") for nfe in (4, 8)]
    assert [line[0] for line in lines] == [*sets, "real text"]


def test_the_caption_names_the_judge_as_it_is_called(report):
    """Square brackets in a folder's name are no markup."""
    from rich.console import Console

    first, *others = report.evaluation.rows
    judged = first.measures.perplexity._replace(judge="/models/[v2]/judge")
    row = dataclasses.replace(first, measures=dataclasses.replace(first.measures, perplexity=judged))
    console = Console(width=300, file=io.StringIO())
    evaluation = dataclasses.replace(report.evaluation, rows=(row, *others))
    console.print(dataclasses.replace(report, evaluation=evaluation).table())
    assert "Judge /models/[v2]/judge, " in " ".join(console.file.getvalue().split())


def test_the_guard_speaks_of_every_set(report):
    said = report.guard()
    assert any(line.startswith("dull, 4 NFE: flag: unigram_entropy") for line in said)
    assert f"{EVIL_NAME}, 8 NFE: no figure was flagged in comparison with real text." in said


def test_differences_are_said_only_beyond_chance(tokenizer, report):
    said = report.differences()
    assert len(said) == 2  # one for each NFE, both distinguishable
    assert "4 NFE against dull, 4 NFE: Gen.-PPL higher" in said[0] and "unigram entropy higher by" in said[0]
    same = as_samples(tokenizer, language(20, seed=3), nfe=4)
    assert make_report(tokenizer, [("a", same), ("b", same)]).differences() == [
        "1 pair is not distinguishable in Gen.-PPL and both entropies: their intervals contain no difference."
    ]


def test_sets_of_one_nfe_are_compared_and_all_where_no_two_have_one(tokenizer, report):
    assert [(a, b) for a, b, _ in report.comparisons()] == [
        (f"{EVIL_NAME}, {nfe} NFE", f"dull, {nfe} NFE") for nfe in (4, 8)
    ]
    sets = [("a", as_samples(tokenizer, language(5), nfe=4)), ("b", as_samples(tokenizer, language(5), nfe=8))]
    assert [(a, b) for a, b, _ in make_report(tokenizer, sets).comparisons()] == [("a", "b")]


def test_a_lower_gen_ppl_at_a_lower_entropy_is_not_called_a_gain(tokenizer):
    sets = [("dull", as_samples(tokenizer, language(20, dull=True))), ("other", as_samples(tokenizer, language(20)))]
    (sentence,) = make_report(tokenizer, sets).differences()
    assert sentence.startswith("dull against other: Gen.-PPL lower, 0.")
    assert sentence.endswith("so this is a gain only if it also holds at equal entropy.")


def test_the_verdict_is_one_sentence_about_the_fewest_evaluations(tokenizer, report):
    from tokendrift.evaluation import matched_entropy
    from tokendrift.evaluation.report.evaluation_report import MatchedSet

    assert report.verdict().startswith(f"At 4 NFE, {EVIL_NAME} has 0.")
    assert "; dull has 0." in report.verdict() and "and the guard flags " in report.verdict()
    assert report.verdict().endswith("without a baseline, nothing is compared at equal entropy.")
    unmatched = dataclasses.replace(report, settings={"baseline": "base"}).verdict()
    assert unmatched.endswith(
        "no other set has as many steps as the baseline, so nothing is compared at equal entropy."
    )
    base, dull = (report.evaluation[f"{name}, 4 NFE"].measures for name in (EVIL_NAME, "dull"))
    found = [matched_entropy(m, base, base, kind="sample", temperature=1.0) for m in (base, dull)]
    matched = [MatchedSet(f"{EVIL_NAME}, 4 NFE", "base", found[0])]
    sentence = dataclasses.replace(report, matched=tuple(matched)).verdict()
    assert sentence == (
        f"At 4 NFE and equal sample entropy, {EVIL_NAME} has 1.00 times the Gen.-PPL of base (1.00 to 1.00), "
        "which is no difference beyond chance."
    )
    matched.append(MatchedSet("dull, 4 NFE", "base", found[1]))
    sentence = dataclasses.replace(report, matched=tuple(matched)).verdict()
    assert sentence.endswith("no temperature gives base the sample entropy of dull, so nothing is claimed of dull.")
    in_bytes = matched[0].found._replace(comparison=found[0].comparison._replace(headline="bits_per_byte"))
    report = dataclasses.replace(report, matched=(matched[0]._replace(found=in_bytes),))
    assert "has 1.00 times the bits per byte of base (1.00 to 1.00)" in report.verdict()
    assert report.verdict() == report.to_dict()["verdict"]
    assert page(report).index("times the bits per byte of base") < page(report).index("A low Gen.-PPL alone")


def test_json_holds_every_number_and_no_nan(report):
    plain = json.loads(json.dumps(as_json(report.to_dict()), allow_nan=False))
    assert len(plain["rows"]) == 4 and len(plain["comparisons"]) == 2
    first = plain["rows"][0]
    assert first["gen_ppl"]["estimate"] == report.evaluation.rows[0].measures.gen_ppl.estimate
    assert first["model"] == EVIL_NAME and first["real_text"]["gen_ppl"] and first["guard"]["passed"] is True
    assert as_json({"a": [float("nan"), (float("inf"), 1.0)]}) == {"a": [None, [None, 1.0]]}


def test_real_text_of_other_lengths_has_a_row_of_its_own(tokenizer):
    short = as_samples(tokenizer, language(10, length=12))
    long = as_samples(tokenizer, language(20, length=24))
    names = [name for name, _, _ in make_report(tokenizer, [("short", short), ("long", long)]).entries()]
    assert names == ["short", "long", "real text", "real text, cut as long"]


@given(st.lists(st.text(alphabet="ab <>|.\n", max_size=40), max_size=5))
def test_marking_changes_no_letter_and_marks_every_repeated_phrase(texts):
    phrases = most_repeated(texts)
    for text in texts:
        parts = marked(text, phrases)
        assert "".join(part.text for part in parts) == text
        assert all(part.text for part in parts)
        assert all(a.repeated != b.repeated for a, b in pairwise(parts))
    shown = sum(part.repeated for text in texts for part in marked(text, phrases))
    assert bool(shown) == bool(phrases)


def test_phrases_are_counted_over_the_whole_set_and_hold_words():
    texts = ["one two three", "and one  two\nthree", "...", "... ..."]
    assert [(phrase.text, phrase.times) for phrase in most_repeated(texts)] == [("one two three", 2)]
    assert most_repeated(["<eos> a b", "<eos> a b"])[0].text == "<eos> a b"


def test_windows_of_real_text_are_disjoint_spread_and_as_long_as_the_longest_sample(tokenizer):
    text = " ".join(f"word{i}" for i in range(400))
    sources = [NamedSamples("a", as_samples(tokenizer, [*language(3, length=7), *language(1, length=10)]), "a.jsonl")]
    stream = tokenizer.encode(text).ids
    windows = real_windows(text, sources, tokenizer, None).ids
    assert [len(window) for window in windows] == [10] * 4
    assert windows[0] == stream[:10] and len(stream) - 4 <= _end(windows[-1], stream) <= len(stream)
    from_text = NamedSamples("a", SampleSet(texts=["some text", "more of it"]), "a.txt")
    texts = real_windows(text, [from_text], None, tokenizer)
    assert texts.ids is None and len(texts.texts) == 2
    one = NamedSamples("a", SampleSet(texts=["a single sample"]), "a.txt")
    with pytest.raises(TokenDriftError, match=r"every set has 1 sample, and intervals need at least two[\s\S]*a.txt"):
        real_windows(text, [one], None, tokenizer)
    with pytest.raises(TokenDriftError, match="too short for two windows of 10 tokens"):
        real_windows("short", sources, tokenizer, None)


def _end(window, stream):
    starts = [i for i in range(len(stream)) if stream[i : i + len(window)] == window]
    return starts[-1] + len(window)


def test_names_come_from_the_argument_or_the_file():
    assert split_name("a=b.jsonl") == ("a", "b.jsonl")
    assert split_name("runs/x.4.jsonl") == ("x.4", "runs/x.4.jsonl")
    assert split_name("org/mdlm-1.5") == ("mdlm-1.5", "org/mdlm-1.5")
    twice = [NamedSamples("a", SampleSet(texts=["x", "y"], nfe=4), place) for place in ("one", "two")]
    many = [NamedSamples("a", SampleSet(texts=["x"], nfe=7, metadata={"steps": steps}), "") for steps in (64, 128)]
    assert unique_names(many) == ["a, 7 NFE of 64 steps", "a, 7 NFE of 128 steps"]
    with pytest.raises(TokenDriftError, match=r"two sets of samples are called 'a, 4 NFE': one, two\.\n.*NAME=FILE"):
        unique_names(twice)
    with pytest.raises(TokenDriftError, match="a set of samples is called 'real text'"):
        unique_names([twice[0]._replace(model="real text")])


def test_copies_of_a_tokenizer_are_one_and_others_do_not_mix(tokenizer, tmp_path):
    pytest.importorskip("transformers")
    places = [tmp_path / name / "tokenizer.json" for name in ("one", "two", "other")]
    for place in places:
        place.parent.mkdir()
        tokenizer.save(str(place))
    sets = [
        NamedSamples(
            place.parent.name, SampleSet(ids=[[300, 301]], texts=["a"], metadata={"tokenizer": str(place.parent)}), ""
        )
        for place in places
    ]
    texts = NamedSamples("texts", SampleSet(texts=["a"]), "")
    assert common_tokenizer([*sets, texts], None).get_vocab() == tokenizer.get_vocab()
    stored = json.loads(places[2].read_text())
    first, second = list(stored["model"]["vocab"])[:2]
    vocabulary = stored["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    places[2].write_text(json.dumps(stored))
    assert common_tokenizer(sets[:2], None) is not None
    with pytest.raises(TokenDriftError, match=r"the tokenizers of .* differ: .*one, .*other\. Ids of two vocab"):
        common_tokenizer(sets, None)
    unknown = NamedSamples("unknown", SampleSet(ids=[[1]], texts=["a"]), "")
    assert common_tokenizer([*sets[:2], unknown], None) is None
    places[1].unlink()  # made on another machine
    assert common_tokenizer(sets[:2], None) is None


def test_an_unfinished_file_is_said_to_be(tokenizer):
    header = {"n": 256, "complete": False}
    sets = [
        ("part", as_samples(tokenizer, language(20), metadata=header)),
        ("whole", as_samples(tokenizer, language(20))),
        ("longer", as_samples(tokenizer, language(20), metadata={"n": 12, "complete": False})),
    ]
    said = [line for line in make_report(tokenizer, sets).guard() if "samples of" in line or "instead of" in line]
    assert said == [
        "part: part.jsonl is unfinished: 20 samples of 256.",
        "longer: longer.jsonl was changed: 20 samples instead of 12.",
    ]


def test_sets_of_as_many_steps_are_compared_whatever_their_measured_nfe(tokenizer):
    """Rows of a masked model skip calls, so two models hardly ever measure the same NFE."""
    made = [("a", 30, 32), ("b", 31, 32), ("a", 59, 64), ("b", 59, 64), ("c", 30, None)]
    sets = [
        (name, as_samples(tokenizer, language(5), nfe=nfe, metadata={} if steps is None else {"steps": steps}))
        for name, nfe, steps in made
    ]
    assert [(a, b) for a, b, _ in make_report(tokenizer, sets).comparisons()] == [
        ("a, 30 NFE", "b, 31 NFE"), ("a, 59 NFE", "b, 59 NFE")
    ]  # fmt: skip


def test_real_text_by_line_is_known_by_its_header_whatever_the_ending(tmp_path):
    path = tmp_path / "real.json"
    path.write_text('{"tokendrift": {}}\n{"text": "one"}\n{"text": "two"}\n')
    assert read_real(str(path)).texts == ["one", "two"]
    path.write_text('{"text": "one"}\n{"text": " "}\n{"text": null}')
    assert read_real(str(path)).texts == ["one"]
    prose = tmp_path / "real.txt"
    prose.write_text('{"text": "one"}')
    assert read_real(str(prose)) == '{"text": "one"}'


def test_ids_without_text_need_a_tokenizer():
    with pytest.raises(TokenDriftError, match=r"a.jsonl has ids without texts.*\n.*--tokenizer"):
        common_tokenizer([NamedSamples("a", SampleSet(ids=[[1, 2]]), "a.jsonl")], None)


def test_ids_that_the_tokenizer_does_not_have_are_counted_in_a_warning(tokenizer):
    sets = [SampleSet(ids=ids, texts=["a", "b"]) for ids in ([[1, 2], [3, 1024]], [[1], [1023]])]
    sources = [NamedSamples(name, samples, f"{name}.jsonl") for name, samples in zip("ab", sets, strict=True)]
    with pytest.warns(UserWarning, match=r"^1 of 4 ids of a.jsonl are not in .* has 1024 entries") as said:
        warn_of_unknown_ids(sources, tokenizer)
    assert len(said) == 1


def test_a_figure_of_a_users_own_is_measured_and_shown_with_all_others(tokenizer, monkeypatch):
    from rich.console import Console

    def even_share(ids):
        return torch.tensor([float((sequence % 2 == 0).double().mean()) for sequence in ids])

    figure = Figure("even_share", "even ids", "share of even ids", 3, per_sample(even_share), main=True)
    monkeypatch.setitem(FIGURES, "even_share", figure)  # so that it is forgotten after this test
    del FIGURES["even_share"]
    register_figure(figure)
    with pytest.raises(TokenDriftError, match="there is already a figure named 'even_share'"):
        register_figure(figure)
    report = make_report(tokenizer, [("model", as_samples(tokenizer, language(20)))])
    share = report.evaluation["model"].measures.even_share
    console = Console(width=200, file=io.StringIO())
    console.print(report.table())
    html = page(report)
    for text in (console.file.getvalue(), html, str(report.evaluation)):
        assert "even ids" in text and f"{share.estimate:.3f}" in text and share.ends(".3f") in text
    assert report.to_dict()["rows"][0]["even_share"] == share._asdict()
    assert "even_share" in report.evaluation["model"].comparison.differences
    (line, _) = csv.DictReader(io.StringIO(report.to_csv()))
    assert float(line["even_share_low"]) == share.low
