"""support/files.py: TREC judgements and runs, candidates and training instances.

TREC files are read as trec_eval reads them. Written files read back the same. Errors name file and line.
"""

import dataclasses
import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.cli import InputError
from support.files import (Candidates, Instance, check_run, read_candidates, read_instances, read_qrels,
                           read_run, read_trec, trec_id, write_candidates, write_instances, write_qrels,
                           write_run)
from support.streams import read_text

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real files of ../shared/data are not here")


# --- TREC judgements and runs

# Ids hold anything except ASCII white space and zero bytes (control characters and U+00A0 are allowed).
names = st.text(
    st.characters(exclude_characters=" \t\n\v\f\r\0", exclude_categories=("Cs",)), min_size=1, max_size=30
)

scores = st.one_of(
    st.floats(allow_nan=False),
    st.integers(-(10**6), 10**6).map(float),
    st.floats(-99, 99).map(lambda x: round(x, 6)),
)

blanks = st.text(" \t\r\v\f", min_size=1, max_size=3)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(
        st.tuples(names.filter(lambda qid: qid[0] != "#"), names, scores, blanks),
        min_size=1,
        max_size=20,
        unique_by=lambda line: line[:2],
    ),
    last_newline=st.booleans(),
)
def test_a_run_reads_as_python_would_split_it(tmp_path_factory, lines, last_newline):
    text = (
        "\n".join(f"{qid}{b}Q0{b}{docid}{b}1{b}{score!r}{b}tag{b}" for qid, docid, score, b in lines)
        + "\n" * last_newline
    )
    run = read_run(write(tmp_path_factory.mktemp("run") / "run.txt", text))
    expected = {}
    for qid, docid, score, _ in lines:
        expected.setdefault(qid, {})[docid] = score
    assert run == expected
    assert [*run] == [*expected] and all([*run[qid]] == [*expected[qid]] for qid in run), (
        "not in the file's order"
    )


def test_gz_comments_blank_lines_and_crlf(tmp_path):
    text = (
        b"# made by hand\r\n\r\n   \n  1 Q0 d1 1 2.5 tag\r\n1\tQ0\td2\t2\t-1e-3\ttag one more\n"
        b"#1 Q0 d3 3 0 tag\n2 0 d1 x inf y"
    )
    expected = {"1": {"d1": 2.5, "d2": -0.001}, "2": {"d1": float("inf")}}
    table = read_trec(write(tmp_path / "run.txt.gz", gzip.compress(text)), "run")
    assert table == {b"1": {b"d1": 2.5, b"d2": -0.001}, b"2": {b"d1": float("inf")}}
    assert read_run(write(tmp_path / "run.txt", text.replace(b" one more", b""))) == expected


def test_lines_of_the_right_width_that_are_comments_and_lines_of_the_wrong_one_that_count(tmp_path):
    for line in ("# is no query here now", "", "1 Q0 a 1 2.0 t and six more fields of it"):
        table = read_trec(write(tmp_path / "run", f"{line}\n2 Q0 b 1 2.0 t\n"), "run")
        assert [*table] == [b"1", b"2"][not line.startswith("1") :] and table[b"2"] == {b"b": 2.0}


def test_queries_may_be_interleaved(tmp_path):
    path = write(tmp_path / "run", "1 Q0 a 1 3 t\n2 Q0 a 1 2 t\n1 Q0 b 2 1 t\n")
    assert read_run(path) == {"1": {"a": 3.0, "b": 1.0}, "2": {"a": 2.0}}
    with pytest.raises(InputError, match=":4: "):
        read_run(write(path, path.read_text() + "2 Q0 a 4 0.1 t\n"))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_byte_order_mark_at_the_head_belongs_to_no_id(tmp_path, compressed):
    def write_marked(name, text):
        content = b"\xef\xbb\xbf" + text.encode()
        return write(
            tmp_path / (name + ".gz" * compressed), gzip.compress(content) if compressed else content
        )

    assert read_qrels(write_marked("qrels", "1 0 a 1\n")) == {"1": {"a": 1}}
    assert read_trec(write_marked("run", "1 Q0 a 1 2.5 t\n"), "run") == {b"1": {b"a": 2.5}}
    assert read_run(write_marked("commented", "# a comment\n1 Q0 a 1 2.5 t\n")) == {"1": {"a": 2.5}}
    with pytest.raises(InputError, match=":1: expected"):
        read_qrels(write_marked("nothing", ""))
    assert read_qrels(write_marked("inside", "1 0 a 1\n\ufeff1 0 a 1\n"))["\ufeff1"] == {"a": 1}


def test_qrels_have_integer_labels_below_zero_too(tmp_path):
    assert read_qrels(write(tmp_path / "qrels", "1 0 a 3\n2 0 a -1\n1 Q0 b +2\n")) == {
        "1": {"a": 3, "b": 2},
        "2": {"a": -1},
    }


