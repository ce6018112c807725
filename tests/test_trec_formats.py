"""Reading and writing TREC qrels and runs (data.py)."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import InputError, read_qrels, read_run, read_trec, trec_id, write_run

# What an id may be: anything but ASCII white space and zero bytes. Control characters and blanks of other alphabets are allowed.
names = st.text(st.characters(exclude_characters=" \t\n\v\f\r\0", exclude_categories=("Cs",)), min_size=1, max_size=30)
scores = st.one_of(st.floats(allow_nan=False), st.integers(-10**6, 10**6).map(float), st.floats(-99, 99).map(lambda x: round(x, 6)))
blanks = st.text(" \t\r\v\f", min_size=1, max_size=3)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.tuples(names.filter(lambda qid: qid[0] != "#"), names, scores, blanks), min_size=1, max_size=20,
                      unique_by=lambda line: line[:2]), last_newline=st.booleans())
def test_a_run_reads_as_python_would_split_it(tmp_path_factory, lines, last_newline):
    text = "\n".join(f"{qid}{b}Q0{b}{docid}{b}1{b}{score!r}{b}tag{b}" for qid, docid, score, b in lines) + "\n" * last_newline
    run = read_run(write(tmp_path_factory.mktemp("run") / "run.txt", text))
    expected = {}
    for qid, docid, score, _ in lines:
        expected.setdefault(qid, {})[docid] = score
    assert run == expected
    assert [*run] == [*expected] and all([*run[qid]] == [*expected[qid]] for qid in run), "not in the file's order"


def test_regular_and_irregular_lines_mix_over_many_chunks(tmp_path):
    lines, expected = [], {}
    for n in range(60_000):                                                    # about two chunks of the reader
        qid, docid, blank = f"q{n // 700}", f"d{n}" + "x" * (40 * (n == 50_000)), "  " if n == 3 else " "
        lines.append(f"{qid} Q0{blank}{docid} 1 {1000 - n % 700}.25 tag\n" + "# a comment\n" * (n == 40_000))
        expected.setdefault(qid, {})[docid] = 1000.25 - n % 700
    assert sum(map(len, lines)) > 1.2 * 2**20
    assert read_run(write(tmp_path / "run.txt", "".join(lines))) == expected


def test_packed_ids_sort_as_their_bytes():
    ids = ["a", "aa", "b", "é", "z" * 8, "z" * 9, "z" * 8 + "a", "\x01", "中", "a\x01", "12345678", "123456789"]
    packed = data.pack_ids([name.encode() for name in ids])
    order = np.lexsort(packed[::-1])
    assert [ids[n] for n in order] == sorted(ids, key=str.encode)
    assert data.unpack_ids(packed) == [name.encode() for name in ids]


def test_gz_comments_blank_lines_and_crlf(tmp_path):
    text = b"# made by hand\r\n\r\n   \n  1 Q0 d1 1 2.5 tag\r\n1\tQ0\td2\t2\t-1e-3\ttag one more\n#1 Q0 d3 3 0 tag\n2 0 d1 x inf y"
    expected = {"1": {"d1": 2.5, "d2": -0.001}, "2": {"d1": float("inf")}}
    table = read_trec(write(tmp_path / "run.txt.gz", gzip.compress(text)), "run")
    assert table.qids == [b"1", b"2"] and table.values.tolist() == [2.5, -0.001, float("inf")]
    assert data.unpack_ids(table.docids) == [b"d1", b"d2", b"d1"]
    assert read_run(write(tmp_path / "run.txt", text.replace(b" one more", b""))) == expected


def test_lines_that_look_regular_and_are_not(tmp_path):
    for line in ("# is no query here now", "", "1 Q0 a 1 2.0 t and six more fields of it"):        # six fields, none, twice six
        table = read_trec(write(tmp_path / "run", f"{line}\n2 Q0 b 1 2.0 t\n"), "run")
        assert table.qids == [b"1", b"2"][not line.startswith("1"):] and data.unpack_ids(table.docids)[-1] == b"b"


def test_qrels_have_integer_labels_below_zero_too(tmp_path):
    assert read_qrels(write(tmp_path / "qrels", "1 0 a 3\n2 0 a -1\n1 Q0 b +2\n")) == {"1": {"a": 3, "b": 2}, "2": {"a": -1}}


@pytest.mark.parametrize("kind, text, line", [
    ("run", "1 Q0 a 1 2.0 t\n1 Q0 b 2 1.0\n", 2),                              # five fields
    ("run", "1  Q0 a 1 2.0\n", 1), ("run", " 1 Q0 a 1 2.0\n", 1),               # as much white space as a good line has, fewer fields
    ("run", "1 Q0 a\x01b 1 2.0\n", 1), ("run", "1\n2 Q0 a 1 2.0\n", 1), ("run", "1 Q0 a 1 2.0\n1 Q0 b 2 1.0 t x\n", 1),
    ("run", "# c\n\n1 Q0 a 1 2.0 t\n\n1 Q0 b 2 high t\n", 5),                  # no number; skipped lines count
    ("run", "1 Q0 a 1 nan t\n", 1),
    ("run", "1 Q0 a 1 1_000 t\n", 1),                                          # a number to Python only
    ("run", "1 Q0 a 1 2.0 t\n1 Q0 b 2 1.0 t\n1 Q0 a 3 0.5 t\n", 3),            # a document twice
    ("run", "1 Q0 a\0b 1 2.0 t\n", 1),
    ("run", "", 1),
    ("run", "# only a comment\n", 1),
    ("qrels", "1 0 a 1\n1 0 b\n", 2),
    ("qrels", "1 0 a 1\n1 0 b 1 x\n", 2),                                      # five fields
    ("qrels", "1 0 a 1\n\n1 0 b 1\n", 2),                                      # trec_eval wants no blank lines in qrels
    ("qrels", "# c\n1 0 a 1.0\n", 2),
    ("qrels", "1 0 a 1_0\n", 1),
    ("qrels", "1 0 a 99999999999999999999\n", 1),
    ("qrels", "1 0 a 1\n2 0 a 1\n1 1 a 0\n", 3),
])
def test_bad_lines_are_named(tmp_path, kind, text, line):
    path = write(tmp_path / "bad.txt", text)
    with pytest.raises(InputError) as error:
        read_trec(path, kind)
    assert str(error.value).startswith(f"{path}:{line}: expected") and "\n" not in str(error.value)


def test_a_damaged_gzip_file_is_bad_input(tmp_path):
    whole = gzip.compress(b"1 Q0 a 1 2.0 t\n" * 1000)
    for damaged in (whole[: len(whole) // 2], b"1 Q0 a 1 2.0 t\n", whole[:12] + bytes([whole[12] ^ 255]) + whole[13:]):
        with pytest.raises(InputError, match="gzip"):
            read_run(write(tmp_path / "run.gz", damaged))


def test_duplicates_are_found_by_the_pair_and_not_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "pair_keys", lambda query, docids, salt=0: np.zeros(len(query), np.uint64))
    text = "1 Q0 a 1 2.0 t\n1 Q0 b 2 1.0 t\n2 Q0 a 3 0.5 t\n"
    assert len(read_run(write(tmp_path / "run", text))) == 2
    with pytest.raises(InputError, match=":4: "):
        read_run(write(tmp_path / "run", text + "2 Q0 a 4 0.1 t\n"))


def test_a_written_run_comes_back_in_its_order_and_with_strictly_falling_scores(tmp_path):
    ranking = {"10": ["b", "a", "c"], "9": ["é", "中"], "none": []}
    write_run(tmp_path / "run.txt", ranking, "tag")
    assert (tmp_path / "run.txt").read_text("utf-8").splitlines()[:2] == ["10 Q0 b 1 2 tag", "10 Q0 a 2 1 tag"]
    run = read_run(tmp_path / "run.txt")
    assert {qid: [*docids] for qid, docids in run.items()} == {"10": ["b", "a", "c"], "9": ["é", "中"]}
    assert all(np.all(np.diff([*docids.values()]) < 0) for docids in run.values())


def test_docids_with_spaces_survive_the_round_trip(tmp_path):
    docid = "insects/Red wood ant_12.txt"
    write_run(tmp_path / "run.txt", {"1": [docid, "other"]}, "tag")
    foreign = write(tmp_path / "foreign.txt", f"1 Q0 {docid} 1 7.5 tag\n1 Q0 other 2 3.5 tag\n")
    qrels = write(tmp_path / "qrels.txt", f"1 0 {docid} 1\n")
    assert trec_id(docid) == "insects/Red_wood_ant_12.txt" and trec_id(" a \t b\u00a0c ") == "a_b\u00a0c"
    assert [*read_run(tmp_path / "run.txt")["1"]] == [*read_run(foreign)["1"]] == [trec_id(docid), "other"]
    assert read_run(foreign)["1"]["other"] == 3.5 and read_qrels(qrels) == {"1": {trec_id(docid): 1}}


@pytest.mark.parametrize("ranking, tag", [({"1": ["a b", "a_b"]}, "t"), ({"1": ["a", "a"]}, "t"), ({"q 1": ["a"]}, "t"), ({"": ["a"]}, "t"),
                                          ({"#1": ["a"]}, "t"), ({"1": [" "]}, "t"), ({"1": ["a\0"]}, "t"), ({"1": ["a"]}, "two words")])
def test_what_a_run_cannot_hold_is_refused_and_nothing_is_written(tmp_path, ranking, tag):
    with pytest.raises(InputError):
        write_run(tmp_path / "run.txt", ranking, tag)
    assert not [*tmp_path.iterdir()]
    write_run(tmp_path / "run.txt", {"1": ["a b", "a\u00a0b"]}, "t")            # only ASCII white space separates fields
    assert [*read_run(tmp_path / "run.txt")["1"]] == ["a_b", "a\u00a0b"]


def test_ids_that_are_not_utf8_are_kept(tmp_path):
    path = write(tmp_path / "run.txt", b"1 Q0 caf\xe9 1 2.0 t\n1 Q0 caf\xc3\xa9 2 1.0 t\n")
    write_run(tmp_path / "again.txt", {qid: [*docids] for qid, docids in read_run(path).items()}, "t")
    assert b"caf\xe9 1" in (tmp_path / "again.txt").read_bytes() and b"caf\xc3\xa9 2" in (tmp_path / "again.txt").read_bytes()
