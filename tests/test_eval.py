"""eval.py: exactly the numbers and the output of trec_eval, and statistics checked by hand."""

import gzip
import itertools
import json
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as trec
from data import BRIGHT_SPLITS
from eval import bootstrap_interval, evaluate, parse_measures, randomisation_test
from reward import ndcg
from support.cli import InputError

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
PLAIN = [
    "num_ret",
    "num_rel",
    "num_rel_ret",
    "map",
    "bpref",
    "recip_rank",
    "P",
    "recall",
    "ndcg",
    "ndcg_cut",
    "map_cut",
    "success",
]
CUT = ["P.1,3,7", "recall.1,2,50", "ndcg_cut.1,3,4", "map_cut.2,3", "success.3"]


def generated_case(rng: random.Random) -> tuple[dict, dict]:
    """Random judgements and a run, with ties, missing queries, negative labels and unjudged documents."""
    starts = ["d", "é", "msmarco_passage_0", "Z", "中", "x.", "longer-than-two-words-"]
    pool = [rng.choice(starts) + str(rng.randrange(30)) for _ in range(40)]
    qrels, run = {}, {}
    for qid in rng.sample(["1", "2", "10", "qé", "a", "b9", "9"], rng.randrange(2, 7)):
        if rng.random() < 0.9:
            qrels[qid] = {
                docid: rng.choice([-2, -1, 0, 0, 1, 1, 2, 3, 5])
                for docid in rng.sample(pool, rng.randrange(1, 40))
            }
            qrels[qid][rng.choice(pool)] = 0  # trec_eval reads wrong memory if all labels are negative
        if rng.random() < 0.9:
            docids = rng.sample(pool, rng.randrange(1, 40))
            scores = [rng.choice([rng.uniform(-3, 3), rng.randrange(4), -0.0]) for _ in docids]
            run[qid] = dict(zip(docids, map(float, np.float32(scores))))
    return qrels, run


def of_pytrec_eval(qrels: dict, run: dict, measures: list[str], level: int) -> dict:
    """pytrec_eval's {qid: {measure: value}}. Name a measure once: it keeps one list of cutoffs for each."""
    if not set(qrels) & set(run):
        return {}
    return pytrec_eval.RelevanceEvaluator(qrels, set(measures), relevance_level=level).evaluate(run)


@pytest.mark.parametrize("measures", [PLAIN, CUT], ids=["default cutoffs", "chosen cutoffs"])
def test_every_measure_equals_pytrec_eval_on_two_thousand_cases(measures):
    rng, compared = random.Random(7), 0
    for _ in range(1000):
        (qrels, run), level = generated_case(rng), rng.choice([1, 1, 1, 2, 3])
        ours, theirs = evaluate(qrels, run, measures, level), of_pytrec_eval(qrels, run, measures, level)
        assert ours == {qid: theirs[qid] for qid in ours} and set(ours) == set(qrels) & set(run)
        compared += sum(map(len, ours.values()))
    assert compared > 10_000


def of_ir_measures(qrels: dict, run: dict, k: int) -> dict:
    """Judged@k per query, as ir_measures 0.4.3 computes it: the share of judged documents among the first k.

    Any label is a judgement. A list shorter than k is divided by its length.
    """
    shares = {}
    for qid in set(qrels) & set(run):
        top = sorted(run[qid], key=lambda docid: (run[qid][docid], docid.encode()), reverse=True)[:k]
        shares[qid] = sum(docid in qrels[qid] for docid in top) / len(top)
    return shares


def test_the_judged_share_is_defined_as_in_ir_measures():
    rng, short, negative = random.Random(5), 0, 0
    for _ in range(300):
        qrels, run = generated_case(rng)
        ours = evaluate(qrels, run, ["judged.3,10"], level=rng.choice([0, 1, 3]))
        for k in (3, 10):
            assert {qid: row[f"judged_{k}"] for qid, row in ours.items()} == of_ir_measures(qrels, run, k)
        short += sum(len(run[qid]) < 10 for qid in ours)
        negative += sum(label < 0 for qid in ours for label in qrels[qid].values())
    assert short > 100 and negative > 100
    assert evaluate({"q": {"a": 1}}, {"q": {}}, ["judged.10"]) == {"q": {"judged_10": 0.0}}


def test_the_judged_share_equals_that_of_the_package_ir_measures():
    package = pytest.importorskip("ir_measures")
    rng, compared = random.Random(6), 0
    for _ in range(100):
        qrels, run = generated_case(rng)
        for scores in run.values():  # avoid ties: the package sorts them by ascending docid
            scores.update({docid: float(n) for n, docid in enumerate(scores)})
        theirs = {(m.query_id, str(m.measure)): m.value
                  for m in package.iter_calc([package.Judged @ 3, package.Judged @ 10], qrels, run)}
        for qid, row in evaluate(qrels, run, ["judged.3,10"]).items():
            for k in (3, 10):
                assert row[f"judged_{k}"] == theirs[qid, f"Judged@{k}"]
                compared += 1
    assert compared > 300


# --- files and the command line


