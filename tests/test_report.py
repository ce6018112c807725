"""report.py: the passages' paths, sentences, NDCG as in eval.py, escaped text, the page in a browser."""

import doctest
import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

import report
from eval import evaluate
from rearank import RerankSettings, rerank_file, sliding_window
from report import describe, page, read_queries, replay
from reward import sentences
from support.cli import InputError
from support.files import read_run, write_candidates, write_qrels, write_run
from toy import toy_task

ROOT = Path(__file__).resolve().parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = ["</script><script>document.title='bad'</script>", "<!-- <script>",
           "<img src=x onerror=document.title='bad'>", "\"'&amp;`${1}\\u003c", "a b\u2028c\u0000 中文 😀"]


def a_query(qid: str, docids: list[str], order: list[str], texts: list[str] | None = None) -> dict:
    return {"qid": qid, "query": f"about {qid}", "docids": docids, "order": order,
            "texts": texts or [f"text of {docid}" for docid in docids]}


def a_window(qid: str, docids: list[str], order: list[str], reasoning: str = "", **changes) -> dict:
    return {"qid": qid, "docids": docids, "status": "ok", "order": order, "reasoning": reasoning,
            "response": f"<think>{reasoning}</think><answer> ... </answer>", "tokens": 7, "finished": True,
            "prompt_shortened": False, "some key of next year": None} | changes


def overlapping() -> list[dict]:
    """Rows of a trace: query q1 has five passages and two windows of three; e rises from rank 5 to 3 to 1."""
    return [a_query("q1", [*"abcde"], [*"eabcd"]),
            a_window("q1", [*"cde"], [*"ecd"], "[1] is dull. [3] says it all! See also [1, 3]."),
            a_window("q1", [*"abe"], [*"eab"], "[3] is best."), a_query("q2", ["x"], ["x"])]


def written(path: Path, rows: list, end: str = "\n") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def data_in(html: str) -> dict:
    [found] = re.findall(r'<script type="application/json" id="data">([^<]*)</script>', html)
    return json.loads(found)


# --- paths and sentences


@given(st.integers(0, 40), st.integers(1, 8), st.integers(0, 8), st.integers(0, 99))
def test_replayed_windows_lead_to_the_order_of_the_sliding_window(n, stride, more, seed):
    rng, docids, windows = random.Random(seed), [f"d{i}" for i in range(n)], []

    def shuffled(present):
        order = rng.sample(range(len(present)), len(present))
        windows.append({"order": [present[i] for i in order]})
        return order

    end = sliding_window(docids, shuffled, stride + more, stride)
    paths, replayed = replay(docids, windows)
    assert replayed == end and [*paths] == docids
    for rank, docid in enumerate(docids, 1):
        for number, before, after in paths[docid]:
            assert before == rank and docid in windows[number - 1]["order"]
            rank = after
        assert end[rank - 1] == docid


def test_windows_trade_only_the_places_their_documents_hold_whatever_the_prompt_showed_first():
    paths, end = replay([*"abcdef"], [{"docids": [*"fbd"], "order": [*"fdb"]},
                                      {"docids": [*"af"], "order": [*"fa"]}])
    assert end == [*"facdeb"]
    assert paths["f"] == [(1, 6, 2), (2, 2, 1)] and paths["b"] == [(1, 2, 6)] and paths["c"] == []


@pytest.mark.parametrize("sentence, named", [
    ("[3] is best.", [3]), ("[3, 5] fit", [3, 5]), ("[13] does", [13]), ("Passages [3] > [5]:", [3, 5]),
    ("[Passage 3] and [5][7]", [3, 5, 7]), ("In 1984 3 men [3.1] [-2] [a] [] [99999999999]", [])])
def test_a_sentence_names_what_stands_in_brackets(sentence, named):
    assert sentences(sentence) == [(sentence, named)]


def test_sentences_end_at_lines_and_full_stops_but_not_in_abbreviations_or_list_numbers():
    text = "1. [4] is on topic, e.g. fleas. It (3.5 mm) jumps!\n- [2]: no\n\n很好。[1]好。"
    assert [part for part, _ in sentences(text)] == [
        "1. [4] is on topic, e.g. fleas. ", "It (3.5 mm) jumps!\n", "- [2]: no\n\n", "很好。", "[1]好。"]


