"""Downloads, against a local server that stalls, cuts off, serves the wrong file, redirects, and hands out malicious archives."""

import hashlib
import http.server
import io
import stat
import tarfile
import threading
import time
import zipfile

import pytest

import data
from data import InputError

CONTENT = bytes(range(256)) * 1000  # 256 kB: several blocks
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /name/file by the method `name`; every request's path and Range go to the log."""

    def do_GET(self):
        self.server.log.append((self.path, self.headers.get("Range")))
        getattr(self, self.path.split("/")[1])()

    def answer(self, body, status=200, sent=None, ranges=True, **headers):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else status)
        for name, value in {"Content-Length": len(body) - start, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body[start:][:sent])

    def good(self):
        self.answer(CONTENT)

    def wrong(self):
        self.answer(b"<html>not the file</html>")

    def cuts(self):  # 60,000 bytes of each answer arrive
        self.answer(CONTENT, sent=60_000)

    def forgetful(self):  # does not know ranges; cut off at the first request only
        self.answer(CONTENT, sent=None if len(self.server.log) > 1 else 100_000, ranges=False)

    def dead(self):  # promises everything, sends nothing
        self.answer(CONTENT, sent=0)

    def stalls(self):  # the first answer stops half way without closing the connection
        first = len(self.server.log) == 1
        self.answer(CONTENT, sent=100_000 if first else None)
        if first:
            self.wfile.flush()
            self.server.released.wait(10)

    def moved(self):
        self.answer(b"x", status=302, ranges=False, Location=self.path.replace("moved", "good"))

    def absent(self):
        self.send_error(404)

    def busy(self):
        self.send_error(503)

    def served(self):
        self.answer(self.server.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "WAIT", 0.01)
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    monkeypatch.setenv("REARANK_DATA", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.log, server.released, server.url = [], threading.Event(), f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("how, requests", [("good", 1), ("moved", 2), ("cuts", 5), ("forgetful", 2), ("stalls", 2)])
def test_a_file_arrives_whole_whatever_the_server_does(server, tmp_path, how, requests):
    path = data.fetch(f"{server.url}/{how}/file.bin", tmp_path / "sub" / "file.bin", MD5)
    assert path.read_bytes() == CONTENT and len(server.log) == requests
    assert files_below(tmp_path / "sub") == ["file.bin"]


def test_a_cut_download_is_continued_as_long_as_more_arrives_and_not_begun_again(server, tmp_path):
    data.fetch(f"{server.url}/cuts/file", tmp_path / "file", MD5)
    assert [ranges for _, ranges in server.log] == [None, "bytes=60000-", "bytes=120000-", "bytes=180000-", "bytes=240000-"]
    (tmp_path / "again.part").write_bytes(CONTENT[:5])  # left by an earlier, interrupted process
    data.fetch(f"{server.url}/good/file", tmp_path / "again", MD5)
    assert server.log[-1][1] == "bytes=5-" and (tmp_path / "again").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT + b"and more")
    assert data.fetch(f"{server.url}/good/file", tmp_path / "file", MD5).read_bytes() == CONTENT


def test_a_stall_is_noticed_in_time(server, tmp_path):
    begin = time.monotonic()
    data.fetch(f"{server.url}/stalls/file", tmp_path / "file", MD5)
    assert time.monotonic() - begin < 3


def test_what_is_there_and_valid_is_not_fetched_again_and_what_is_damaged_is(server, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    data.fetch(f"{server.url}/good/file", tmp_path / "file", MD5)
    assert server.log == []
    (tmp_path / "file").write_bytes(CONTENT[:-1])
    assert data.fetch(f"{server.url}/good/file", tmp_path / "file", MD5).read_bytes() == CONTENT


@pytest.mark.parametrize("resumed", [False, True])
def test_a_wrong_checksum_keeps_nothing_and_says_so(server, tmp_path, resumed):
    if resumed:
        (tmp_path / "file.part").write_bytes(b"!")
    with pytest.raises(InputError, match=f"wrong checksum, expected md5 {MD5}, got .*; nothing was kept"):
        data.fetch(f"{server.url}/{'good' if resumed else 'wrong'}/file", tmp_path / "file", MD5)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("how, reason, requests", [("absent", "Not Found", 1), ("busy", "Service Unavailable", 3), ("dead", "cut off", 3)])
def test_what_cannot_be_fetched_is_one_line_with_the_address_and_the_place(server, tmp_path, how, reason, requests):
    with pytest.raises(InputError) as error:
        data.fetch(f"{server.url}/{how}/file", tmp_path / "file", MD5)
    message = str(error.value)
    assert f"{server.url}/{how}/file" in message and str(tmp_path / "file") in message and reason in message and "\n" not in message
    assert len(server.log) == requests and not (tmp_path / "file").exists()


def test_nobody_listening_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "WAIT", 0.01)
    with pytest.raises(InputError, match="cannot fetch http://127.0.0.1:9/file .*refused.* by hand"):
        data.fetch("http://127.0.0.1:9/file", tmp_path / "file")


# -- archives ----------------------------------------------------------------------------------------------------------


def make_tar(members):
    """A .tar.gz of (name, type or None for a file, link target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind or tarfile.REGTYPE, target, 0 if kind else 5
            archive.addfile(info, io.BytesIO(b"12345"))
    return buffer.getvalue()


def make_zip(members):
    """A .zip of (name, Unix mode or None, content)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, mode, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode or 0) << 16
            archive.writestr(info, content)
    return buffer.getvalue()