def write_messy(path: Path, qrels: dict, run: dict, rng: random.Random) -> tuple[str, str]:
    """Write both as untidy files: interleaved queries, tabs, comments, CRLF, blank lines, wrong ranks."""
    judged = [f"{qid} 0 {docid} {label}" for qid, labels in qrels.items() for docid, label in labels.items()]
    found = [
        f"{qid} Q0 {docid} {rng.randrange(99)} {score!r} tag"
        for qid, scores in run.items()
        for docid, score in scores.items()
    ]
    for lines in (judged, found):
        rng.shuffle(lines)
        blanks, ends = [" ", "\t", "   ", " \t"], ["", "\r", " "]
        lines[:] = [
            line.replace(" ", rng.choice(blanks), rng.randrange(5)) + rng.choice(ends) for line in lines
        ]
    found.insert(len(found) // 2, "\n# half of it\n \t")
    (path / "qrels.gz").write_bytes(gzip.compress("\n".join(["# comment", *judged]).encode()))
    (path / "run").write_bytes("\n".join(found).encode())
    return str(path / "qrels.gz"), str(path / "run")


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)], capture_output=True, check=False
    )


def printed(capsysbinary, *arguments) -> bytes:
    """Run main in this process (20 times faster than in a new one). Returns its output."""
    trec.main([*map(str, arguments)])
    return capsysbinary.readouterr().out


def expected_output(qrels, run, measures, level=1, queries=False, complete=False) -> bytes:
    """The output of trec_eval, made from pytrec_eval's values by trec_eval's documented rules."""
    theirs = of_pytrec_eval(qrels, run, measures, level)
    qids = sorted(theirs, key=str.encode)
    by_cutoff = sorted(
        theirs[qids[0]], key=lambda key: int(key.rsplit("_", 1)[-1]) if key[-1].isdigit() else 0
    )
    keys = [
        key
        for measure in PLAIN
        for key in by_cutoff
        if key == measure or re.fullmatch(measure + "_[0-9]+", key)
    ]
    lines = []

    def number(key, value):
        return f"{value:.0f}" if key.startswith("num") else f"{value:6.4f}"

    if queries:
        lines += [f"{key:22s}\t{qid}\t{number(key, theirs[qid][key])}" for qid in qids for key in keys]
    num_q = len(qrels) if complete else len(qids)
    lines.append(f"{'num_q':22s}\tall\t{num_q}")
    for key in keys:
        total = 0.0
        for qid in qids:
            total += theirs[qid][key]
        if key == "num_rel" and complete:
            total = sum(label > 0 for labels in qrels.values() for label in labels.values())
        lines.append(f"{key:22s}\tall\t{number(key, total if key.startswith('num') else total / num_q)}")
    return "".join(line + "\n" for line in lines).encode()


def test_the_output_of_messy_files_is_trec_evals_to_the_last_byte(tmp_path, capsysbinary):
    rng, seen = random.Random(11), 0
    while seen < 150:
        (qrels, run), level = generated_case(rng), rng.choice([1, 2])
        if not set(qrels) & set(run):
            continue
        seen += 1
        measures, queries, complete = rng.choice([PLAIN, CUT]), rng.random() < 0.5, rng.random() < 0.5
        options = [
            *itertools.chain(*(("-m", measure) for measure in rng.sample(measures, len(measures)))),
            "-m",
            "num_q",
            "-l",
            level,
        ]
        options += ["-q"] * queries + ["-c"] * complete
        output = printed(capsysbinary, *write_messy(tmp_path, qrels, run, rng), *options)
        assert output == expected_output(qrels, run, measures, level, queries, complete)


def files(path: Path, qrels: str, run: str) -> tuple[Path, Path]:
    (path / "qrels").write_text(qrels)
    (path / "run").write_text(run)
    return path / "qrels", path / "run"


def test_equal_scores_are_ordered_by_docid_descending_in_bytes(tmp_path, capsysbinary):
    # In UTF-8 bytes z < é < 中 and 10 < 9. The rank column says the opposite and is ignored.
    judged = files(
        tmp_path,
        "1 0 中 1\n2 0 9 1\n3 0 é 1\n",
        "1 Q0 z 1 2 t\n1 Q0 é 2 2 t\n1 Q0 中 3 2 t\n2 Q0 10 1 5 t\n2 Q0 9 2 5 t\n"
        "3 Q0 z 1 1 t\n3 Q0 é 2 1 t\n3 Q0 é0 3 1 t\n",
    )
    assert printed(capsysbinary, *judged, "-m", "recip_rank", "-q").split()[2::3] == [
        b"1.0000",
        b"1.0000",
        b"0.5000",
        b"0.8333",
    ]


def test_queries_may_be_interleaved_and_in_any_order(tmp_path, capsysbinary):
    judged = files(
        tmp_path,
        "1 0 a 1\n2 0 a 1\n10 0 a 1\n",
        "2 Q0 b 1 9 t\n1 Q0 b 1 8 t\n2 Q0 c 2 7 t\n10 Q0 a 1 7 t\n1 Q0 a 2 6 t\n2 Q0 a 3 5 t\n",
    )
    output = printed(capsysbinary, *judged, "-m", "recip_rank", "-q").split()
    assert output[1::3] == [b"1", b"10", b"2", b"all"] and output[2::3] == [
        b"0.5000",
        b"1.0000",
        b"0.3333",
        b"0.6111",
    ]