@given(st.text(alphabet="ab .!\n[]3,é。\")1"))
def test_the_sentences_together_are_the_text(text):
    assert "".join(part for part, _ in sentences(text)) == text


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(report) == (0, 1)  # test_reward.py runs those of `sentences`


# --- labels and NDCG


def test_labels_and_ndcg_before_and_after_are_those_of_the_runs_in_eval(tmp_path):
    rng, rows, before, after, qrels = random.Random(5), [], {}, {}, {}
    for qid in ("1", "2", "unjudged"):
        docids = [f"doc {i} é" for i in rng.sample(range(99), 30)]  # TREC files have _ for spaces
        before[qid], after[qid] = docids, rng.sample(docids, 30)
        rows.append(a_query(qid, docids, after[qid]))
        qrels[qid] = {docid: rng.randrange(-1, 4) for docid in rng.sample(docids, 20)} | {"not found": 3}
    del qrels["unjudged"]
    for name, ranking in (("before", before), ("after", after)):
        write_run(tmp_path / name, ranking, "x")
    write_qrels(tmp_path / "qrels", qrels)
    report.main([str(written(tmp_path / "r.trec.jsonl", rows)), "--qrels", str(tmp_path / "qrels")])
    found = {row["qid"]: row for row in data_in((tmp_path / "r.html").read_text())["queries"]}
    labels = report.read_qrels(tmp_path / "qrels")
    for side, name in enumerate(("before", "after")):
        expected = evaluate(labels, read_run(tmp_path / name), ["ndcg_cut.10"])
        assert {qid: row["ndcg"][side] for qid, row in found.items()} == {
            qid: expected.get(qid, {}).get("ndcg_cut_10") for qid in found}
    assert found["unjudged"]["labels"] is None
    assert found["1"]["labels"] == [qrels["1"].get(docid) for docid in before["1"]]


def test_unjudged_passages_in_the_top_10_are_counted_before_and_after():
    docids = [f"d{i}" for i in range(20)]
    query = a_query("q", docids, docids[5:] + docids[:5]) | {"windows": []}
    assert describe(query, {f"d{i}": 0 for i in range(12)})["unjudged"] == [0, 3]


# --- contents of the page


def test_a_window_knows_its_ranks_its_prompts_numbers_and_its_answer_word_for_word(tmp_path):
    first, second = read_queries(written(tmp_path / "t", overlapping()))
    found = describe(first, None)
    assert found["paths"][4] == [(1, 5, 3), (2, 3, 1)] and found["whole"] and found["statuses"] == "2 ok"
    assert [window["ranks"] for window in found["windows"]] == ["3–5", "1–3"]
    assert found["windows"][1]["shown"] == [0, 1, 4], "[3] of the second window is e"
    assert "".join(text for text, _ in found["windows"][0]["text"]) == first["windows"][0]["response"]
    assert describe(second, None)["windows"] == [] and describe(second, None)["whole"]


def test_of_a_top_down_run_a_path_has_its_first_and_its_last_rank(tmp_path):
    """Its windows are not neighbours in the list, so they cannot be replayed one after the other."""
    query, window, *_ = overlapping()
    [row] = read_queries(written(tmp_path / "t", [query, window | {"part": 0}]))
    found = describe(row, None)
    ends = [(0, n, row["order"].index(docid) + 1) for n, docid in enumerate(row["docids"], 1)]
    assert found["paths"] == [[end] for end in ends] and found["whole"]
    assert found["windows"][0]["ranks"] == "3–5"  # in the first stage's list


def test_answers_cut_off_prompts_cut_and_windows_missing_are_said(tmp_path):
    query, window, *_ = overlapping()
    window |= {"finished": False, "prompt_shortened": True}
    [row] = read_queries(written(tmp_path / "t", [query, window]))
    found = describe(row, None)
    assert found["windows"][0]["status"] == "ok, hit limit, prompt shortened" and not found["whole"]