@pytest.mark.parametrize(
    "kind, text, line",
    [
        ("run", "1 Q0 a 1 2.0 t\n1 Q0 b 2 1.0\n", 2),  # five fields
        ("run", "1  Q0 a 1 2.0\n", 1),
        ("run", " 1 Q0 a 1 2.0\n", 1),  # as many blanks as a good line, fewer fields
        ("run", "1 Q0 a\x01b 1 2.0\n", 1),
        ("run", "1\n2 Q0 a 1 2.0\n", 1),
        ("run", "1 Q0 a 1 2.0\n1 Q0 b 2 1.0 t x\n", 1),
        ("run", "# c\n\n1 Q0 a 1 2.0 t\n\n1 Q0 b 2 high t\n", 5),  # not a number; skipped lines are counted
        ("run", "1 Q0 a 1 nan t\n", 1),
        ("run", "1 Q0 a 1 1_000 t\n", 1),  # only Python reads it as a number
        ("run", "1 Q0 a 1 2.0 t\n1 Q0 b 2 1.0 t\n1 Q0 a 3 0.5 t\n", 3),  # a document twice
        ("run", "1 Q0 a\0b 1 2.0 t\n", 1),
        ("run", "1 Q0 a 1 2.0 t\r2 Q0 b 1 2.0 t\r", 1),  # \r ends no line, as in trec_eval
        ("qrels", "1 0 a 1\r1 0 b 1\r", 1),
        ("run", "", 1),
        ("run", "# only a comment\n", 1),
        ("qrels", "1 0 a 1\n1 0 b\n", 2),
        ("qrels", "1 0 a 1\n1 0 b 1 x\n", 2),  # five fields
        ("qrels", "1 0 a 1\n\n1 0 b 1\n", 2),  # trec_eval accepts no blank lines in qrels
        ("qrels", "# c\n1 0 a 1.0\n", 2),
        ("qrels", "1 0 a 1_0\n", 1),
        ("qrels", "1 0 a 9223372036854775808\n", 1),
        ("qrels", "1 0 a -9223372036854775809\n", 1),
        ("qrels", "1 0 a " + "9" * 5000 + "\n", 1),
        ("qrels", "1 0 a\0b 1\n", 1),
        ("qrels", "1 0 a 1\n2 0 a 1\n1 1 a 0\n", 3),
    ],
)
def test_bad_lines_are_named(tmp_path, kind, text, line):
    path = write(tmp_path / "bad.txt", text)
    with pytest.raises(InputError) as error:
        read_trec(path, kind)
    assert str(error.value).startswith(f"{path}:{line}: expected") and "\n" not in str(error.value)


def test_lines_that_end_in_a_carriage_return_alone_are_no_docid_with_spaces(tmp_path):
    for read, text in ((read_run, "1 Q0 a 1 2.0 t\r2 Q0 b 1 1.0 t\r"), (read_qrels, "1 0 a 1\r1 0 b 1\r")):
        with pytest.raises(InputError, match="mac:1: expected"):
            read(write(tmp_path / "mac", text))