def test_scores_are_compared_as_float64(tmp_path, capsysbinary):
    judged = files(
        tmp_path, "1 0 a 1\n", "1 Q0 b 1 12.000000000000001 t\n1 Q0 a 2 12.000000000000003 t\n1 Q0 c 3 12 t\n"
    )
    assert printed(capsysbinary, *judged, "-m", "P.1").endswith(b"1.0000\n")
    assert np.float32(12.000000000000003) == np.float32(12)


def test_one_query_from_end_to_end(tmp_path, capsysbinary):
    """NDCG@3 by hand: the run has labels 1, 0, 3; the ideal ranking of the judged documents has 3, 2, 1."""
    judged = files(
        tmp_path,
        "q 0 a 3\nq 0 b 2\nq 0 c 1\nq 0 d 0\n",
        "q Q0 c 1 3 t\nq Q0 d 2 2 t\nq Q0 a 3 1 t\nother Q0 a 1 1 t\n",
    )
    dcg, ideal = 1 / np.log2(2) + 3 / np.log2(4), 3 / np.log2(2) + 2 / np.log2(3) + 1 / np.log2(4)
    assert (
        printed(capsysbinary, *judged, "-m", "ndcg_cut.3")
        == f"{'ndcg_cut_3':22s}\tall\t{dcg / ideal:6.4f}\n".encode()
    )
    # map: relevant at ranks 1 and 3, of 3 relevant. bpref: the only nonrelevant one is above the second.
    assert printed(capsysbinary, *judged, "-m", "map", "-m", "bpref", "-m", "num_rel").split()[2::3] == [
        b"3",
        b"0.5556",
        b"0.3333",
    ]
    strict = printed(capsysbinary, *judged, "-m", "num_rel_ret", "-l", 2, "-m", "ndcg_cut.3").split()
    assert strict[2::3] == [b"1", f"{dcg / ideal:.4f}".encode()], "the relevance level must not change ndcg"


def test_missing_queries_are_skipped_or_count_as_zero(tmp_path, capsysbinary):
    judged = files(tmp_path, "1 0 a 1\n1 0 b 2\n2 0 a 1\n3 0 a -1\n", "1 Q0 a 1 1 t\n4 Q0 a 1 1 t\n")
    numbers = ("-m", "num_q", "-m", "num_rel", "-m", "P.1", "-m", "num_ret")
    assert printed(capsysbinary, *judged, *numbers).split()[2::3] == [b"1", b"1", b"2", b"1.0000"]
    assert printed(capsysbinary, *judged, *numbers, "-c").split()[2::3] == [b"3", b"1", b"3", b"0.3333"]
    # With -c, trec_eval's num_rel ignores the relevance level.
    assert printed(capsysbinary, *judged, *numbers, "-c", "-l2").split()[2::3] == [
        b"3",
        b"1",
        b"3",
        b"0.0000",
    ]


def test_default_measures_in_trec_evals_order(tmp_path, capsysbinary):
    judged = files(tmp_path, "1 0 a 1\n", "1 Q0 a 1 1 t\n")
    assert printed(capsysbinary, *judged).split()[::3] == [
        b"map",
        b"recip_rank",
        b"P_10",
        b"recall_100",
        b"ndcg_cut_10",
    ]


def test_judged_comes_after_trec_evals_measures_and_only_if_asked_for(tmp_path, capsysbinary):
    run = "".join(f"1 Q0 {docid} 1 {score} t\n" for score, docid in enumerate("dcba"))
    judged = files(tmp_path, "1 0 a 1\n1 0 b -1\n", run)
    output = printed(capsysbinary, *judged, "-m", "judged.1,10", "-m", "success.1", "-q")
    values = {"success_1": "1.0000", "judged_1": "1.0000", "judged_10": "0.5000"}
    lines = [f"{name:22s}\t{qid}\t{value}\n" for qid in ("1", "all") for name, value in values.items()]
    assert output == "".join(lines).encode()
    assert b"judged" not in printed(capsysbinary, *judged)


def test_measures_are_named_as_trec_eval_takes_them(capsys):
    assert parse_measures(["success", "P.10,5", "map"]) == {"map": [], "P": [5, 10], "success": [1, 5, 10]}
    assert parse_measures(["P.7,5", "P.100", "P"])["P"] == [5, 7, 10, 15, 20, 30, 100, 200, 500, 1000]
    assert not capsys.readouterr().err
    # trec_eval itself keeps only the first list of cutoffs, which can surprise its users
    assert (
        parse_measures(["P.7,5", "P.100", "P"], merge=False) == {"P": [5, 7]}
        and "only the first" in capsys.readouterr().err
    )
    for name in (
        "MAP",
        "ndcg_cut_10",
        "P.",
        "P.0",
        "P.-1",
        "P.5,5",
        "P.5,,6",
        "P.x",
        "map.5",
        "P.²",
        "",
        "P.5 ",
        "P.1_0",
    ):
        with pytest.raises(InputError):
            parse_measures([name])