def test_long_passages_are_cut_and_marked():
    query = a_query("q", ["d"], ["d"], ["x" * 6000]) | {"windows": []}
    assert describe(query, None)["texts"] == ["x" * 5000 + " […]"]


def hostile_rows() -> list[dict]:
    order, said = HOSTILE[::-1], "[1] " + HOSTILE[0] + ". [2] too."
    return [a_query(HOSTILE[0], HOSTILE, order, HOSTILE) | {"query": HOSTILE[1]},
            a_window(HOSTILE[0], HOSTILE, order, said, status=HOSTILE[2])]


def test_no_text_can_end_the_data_or_begin_an_element(tmp_path):
    path = written(tmp_path / "t", hostile_rows())
    html, elements = page(read_queries(path), {}, HOSTILE[0]), []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, _: elements.append(tag)
    reader.feed(html)
    assert elements.count("script") == 2 and "img" not in elements and html.count("<!--") == 0
    found = data_in(html)
    [query] = found["queries"]
    assert found["title"] == query["qid"] == HOSTILE[0] and query["texts"] == query["docids"] == HOSTILE


def test_half_a_surrogate_pair_does_no_harm(tmp_path):
    row = json.dumps(a_query("q", ["d"], ["d"], ["half \ud83d"]))
    assert read_queries(written(tmp_path / "t", [row]))[0]["texts"] == ["half ?"]


def test_the_page_loads_nothing_from_elsewhere():
    assert not re.search(r"https?:|//\w|@import|url\(|\bsrc=|<link|fetch\(|XMLHttp|import\(", report.PAGE)
    assert "content=\"default-src 'unsafe-inline'\"" in report.PAGE, "the browser must refuse other sources"


# --- bad input

LINES = [json.dumps(row) for row in overlapping()]


@pytest.mark.parametrize("lines, line", [
    ([""], 1),
    (["<html>"], 1),
    (['{"qid": "q1", "query": "cut o'], 1),
    (["q1 Q0 d1 1 9 run"], 1),
    (['[{"qid": "q1"}]'], 1),
    (['{"query": {"qid": "1", "text": "candidates"}, "candidates": []}'], 1),
    ([LINES[1], LINES[0]], 1),                                               # a window before its query
    ([LINES[0], LINES[1].replace('"q1"', '"q9"')], 2),                       # ... without a query
    ([LINES[0], LINES[0]], 2),
    ([LINES[0], '{"qid": "q1", "doc', LINES[2]], 2),                         # half a line in the middle
    ([LINES[0].replace('"text of a", ', ""), LINES[1]], 1),                  # a text missing
    ([LINES[0].replace('"order": ["e"', '"order": ["x"')], 1),
    ([LINES[0].replace('"qid": "q1"', '"qid": 1')], 1),
    ([LINES[0], LINES[1].replace('"e"', '"y"')], 2),                         # not a document of the query
    ([LINES[0], LINES[1].replace('"status": "ok", ', "")], 2),
    ([LINES[0], LINES[1].replace('["e", "c", "d"]', '["e", "c", "c"]')], 2),
    ([LINES[0], json.dumps(a_window("q1", [], []))], 2),
    ([LINES[0], LINES[1].replace('"tokens": 7', '"tokens": NaN')], 2),
    (json.dumps(overlapping()[0], indent=1).split("\n"), 1),
])
def test_bad_input_names_the_file_the_line_and_what_was_expected(tmp_path, lines, line):
    path = written(tmp_path / "t.jsonl", lines, end="" if lines == [""] else "\n")
    said = rf"^{re.escape(str(path))}:{line}: expected .* as rearank.py writes it .*, found "
    with pytest.raises(InputError, match=said):
        report.main([str(path)])
    assert not (tmp_path / "t.html").exists()


def test_bad_input_is_one_line_and_status_2(tmp_path):
    path = written(tmp_path / "t.jsonl", ["no JSON"])
    command = [sys.executable, str(ROOT / "report.py"), str(path)]
    result = subprocess.run(command, capture_output=True, check=False)
    assert result.returncode == 2 and not result.stdout and result.stderr.count(b"\n") == 1


