"""Downloads from a local server: files of the hub, the hub's rows service, plain URLs, archives.

The server cuts replies off, stalls, and sends error pages (also with status 200) and wrong files.
"""

import functools
import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import huggingface_hub
import pytest

import data
from data import expand
from support import download
from support.cli import InputError
from support.files import Instance, read_candidates, read_instances, read_qrels

CONTENT = b"1 0 a 1\n" * 30_000  # 240 kB
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MD5 = hashlib.md5(CONTENT).hexdigest()
LISTS = (
    b'{"query": {"text": "q", "qid": "1"}, "candidates": [{"docid": "a", "score": 2.0, "doc": {"text": "x"}},'
    b' {"docid": "b", "score": 1.0, "doc": {"text": "y"}}]}\n'
)
QRELS = b"1 0 b 1\n1 0 c 1\n2 0 b 1\n"
HTML = b"\n<!DOCTYPE html><html>Too many requests</html>"


class Handler(http.server.BaseHTTPRequestHandler):
    """The method `name` answers requests for /name/... Each GET is added to the server's `log`."""

    def do_GET(self):
        self.server.log.append(self.path)
        getattr(self, urlsplit(self.path).path.split("/")[1])()

    def do_HEAD(self):
        self.datasets(head=True)

    def answer(self, body, status=200, sent=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body[:sent])

    def good(self):
        self.answer(CONTENT)

    def wrong(self):
        self.answer(b"not the file")

    def page(self):
        self.answer(HTML)

    def cut_once(self):
        self.answer(CONTENT, sent=None if len(self.server.log) > 1 else 100_000)

    def cut(self):
        self.answer(CONTENT, sent=100_000)

    def stalls_once(self):  # the first answer stops half way without closing the connection
        self.answer(CONTENT, sent=None if len(self.server.log) > 1 else 100_000)
        if len(self.server.log) == 1:
            self.wfile.flush()
            self.server.released.wait(10)

    def moved(self):
        self.answer(b"", status=302, Location=self.path.replace("moved", "good"))

    def absent(self):
        self.send_error(404)

    def busy(self):
        self.send_error(503)

    def qrels(self):
        self.answer(QRELS)

    def datasets(self, head=False):  # the hub: /datasets/OWNER/NAME/resolve/main/FILE
        body = self.server.hub.get(self.path)
        if body is None:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        tag = hashlib.sha256(body).hexdigest()
        self.answer(body, sent=0 if head else None, ETag=f'"{tag}"', X_Repo_Commit="0" * 40)

    def splits(self):
        splits = [{"config": "other", "split": "test"}, {"config": "default", "split": "train"}]
        self.answer(json.dumps({"splits": splits}).encode())

    def rows(self):
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        assert (asked["dataset"], asked["config"], asked["split"]) == (
            "le723z/rearank_12k",
            "default",
            "train",
        )
        offset, rows = int(asked["offset"]), self.server.rows
        entries = [{"row_idx": n, "row": row, "truncated_cells": []} for n, row in enumerate(rows)]
        page = {
            "features": [],
            "rows": entries[offset : offset + int(asked["length"])],
            "num_rows_total": len(rows),
        }
        fault = self.server.faults.get(offset)
        if fault == "html":
            return self.answer(HTML)
        if fault == "500":
            return self.answer(HTML, 500)
        if fault == "cut":
            return self.answer(json.dumps(page).encode(), sent=1000)
        if fault == "short":
            page["rows"].pop()
        if fault == "truncated":
            page["rows"][3]["truncated_cells"] = ["hits"]
        if fault == "another place":
            page["rows"][3]["row_idx"] += 1
        self.answer(b"[3]" if fault == "list" else json.dumps(page).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A running server. data.py and the hub's client download from it and keep their files below tmp_path."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.log, server.hub, server.rows, server.faults, server.released = [], {}, [], {}, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(download, "WAIT", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setattr(download, "ROWS", server.url)
    monkeypatch.setenv("REARANK_DATA", str(tmp_path / "cache"))
    hub_file = functools.partial(
        huggingface_hub.hf_hub_download, endpoint=server.url, cache_dir=tmp_path / "hub"
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub_file)
    monkeypatch.setattr(download, "hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def on_hub(server, source, body):
    """Let the hub serve `body` as the file `source` (owner/name/file). Returns `source`."""
    owner, name, file = source.split("/", 2)
    server.hub[f"/datasets/{owner}/{name}/resolve/main/{file}"] = body
    return source


# -- one file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how, requests", [("good", 1), ("moved", 2), ("cut_once", 2), ("stalls_once", 2)])
def test_a_file_arrives_whole_whatever_the_server_does(server, tmp_path, how, requests):
    path = download.fetch(f"{server.url}/{how}/file.txt", tmp_path / "sub", MD5)
    assert (
        path == tmp_path / "sub" / "file.txt" and path.read_bytes() == CONTENT and len(server.log) == requests
    )
    assert files_below(tmp_path / "sub") == ["file.txt"]


def test_what_is_there_and_valid_is_not_fetched_again_and_what_is_damaged_is(server, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    download.fetch(f"{server.url}/good/file", tmp_path, MD5)
    assert server.log == []
    (tmp_path / "file").write_bytes(CONTENT[:-1])
    assert download.fetch(f"{server.url}/good/file", tmp_path, MD5).read_bytes() == CONTENT
    (tmp_path / "file").write_bytes(b"of the user's own")  # used as it is if no checksum is known
    assert download.fetch(f"{server.url}/good/file", tmp_path, "").read_bytes() == b"of the user's own"


@pytest.mark.parametrize(
    "how, reason, requests",
    [
        ("absent", "Not Found", 1),
        ("busy", "Service Unavailable", 4),
        ("cut", "IncompleteRead", 4),
        ("wrong", "expected a file of MD5 " + MD5, 1),
        ("page", "expected a file of MD5", 1),
    ],
)
def test_what_cannot_be_had_is_one_line_with_the_address_and_the_place_and_nothing_is_kept(
    server, tmp_path, how, reason, requests
):
    with pytest.raises(InputError) as error:
        download.fetch(f"{server.url}/{how}/file", tmp_path / "sub", MD5)
    message = str(error.value)
    assert f"{server.url}/{how}/file" in message and str(tmp_path / "sub" / "file") in message
    assert reason in message and "\n" not in message and "by hand" in message
    assert len(server.log) == requests and not [*tmp_path.rglob("*file*")]


def test_nobody_listening_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "WAIT", 0.01)
    with pytest.raises(InputError, match="cannot fetch http://127.0.0.1:9/file .*refused.* by hand"):
        download.fetch("http://127.0.0.1:9/file", tmp_path, MD5)


def test_a_missing_checksum_is_said_and_a_web_page_is_no_data(server, tmp_path, capsys):
    download.fetch(f"{server.url}/qrels/file", tmp_path, "")
    assert capsys.readouterr().err == f"{server.url}/qrels/file: no checksum is published for this file\n"
    with pytest.raises(InputError, match="expected data, found .*DOCTYPE"):
        download.fetch(f"{server.url}/page/other", tmp_path, "")
    assert files_below(tmp_path) == ["file"]


def test_a_file_of_the_hub_is_fetched_once_and_a_wrong_one_is_not_taken(server, tmp_path):
    source = on_hub(server, "owner/set/folder/lists.jsonl", CONTENT)
    for _ in range(2):
        path = download.fetch(source, tmp_path / "lists", MD5)
        assert path == tmp_path / "lists" / "lists.jsonl" and path.read_bytes() == CONTENT
    assert len(server.log) == 1
    path.unlink()
    download.fetch(source, tmp_path / "lists", MD5)
    assert len(server.log) == 1, "the hub's own cache has it"
    with pytest.raises(InputError, match="expected a file of MD5 00"):
        download.fetch(source, tmp_path / "other", "0" * 32)
    assert not (tmp_path / "other").exists()


def test_what_the_hub_does_not_have_is_one_line(server, tmp_path):
    with pytest.raises(
        InputError, match="cannot fetch owner/set/lists.jsonl .*by hand"
    ) as error:
        download.fetch("owner/set/lists.jsonl", tmp_path, MD5)
    assert "\n" not in str(error.value) and str(tmp_path / "lists.jsonl") in str(error.value)


# -- archives ----------------------------------------------------------------------------------------------


def make_tar(*members):
    """The bytes of a .tar.gz. A member is (name, type or None for a file, link target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind or tarfile.REGTYPE, target, 0 if kind else 5
            archive.addfile(info, io.BytesIO(b"12345"))
    return buffer.getvalue()


GOOD = ("first/file.txt", None, "")
BAD_ARCHIVES = [
    make_tar(GOOD, member)
    for member in (
        ("../outside", None, ""),
        ("first/../../outside", None, ""),
        ("link", tarfile.SYMTYPE, "/etc"),
        ("link", tarfile.SYMTYPE, "../outside"),
        ("hard", tarfile.LNKTYPE, "/etc/passwd"),
        ("device", tarfile.CHRTYPE, ""),
        ("pipe", tarfile.FIFOTYPE, ""),
    )
]
BAD_ARCHIVES += [make_tar(GOOD)[:-20], b"nonsense", HTML]


@pytest.mark.parametrize("body", BAD_ARCHIVES, ids=range(len(BAD_ARCHIVES)))
def test_an_unsafe_or_damaged_archive_leaves_nothing_behind(server, tmp_path, body):
    on_hub(server, download.BRIGHT_ARCHIVE, body)
    with pytest.raises(InputError, match="unsafe or damaged, nothing was unpacked") as error:
        download.download("bright")
    assert "\n" not in str(error.value) and files_below(tmp_path / "cache") == []
    assert not (tmp_path / "outside").exists()


def test_a_good_archive_is_unpacked_once_and_an_absolute_name_stays_inside(server, tmp_path):
    body = make_tar(("first", tarfile.DIRTYPE, ""), GOOD, ("/absolute/second.txt", None, ""))
    on_hub(server, download.BRIGHT_ARCHIVE, body)
    for _ in range(2):
        (folder,) = download.download("bright")
        assert files_below(tmp_path / "cache") == [
            "bright",
            "bright/absolute",
            "bright/absolute/second.txt",
            "bright/first",
            "bright/first/file.txt",
        ]
        assert (folder / "first" / "file.txt").read_text() == "12345"
    assert len(server.log) == 1


# -- the authors' training windows ---------------------------------------------------------------------------


def window(n):
    """Row n of the data set: five passages of query n % 3, not sorted by docid."""
    hits = [
        {"content": f"text {d}", "docid": f"d{d}", "qid": n % 3, "rank": r + 1, "score": 9.0 - r}
        for r, d in enumerate((n, n + 2, n + 4, n + 1, n + 7))
    ]
    return {"query": f"query {n % 3}", "hits": hits, "reward": {"unused": 1}}


def offer_windows(server, monkeypatch, rows):
    """Serve `rows` windows, with judgements of query 0 in DL21, 1 in DL22 and 2 in DL23.

    Returns the instances that the download must write.
    """
    server.rows = [window(n) for n in range(rows)]
    labels = {str(q): {f"d{d}": (d + q) % 4 - 1 for d in range(0, rows, 2)} for q in range(3)}

    def judged(handler):
        qid = handler.path.rsplit("/")[-1]
        handler.answer("".join(f"{qid} 0 {docid} {label}\n" for docid, label in labels[qid].items()).encode())

    monkeypatch.setattr(Handler, "judged", judged, raising=False)
    for qid, name in (("0", "dl21"), ("1", "dl22")):
        monkeypatch.setitem(download.TABLE_1, name, ("", "", f"{server.url}/judged/{qid}", "", None))
    monkeypatch.setattr(download, "DL23", (f"{server.url}/judged/2", ""))
    return [
        Instance(
            str(n % 3),
            f"query {n % 3}",
            [f"d{d}" for d in numbers],
            [f"text {d}" for d in numbers],
            [max(0, labels[str(n % 3)].get(f"d{d}", 0)) for d in numbers],
            list(labels[str(n % 3)].values()),
        )
        for n in range(rows)
        for numbers in [(n, n + 2, n + 4, n + 1, n + 7)]
    ]


def pages_asked(server):
    return [
        int(parse_qs(urlsplit(path).query)["offset"][0]) for path in server.log if path.startswith("/rows")
    ]


@pytest.mark.parametrize("rows", [1, 99, 100, 250])
def test_the_windows_come_page_by_page_with_labels_from_the_three_judgements(
    server, monkeypatch, tmp_path, rows, capsys
):
    expected = offer_windows(server, monkeypatch, rows)
    (path,) = download.download("rearank_12k")
    assert read_instances(path) == expected and pages_asked(server) == [*range(0, rows, 100)]
    assert f"{rows} windows; the paper has 12,603" in capsys.readouterr().err
    assert files_below(path.parent) == ["instances.jsonl"]
    requests = len(server.log)
    assert download.download("rearank_12k") == [path] and len(server.log) == requests


@pytest.mark.parametrize("fault", ["html", "500", "cut", "short", "truncated", "another place", "list"])
def test_a_bad_page_is_one_line_and_the_next_attempt_goes_on_where_it_was(
    server, monkeypatch, tmp_path, fault
):
    expected = offer_windows(server, monkeypatch, 250)
    server.faults = {100: fault}
    with pytest.raises(InputError, match=r"/rows\?.*offset=100.*try again") as error:
        download.download("rearank_12k")
    assert (
        "\n" not in str(error.value) and not (tmp_path / "cache" / "rearank_12k" / "instances.jsonl").exists()
    )
    assert files_below(tmp_path / "cache" / "rearank_12k" / "pages") == ["000000.json"]
    server.faults, server.log = {}, []
    (path,) = download.download("rearank_12k")
    assert read_instances(path) == expected and pages_asked(server) == [100, 200]


def test_a_data_set_without_rows_is_refused(server, monkeypatch, tmp_path):
    offer_windows(server, monkeypatch, 0)
    for qid, name in (("0", "dl21"), ("1", "dl22")):
        monkeypatch.setitem(download.TABLE_1, name, ("", "", f"{server.url}/qrels/{qid}", "", None))
    monkeypatch.setattr(download, "DL23", (f"{server.url}/qrels/2", ""))
    with pytest.raises(InputError, match="offset=0.* expected whole rows"):
        download.download("rearank_12k")


def test_an_interrupted_download_goes_on_where_it_was(server, monkeypatch, tmp_path):
    expected, fetch = offer_windows(server, monkeypatch, 250), download.get

    def interrupted(url, path):
        if "offset=200" in url:
            raise KeyboardInterrupt
        return fetch(url, path)

    monkeypatch.setattr(download, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.download("rearank_12k")
    monkeypatch.setattr(download, "get", fetch)
    server.log.clear()
    assert read_instances(*download.download("rearank_12k")) == expected and pages_asked(server) == [200]


def test_windows_without_judgements_are_refused(server, monkeypatch, tmp_path):
    offer_windows(server, monkeypatch, 250)
    server.rows[7]["hits"][0]["qid"] = 5
    with pytest.raises(InputError, match="query 5 has no judgements"):
        download.download("rearank_12k")
    assert not (tmp_path / "cache" / "rearank_12k" / "instances.jsonl").exists()


def test_an_answer_without_a_train_split_is_one_line(server, monkeypatch, tmp_path):
    offer_windows(server, monkeypatch, 1)
    monkeypatch.setattr(Handler, "splits", Handler.page)
    with pytest.raises(InputError, match="splits.*: expected JSON with a train split"):
        download.download("rearank_12k")


# -- the command and training data ---------------------------------------------------------------------------


def offer_set(server, monkeypatch, name, paper=50.0):
    """Serve a data set `name`: a list of query 1 (documents a, b), and judgements of queries 1 and 2."""
    source = on_hub(server, f"owner/set/{name}.jsonl", LISTS)
    entry = (source, hashlib.md5(LISTS).hexdigest(), f"{server.url}/qrels/{name}.txt", "", paper)
    monkeypatch.setitem(download.TABLE_1, name, entry)


def test_the_command_prints_places_and_the_first_stage_and_goes_on_after_a_failure(
    server, monkeypatch, capsys, tmp_path
):
    offer_set(server, monkeypatch, "dl19")
    offer_set(server, monkeypatch, "dl21", None)
    monkeypatch.setitem(
        download.TABLE_1, "dl20", (f"{server.url}/absent/lists", MD5, f"{server.url}/qrels/q", "", 1.0)
    )
    assert data.main(["download", "dl20", "chess", "dl19", "dl21"]) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("data.py:")]
    assert (
        len(errors) == 2 and "absent/lists" in errors[0] and "no data set 'chess': expected dl19" in errors[1]
    )
    folder = tmp_path / "cache" / "dl19"
    # The list has one of query 1's two relevant documents, at rank 2: DCG 1 / log2(3), ideal 1 + 1 / log2(3).
    assert f"dl19: {folder / 'dl19.jsonl'} {folder / 'dl19.txt'}\n" in printed.out
    assert "dl19: NDCG@10 x 100 of the lists 38.69 (1 queries), the paper's BM25 50.00\n" in printed.out
    assert (
        "dl21: NDCG@10 x 100 of the lists 38.69 (1 queries), the paper's BM25 is not given\n" in printed.out
    )
    assert data.main(["download", "dl19"]) == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files of ../shared/data are not here")
@pytest.mark.parametrize(
    "name, folder, qrels, said",
    [
        ("dl19", "dl19_eval_dev", "2019qrels-pass.txt", "50.58 (43 queries), the paper's BM25 50.58"),
        ("dl21", "dl21_train_dev", "2021.qrels.pass.final.txt", "44.58 (53 queries), the paper's BM25 is"),
    ],
)
def test_the_real_lists_have_the_checksums_and_the_ndcg_that_are_known(
    server, tmp_path, capsys, name, folder, qrels, said
):
    (tmp_path / "cache" / name).mkdir(parents=True)
    for source, target in (("retrieve*", f"retrieve_results_{name}_top100.jsonl"), ("qrels*", qrels)):
        (packed,) = (SHARED / folder).glob(source)
        (tmp_path / "cache" / name / target).write_bytes(gzip.decompress(packed.read_bytes()))
    assert data.main(["download", name]) == 0 and server.log == []
    assert f"{name}: NDCG@10 x 100 of the lists {said}" in capsys.readouterr().out


def test_training_data_by_name_is_downloaded_on_demand(server, monkeypatch, capsys):
    offer_set(server, monkeypatch, "dl21")
    offer_set(server, monkeypatch, "dl22")
    with pytest.raises(InputError, match="query 1 is in both dl21 and dl22"):
        data.training_instances(["auto"])
    instances, what = data.training_instances(["dl21"])
    candidates, qrels = download.download("dl21")
    assert instances == expand(read_candidates(candidates), read_qrels(qrels)) and what["data"] == [
        "dl21"
    ]
    assert instances[0].docids == ["a", "b"] and instances[0].labels == [0, 1]


def test_the_cache_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("REARANK_DATA", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert download.cache_folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("REARANK_DATA")
    assert download.cache_folder() == tmp_path / ".cache" / "rearank"


def test_every_set_of_the_papers_table_has_candidates_and_judgements():
    assert [*download.TABLE_1] == (
        "dl19 dl20 dl21 dl22 covid nfcorpus dbpedia scifact signal news robust04"
    ).split()
    for candidates, candidates_md5, qrels, qrels_md5, paper in download.TABLE_1.values():
        assert (
            candidates.count("/") >= 2 and not candidates.startswith("http") and qrels.startswith("https://")
        )
        assert all(
            set(md5) <= set("0123456789abcdef") and len(md5) in (0, 32) for md5 in (candidates_md5, qrels_md5)
        )
        assert paper is None or 30 < paper < 70


def test_the_hub_without_a_network_is_one_line_within_seconds(monkeypatch, tmp_path):
    """The hub's client would retry for half a minute and print a line each time."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(InputError, match="cannot fetch nobody/nothing/x.jsonl .*put it at") as refused:
        download.get("nobody/nothing/x.jsonl", tmp_path / "x.jsonl")
    assert time.monotonic() - started < 3 and "\n" not in str(refused.value)