@pytest.mark.parametrize(
    "name, meant",
    [
        ("nDCG@10", "ndcg_cut.10"),
        ("NDCG_CUT.10", "ndcg_cut.10"),
        ("ndcg_cut_10", "ndcg_cut.10"),
        ("ndcg.10", "ndcg_cut.10"),
        ("ndcg@5,10", "ndcg_cut.5,10"),
        ("nDCG", "ndcg"),
        ("P@5", "P.5"),
        ("p_5", "P.5"),
        ("Precision@5", "P.5"),
        ("recall@100", "recall.100"),
        ("recall_at_100", "recall.100"),
        ("R@100", "recall.100"),
        ("MAP", "map"),
        ("MAP@100", "map_cut.100"),
        ("map.5", "map_cut.5"),
        ("Success@1", "success.1"),
        ("hit@1", "success.1"),
        ("MRR", "recip_rank"),
        ("MRR@10", "recip_rank, which has no cutoff"),
        ("recip_rank.10", "recip_rank, which has no cutoff"),
        ("num_rel_ret_10", "num_rel_ret, which has no cutoff"),
        ("Judged@10", "judged.10"),
    ],
)
def test_a_measure_s_other_names_are_answered_with_the_right_one(name, meant):
    with pytest.raises(InputError) as error:
        parse_measures([name])
    assert str(error.value).endswith(f"measure {name!r}: did you mean -m {meant}?")
    parse_measures([meant.split(",")[0]])  # the suggested name is accepted


def test_every_name_that_is_printed_is_answered_with_the_one_that_is_taken():
    for measure, (_, cutoffs) in trec.MEASURES.items():
        if cutoffs:
            with pytest.raises(InputError, match=rf"did you mean -m {measure}\.7\?"):
                parse_measures([f"{measure}_7"])
    with pytest.raises(InputError, match="unknown measure 'ERR@20': expected num_q .* success judged$"):
        parse_measures(["ERR@20"])


@pytest.mark.parametrize("arguments", ["QRELS RUN -m ndcg_cut.10 judged.10", "QRELS RUN -m map nDCG@10",
                                       "-m map P.10 QRELS RUN", "QRELS -m map judged.10",
                                       "QRELS RUN -m ndcg_cut.10,judged.10", "QRELS RUN -m map,P.5,10",
                                       "QRELS RUN -m ndcg_cut.10, judged.10"])
def test_measures_that_share_one_m_are_answered_with_how_to_repeat_it(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    files(tmp_path, "1 0 a 1\n", "1 Q0 a 1 1 t\n")
    with pytest.raises(InputError, match="each measure needs its own -m") as error:
        trec.main(arguments.replace("QRELS", "qrels").replace("RUN", "run").split())
    assert "\n" not in str(error.value)


def test_a_run_may_be_called_like_a_measure(tmp_path, monkeypatch, capsysbinary):
    judged, found = files(tmp_path, "1 0 a 1\n", "1 Q0 a 1 1 t\n")
    found.rename(tmp_path / "judged.10")
    monkeypatch.chdir(tmp_path)
    assert printed(capsysbinary, judged, "-m", "map", "judged.10").endswith(b"all\t1.0000\n")


@pytest.mark.parametrize(
    "qrels, run, options, said",
    [
        ("1 0 a 1\n", "1 Q0 a 1 1 t\n1 Q0 a 2 0 t\n", [], b"run:2: "),  # a document twice
        ("1 0 a 1\n", "1 Q0 a 1 1\n", [], b"run:1: "),
        ("1 0 a\n", "1 Q0 a 1 1 t\n", [], b"qrels:1: "),
        ("1 0 a 1\n1 0 a 1\n", "1 Q0 a 1 1 t\n", [], b"qrels:2: "),
        ("1 0 a 1\n", "2 Q0 a 1 1 t\n", [], b"no query in common"),
        ("1 0 a 1\n", "1 Q0 a 1 1 t\n", ["-m", "nDCG"], b"unknown measure"),
        ("1 0 a 1\n", "1 Q0 a 1 1 t\n", ["-l", "-1"], b"expected at least 0"),
        ("1 0 a 1\n", None, [], b"No such file"),
        ("1 0 a 1\n", "\0001\0 \0Q\0000\0 \0a", [], b"run: looks like UTF-16; expected text in UTF-8"),
        ("1 0 a 1\n", "1 Q0 a 1 1 t\n", ["-m", "ndcg_cut_10"], b"did you mean -m ndcg_cut.10?"),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_nothing_on_stdout(tmp_path, qrels, run, options, said):
    judged, found = files(tmp_path, qrels, run or "")
    result = command(judged, found if run else tmp_path / "absent", *options)
    assert result.returncode == 2 and not result.stdout
    assert said in result.stderr and result.stderr.count(b"\n") == 1


def test_a_run_may_come_from_standard_input(tmp_path):
    judged, found = files(tmp_path, "1 0 a 1\n", "1 Q0 a 1 1 t\n")
    run = gzip.compress(b"\xef\xbb\xbf" + found.read_bytes())
    code = [sys.executable, str(ROOT / "eval.py"), str(judged)]
    piped = subprocess.run([*code, "-"], input=run, capture_output=True, check=False)
    assert not piped.stderr and piped.stdout == command(judged, found).stdout != b""


def test_ids_that_are_not_utf8_pass_through(tmp_path):
    (tmp_path / "qrels").write_bytes(b"caf\xe9 0 a 1\n")
    (tmp_path / "run").write_bytes(b"caf\xe9 Q0 a 1 1 t\n")
    assert command(tmp_path / "qrels", tmp_path / "run", "-q", "-m", "map").stdout.startswith(
        b"map                   \tcaf\xe9\t1.0000\n"
    )


def test_nothing_heavy_is_imported():
    heavy = ("torch", "transformers", "huggingface_hub", "scipy", "pandas", "tqdm", "urllib.request")
    code = f"import sys, eval; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True).stdout.strip()
        == b"[]"
    )


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("folder, value", [("dl19_eval_dev", b"0.5058"), ("dl21_train_dev", b"0.4458")])
def test_bm25_has_its_published_ndcg(folder, value, capsysbinary):
    (qrels,), (run,) = (REAL / folder).glob("qrels*"), (REAL / folder).glob("trec_results*")
    assert printed(capsysbinary, qrels, run, "-m", "ndcg_cut.10").split()[2] == value


# --- the dict API


def test_evaluate_refuses_what_it_would_have_to_guess():
    for label, score in ((0.5, 1.0), (1, float("nan")), (1, "1"), ("1", 1.0)):
        with pytest.raises(InputError):
            evaluate({"1": {"a": label}}, {"1": {"a": score}}, ["map"])
    assert evaluate({"1": {"a": 1}}, {"2": {"a": 1.0}}, ["map"]) == evaluate({}, {}, ["map"]) == {}
    negative = evaluate({"1": {"a": -1}}, {"1": {"a": 1.0}}, ["num_rel", "num_rel_ret"], level=-1)
    assert negative == {"1": {"num_rel": 0.0, "num_rel_ret": 0.0}}, "a label below 0 is never relevant"
    assert evaluate({"1": {"a": 1}}, {"1": {}}, ["map", "num_ret"]) == {"1": {"num_ret": 0.0, "map": 0.0}}


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(-1, 3), min_size=1, max_size=30), k=st.integers(1, 12))
def test_the_ideal_order_has_ndcg_1_and_no_order_has_more(labels, k):
    qrels = {"q": {f"d{n}": label for n, label in enumerate(labels)}}
    given_order = {"q": {f"d{n}": float(-n) for n in range(len(labels))}}
    ideal = {"q": {docid: float(label) for docid, label in qrels["q"].items()}}
    name = f"ndcg_cut_{k}"
    best = evaluate(qrels, ideal, [f"ndcg_cut.{k}"])["q"][name]
    assert best == (1.0 if max(labels) > 0 else 0.0)
    assert 0.0 <= evaluate(qrels, given_order, [f"ndcg_cut.{k}"])["q"][name] <= best + 1e-12