GOOD = ("first/file.txt", None, "")
MALICIOUS = [("tar.gz", make_tar([GOOD, member])) for member in (
    ("/absolute", None, ""), ("../outside", None, ""), ("first/../../outside", None, ""), ("C:\\file", None, ""), ("..\\outside", None, ""),
    ("link", tarfile.SYMTYPE, "/etc"), ("hard", tarfile.LNKTYPE, "first/file.txt"), ("device", tarfile.CHRTYPE, ""),
    ("pipe", tarfile.FIFOTYPE, ""))]
MALICIOUS += [("zip", make_zip([GOOD, member])) for member in (
    ("/absolute", None, "x"), ("../outside", None, "x"), ("a/../../outside", None, "x"), ("C:/file", None, "x"),
    ("link", stat.S_IFLNK | 0o777, "/etc"), ("device", stat.S_IFCHR | 0o600, ""))]
DAMAGED = [("tar.gz", make_tar([GOOD])[:-20]), ("tar.gz", b"nonsense"), ("zip", make_zip([("a", None, "x" * 99)])[:60]),
           ("zip", make_zip([("a", None, "here"), ("b", None, "damage")]).replace(b"here", b"hexe", 1))]


def offer(monkeypatch, server, ending, body, md5=""):
    server.body = body
    monkeypatch.setitem(data.SOURCES, "bright", {f"{server.url}/served/bright.{ending}": md5})


@pytest.mark.parametrize("ending, body", MALICIOUS + DAMAGED, ids=range(len(MALICIOUS + DAMAGED)))
def test_an_unsafe_or_damaged_archive_leaves_nothing_behind(server, monkeypatch, tmp_path, ending, body):
    offer(monkeypatch, server, ending, body)
    with pytest.raises(InputError, match="unsafe member|cannot be unpacked") as error:
        data.download("bright")
    assert (ending, body) in DAMAGED or "unsafe member" in str(error.value)
    assert "\n" not in str(error.value) and files_below(tmp_path) == ["cache"]


@pytest.mark.parametrize("ending, body", [
    ("tar.gz", make_tar([("first", tarfile.DIRTYPE, ""), GOOD, ("second.txt", None, "")])),
    ("zip", make_zip([("first/", None, ""), ("first/file.txt", 0o100644, "12345"), ("second.txt", None, "12345")]))], ids=["tar", "zip"])
def test_a_good_archive_is_unpacked_once(server, monkeypatch, tmp_path, ending, body):
    offer(monkeypatch, server, ending, body, hashlib.md5(body).hexdigest())
    for _ in range(2):
        folder, = data.download("bright")
        assert folder == tmp_path / "cache" / "bright" and files_below(folder) == ["first", "first/file.txt", "second.txt"]
        assert (folder / "first" / "file.txt").read_text() == "12345"
    assert len(server.log) == 1 and files_below(tmp_path / "cache")[0] == "bright"
    assert not list((tmp_path / "cache").glob("*.*"))  # the archive itself and its pieces are gone


# -- the command and the training pool -------------------------------------------------------------------------------


def test_the_command_prints_places_and_goes_on_after_a_failure(server, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(data.SOURCES, "dl19", {f"{server.url}/absent/lists": MD5})
    monkeypatch.setitem(data.SOURCES, "dl23", {f"{server.url}/good/qrels": MD5})
    assert data.main(["download", "dl19", "chess", "dl23"]) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("data.py:")]
    assert len(errors) == 2 and "absent/lists" in errors[0] and "no data set 'chess': expected dl19" in errors[1]
    assert f"dl23: {tmp_path / 'cache' / 'dl23' / 'qrels'}" in printed.out and "no public file" in printed.out
    assert data.main(["download", "dl23"]) == 0


def test_the_training_pool_says_how_many_of_the_papers_queries_it_has(server, monkeypatch, tmp_path, capsys):
    for name, qid in (("dl21", "1"), ("dl22", "2"), ("dl23", "3")):
        query = data.Candidates(qid, "q", ["a", "b"], ["x", "y"], [2.0, 1.0])
        data.write_candidates(tmp_path / "cache" / name / f"retrieve_results_{name}_top100.jsonl", [query])
        (tmp_path / "cache" / name / "qrels").write_text(f"{qid} 0 {'b' if name != 'dl22' else 'z'} 1\n")
        folder = tmp_path / "cache" / name
        files = [folder / f"retrieve_results_{name}_top100.jsonl"] * (name != "dl23") + [folder / "qrels"]
        monkeypatch.setitem(data.SOURCES, name, {f"{server.url}/absent/{path.name}": data.file_md5(path) for path in files})
    pool, qrels = data.training_pool()
    assert [query.qid for query in pool] == ["1", "2", "3"] == list(qrels) and server.log == []
    assert "2 of the paper's 179 training queries" in capsys.readouterr().err
    (tmp_path / "cache" / data.DL23_PASSAGES).unlink()
    assert [query.qid for query in data.training_pool()[0]] == ["1", "2"]
    assert "1 of the paper's 179 training queries" in (message := capsys.readouterr().err) and "DL23" in message


def test_the_cache_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("REARANK_DATA", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("REARANK_DATA")
    assert data.cache_folder() == tmp_path / ".cache" / "rearank"


def test_every_checksum_is_an_md5_and_every_address_is_https():
    for files in data.SOURCES.values():
        for url, md5 in files.items():
            assert url.startswith("https://") and (len(md5) == 32 and set(md5) <= set("0123456789abcdef") or "bright" in url)