def test_a_damaged_gzip_file_is_bad_input(tmp_path):
    whole = gzip.compress(b"1 Q0 a 1 2.0 t\n" * 1000)
    for damaged in (
        whole[: len(whole) // 2],
        b"1 Q0 a 1 2.0 t\n",
        whole[:12] + bytes([whole[12] ^ 255]) + whole[13:],
    ):
        with pytest.raises(InputError, match="gzip"):
            read_run(write(tmp_path / "run.gz", damaged))


def test_a_written_run_comes_back_in_its_order_and_with_strictly_falling_scores(tmp_path):
    ranking = {"10": ["b", "a", "c"], "9": ["é", "中"], "none": []}
    write_run(tmp_path / "run.txt", ranking, "tag")
    assert (tmp_path / "run.txt").read_text("utf-8").splitlines()[:2] == [
        "10 Q0 b 1 2 tag",
        "10 Q0 a 2 1 tag",
    ]
    run = read_run(tmp_path / "run.txt")
    assert {qid: [*docids] for qid, docids in run.items()} == {"10": ["b", "a", "c"], "9": ["é", "中"]}
    assert all(sorted(set(docids.values()), reverse=True) == [*docids.values()] for docids in run.values())


def test_docids_with_spaces_survive_the_round_trip(tmp_path):
    docid = "insects/Red wood ant_12.txt"
    write_run(tmp_path / "run.txt", {"1": [docid, "other"]}, "tag")
    foreign = write(tmp_path / "foreign.txt", f"1 Q0 {docid} 1 7.5 tag\n1 Q0 other 2 3.5 tag\n")
    qrels = write(tmp_path / "qrels.txt", f"1 0 {docid} 1\n")
    assert trec_id(docid) == "insects/Red_wood_ant_12.txt" and trec_id(" a \t b\u00a0c ") == "a_b\u00a0c"
    assert [*read_run(tmp_path / "run.txt")["1"]] == [*read_run(foreign)["1"]] == [trec_id(docid), "other"]
    assert read_run(foreign)["1"]["other"] == 3.5 and read_qrels(qrels) == {"1": {trec_id(docid): 1}}


@pytest.mark.parametrize(
    "ranking, tag",
    [
        ({"1": ["a b", "a_b"]}, "t"),
        ({"1": ["a", "a"]}, "t"),
        ({"q 1": ["a"]}, "t"),
        ({"": ["a"]}, "t"),
        ({"#1": ["a"]}, "t"),
        ({"1": [" "]}, "t"),
        ({"1": ["a\0"]}, "t"),
        ({"1": ["a"]}, "two words"),
    ],
)
def test_what_a_run_cannot_hold_is_refused_and_nothing_is_written(tmp_path, ranking, tag):
    with pytest.raises(InputError):
        write_run(tmp_path / "run.txt", ranking, tag)
    assert not [*tmp_path.iterdir()]
    write_run(
        tmp_path / "run.txt", {"1": ["a b", "a\u00a0b"]}, "t"
    )  # only ASCII white space separates fields
    assert [*read_run(tmp_path / "run.txt")["1"]] == ["a_b", "a\u00a0b"]


def test_ids_that_are_not_utf8_are_kept(tmp_path):
    path = write(tmp_path / "run.txt", b"1 Q0 caf\xe9 1 2.0 t\n1 Q0 caf\xc3\xa9 2 1.0 t\n")
    write_run(tmp_path / "again.txt", {qid: [*docids] for qid, docids in read_run(path).items()}, "t")
    assert (
        b"caf\xe9 1" in (tmp_path / "again.txt").read_bytes()
        and b"caf\xc3\xa9 2" in (tmp_path / "again.txt").read_bytes()
    )


def test_the_check_before_long_work_refuses_what_the_writer_would(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        check_run(tmp_path, {"1": ["a"]}, "t")
    with pytest.raises(InputError, match="query 1 has two documents 'a_b'"):
        check_run(tmp_path / "run", {"0": ["c"], "1": ["c", "a b", "a_b"]}, "t")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to("pipe")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("pipe", "to pipe", "circle", "new folder/"):
        with pytest.raises(InputError, match=f"{name}: is a folder, a pipe or a device; expected the name"):
            check_run(f"{tmp_path}/{name}", {"1": ["a"]}, "t")
    (tmp_path / "dangling").symlink_to("not yet")
    for name in ("run", "dangling"):
        check_run(tmp_path / name, {"1": ["a", "b"], "2": ["a"]}, "t")


def test_a_run_is_written_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "store" / "run")
    write_run(tmp_path / "link", {"1": ["a"]}, "t")
    assert (tmp_path / "link").is_symlink() and read_run(tmp_path / "store" / "run") == {"1": {"a": 0.0}}


def test_written_judgements_come_back(tmp_path):
    qrels = {"1": {"a b": 3, "\udce9": -1}, "2": {"c": 0}}
    write_qrels(tmp_path / "qrels.gz", qrels)
    assert read_qrels(tmp_path / "qrels.gz") == {"1": {"a_b": 3, "\udce9": -1}, "2": {"c": 0}}


# --- candidates


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
        ({"contents": "", "title": "T"}, "T"),
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
    """RANK_LLM as JSON, with fields of its second passage changed. None removes a field."""
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
    path.write_text("\n[\n\n]\n" + json.dumps([other], indent=1) + "\n" + spoiled(score=None))
    with pytest.raises(InputError, match=rf"lists:{path.read_text().count(chr(10)) + 1}, passage 2: "):
        read_candidates(path)
    path.write_bytes(b"{}\n\n\xff")
    with pytest.raises(InputError, match=r"lists:3: expected UTF-8 text, found the byte 0xff"):
        read_candidates(path)


texts = st.text(max_size=20)  # includes unusual line separators, quotes and control characters

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


# --- training instances


def test_instances_survive_the_round_trip_and_bad_ones_are_named(tmp_path):
    instances = [Instance("q", "rain", ["a", "b"], ["x", f"y\u2028{n}"], [0, n], [n, 0, 3]) for n in range(5)]
    write_instances(tmp_path / "i.jsonl", instances)
    assert read_instances(tmp_path / "i.jsonl") == instances
    good = dataclasses.asdict(instances[0])
    for spoil in (
        {"labels": good["labels"][1:]},
        {"labels": ["1"] * 2},
        {"labels": [True] * 2},
        {"extra": 1},
        {"docids": "ab"},
        {"texts": [None] * 2},
        {"docids": [], "texts": [], "labels": []},
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | spoil))
        with pytest.raises(InputError, match="bad.jsonl:2: expected"):
            read_instances(tmp_path / "bad.jsonl")


# --- text and streams


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
    for read in (read_candidates, read_instances, read_qrels, read_run, read_text):
        with pytest.raises(InputError, match=f"lists: looks like {what}.*; expected text in UTF-8$"):
            read(tmp_path / "lists")


def test_a_trec_run_given_as_candidates_is_recognised(tmp_path):
    (tmp_path / "run").write_text("q1 Q0 d1 1 2.5 bm25\nq1 Q0 d2 2 1.5 bm25\n")
    with pytest.raises(InputError, match="run:1: looks like a TREC run, which has no texts; expected JSON"):
        read_candidates(tmp_path / "run")