# --- statistics


@pytest.mark.parametrize(
    "deltas, p",
    [
        ([0.1] * 5, 2 / 32),  # only all + and all - have a sum as large
        ([1, 2, 3], 2 / 8),
        ([3, 1, -1], 6 / 8),  # 3 + 1 + 1, 3 + 1 - 1 (twice), and all with flipped signs
        ([0.1, 0.2, -0.3], 1.0),  # the sum is 5.6e-17, not 0: rounding must not change p
        ([0.5, 0, 0, 0], 1.0),
        ([0.0, 0.0], 1.0),
        ([], 1.0),
        (
            [0.41, 0.91, 0.04, 0.82, 0.42, 0.83, 0.01, 0.37, 0.08],
            2 / 512,
        ),  # all +; another order of summation changes the last bit
    ],
)
def test_p_values_of_known_cases(deltas, p):
    by_hand = [
        abs(sum(s * d for s, d in zip(signs, deltas)))
        for signs in itertools.product((1, -1), repeat=len(deltas))
    ]
    assert p == pytest.approx(np.mean([total >= abs(sum(deltas)) - 1e-12 for total in by_hand]))
    assert randomisation_test(deltas) == pytest.approx(p)
    assert randomisation_test([*deltas, *[0.0] * 40]) == pytest.approx(p), (
        "queries without a difference must not change p"
    )


def test_random_sign_flips_agree_with_all_of_them():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.3, 0.6):
        deltas = rng.normal(shift, 1, 14)
        exact, sampled = randomisation_test(deltas), randomisation_test(deltas, exact=0, samples=20_000)
        assert abs(exact - sampled) < 0.015 and sampled == randomisation_test(deltas, exact=0, samples=20_000)
    assert randomisation_test([0.1] * 40, samples=999) == 1 / 1000, (
        "the observed signs are one of the patterns: p is never 0"
    )


def test_the_randomisation_test_keeps_its_level():
    rng = np.random.default_rng(1)
    rejected = np.mean([randomisation_test(rng.normal(0, 1, 12)) <= 0.05 for _ in range(400)])
    assert 0.02 < rejected < 0.085


def test_the_bootstrap_interval_is_the_normal_one_for_many_values():
    values = np.random.default_rng(2).normal(0.5, 0.2, 400)
    mean, low, high = bootstrap_interval(values, seed=3)
    assert mean == pytest.approx(values.mean())
    assert (mean, low, high) == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(mean - half, abs=0.1 * half) and high == pytest.approx(
        mean + half, abs=0.1 * half
    )
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25, 0.25)
    narrow = bootstrap_interval(values, level=0.5)
    assert narrow[2] - narrow[1] < 0.5 * (high - low)
    with pytest.raises(ValueError):
        bootstrap_interval([])


