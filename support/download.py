"""Downloads: the test sets of the paper's Table 1, the authors' training windows, BRIGHT's archive.

Files go to $REARANK_DATA, by default ~/.cache/rearank. Each is checked (by its MD5, where one is published)
and appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

from support.cli import InputError
from support.files import Instance, candidates_of, judged_labels, read_qrels, write_instances
from support.streams import atomic_write

HUB = "castorini/rank_llm_data/retrieve_results/BM25/retrieve_results_"  # on the hub: owner/data set/file
LIGHT = "abdoelsayed/reranking-datasets-light/bm25/beir/"
NIST = "https://trec.nist.gov/data/deep/"
BEIR = ("https://raw.githubusercontent.com/castorini/anserini-tools/"  # at a commit, as later ones moved it
        "5b819c1a45c8a0a3ec9426f476694f44a29dfaf3/qrels/qrels.beir-v1.0.0-")
TABLE_1 = {  # (candidates, their MD5 ("": none known), judgements, theirs, the paper's NDCG@10 x 100 of BM25)
    "dl19": (HUB + "dl19_top100.jsonl", "518ab9f821fb74d862589d1d141c208e",
             NIST + "2019qrels-pass.txt", "2f4be390198da108f6845c822e5ada14", 50.58),
    "dl20": (HUB + "dl20_top100.jsonl", "3b6397f50fd78229e8d733243745a6d4",
             NIST + "2020qrels-pass.txt", "0355ccee7509ac0463e8278186cdd8d1", 47.96),
    "dl21": (HUB + "dl21_top100.jsonl", "6ca5e405c55fc2280d66eb0afc7416f5",
             NIST + "2021.qrels.pass.final.txt", "c5b76ec95b589732edc9040302e22a2b", None),
    "dl22": (HUB + "dl22_top100.jsonl", "08322ee30bf084d1309f5c5a515f2f18",
             NIST + "2022.qrels.pass.withDupes.txt", "b36484d6cfd039664a570a4bf04f0eeb", None),
    "covid": (HUB + "covid_top100.jsonl", "7dd70b911afc40647c37580e2f17a27f",
              BEIR + "trec-covid.test.txt", "1e130db6fb3f9c217a17b024cb5381be", 59.47),
    "nfcorpus": (LIGHT + "nfc.json", "",
                 BEIR + "nfcorpus.test.txt", "d0655f2827d0355f62b1e0f7a30f0254", 30.75),
    "dbpedia": (LIGHT + "dbpedia.json", "",
                BEIR + "dbpedia-entity.test.txt", "908791ee9f185f3cf83f0df32a776d94", 31.80),
    "scifact": (LIGHT + "scifact.json", "",
                BEIR + "scifact.test.txt", "2edf8f4c5cb2ebf9f4fd9a0b9a389133", 67.89),
    "signal": (LIGHT + "signal.json", "",
               BEIR + "signal1m.test.txt", "a8657d043c4a11183ba945f766c0158b", 33.05),
    "news": (HUB + "news_top100.jsonl", "3fa0063db9ba1dcfc5b527a062d41720",
             BEIR + "trec-news.test.txt", "59e152bcc7abfd5f1b46df31bd3c4f18", 39.52),
    "robust04": (LIGHT + "robust04.json", "", BEIR + "robust04.test.txt", "", 40.70)}
DL23 = (NIST + "2023.qrels.pass.withDupes.txt", "3a742d51ae65da2ece9c09b304b9e358")
BRIGHT_ARCHIVE = "le723z/bright_tar/bright.tar.gz"  # no checksum is published for it
ROWS = "https://datasets-server.huggingface.co"  # the hub's service that gives a data set's rows as JSON
WINDOWS, PAGE = "instances.jsonl", 100  # the file below rearank_12k; rows that the service gives at a time
TIMEOUT, TRIES, WAIT = 30.0, 4, 1.0  # seconds of silence that are a stall; tries; seconds before the second


def cache_folder() -> Path:
    """Where downloads are kept: the environment variable REARANK_DATA, or ~/.cache/rearank."""
    return Path(os.environ.get("REARANK_DATA") or "~/.cache/rearank").expanduser()


def download(name: str) -> list[Path]:
    """Fetch a data set into cache_folder()/name, if needed. Returns the paths [candidates, judgements], of
    bright [folder], of rearank_12k [instances]. InputError: unknown, not reached, wrong checksum or archive.
    """
    folder = cache_folder() / name
    if name == "rearank_12k":
        return [download_windows(folder)]
    if name == "bright":
        return [folder if folder.is_dir() else unpack(BRIGHT_ARCHIVE, folder)]
    if name not in TABLE_1:
        raise InputError(f"no data set {name!r}: expected {', '.join([*TABLE_1, 'bright', 'rearank_12k'])}")
    candidates, candidates_md5, qrels, qrels_md5, _ = TABLE_1[name]
    return [fetch(candidates, folder, candidates_md5), fetch(qrels, folder, qrels_md5)]


def fetch(source: str, folder: Path, md5: str) -> Path:
    """Fetch one file into `folder`, unless it is there. Nothing is kept that fails the check."""
    def fits(content: bytes) -> bool:  # a checksum is against damage; it is no protection from malice
        is_error_page = content.lstrip().startswith(b"<")
        return hashlib.md5(content).hexdigest() == md5 if md5 else not is_error_page

    path = folder / source.rsplit("/", 1)[-1]
    if path.exists() and fits(path.read_bytes()):
        return path
    content = get(source, path)
    if not fits(content):
        raise InputError(f"{source}: expected {'a file of MD5 ' + md5 if md5 else 'data'}, found "
                         f"{content[:40]!r}; try again later, or put it at {path} by hand")
    if not md5:
        print(f"{source}: no checksum is published for this file", file=sys.stderr)
    with atomic_write(path, "wb") as file:
        file.write(content)
    return path


def hub_answers(seconds: float = 2.0) -> bool:
    """Whether the hub, or its mirror in HF_ENDPOINT, can be reached. (Its client would try for 30 s.)"""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if getproxies():  # then the way there is not a direct one
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), seconds).close()
    except OSError:
        return False
    return True


def get(source: str, path: Path) -> bytes:
    """The content at a URL, or of owner/name/file on the hub. InputError advises to put it at `path`."""
    from urllib.request import Request, urlopen

    from huggingface_hub import hf_hub_download

    on_hub = not source.startswith("http")
    for n in range(1, TRIES + 1):
        try:
            if on_hub:  # its client keeps a cache of its own, resumes, knows mirrors and how to be offline
                owner, name, file = source.split("/", 2)
                local = not hub_answers()
                return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset",
                                            local_files_only=local)).read_bytes()
            with urlopen(Request(source, headers={"User-Agent": "rearank"}), timeout=TIMEOUT) as response:
                return response.read()
        except Exception as error:  # a refusal, a timeout, an answer cut off: whatever the two clients raise
            if on_hub or n == TRIES or getattr(error, "code", 500) in (401, 403, 404, 410):
                raise InputError(f"cannot fetch {source} ({' '.join(str(error).split())[:200]}); try again "
                                 f"later, or put it at {path} by hand") from None
            time.sleep(WAIT * 2 ** (n - 1))


def unpack(source: str, folder: Path) -> Path:
    """Fetch a .tar.gz and unpack it into `folder`, all or nothing. InputError if it is unsafe or damaged."""
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        with tarfile.open(fileobj=io.BytesIO(get(source, folder)), mode="r:gz") as archive:
            archive.extractall(staging, filter="data")  # no devices, nothing that lies or leads outside
        os.replace(staging, folder)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise InputError(f"{source}: unsafe or damaged, nothing was unpacked ({error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def download_windows(folder: Path) -> Path:
    """Fetch the authors' training windows (le723z/rearank_12k on the hub), labelled by NIST's judgements.

    They come in pages. Each page is kept as it arrives, so that an interrupted download can go on.
    """
    from tqdm import tqdm

    output, pages, qrels, instances = folder / WINDOWS, folder / "pages", {}, []
    if output.exists():
        return output
    for name, source in {"dl21": TABLE_1["dl21"][2:4], "dl22": TABLE_1["dl22"][2:4], "dl23": DL23}.items():
        qrels |= read_qrels(fetch(source[0], cache_folder() / name, source[1]))
    query = f"{ROWS}/{{}}?dataset=le723z%2Frearank_12k"
    try:
        splits = json.loads(get(query.format("splits"), output))["splits"]
        config = next(split["config"] for split in splits if split["split"] == "train")
    except (ValueError, KeyError, TypeError, StopIteration):
        raise InputError(f"{query.format('splits')}: expected JSON with a train split") from None
    with tqdm(desc="rearank_12k", unit=" rows", disable=None) as bar:
        while not instances or len(instances) < bar.total:
            url = f"{query.format('rows')}&config={config}&split=train&offset={len(instances)}&length={PAGE}"
            rows, bar.total = read_page(url, pages / f"{len(instances):06d}.json", len(instances))
            for row in rows:
                found = candidates_of(row, url, Counter())
                if not found:
                    raise InputError(f"{url}: a query without passages")
                if found.qid not in qrels:
                    raise InputError(f"{url}: query {found.qid} has no judgements in DL21, DL22 and DL23")
                labels, ideal = judged_labels(found, qrels[found.qid]), list(qrels[found.qid].values())
                instances.append(Instance(found.qid, found.query, found.docids, found.texts, labels, ideal))
            bar.update(len(rows))
    if len(instances) != 12_603:
        print(f"rearank_12k: {len(instances):,} windows; the paper has 12,603", file=sys.stderr)
    write_instances(output, instances)
    shutil.rmtree(pages)
    return output


def read_page(url: str, path: Path, offset: int) -> tuple[list[dict], int]:
    """(the rows from `offset` on, how many rows there are in all). A whole page is kept at `path`."""
    content = path.read_bytes() if path.exists() else get(url, path)
    try:
        page = json.loads(content)
        rows, total = page["rows"], page["num_rows_total"]
        found = [row["row"] for row in rows]
        numbers = [row["row_idx"] for row in rows if not row["truncated_cells"]]
        if not rows or numbers != [*range(offset, min(offset + PAGE, total))]:
            raise ValueError("a row is missing or cut")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{url}: expected whole rows as JSON, found {content[:40]!r} ({error}); try again "
                         "later: the pages that have arrived are kept") from None
    with atomic_write(path, "wb") as file:
        file.write(content)
    return found, total
