"""Candidates, initial state expansion, training data, BRIGHT: formats survive the round trip, bad input is
named, draws are what the paper says.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import (
    Candidates,
    InputError,
    expand,
    read_candidates,
    read_qrels,
    training_instances,
    write_candidates,
)
from eval import evaluate
from reward import ndcg

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real files of ../shared/data are not here")

RANK_LLM = {
    "query": {"text": "what is a moat", "qid": 7},
    "candidates": [
        {"docid": "d1", "score": 2.5, "doc": {"contents": "A moat is water."}},
        {"docid": 12, "score": 1, "doc": {"text": "Bread."}},
    ],
}
HITS = {
    "query": "what is a moat",
    "hits": [
        {"content": "A moat is water.", "qid": 7, "docid": "d1", "rank": 1, "score": 2.5},
        {"content": "Bread.", "qid": 7, "docid": "12", "rank": 2, "score": 1.0},
    ],
}
RANKIFY = {
    "question": "what is a moat",
    "answers": [],
    "query_id": 7,
    "ctxs": [
        {"id": "d1", "text": "A moat is water.", "title": "", "score": 2.5, "has_answer": True},
        {"id": 12, "text": "Bread.", "title": None, "score": 1},
    ],
}
MOAT = Candidates("7", "what is a moat", ["d1", "12"], ["A moat is water.", "Bread."], [2.5, 1.0])


def make_list(qid="q", passages=30):
    """A first-stage list of `passages` passages d0, d1, ... with falling scores."""
    return Candidates(
        qid,
        f"query {qid}",
        [f"d{n}" for n in range(passages)],
        [f"text {n}" for n in range(passages)],
        [float(passages - n) for n in range(passages)],
    )


def labels_of(labels, qid="q"):
    return {qid: {f"d{n}": label for n, label in enumerate(labels)}}


# -- candidates


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RANK_LLM),
        json.dumps([RANK_LLM]),
        json.dumps([RANK_LLM], indent=2),
        json.dumps([HITS]),
        json.dumps(HITS),
        json.dumps([RANKIFY]),
        "\n" + json.dumps(RANK_LLM) + "\r\n\n",
        "\ufeff" + json.dumps(RANK_LLM),
    ],
)
@pytest.mark.parametrize("compressed, name", [(False, "lists"), (True, "lists.gz"), (True, "lists")])
def test_every_shape_reads_as_the_same_candidates_whatever_the_name(tmp_path, content, compressed, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    assert read_candidates(path) == [MOAT]


@pytest.mark.parametrize(
    "doc, text",
    [
        ({"contents": "c"}, "c"),
        ({"text": "t", "title": "T"}, "T t"),
        ({"passage": "p", "title": ""}, "p"),
        ({"segment": "s", "title": None}, "s"),
        ({"body": "b", "url": "u"}, "b"),
        ({"contents": ""}, ""),
        ({"contents": "", "text": "t"}, "t"),
        ({"contents": None, "title": "T", "body": "b"}, "T b"),
        ("a plain string", "a plain string"),
        ("", ""),
    ],
)
def test_the_text_is_found_under_the_field_s_names_and_the_title_goes_first(tmp_path, doc, text):
    (tmp_path / "c").write_text(
        json.dumps({**RANK_LLM, "candidates": [{"docid": "d", "score": 1.0, "doc": doc}]})
    )
    assert read_candidates(tmp_path / "c")[0].texts == [text]


@pytest.mark.parametrize(
    "hits",
    [
        ["A moat is water.", "Bread."],
        [{"text": "A moat is water."}, {"text": "", "content": "Bread."}],
        [{"doc": "A moat is water.", "docid": None}, {"doc": {"contents": "Bread."}, "id": None}],
        [{"doc": "A moat is water.", "score": None}, "Bread."],
    ],
)
@pytest.mark.parametrize("name", ["candidates", "hits", "ctxs"])
def test_passages_without_ids_get_their_places_and_a_query_without_one_its_number(
    tmp_path, hits, name, capsys
):
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps({"query": query, name: hits}) + "\n" for query in ("moat", "bread")))
    texts, scores = ["A moat is water.", "Bread."], [1.0, 0.0]
    assert read_candidates(path) == [
        Candidates("1", "moat", ["1", "2"], texts, scores),
        Candidates("2", "bread", ["1", "2"], texts, scores),
    ]
    said = capsys.readouterr().err
    assert said == f"{path}: 2 queries have candidates without ids: their places, from 1, are taken\n"
    path.write_text(json.dumps({"qid": "own", "query": {"text": "moat"}, name: hits}))
    assert [(query.qid, query.docids) for query in read_candidates(path)] == [("own", ["1", "2"])]


def test_the_passage_s_id_may_be_inside_its_doc_and_the_query_s_under_id(tmp_path):
    hits = [
        {"score": 1, "text": "", "doc": {"id": "d1", "text": "c", "score": 7}},
        {"score": 0, "id": "d2", "docid": None, "doc": "e"},
        {"score": -1, "id": "d3", "doc": {"id": "not this", "body": "f"}},
    ]
    (tmp_path / "c").write_text(json.dumps({"id": 7, "query": "q", "hits": hits}))
    assert read_candidates(tmp_path / "c") == [
        Candidates("7", "q", ["d1", "d2", "d3"], ["c", "e", "f"], [1.0, 0.0, -1.0])
    ]


def test_queries_without_candidates_are_left_out_and_counted(tmp_path, capsys):
    path, empty = tmp_path / "lists", {"query": "zxqv", "hits": []}
    path.write_text("\n".join(map(json.dumps, [empty, RANK_LLM, {"query": {"qid": 8}, "candidates": []}])))
    assert read_candidates(path) == [MOAT]
    assert capsys.readouterr().err == f"{path}: 2 queries without candidates are left out\n"
    path.write_text(json.dumps([empty, empty]))
    with pytest.raises(InputError, match="lists: expected candidates, found only queries without any"):
        read_candidates(path)


def test_a_querys_own_id_counts_before_that_of_its_passages(tmp_path):
    (tmp_path / "c").write_text(json.dumps({**HITS, "qid": "own"}))
    assert read_candidates(tmp_path / "c")[0].qid == "own"


def spoiled(**changes):
    """RANK_LLM with its second passage changed; a change to None takes the field away."""
    hit = {**RANK_LLM["candidates"][1], **changes}
    hits = [RANK_LLM["candidates"][0], {key: value for key, value in hit.items() if value is not None}]
    return json.dumps({**RANK_LLM, "candidates": hits})


def test_a_list_without_scores_is_in_its_own_order(tmp_path):
    hits = [{"docid": name, "doc": {"text": name}} for name in ("b", "a", "c")]
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps({"query": {"qid": "1", "text": "q"}, "candidates": hits}))
    [query] = read_candidates(path)
    assert query.docids == ["b", "a", "c"] and query.scores == [2, 1, 0]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("{", "expected JSON"),
        ("3", "JSON object"),
        ("[]", "empty"),
        ("", "empty"),
        ('{"query": "q"}', '"candidates"'),
        ('{"query": "q", "hits": []}', "candidates"),
        ('{"query": "q", "hits": null}', '"hits"'),
        ('{"queries": [{"query": "q", "hits": ["t"]}]}', "one object per query"),
        ('{"query": "q", "hits": [{"docid": 1, "text": "t"}]}', "qid"),
        ('{"query": "q", "hits": [3]}', '"hits"'),
        ('{"query": {"text": "q"}, "candidates": [{"id": 1, "text": "t"}]}', "qid"),
        ('{"query": {"qid": 1}, "candidates": [{"id": 1, "text": "t"}]}', "the query's text"),
        ('{"query": {"qid": 1.5, "text": "q"}, "candidates": [{"id": 1, "text": "t"}]}', "qid"),
        ('{"query": {"qid": true, "text": "q"}, "candidates": [{"id": 1, "text": "t"}]}', "qid"),
        ('{"query": {"qid": "", "text": "q"}, "candidates": [{"id": 1, "text": "t"}]}', "ids"),
        (spoiled(docid=None), "passage 2: expected the passage's id"),
        (spoiled(docid=1.0), "passage's id"),
        (spoiled(docid="d1"), "twice"),
        (spoiled(doc={"id": 3}), "passage's text"),
        (spoiled(doc={"text": None}), "passage's text"),
        (spoiled(doc=["x"]), "passage's text"),
        ('{"qid": 1, "query": "q", "hits": [{"id": 1, "text": "t"}, "u"]}', "passage 2: expected the"),
        (json.dumps(RANK_LLM, indent=2), "expected one object per line (JSONL) or one JSON list"),
        (json.dumps(RANK_LLM) + "\n" + json.dumps(HITS, indent=1), ":2: a JSON object over several lines"),
        (json.dumps(RANK_LLM) + ",\n" + json.dumps(HITS), "expected JSON"),
        (spoiled(doc={"text": "t", "title": [3]}), "a title"),
        (spoiled(docid=""), "ids that are not empty"),
        (spoiled(score=None), "finite number"),
        (spoiled(score="1"), "finite number"),
        (spoiled(score=True), "finite number"),
        (spoiled(score=float("nan")), "finite number"),
        (spoiled(score=10**400), "finite number"),
        ("[" * 100_000, "expected JSON"),
        (json.dumps(RANK_LLM) + "\n" + json.dumps(RANK_LLM), "twice"),
    ],
)
def test_malformed_candidates_are_one_line_that_names_the_file(tmp_path, line, expected):
    path = tmp_path / "lists.jsonl"
    path.write_text(line)
    with pytest.raises(InputError) as error:
        read_candidates(path)
    assert (
        expected in str(error.value)
        and str(error.value).startswith(str(path))
        and "\n" not in str(error.value)
    )


def test_jsonl_files_with_marks_may_stand_one_after_the_other(tmp_path):
    other = {**RANK_LLM, "query": {"text": "x", "qid": 8}}
    (tmp_path / "both").write_text(f"\ufeff{json.dumps(RANK_LLM)}\n\ufeff{json.dumps(other)}\n\n\ufeff")
    assert [query.qid for query in read_candidates(tmp_path / "both")] == ["7", "8"]


def test_errors_name_the_line_of_jsonl_and_the_record_of_json(tmp_path):
    path, other = tmp_path / "lists", {**RANK_LLM, "query": {"text": "x", "qid": 8}}
    path.write_text(json.dumps(other) + "\n\n" + spoiled(score=None))
    with pytest.raises(InputError, match=r"lists:3, passage 2: "):
        read_candidates(path)
    path.write_text("[" + json.dumps(other) + "," + spoiled(score=None) + "]")
    with pytest.raises(InputError, match=r"lists: record 2, passage 2: "):
        read_candidates(path)
    path.write_bytes(b"{}\n\n\xff")
    with pytest.raises(InputError, match=r"lists:3: expected UTF-8 text, found the byte 0xff"):
        read_candidates(path)


FOREIGN = {
    "UTF-16": [
        json.dumps(RANK_LLM).encode("utf-16"),
        json.dumps(RANK_LLM).encode("utf-16-be"),
        json.dumps([RANK_LLM]).encode("utf-16-le"),
        b"\xfe\xff" + "\n[]".encode("utf-16-be"),
        gzip.compress("{}".encode("utf-16")),
        b"\xff\xfe" + "流行".encode("utf-16-le"),
        b"\xfe\xff" + "流行".encode("utf-16-be"),
    ],
    "a zip archive": [b"PK\3\4\x14\0\0\0"],
    "Parquet": [b"PAR1\x15\4\x15"],
    "zstd": [b"\x28\xb5\x2f\xfd\4"],
    "PDF": [b"%PDF-1.7\n%\xb5\xed"],
    "a Git LFS pointer": [b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 9\n"],
}


@pytest.mark.parametrize("what, content", [(what, one) for what in FOREIGN for one in FOREIGN[what]])
def test_what_is_no_text_in_utf8_is_named(tmp_path, what, content):
    (tmp_path / "lists").write_bytes(content)
    for read in (read_candidates, data.read_instances, read_qrels, data.read_run, data.read_text):
        with pytest.raises(InputError, match=f"lists: looks like {what}.*; expected text in UTF-8$"):
            read(tmp_path / "lists")


def test_a_damaged_gzip_file_is_one_line(tmp_path):
    whole = gzip.compress(json.dumps(RANK_LLM).encode())
    for content in (whole[:-9], whole[:20] + b"damage" + whole[26:], b"not compressed"):
        (tmp_path / "lists.gz").write_bytes(content)
        with pytest.raises(InputError, match="lists.gz: not a readable gzip file"):
            read_candidates(tmp_path / "lists.gz")


texts = st.text(max_size=20)  # with every odd line separator, quote and control character there is
lists = st.builds(
    lambda qid, query, hits: Candidates(
        qid, query, list(hits), [t for t, _ in hits.values()], [s for _, s in hits.values()]
    ),
    texts.filter(bool),
    texts,
    st.dictionaries(texts.filter(bool), st.tuples(texts, st.floats(-1e9, 1e9)), min_size=1, max_size=4),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(lists, min_size=1, max_size=3, unique_by=lambda query: query.qid))
def test_candidates_survive_the_round_trip(tmp_path_factory, queries):
    path = tmp_path_factory.mktemp("round") / "lists.jsonl.gz"
    write_candidates(path, queries)
    assert read_candidates(path) == queries


def test_half_a_surrogate_pair_does_not_stop_the_writer(tmp_path):
    (tmp_path / "in").write_text(spoiled(doc={"text": "broken \ud83d emoji"}))
    lists = read_candidates(tmp_path / "in")
    write_candidates(tmp_path / "out", lists)
    assert read_candidates(tmp_path / "out") == lists and lists[0].texts[1] == "broken ? emoji"


@pytest.mark.parametrize("name", ["file", "file.gz"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, name):
    write_candidates(tmp_path / name, [MOAT])

    def interrupted():
        yield make_list()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_candidates(tmp_path / name, interrupted())
    assert [path.name for path in tmp_path.iterdir()] == [name] and read_candidates(tmp_path / name) == [MOAT]


# -- what is written, and where


def write_text(path, text):
    with data.atomic_write(path) as file:
        file.write(text)


def test_a_link_stays_and_the_file_that_it_leads_to_is_written_whole(tmp_path):
    store, here = tmp_path / "store", tmp_path / "here"
    store.mkdir()
    here.mkdir()
    (store / "old").write_text("old")
    (here / "relative").symlink_to("../store/old")
    (here / "chain.gz").symlink_to(here / "relative")
    (here / "dangling").symlink_to(tmp_path / "not yet" / "new")
    for name, target in (("relative", store / "old"), ("dangling", tmp_path / "not yet" / "new")):
        with pytest.raises(KeyboardInterrupt), data.atomic_write(here / name) as file:
            file.write("half")
            assert [path.parent for path in tmp_path.rglob("*.part")] == [target.parent]
            raise KeyboardInterrupt
        assert not target.exists() or target.read_text() == "old"
        write_text(here / name, "new")
        assert (here / name).is_symlink() and target.read_text() == "new" and not target.is_symlink()
    write_text(here / "chain.gz", "packed")  # what is packed is decided by the name that was given
    assert gzip.decompress((store / "old").read_bytes()) == b"packed" and (here / "chain.gz").is_symlink()
    assert not [*tmp_path.rglob("*.part")] and len([*tmp_path.rglob("*")]) == 8


def test_a_file_keeps_its_mode(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o640)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640 and (tmp_path / "file").read_text() == "new"


def test_what_can_hold_no_file_is_one_line_and_stays_as_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "to folder").symlink_to(tmp_path / "folder")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    for name in ("folder", "to folder", "a", "file/below"):
        with pytest.raises(OSError):
            write_text(tmp_path / name, "new")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "a").is_symlink()
    assert (tmp_path / "to folder").is_symlink() and (tmp_path / "file").read_text() == "old"


def test_a_pipe_is_written_to_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # waits for no writer
    for name in ("pipe", "link"):
        write_text(tmp_path / name, "straight\n")
        assert os.read(reader, 99) == b"straight\n"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("name", ["/dev/fd/1", "log"])  # no slip of ours can replace what is in /dev/fd
def test_our_own_output_is_written_to_in_its_order_even_where_it_is_a_file(tmp_path, name):
    code = """if True:
        import sys, data
        print("before")
        with data.atomic_write(sys.argv[1]) as file:
            file.write("within\\n")
        print("after")"""
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parent), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", code, name]
    with open(tmp_path / "log", "w") as log:
        subprocess.run(command, cwd=tmp_path, env=environment, stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "before\nwithin\nafter\n"
    if name == "/dev/fd/1":
        piped = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
        assert piped.stdout == b"before\nwithin\nafter\n" and not piped.stderr


@needs_shared
def test_the_real_dl21_file_and_the_old_shape_agree():
    lists = read_candidates(SHARED / "dl21_train_dev" / "retrieve_results_dl21_top100.jsonl.gz")
    assert len(lists) == 53 and all(
        len(query.docids) == len(query.texts) == len(query.scores) == 100 for query in lists
    )
    assert lists[0].qid == "646091" and all(
        query.scores == sorted(query.scores, reverse=True) for query in lists
    )
    by_qid = {query.qid: query for query in lists}
    for old in read_candidates(SHARED / "dl21_train_dev" / "old_shape_sample.json.gz"):
        new = by_qid[old.qid]
        assert (old.query, old.docids, old.texts, old.scores) == (
            new.query,
            new.docids[:20],
            new.texts[:20],
            new.scores[:20],
        )


# -- initial state expansion


def test_a_draw_has_no_passage_twice_and_its_own_labels():
    query, qrels = make_list(), labels_of([3, 0, 1, 0, 2] * 6)
    for instance in expand([query], qrels, draws=20, size=7, order="shuffled", keep="all"):
        assert len(set(instance.docids)) == 7 and sorted(instance.ideal) == sorted(qrels["q"].values())
        assert instance.labels == [qrels["q"][docid] for docid in instance.docids]
        assert instance.texts == [query.texts[query.docids.index(docid)] for docid in instance.docids]


def test_retrieval_order_sorts_the_very_draws_that_shuffled_order_leaves_as_drawn():
    query, qrels = make_list(), labels_of([1] * 30)
    place = {docid: n for n, docid in enumerate(query.docids)}
    sorted_draws = expand([query], qrels, draws=30, keep="all")
    shuffled = expand([query], qrels, draws=30, keep="all", order="shuffled")
    assert [sorted(draw.docids, key=place.get) for draw in shuffled] == [draw.docids for draw in sorted_draws]
    assert sum(draw.docids == other.docids for draw, other in zip(shuffled, sorted_draws)) == 0


def test_every_passage_is_drawn_equally_often():
    drawn = Counter(
        docid
        for draw in expand([make_list()], labels_of([1] * 30), draws=3000, size=10, keep="all")
        for docid in draw.docids
    )
    assert len(drawn) == 30 and all(
        abs(count - 1000) < 150 for count in drawn.values()
    )  # 150 is almost 6 standard deviations


def test_draws_depend_on_the_seed_and_the_query_alone():
    a, b = make_list("a"), make_list("b")
    qrels = labels_of([1, 0] * 15, "a") | labels_of([0, 1] * 15, "b")
    alone, together, turned = expand([a], qrels), expand([a, b], qrels), expand([b, a], qrels)
    assert (
        [draw for draw in together if draw.qid == "a"]
        == alone
        == [draw for draw in turned if draw.qid == "a"]
    )
    assert [draw.docids for draw in alone] != [draw.docids for draw in together if draw.qid == "b"][
        : len(alone)
    ]
    assert expand([a], qrels, seed=1) != alone
    # The same on every machine and in every process: instances made today can be made again tomorrow.
    assert expand([a], qrels, draws=1, size=5, keep="all")[0].docids == ["d7", "d8", "d21", "d22", "d25"]


def test_filters_look_at_the_initial_order_the_best_order_or_nothing():
    query, qrels = make_list(passages=30), labels_of([1] + [0] * 29)
    everything = expand([query], qrels, keep="all")
    assert len(everything) == 100
    with_relevant = [draw for draw in everything if any(draw.labels)]
    assert 0 < len(with_relevant) < 100
    assert expand([query], qrels, keep="best", min_ndcg=0.1) == with_relevant
    assert (
        expand([query], qrels, keep="initial") == []
    )  # the relevant passage is always first: nothing to gain
    shuffled = expand([query], qrels, order="shuffled", min_ndcg=0.5)
    assert shuffled and all(0.5 <= ndcg(draw.labels, ideal=draw.ideal) < 1 for draw in shuffled)


def test_the_ideal_is_over_all_judgements_of_the_query():
    qrels = labels_of([0, 1] + [0] * 28)
    qrels["q"].update({f"unretrieved{n}": 3 for n in range(10)})  # they make every draw's NDCG@10 tiny
    assert expand([make_list()], qrels) == [] and len(expand([make_list()], qrels, min_ndcg=0.0)) > 0


def test_a_list_no_longer_than_the_draw_is_drawn_once_and_whole():
    for passages in (1, 19, 20):
        instances = expand([make_list(passages=passages)], labels_of([1] * passages), keep="all")
        assert len(instances) == 1 and instances[0].docids == [f"d{n}" for n in range(passages)]


def test_unjudged_queries_and_lists_without_anything_relevant_in_the_top_10_give_nothing():
    counts = Counter()
    lists, qrels = (
        [make_list("a"), make_list("b"), make_list("c")],
        labels_of([0] * 10 + [1] * 20, "b") | labels_of([0, 1] * 15, "c"),
    )
    assert {draw.qid for draw in expand(lists, qrels, keep="all", counts=counts)} == {"c"}
    assert counts == {"judged": 2, "found": 1, "draws": 100, "above": 100, "kept": 100}


def test_labels_are_found_for_docids_that_have_spaces():
    query = Candidates("q", "x", ["a b", "c"], ["t", "u"], [2.0, 1.0])
    assert expand([query], {"q": {"a_b": 2, "c": 1}}, keep="all")[0].labels == [2, 1]


def test_negative_labels_count_as_not_relevant():
    assert set(expand([make_list()], labels_of([-2, 1] * 15), keep="all")[0].labels) == {0, 1}


@pytest.mark.parametrize("bad", [{"order": "random"}, {"keep": "some"}, {"draws": 0}, {"size": 0}])
def test_senseless_settings_are_refused(bad):
    with pytest.raises(ValueError):
        expand([make_list()], labels_of([1] * 30), **bad)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 9)), st.sampled_from(["initial", "best", "all"]), st.integers(0, 2**64))
def test_expansion_never_leaks_a_held_out_query(held_out, keep, seed):
    lists = [make_list(str(n), 12) for n in range(10)]
    qrels = {str(n): {f"d{m}": random.Random(n * m).randrange(3) for m in range(12)} for n in range(10)}
    exclude = {str(n) for n in held_out}
    instances = expand(lists, qrels, draws=3, size=6, keep=keep, seed=seed, exclude=exclude)
    assert not {draw.qid for draw in instances} & exclude
    free = expand(lists, qrels, draws=3, size=6, keep=keep, seed=seed)
    assert instances == [
        draw for draw in free if draw.qid not in exclude
    ]  # and holding out changes no other query's draws


def test_instances_survive_the_round_trip_and_bad_ones_are_named(tmp_path):
    instances = expand([make_list()], labels_of([0, 1, 2] * 10), draws=5)
    data.write_instances(tmp_path / "i.jsonl", instances)
    assert data.read_instances(tmp_path / "i.jsonl") == instances and len(instances) == 5
    good = dataclasses.asdict(instances[0])
    for spoil in (
        {"labels": good["labels"][1:]},
        {"labels": ["1"] * 20},
        {"labels": [True] * 20},
        {"extra": 1},
        {"docids": "abc"},
        {"texts": [None] * 20},
        {"docids": [], "texts": [], "labels": []},
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | spoil))
        with pytest.raises(InputError, match="bad.jsonl:2: expected"):
            data.read_instances(tmp_path / "bad.jsonl")


def test_half_a_surrogate_pair_in_an_instance_stops_no_writer(tmp_path):
    good = dataclasses.asdict(expand([make_list()], labels_of([0, 1, 2] * 10), draws=1, keep="all")[0])
    (tmp_path / "i").write_text(json.dumps(good | {"query": "\ud83d emoji \U0001f41d"}))
    [instance], _ = training_instances([str(tmp_path / "i")])
    data.write_instances(tmp_path / "again", [instance])
    assert instance.query == "? emoji \U0001f41d" and data.read_instances(tmp_path / "again") == [instance]


@needs_shared
def test_dl21_gives_the_counts_of_the_authors_procedure():
    lists = read_candidates(SHARED / "dl21_train_dev" / "retrieve_results_dl21_top100.jsonl.gz")
    qrels = read_qrels(SHARED / "dl21_train_dev" / "qrels.dl21-passage.txt.gz")
    instances = expand(lists, qrels, counts=(counts := Counter()))
    assert (counts["judged"], counts["found"], counts["draws"]) == (53, 51, 5100)
    assert {query.qid for query in lists} - {draw.qid for draw in instances} == {"23287", "226975"}
    assert (
        counts["above"] / counts["draws"] == pytest.approx(0.857, abs=0.01)
        and len(instances) == counts["kept"] <= counts["above"]
    )
    over_the_drawn = [
        ndcg(draw.labels) >= 0.1 for draw in expand(lists, qrels, keep="all")
    ]  # the mistake: an ideal of the draw
    assert sum(over_the_drawn) / len(over_the_drawn) == pytest.approx(0.946, abs=0.01)


def test_the_command_prints_every_stage_and_holds_queries_out(tmp_path, capsys):
    write_candidates(tmp_path / "c", [make_list("a"), make_list("b")])
    (tmp_path / "q").write_text("".join(f"{qid} 0 d{n} {n % 2}\n" for qid in "ab" for n in range(30)))
    (tmp_path / "held").write_text("b 0 d1 1\n\nb 0 d2 1\n")
    command = ["expand", "--candidates", str(tmp_path / "c"), "--qrels", str(tmp_path / "q")]
    command += ["--output", str(tmp_path / "out"), "--draws", "10"]
    data.main([*command, "--exclude-queries", str(tmp_path / "held")])
    printed = capsys.readouterr().out
    assert "      1  queries with candidates and judgements\n" in printed and "     10  draws\n" in printed
    assert {draw.qid for draw in data.read_instances(tmp_path / "out")} == {"a"}
    data.main(command)
    both = data.read_instances(tmp_path / "out")
    assert both == expand([make_list("a"), make_list("b")], data.read_qrels(tmp_path / "q"), draws=10)


def test_held_out_queries_in_a_file_of_another_kind_are_refused_and_no_input_is_overwritten(tmp_path):
    write_candidates(tmp_path / "c", [make_list("a")])
    data.write_qrels(tmp_path / "q", labels_of([0, 1] * 15, "a"))
    command = ["expand", "--candidates", str(tmp_path / "c"), "--qrels", str(tmp_path / "q")]
    with pytest.raises(InputError, match="c: expected lines, a query's id first, found JSON"):
        data.main([*command, "--exclude-queries", str(tmp_path / "c")])
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    for name in ("c", "q"):
        with pytest.raises(InputError, match=f"--output .*{name}: would overwrite an input"):
            data.main([*command, "--output", str(tmp_path / name)])
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


# -- training data


def make_files(folder):
    """Candidates of queries a and b, judgements of each in a file of its own, instances of query c."""
    folder.mkdir(exist_ok=True)
    paths = {name: str(folder / name) for name in ("a.jsonl", "b.jsonl", "a.qrels", "b.qrels", "c.jsonl")}
    for qid in "ab":
        write_candidates(paths[f"{qid}.jsonl"], [make_list(qid)])
        data.write_qrels(paths[f"{qid}.qrels"], labels_of([0, 1, 2] * 10, qid))
    data.write_instances(paths["c.jsonl"], expand([make_list("c")], labels_of([0, 1] * 15, "c"), draws=7))
    return paths


def put_sets(monkeypatch, folder, **queries):
    """Table 1 as if downloaded below `folder`: dl21="a" is a list of query a and its judgements."""
    monkeypatch.setenv("REARANK_DATA", str(folder))
    for name, qid in queries.items():
        write_candidates(folder / name / "lists", [make_list(qid)])
        data.write_qrels(folder / name / "qrels", labels_of([0, 1, 2] * 10, qid))
        monkeypatch.setitem(
            data.TABLE_1, name, ("http://127.0.0.1:9/lists", "", "http://127.0.0.1:9/qrels", "", 50.0)
        )


def test_instances_are_taken_as_they_are_and_candidates_are_expanded(tmp_path):
    files = make_files(tmp_path)
    instances, what = training_instances(
        [files["c.jsonl"], files["a.jsonl"], files["b.jsonl"]],
        [files["a.qrels"], files["b.qrels"]],
        draws=5,
        size=6,
    )
    expected = data.read_instances(files["c.jsonl"])
    expected += expand(
        [make_list("a"), make_list("b")],
        labels_of([0, 1, 2] * 10, "a") | labels_of([0, 1, 2] * 10, "b"),
        draws=5,
        size=6,
    )
    assert instances == expected
    data.write_instances(tmp_path / "again", instances)
    assert what == {
        "data": [files["c.jsonl"], files["a.jsonl"], files["b.jsonl"]],
        "instances": 7 + 10,
        "queries": 3,
        "sha256": hashlib.sha256((tmp_path / "again").read_bytes()).hexdigest(),
    }


def test_judgements_of_one_query_may_stand_in_several_files(tmp_path):
    files = make_files(tmp_path)
    data.write_qrels(tmp_path / "more", {"a": {"d0": 2}})
    instances, _ = training_instances([files["a.jsonl"]], [files["a.qrels"], str(tmp_path / "more")])
    assert instances == expand([make_list("a")], {"a": labels_of([0, 1, 2] * 10, "a")["a"] | {"d0": 2}})


def test_what_was_chosen_gives_the_same_again_and_other_settings_another_hash(tmp_path, monkeypatch):
    put_sets(monkeypatch, tmp_path, dl21="a", dl22="b")
    instances, what = training_instances(["auto"], draws=5)
    assert training_instances(what["data"], draws=5) == (instances, what)
    assert training_instances(what["data"], draws=5, seed=1)[1]["sha256"] != what["sha256"]


def test_auto_is_the_authors_windows_once_they_are_there_and_says_what_is_missing_before(
    tmp_path, monkeypatch, capsys
):
    put_sets(monkeypatch, tmp_path, dl21="a", dl22="b")
    _, what = training_instances(["auto"])
    assert what["data"] == ["dl21", "dl22"] and what["queries"] == 2
    said = capsys.readouterr().err
    assert (
        "2 of the paper's 179" in said
        and "python data.py download rearank_12k" in said
        and said.count("\n") == 1
    )
    windows = expand([make_list("c")], labels_of([0, 1] * 15, "c"))
    data.write_instances(tmp_path / "rearank_12k" / "instances.jsonl", windows)
    instances, what = training_instances(["auto"])
    assert instances == windows and what["data"] == ["rearank_12k"] and capsys.readouterr().err == ""
    assert training_instances(["rearank_12k"]) == (instances, what)


def test_training_data_that_cannot_be_meant_is_refused(tmp_path, monkeypatch):
    files = make_files(tmp_path / "files")
    put_sets(monkeypatch, tmp_path, dl21="a")
    for entries, qrels, expected in (
        (["auto", "dl21"], [], "auto: expected a file, auto alone"),
        (["dl99"], [], "dl99: expected a file, auto alone, or of rearank_12k, dl19"),
        ([files["a.jsonl"]], [], "a.jsonl: expected instances, or --qrels"),
        ([files["a.jsonl"]], [files["b.qrels"]], "no instances"),
        (["dl21", files["a.jsonl"]], [files["a.qrels"]], "query a is in both dl21 and .*a.jsonl"),
        (["dl21", "dl21"], [], "query a is in both dl21 and dl21"),
        ([], [], "no instances"),
    ):
        with pytest.raises(InputError, match=expected):
            training_instances(entries, qrels)
    (tmp_path / "empty").write_text("")
    with pytest.raises(InputError, match="empty: expected instances, or --qrels"):
        training_instances([str(tmp_path / "empty")])
    for name in (str(tmp_path), "/dev/null", "-"):  # a pipe could be read only once
        with pytest.raises(InputError, match="expected a file, auto alone"):
            training_instances([name])


# -- BRIGHT


def make_bright(folder, split="leetcode", run="0 Q0 a_b 1 3.0 t\n0 Q0 c 2 2.0 t\n0 Q0 d/e 3 1.0 t\n"):
    """The layout of the authors' archive: a split of three documents, one of which has a space in its id."""
    root = folder / "data" / "bright"
    corpus = "".join(
        json.dumps({"id": docid, "contents": f"text of {docid}"}) + "\n" for docid in ("a b", "c", "d/e")
    )
    files = {
        f"data/pyserini_queries/{split}.tsv": "0\thow\tto sort\n",
        f"data/pyserini_corpus/{split}/{split}.jsonl": corpus,
        f"data/pyserini_qrels/{split}.tsv": "0\t0\ta b\t1\n0\t0\tc\t1\n",
        f"runs_bm25/bm25.{split}.filtered.trec": run,
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return folder


def test_excluded_documents_leave_before_the_cut(tmp_path):
    folder = make_bright(tmp_path)
    assert data.read_bright("leetcode", folder, k=2)[0].docids == ["a_b", "c"]
    (folder / "exclude.bright-leetcode.txt").write_text("0 a b\n")
    lists = data.read_bright("leetcode", folder, k=2)
    assert lists == [Candidates("0", "how\tto sort", ["c", "d/e"], ["text of c", "text of d/e"], [2.0, 1.0])]


def test_docids_with_spaces_survive_from_corpus_to_evaluation(tmp_path):
    folder = make_bright(tmp_path)
    lists = data.read_bright("leetcode", folder)
    assert lists[0].docids[0] == "a_b" and lists[0].texts[0] == "text of a b"
    data.write_run(tmp_path / "runs" / "leetcode.trec", {query.qid: query.docids for query in lists}, "test")
    qrels, run = (
        read_qrels(data.bright_file(folder, "leetcode", "qrels")),
        data.read_run(tmp_path / "runs" / "leetcode.trec"),
    )
    assert evaluate(qrels, run, ["ndcg_cut.10"]) == {"0": {"ndcg_cut_10": 1.0}}


def test_equal_scores_are_ordered_by_docid_descending_as_trec_eval_does(tmp_path):
    run = "".join(f"0 Q0 {docid} 1 {score} t\n" for docid, score in (("a_b", 1.0), ("d/e", 1.0), ("c", 1.0)))
    assert data.read_bright("leetcode", make_bright(tmp_path, run=run))[0].docids == ["d/e", "c", "a_b"]


def test_both_forms_of_the_exclusions_are_read(tmp_path):
    (tmp_path / "pairs").write_text("0 a b\n\n0\tc\n1 d\n")
    rows = [
        {"id": "0", "excluded_ids": ["a b", "c"]},
        {"id": 1, "excluded_ids": ["d"]},
        {"id": "2", "excluded_ids": ["N/A"]},
        {"id": "3", "excluded_ids": []},
    ]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
    assert (
        data.read_excluded(tmp_path / "pairs")
        == data.read_excluded(tmp_path / "rows")
        == {"0": {"a_b", "c"}, "1": {"d"}}
    )
    for bad in ("0 a\n1\n", '{"id": "0", "excluded_ids": ["a"]}\n{"id": "1", "excluded_ids": "N/A"}'):
        (tmp_path / "bad").write_text(bad)
        with pytest.raises(InputError, match="bad:2: expected"):
            data.read_excluded(tmp_path / "bad")


def test_what_is_missing_or_ambiguous_is_said(tmp_path):
    folder = make_bright(tmp_path, run="0 Q0 z 1 3.0 t\n")
    for arguments, expected in (
        (("chess", folder), "no queries of BRIGHT's chess"),
        (("leetcode", folder), "'z' is not in"),
        (("pony", folder), "no queries of BRIGHT's pony .python data.py download bright"),
        (("pony", tmp_path / "x"), "expected a folder"),
    ):
        with pytest.raises(InputError, match=expected):
            data.read_bright(*arguments)
    for name in ("first", "second"):
        (tmp_path / f"{name}.pony.trec").write_text("")
    with pytest.raises(InputError, match="could both be the run of pony"):
        data.bright_file(tmp_path, "pony", "run")


def test_the_split_files_are_written_for_the_reranker(tmp_path, capsys):
    data.main(
        [
            "bright",
            "--folder",
            str(make_bright(tmp_path)),
            "--output",
            str(tmp_path / "out"),
            "--splits",
            "leetcode",
        ]
    )
    assert read_candidates(tmp_path / "out" / "leetcode.jsonl") == data.read_bright("leetcode", tmp_path)


@needs_shared
def test_the_real_exclusions_and_judgements_are_exact():
    folder = SHARED / "bright"
    excluded = data.read_excluded(folder / "exclude.bright-leetcode.txt.gz")
    assert (
        len(excluded) == 142
        and sum(map(len, excluded.values())) == 33_485
        and max(map(len, excluded.values())) == 1119
    )
    assert excluded == data.read_excluded(folder / "topics.bright-leetcode-original.jsonl.gz")
    for split, queries, plain, fixed in (
        ("biology", 103, 372, 393),
        ("leetcode", 142, None, None),
        ("theoremqa-theorems", 76, None, None),
    ):
        assert len(dict(data.read_pairs(data.bright_file(folder, split, "queries")))) == queries
        judged = read_qrels(data.bright_file(folder, split, "qrels"))
        assert len(judged) == queries and plain in (None, sum(map(len, judged.values())))
        corrected = read_qrels(data.bright_file(folder, split, "fixed qrels"))
        assert len(corrected) == queries and fixed in (None, sum(map(len, corrected.values())))
        if split != "leetcode":
            assert data.read_excluded(data.bright_file(folder, split, "exclude")) == {}
        else:  # no query's answer is among its excluded documents
            assert not any(excluded[qid] & set(docids) for qid, docids in judged.items())


def test_without_a_command_the_usage_is_printed_and_a_wrong_one_is_refused(capsys):
    assert data.main([]) == 0 and "python data.py download" in capsys.readouterr().out
    with pytest.raises(InputError, match="no command 'fetch': expected download"):
        data.main(["fetch"])
    with pytest.raises(InputError, match="no command 'download': expected download NAMES"):
        data.main(["download"])
    with pytest.raises(SystemExit):
        data.main(["bright", "--splits", "chess"])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_number_out_of_bounds_is_one_line_and_status_2(capsys):
    @dataclasses.dataclass
    class Settings:
        max_rows: int = data.setting(3, "Rows.", least=1)

    assert data.command_line(Settings, ["--max-rows", "1"]).max_rows == 1
    with pytest.raises(SystemExit) as left:
        data.command_line(Settings, ["--max-rows", "0"], prog="x")
    assert (
        left.value.code == 2
        and capsys.readouterr().err == "x: error: argument --max-rows: expected at least 1, found 0\n"
    )