def three_runs(path: Path) -> list[Path]:
    """Paths of judgements and three runs: relevant at rank 2; at rank 1; at rank 1 without the last query."""

    def lines(rank_of_relevant, queries):
        order = ["x", "r"] if rank_of_relevant == 2 else ["r", "x"]
        return "".join(
            f"q{n} Q0 {docid} 1 {2 - m} t\n" for n in range(queries) for m, docid in enumerate(order)
        )

    qrels = "".join(f"q{n} 0 r 1\n" for n in range(6))
    for name, text in (
        ("qrels", qrels),
        ("first", lines(2, 6)),
        ("better", lines(1, 6)),
        ("short", lines(1, 5)),
    ):
        (path / name).write_text(text)
    return [path / name for name in ("qrels", "first", "better", "short")]


def test_several_runs_are_compared_with_the_first(tmp_path, capsysbinary):
    paths = three_runs(tmp_path)
    rows = json.loads(printed(capsysbinary, *paths, "-m", "recip_rank", "-m", "num_ret", "--json"))["runs"]
    first, better, short = (row["measures"]["recip_rank"] for row in rows)
    assert first == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert better == {
        "mean": 1.0,
        "low": 1.0,
        "high": 1.0,
        "difference": {"num_q": 6, "mean": 0.5, "low": 0.5, "high": 0.5, "p": 2 / 2**6},
    }
    assert short["difference"]["num_q"] == 5 and short["difference"]["p"] == 2 / 2**5 and short["mean"] == 1.0
    assert [row["measures"]["num_ret"] for row in rows] == [{"total": 12}, {"total": 12}, {"total": 10}]
    swapped = json.loads(
        printed(capsysbinary, paths[0], paths[3], paths[1], "-m", "recip_rank", "-c", "--json")
    )["runs"][1]
    assert swapped["measures"]["recip_rank"]["difference"]["mean"] == pytest.approx(-2 / 6)
    complete = json.loads(printed(capsysbinary, *paths, "-m", "recip_rank", "-c", "--json"))["runs"][2]
    assert complete["num_q"] == 6 and complete["measures"]["recip_rank"]["mean"] == pytest.approx(5 / 6)
    assert (
        complete["measures"]["recip_rank"]["low"] < 5 / 6
        and complete["measures"]["recip_rank"]["difference"]["num_q"] == 6
    )
    assert complete["measures"]["recip_rank"]["difference"]["mean"] == pytest.approx(2 / 6)


def test_several_runs_show_on_a_terminal_that_they_are_at_work_and_stdout_stays_the_same(tmp_path):
    paths = [str(path) for path in three_runs(tmp_path)]
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
    shown = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *paths, "-c", "-m", "map"], stdout=subprocess.PIPE,
        stderr=theirs
    )
    os.write(theirs, b"end")  # so that os.read does not wait
    said = os.read(ours, 9999)
    os.close(theirs)
    os.close(ours)
    plain = command(*paths, "-c", "-m", "map")
    assert shown.stdout == plain.stdout and plain.stdout.count(b"\n") == 6 and not plain.stderr
    assert b"reading:" in said and all(path.encode() in said for path in paths[1:])


def test_a_run_that_lacks_judged_queries_is_named_beside_the_table(tmp_path, capsys):
    qrels, first, _, short = three_runs(tmp_path)
    trec.main([str(qrels), str(first), str(short), "-m", "map"])
    assert capsys.readouterr().err == f"{short} lacks 1 of 6 judged queries; -c counts them as 0\n"
    trec.main([str(qrels), str(first), str(short), "-m", "map", "-c"])
    assert not capsys.readouterr().err


def test_one_run_that_lacks_judged_queries_is_named_on_stderr_and_stdout_is_trec_evals(tmp_path, capsys):
    qrels, first, _, short = three_runs(tmp_path)
    for run, options, said in ((short, [], f"{short} lacks 1 of 6 judged queries; -c counts them as 0\n"),
                               (short, ["-c"], ""), (first, [], "")):
        trec.main([str(qrels), str(run), "-m", "num_q", *options])
        num_q = 5 if said else 6
        assert capsys.readouterr() == (f"{'num_q':22s}\tall\t{num_q}\n", said)


def test_runs_that_lack_different_queries_are_said_to(tmp_path, capsys):
    qrels, first, _, short = three_runs(tmp_path)
    lines = first.read_text().splitlines(keepends=True)
    late = tmp_path / "late"
    late.write_text("".join(lines[2:]))  # as many queries as `short`, but without the first query
    for runs, said in (((short, late), 1), ((short, short), 0), ((first, short), 0)):
        trec.main([*map(str, (qrels, *runs)), "-m", "map"])
        assert capsys.readouterr().err.count("lack different queries: their means do not compare") == said
    trec.main([*map(str, (qrels, short, late)), "-m", "map", "-c"])
    assert not capsys.readouterr().err


def judged_case(path: Path, *judged: int) -> list[str]:
    """Paths of judgements and of one run per number in `judged`: so many of its top 10 are judged."""
    (path / "qrels").write_text("".join(f"q 0 d{n} {n % 3 - 1}\n" for n in range(10)))  # -1 counts as judged
    for number in judged:
        docids = [f"d{n}" for n in range(number)] + [f"x{n}" for n in range(20 - number)]
        lines = [f"q Q0 {docid} 1 {20 - n} t\n" for n, docid in enumerate(docids)]
        (path / f"run{number}").write_text("".join(lines))
    return [str(path / "qrels"), *(str(path / f"run{number}") for number in judged)]