@pytest.mark.parametrize("kept", [5, 40, -1])
def test_half_a_line_at_the_end_is_left_out_with_a_note(tmp_path, capsys, kept):
    half = LINES[2].replace("best", "bést").encode()[:kept]
    for cut in (half, half + "é".encode()[:1]):  # also cut inside a character
        (tmp_path / "t").write_bytes("\n".join(LINES[:2]).encode() + b"\n" + cut)
        [query] = read_queries(tmp_path / "t")
        assert len(query["windows"]) == 1 and f"{tmp_path / 't'}:3: cut off" in capsys.readouterr().err


def test_a_whole_last_line_needs_no_line_end(tmp_path, capsys):
    assert len(read_queries(written(tmp_path / "t", LINES, end=""))) == 2 and not capsys.readouterr().err


# --- the command


@pytest.mark.parametrize("name, output", [
    ("r.trec.jsonl", "r.html"), ("r.jsonl", "r.html"), ("a.b.trec.jsonl", "a.b.html"),
    ("r.trec.jsonl.gz", "r.html"), ("r.json", "r.json.html")])
def test_the_page_stands_beside_its_input(tmp_path, capsys, name, output):
    text = "\n".join(LINES) + "\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    report.main([str(tmp_path / name)])
    assert data_in((tmp_path / output).read_text())["title"] == name
    assert capsys.readouterr().out == f"{tmp_path / output}: 2 queries\n"


def test_no_input_is_overwritten_and_judgements_of_other_queries_are_refused(tmp_path):
    path = written(tmp_path / "t.jsonl", LINES)
    write_qrels(tmp_path / "qrels", {"another": {"a": 1}})
    with pytest.raises(InputError, match="would overwrite"):
        report.main([str(path), "--output", str(path)])
    with pytest.raises(InputError, match="no query in common with"):
        report.main([str(path), "--qrels", str(tmp_path / "qrels")])


def test_the_page_is_written_through_links_and_straight_into_pipes(tmp_path, capsys):
    path = written(tmp_path / "t.jsonl", LINES)
    (tmp_path / "t.html").symlink_to(tmp_path / "store" / "page.html")
    report.main([str(path)])
    assert (tmp_path / "t.html").is_symlink()
    assert len(data_in((tmp_path / "store" / "page.html").read_text())["queries"]) == 2
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(InputError, match="would overwrite"):  # also through a link
        (tmp_path / "link").symlink_to(path)
        report.main([str(path), "--output", str(tmp_path / "link")])
    report.main([str(path), "--output", str(tmp_path / "pipe")])
    assert os.read(reader, 2**16).startswith(b"<!DOCTYPE html>") and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_the_trace_may_come_from_standard_input(tmp_path, monkeypatch, capsys):
    lines = ("\ufeff" + "\n".join(LINES) + "\n").encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), "ascii"))
    monkeypatch.chdir(tmp_path)
    report.main(["-"])
    assert data_in((tmp_path / "report.html").read_text())["title"] == "report"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_links_in_a_circle_are_one_line_and_status_2(tmp_path):
    path = written(tmp_path / "t.jsonl", LINES)
    (tmp_path / "t.html").symlink_to("t.html")
    (tmp_path / "in").symlink_to("in")
    for arguments in ([path], [tmp_path / "in"]):
        command = [sys.executable, str(ROOT / "report.py"), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, check=False)
        assert result.returncode == 2 and not result.stdout and result.stderr.count(b"\n") == 1
    assert (tmp_path / "t.html").is_symlink() and len([*tmp_path.iterdir()]) == 3


def test_nothing_heavy_is_imported():
    code = "import sys, report; print({'torch', 'transformers', 'tqdm', 'model'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == b"set()"


