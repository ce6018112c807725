"""BM25: the formula by hand, the same order as an index of somebody else's, and the readers of one's own corpus."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import BM25, InputError, tokenize

words = st.lists(st.sampled_from("rain storm moat oak tide 1 2 x".split()), max_size=12)
corpora = st.lists(words, min_size=1, max_size=12).filter(any)


def score_by_hand(query, passages, n, k1=0.9, b=0.4):
    """Robertson's formula, word by word, as the class's docstring states it."""
    mean, total = sum(map(len, passages)) / len(passages), 0.0
    for word in query:
        tf, df = passages[n].count(word), sum(word in passage for passage in passages)
        idf = math.log(1 + (len(passages) - df + 0.5) / (df + 0.5))
        total += idf * tf / (tf + k1 * (1 - b + b * len(passages[n]) / mean)) if tf else 0
    return total


@settings(max_examples=100, deadline=None)
@given(corpora, words, st.integers(1, 14), st.sampled_from([(0.9, 0.4), (1.2, 0.75), (0.0, 0.0), (2.0, 1.0)]))
def test_search_gives_the_formula_s_best_in_order(passages, query, k, constants):
    found, scores = BM25([" ".join(passage) for passage in passages], *constants).search(" ".join(query), k)
    expected = [score_by_hand(query, passages, n, *constants) for n in range(len(passages))]
    np.testing.assert_allclose(scores, [expected[n] for n in found], rtol=1e-5)
    assert len(set(found)) == len(found) == min(k, sum(score > 0 for score in expected))
    assert scores == sorted(scores, reverse=True)
    left_out = [score for n, score in enumerate(expected) if n not in found]
    assert not found or all(score <= scores[-1] * (1 + 1e-5) for score in left_out)


def test_equal_scores_stay_in_the_corpus_order_at_every_cut():
    index = BM25(["moat"] * 50)
    assert all(index.search("moat", k)[0] == list(range(min(k, 50))) for k in (1, 7, 49, 50, 51, 1000))
    mixed = BM25(["moat oak" if n % 3 else "moat" for n in range(3000)])  # two scores, many passages each
    assert mixed.search("moat", 3000)[0] == [*range(0, 3000, 3), *(n for n in range(3000) if n % 3)]


def test_a_word_that_the_query_repeats_counts_as_often():
    index = BM25(["moat castle", "oak forest"])
    assert index.search("moat moat")[1][0] == pytest.approx(2 * index.search("moat")[1][0])


def test_passages_that_share_no_word_are_not_returned():
    index = BM25(["moat", "", "..."])
    assert index.search("oak ...") == ([], []) and index.search("moat!") == index.search("Moat")


def test_words_are_runs_of_letters_and_digits_in_lower_case():
    assert tokenize("The cat's MOAT_2, naïve—3.5€ 水の") == ["the", "cat", "s", "moat", "2", "naïve", "3", "5", "水の"]


def test_stop_words_count_neither_as_words_nor_as_length():
    plain, padded = BM25(["moat castle", "oak"]), BM25(["the moat of a castle", "This is an oak"])
    assert padded.search("what is the moat")[1] == plain.search("moat")[1] and padded.search("the of is") == ([], [])
    assert BM25(["thi"]).search("this") == ([], [])  # recognised before its s is taken off


def test_plurals_are_found_by_their_singulars_and_the_other_way_round():
    index = BM25(["moats", "a pony", "glass", "buses bus"])
    assert [index.search(query)[0] for query in ("moat", "ponies", "glass", "glas", "bus")] == [[0], [1], [2], [], [3]]
    assert [*map(data.singular, "ponies horses oaks glass bus trees shoes its".split())] == [
        "pony", "horse", "oak", "glass", "bus", "tree", "shoe", "its"]


def test_bm25s_gives_the_same_scores():
    bm25s = pytest.importorskip("bm25s")
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{n}" for n in range(300)])
    passages = [" ".join(vocabulary[rng.zipf(1.3, 30) % 300]) for _ in range(200)]
    peer = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    peer.index([tokenize(passage) for passage in passages], show_progress=False)
    ours = BM25(passages)
    for n in range(20):
        query = " ".join(vocabulary[rng.zipf(1.3, 5) % 300])
        found, scores = ours.search(query, 200)
        theirs = peer.get_scores(tokenize(query))
        np.testing.assert_allclose(scores, theirs[found], rtol=1e-4)


# -- a corpus of one's own ---------------------------------------------------------------------------------------------

RECORDS = [{"_id": "a", "title": "Moats", "text": "water"}, {"_id": "b", "title": "", "text": "bread\u2028oven"}]


@pytest.mark.parametrize("content", [
    "a\tMoats water\r\nb\tbread\u2028oven\n\n", "\n".join(map(json.dumps, RECORDS)), json.dumps(RECORDS),
    "\n".join(json.dumps({"id": r["_id"], "contents": f"{r['title']} {r['text']}".strip()}) for r in RECORDS)])
def test_tsv_jsonl_and_json_read_the_same(tmp_path, content):
    (tmp_path / "corpus").write_text(content, newline="")
    assert data.read_texts(tmp_path / "corpus") == (["a", "b"], ["Moats water", "bread\u2028oven"])


@pytest.mark.parametrize("content, expected", [
    ("a\tx\nno tab here\n", "corpus:2: expected id TAB text"), ("a\tx\n\ty\n", "corpus:2: expected id TAB"),
    ("a\tx\na\ty\n", "id a is there twice"),
    ("", "empty"), ("\n", "empty"), ('{"_id": "a"}', "corpus:1: expected a passage's text"), ('{"text": "a"}', "corpus:1: expected an id")])
def test_a_bad_corpus_is_named(tmp_path, content, expected):
    (tmp_path / "corpus").write_text(content)
    with pytest.raises(InputError, match=expected):
        data.read_texts(tmp_path / "corpus")


def test_the_command_goes_from_a_beir_folder_to_candidates_and_a_run(tmp_path, capsys):
    folder = tmp_path / "cache" / "scifact"
    folder.mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    (folder / "queries.jsonl").write_text('{"_id": "1", "text": "moats of bread"}\n{"_id": "2", "text": "nothing"}')
    output, run = str(tmp_path / "lists.jsonl"), str(tmp_path / "run.txt")
    data.main(["bm25", str(tmp_path / "cache"), str(folder), "--output", output, "--run", run])
    lists = data.read_candidates(output)
    assert [(query.qid, query.query, query.docids, query.texts) for query in lists] == [
        ("1", "moats of bread", ["a", "b"], ["Moats water", "bread\u2028oven"]), ("2", "nothing", [], [])]
    assert data.read_run(run).keys() == {"1"} and sorted(data.read_run(run)["1"], key=data.read_run(run)["1"].get) == ["b", "a"]
    assert "2 passages, 2 queries, 1 of them without a match" in capsys.readouterr().out
    with pytest.raises(InputError, match="expected corpus.jsonl in this folder"):
        data.main(["bm25", str(tmp_path / "empty"), str(folder)] if (tmp_path / "empty").mkdir() is None else [])
    with pytest.raises(InputError, match="--k >= 1"):
        data.main(["bm25", str(folder), str(folder), "--k", "0"])


def test_a_corpus_without_a_word_is_refused():
    with pytest.raises(InputError, match="at least one passage with a word"):
        BM25(["", "..."])