def test_runs_that_differ_in_their_judged_documents_are_said_to(tmp_path, capsys):
    qrels, *runs = judged_case(tmp_path, 9, 10, 4)
    for chosen in (["-m", "map"], ["-m", "judged.5"], []):  # the warning always uses judged_10
        trec.main([qrels, *runs, *chosen])
        out, err = capsys.readouterr()
        assert err == (
            f"judged_10 differs: {runs[0]} 0.90, {runs[1]} 1.00, {runs[2]} 0.40; "
            "documents without a judgement count as not relevant\n"
        )
        assert ("judged" in out) == (chosen == ["-m", "judged.5"])
    trec.main([qrels, runs[2], "-m", "map"])
    trec.main([qrels, runs[2], "-m", "map", "--json"])
    trec.main([qrels, runs[2], runs[2]])
    assert not capsys.readouterr().err


def test_a_difference_of_exactly_5_points_in_judged_documents_is_not_reported(tmp_path, capsys):
    """Two queries with 9 and 6 of 10 documents judged, against 9 and 5. In floats 0.75 - 0.7 exceeds 0.05."""
    (tmp_path / "qrels").write_text("".join(f"q{q} 0 d{n} 1\n" for q in range(2) for n in range(10)))
    for name, counts in (("more", (9, 6)), ("less", (9, 5)), ("least", (9, 4))):
        text = ""
        for q, count in enumerate(counts):
            docids = [f"d{n}" if n < count else f"x{n}" for n in range(10)]
            text += "".join(f"q{q} Q0 {docid} 1 {10 - n} t\n" for n, docid in enumerate(docids))
        (tmp_path / name).write_text(text)
    qrels, more, less, least = (str(tmp_path / name) for name in ("qrels", "more", "less", "least"))
    trec.main([qrels, more, less, "-m", "map"])
    assert 0.75 - 0.7 > 0.05 and not capsys.readouterr().err
    trec.main([qrels, more, least, "-m", "map"])
    assert "judged_10 differs" in capsys.readouterr().err


def test_the_judged_documents_of_runs_are_compared_over_the_same_queries(tmp_path, capsys):
    """10 judged queries with 10 documents each, 4 of them judged in query 0 and 8 in the others."""
    def lines(queries, gain=0):
        return "".join(f"q{q} Q0 {'d' if n < (8 if q else 4) + gain else 'x'}{n} 1 {10 - n} t\n"
                       for q in queries for n in range(10))

    qrels = "".join(f"q{q} 0 d{n} 1\n" for q in range(10) for n in range(10))
    for name, text in (("qrels", qrels), ("whole", lines(range(10))), ("part", lines([0])),
                       ("good", lines([0], gain=2)), ("other", lines([1]))):
        (tmp_path / name).write_text(text)
    qrels, whole, part, good, other = (str(tmp_path / n) for n in ("qrels", "whole", "part", "good", "other"))

    def said(*arguments):
        trec.main([qrels, *arguments, "-m", "judged.10"])
        out, err = capsys.readouterr()
        return out, [line for line in err.splitlines() if "judged_10" in line]

    reason = "documents without a judgement count as not relevant"
    assert not said(whole, part)[1], "query 0 is the same in both"
    assert not said(part, other)[1], "no query to compare"
    assert not said(whole, part, "-c")[1], "also with -c: queries that `part` lacks have no documents"
    for option, of_table in (("-q", ["0.7600", "0.4000", "0.6000"]), ("-c", ["0.7600", "0.0400", "0.0600"])):
        table, warning = said(whole, part, good, option)
        assert warning == [f"judged_10 differs over the 1 queries that all runs have: {whole} 0.40, "
                           f"{part} 0.40, {good} 0.60; {reason}"]
        rows = [line.split() for line in table.splitlines() if line.startswith(str(tmp_path))]
        assert [row[2] for row in rows] == of_table, "the table's means are over other queries"


def test_the_table_has_a_row_for_each_run_and_differences_for_each_query(tmp_path, capsysbinary):
    paths = three_runs(tmp_path)
    text = printed(capsysbinary, *paths, "-m", "recip_rank", "-q").decode()
    assert (
        f"{'recip_rank':22s}\tq0\t0.5000\t+0.5000\t+0.5000\n" in text
        and f"{'recip_rank':22s}\tq5\t0.5000\t+0.5000\t-\n" in text
    )
    rows = [line.split() for line in text.splitlines() if line.startswith(str(tmp_path))]
    assert [row[:3] for row in rows] == [
        [str(paths[1]), "6", "0.5000"],
        [str(paths[2]), "6", "1.0000"],
        [str(paths[3]), "5", "1.0000"],
    ]
    assert rows[1][-1] == "0.0312" and rows[2][-1] == "0.0625"


def test_one_run_as_json_has_the_values_of_each_query(tmp_path, capsysbinary):
    qrels, first, *_ = three_runs(tmp_path)
    (row,) = json.loads(printed(capsysbinary, qrels, first, "-m", "recip_rank", "-q", "--json"))["runs"]
    assert row["queries"]["q3"] == {"recip_rank": 0.5} and row["num_q"] == 6


# --- BRIGHT