def test_what_rearank_writes_is_read(tmp_path, toy):
    candidates, qrels = toy_task(3, 9, seed=0)
    write_candidates(tmp_path / "c.jsonl", candidates)
    write_qrels(tmp_path / "qrels", qrels)
    rerank_file(RerankSettings(input=str(tmp_path / "c.jsonl"), output=str(tmp_path / "r.trec"), prompt="toy",
                               window=6, stride=3, max_new_tokens=4), toy)
    report.main([str(tmp_path / "r.trec.jsonl"), "--qrels", str(tmp_path / "qrels")])
    queries = data_in((tmp_path / "r.html").read_text())["queries"]
    assert [(len(query["windows"]), query["whole"]) for query in queries] == [(2, True)] * 3


# --- in a browser


def seen(html: str, keys: str = "", **fragment) -> tuple[str, list[str]]:
    """Show a page in headless Chromium and press `keys`. Returns (title and text, each key's fragment)."""
    script = """<script>(async () => {
      const trail = [];
      for (const key of KEYS) {
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        if (key === "Enter") document.activeElement.click();
        await new Promise(done => setTimeout(done, 50));
        trail.push(location.hash);
      }
      const found = JSON.stringify([`${document.title}: ${document.body.innerText}`, trail]);
      document.documentElement.innerHTML = "<body><pre>";
      document.querySelector("pre").textContent = found;
    })()</script>""".replace("KEYS", json.dumps(keys.split()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.html")
        path.write_text(html + script, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-sync", "--disable-background-networking", "--disable-component-update",
                 f"--user-data-dir={folder}", "--virtual-time-budget=5000", "--dump-dom"]
        shown = subprocess.run([BROWSER, *flags, f"{path.as_uri()}#{urlencode(fragment)}"], check=True,
                               capture_output=True, timeout=60).stdout.decode()
    text, trail = json.loads(unescape(re.search("<pre>(.*)</pre>", shown, re.DOTALL)[1]))
    return re.sub(r"\s+", " ", text), trail


needs_browser = pytest.mark.skipif(not BROWSER, reason="needs chromium")


@pytest.mark.slow
@needs_browser
def test_the_browser_opens_a_query_and_shows_a_passages_path_and_what_was_said_of_it(tmp_path):
    html = page(read_queries(written(tmp_path / "t", overlapping())), {"q1": {"e": 3, "a": 0}}, "t")
    text, _ = seen(html, q="q1", d="e")
    assert "Rank 5 → 3 → 1; label: 3" in text and "NDCG@10 0.3869 → 1.0000 ▲0.6131" in text
    first = text.index("Window 1 (ranks 3–5) ok: [3], rank 5 → 3")
    second = text.index("Window 2 (ranks 1–3) ok: [3], rank 3 → 1")
    assert first < text.index("[3] says it all!") < text.index("See also [1, 3].") < second
    assert second < text.index("[3] is best.") and "is dull" not in text, "this sentence is about c"
    other, _ = seen(html, q="q1", d="b")
    assert "Rank 2 → 3; label: none, counts as irrelevant" in other and "[2], not named, rank 2 → 3" in other
    assert "Window 1 (ranks 3–5) ok: without it" in other


@pytest.mark.slow
@needs_browser
def test_the_keyboard_walks_through_queries_and_passages(tmp_path):
    html = page(read_queries(written(tmp_path / "t", overlapping())), {"q1": {"e": 3, "a": 0}}, "t")
    text, trail = seen(html, "j k Enter j k ArrowDown ArrowDown Escape")
    assert trail == ["", "", "#q=q1", "#q=q2", "#q=q1", "#q=q1&d=a", "#q=q1&d=b", ""], "b is now third"
    assert seen(html, "j", q="q1")[1] == ["#q=q2"], "also if the list was never shown"
    assert "2 queries, 1 judged: mean NDCG@10 0.3869 → 1.0000 ▲0.6131; unjudged (so irrelevant) in " in text


@pytest.mark.slow
@needs_browser
def test_the_browser_takes_no_text_for_html(tmp_path):
    html = page(read_queries(written(tmp_path / "t", hostile_rows())), {}, "good")
    text, _ = seen(html, q=HOSTILE[0], d=HOSTILE[0])
    assert text.startswith("good: ") and all(hostile in text for hostile in HOSTILE[:4])
    assert text.count(HOSTILE[0]) >= 3, "as docid, as text, in the reasoning"
