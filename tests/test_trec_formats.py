"""TREC qrels and runs (data.py): read as trec_eval reads them, written so that no reader can misread them."""

import gzip
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.cli import InputError
from support.files import check_run, read_qrels, read_run, read_trec, trec_id, write_qrels, write_run

# What an id may be: anything but ASCII white space and zero bytes (control characters and U+00A0 may be).
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
        ("run", " 1 Q0 a 1 2.0\n", 1),  # as much white space as a good line has, fewer fields
        ("run", "1 Q0 a\x01b 1 2.0\n", 1),
        ("run", "1\n2 Q0 a 1 2.0\n", 1),
        ("run", "1 Q0 a 1 2.0\n1 Q0 b 2 1.0 t x\n", 1),
        ("run", "# c\n\n1 Q0 a 1 2.0 t\n\n1 Q0 b 2 high t\n", 5),  # no number; skipped lines count
        ("run", "1 Q0 a 1 nan t\n", 1),
        ("run", "1 Q0 a 1 1_000 t\n", 1),  # a number to Python only
        ("run", "1 Q0 a 1 2.0 t\n1 Q0 b 2 1.0 t\n1 Q0 a 3 0.5 t\n", 3),  # a document twice
        ("run", "1 Q0 a\0b 1 2.0 t\n", 1),
        ("run", "1 Q0 a 1 2.0 t\r2 Q0 b 1 2.0 t\r", 1),  # all in one line, for us as for trec_eval
        ("qrels", "1 0 a 1\r1 0 b 1\r", 1),
        ("run", "", 1),
        ("run", "# only a comment\n", 1),
        ("qrels", "1 0 a 1\n1 0 b\n", 2),
        ("qrels", "1 0 a 1\n1 0 b 1 x\n", 2),  # five fields
        ("qrels", "1 0 a 1\n\n1 0 b 1\n", 2),  # trec_eval wants no blank lines in qrels
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