def bright_folders(path: Path) -> tuple[Path, Path]:
    """Write runs and judgements of BRIGHT's 12 splits. Returns the folders of runs and judgements.

    Split n has n + 1 judged queries. Its run has one of them, with NDCG@10 1 in the first three splits and
    0 in the others.
    """
    runs, qrels = path / "runs", path / "qrels"
    runs.mkdir()
    qrels.mkdir()
    for n, split in enumerate(BRIGHT_SPLITS):
        name = split.replace("_", "-")
        (runs / f"run.{name}.txt").write_text("0 Q0 x 1 2 t\n0 Q0 y 2 1 t\n")
        gold = [f"{qid} 0 {'x' if n < 3 else 'z'} 1\n" for qid in range(n + 1)]
        (qrels / f"qrels.bright-{name}.txt").write_text("".join(gold))
    return runs, qrels


def test_brights_headline_is_the_plain_mean_of_the_splits_with_missing_queries_as_0(tmp_path, capsys):
    runs, qrels = bright_folders(tmp_path)
    trec.main(["--bright", str(runs), "--qrels", str(qrels)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13 and [float(line.split()[1]) for line in lines[:4]] == [100, 50, 33.33, 0]
    assert lines[0].split()[2] == "1" and lines[11].split()[2] == "12"
    assert float(lines[-1].split()[1]) == round((100 + 50 + 100 / 3) / 12, 2) and "12 splits" in lines[-1]


def test_brights_runs_may_lie_beside_the_reasoning_that_rearank_writes(tmp_path, capsys):
    runs, qrels = bright_folders(tmp_path)
    for path in [*runs.iterdir()]:
        path.rename(runs / f"{path.stem}.trec")
        (runs / f"{path.stem}.trec.jsonl").write_text("{}\n")
    trec.main(["--bright", str(runs), "--qrels", str(qrels)])
    assert "12 splits" in capsys.readouterr().out


def test_brights_corrected_judgements_are_a_choice_and_a_mean_of_some_splits_is_marked(tmp_path, capsys):
    runs, qrels = bright_folders(tmp_path)
    for path in runs.iterdir():
        if "pony" not in path.name:
            path.unlink()
    (qrels / "qrels.bright-pony.fixed.txt").write_text("0 0 y 1\n")
    trec.main(["--bright", str(runs), "--qrels", str(qrels), "--fixed"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split()[1:5] == ["63.09", "1", "splits", "of"] and lines[0].split() == [
        "biology",
        "-",
        "no",
        "run",
    ]
    (qrels / "qrels.bright-pony.fixed.txt").unlink()
    with pytest.raises(InputError, match="no fixed qrels of BRIGHT's pony"):
        trec.main(["--bright", str(runs), "--qrels", str(qrels), "--fixed"])
    (runs / "run.pony.txt").unlink()
    with pytest.raises(InputError, match="no run of any BRIGHT split"):
        trec.main(["--bright", str(runs), "--qrels", str(qrels)])


def test_excluded_documents_leave_brights_runs_but_not_its_judgements(tmp_path, capsys):
    runs, qrels, exclude = *bright_folders(tmp_path), tmp_path / "exclude"
    exclude.mkdir()
    (qrels / "qrels.bright-biology.txt").write_text("0 0 x 1\n0 0 y 1\n")
    (exclude / "exclude.bright-biology.txt").write_text("0 x\n")
    trec.main(["--bright", str(runs), "--qrels", str(qrels), "--exclude", str(exclude)])
    expected = 100 * ndcg([1], ideal=[1, 1])  # only y is in the run; x counts as not found
    assert capsys.readouterr().out.split()[1] == f"{expected:.2f}"


def test_options_may_stand_between_the_files_and_the_two_ways_of_use_do_not_mix(tmp_path, capsysbinary):
    judged = files(tmp_path, "1 0 a 1\n", "1 Q0 a 1 1 t\n")
    assert printed(capsysbinary, judged[0], "-q", "-m", "map", judged[1]).count(b"\n") == 2
    for arguments in ([], [*judged, "--bright", tmp_path], [judged[0], "--bright", tmp_path]):
        with pytest.raises(InputError, match="expected QRELS and at least one RUN, or --bright"):
            trec.main([*map(str, arguments)])
    with pytest.raises(InputError, match="^expected a RUN after QRELS$"):
        trec.main([str(judged[0])])


@pytest.mark.parametrize("option", ["--qrels=x", "--fixed", "--exclude=x"])
def test_an_option_of_bright_is_refused_without_it(tmp_path, capsys, option):
    judged = files(tmp_path, "1 0 a 1\n", "1 Q0 a 1 1 t\n")
    with pytest.raises(InputError, match=f"^{option.removesuffix('=x')} has no effect without --bright$"):
        trec.main([*map(str, judged), option])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("typed, name", [
    ("-mmap", "--measure (-m)"), ("-q", "--queries (-q)"), ("-c", "--complete (-c)"), ("-l2", "--level (-l)"),
    ("--seed=1", "--seed"), ("--json", "--json")])
def test_bright_refuses_the_options_that_it_would_ignore(tmp_path, capsys, typed, name):
    runs, qrels = bright_folders(tmp_path)
    with pytest.raises(InputError, match=f"^{re.escape(name)} has no effect with --bright$"):
        trec.main(["--bright", str(runs), "--qrels", str(qrels), typed])
    assert not capsys.readouterr().out
