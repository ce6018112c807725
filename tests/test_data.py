"""data.py: initial state expansion as in the paper, training data, BRIGHT's lists, the command."""

import dataclasses
import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import expand, training_instances
from eval import evaluate
from reward import ndcg
from support.cli import InputError
from support.files import Candidates, read_candidates, read_qrels, write_candidates


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real files of ../shared/data are not here")


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


# --- initial state expansion


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
    # Draws are the same on every machine and in every process, so that instances can be made again.
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
    least = min(ndcg(draw.labels, ideal=draw.ideal) for draw in shuffled)
    assert expand([query], qrels, order="shuffled", min_ndcg=least) == shuffled  # min_ndcg is inclusive
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
    ]  # holding out queries does not change the draws of the others


@pytest.mark.slow
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
    ]  # a mistake to avoid: an ideal over the drawn passages only
    assert sum(over_the_drawn) / len(over_the_drawn) == pytest.approx(0.946, abs=0.01)


# --- training data


def make_files(folder):
    """Write candidates and judgements of queries a and b (one file each), and instances of query c."""
    folder.mkdir(exist_ok=True)
    paths = {name: str(folder / name) for name in ("a.jsonl", "b.jsonl", "a.qrels", "b.qrels", "c.jsonl")}
    for qid in "ab":
        write_candidates(paths[f"{qid}.jsonl"], [make_list(qid)])
        data.write_qrels(paths[f"{qid}.qrels"], labels_of([0, 1, 2] * 10, qid))
    data.write_instances(paths["c.jsonl"], expand([make_list("c")], labels_of([0, 1] * 15, "c"), draws=7))
    return paths


def put_sets(monkeypatch, folder, **queries):
    """Write data sets of Table 1 as if downloaded. dl21="a": DL21 is a list of query a and its judgements."""
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


def test_half_a_surrogate_pair_in_an_instance_stops_no_writer(tmp_path):
    good = dataclasses.asdict(expand([make_list()], labels_of([0, 1, 2] * 10), draws=1, keep="all")[0])
    (tmp_path / "i").write_text(json.dumps(good | {"query": "\ud83d emoji \U0001f41d"}))
    [instance], _ = training_instances([str(tmp_path / "i")])
    data.write_instances(tmp_path / "again", [instance])
    assert instance.query == "? emoji \U0001f41d" and data.read_instances(tmp_path / "again") == [instance]


# --- BRIGHT


def make_bright(folder, split="leetcode", run="0 Q0 a_b 1 3.0 t\n0 Q0 c 2 2.0 t\n0 Q0 d/e 3 1.0 t\n"):
    """Write a split of three documents in the layout of the authors' archive. One docid has a space."""
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
        else:  # no relevant document of a query is excluded
            assert not any(excluded[qid] & set(docids) for qid, docids in judged.items())


# --- the command


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


def test_without_a_command_the_usage_is_printed_and_a_wrong_one_is_refused(capsys):
    assert data.main([]) == 0 and "python data.py download" in capsys.readouterr().out
    with pytest.raises(InputError, match="no command 'fetch': expected download"):
        data.main(["fetch"])
    with pytest.raises(InputError, match="no command 'download': expected download NAMES"):
        data.main(["download"])
    with pytest.raises(SystemExit):
        data.main(["bright", "--splits", "chess"])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command, option", [
    ("download dl19", "--candidates c"), ("download dl19", "--output o"), ("download dl19", "--folder f"),
    ("expand", "--folder f"), ("expand", "--splits pony"), ("bright", "--candidates c"),
    ("bright", "--qrels q"), ("bright", "--draws 100"), ("bright", "--exclude-queries q")])
def test_an_option_of_another_command_is_refused_in_one_line(monkeypatch, command, option):
    for name in ("download", "training_instances", "read_bright"):
        monkeypatch.setattr(data, name, lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(InputError) as refusal:
        data.main([*command.split(), *option.split()])
    assert str(refusal.value) == f"{option.split()[0]} has no effect with {command.split()[0]}"
