"""Data for REARANK (arXiv 2505.20046): file formats, training instances, BRIGHT, downloads.

    python data.py download dl19 covid bright        test sets: candidates with passages, judgements
    python data.py download rearank_12k              the 12,603 windows that the authors trained on
    python data.py expand --candidates C --qrels Q   initial state expansion, with the counts at every stage
    python data.py bright --output FOLDER            BRIGHT's first-stage lists, excluded documents taken out

Downloads go to $REARANK_DATA, by default ~/.cache/rearank. What is read from outside is checked (InputError:
file, line, what was expected); what is written appears whole or not at all.

Where we depart from the paper, or had to choose:
- Expansion (section 3.2): the text contradicts itself (179 queries x 50 draws are fewer than its 12k
  instances; the filter is on the initial NDCG@10 in section 4.1, on the best possible one in Table 3). The
  defaults are those of the authors' public notebook; the text's variant is
  `--draws 50 --order shuffled --keep best`.
- Training data: the passages of DL23, a third of the paper's queries, have no public file. So it is either
  the authors' own windows (rearank_12k) or what DL21 and DL22 give. Passages stay whole; prompts cut them.
- BRIGHT (section 4): excluded documents leave the candidates before the cut to 100, never the judgements.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import string
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

from reward import ndcg

# ------------------------------------------------------------------------------------------------------------
# Shared by every script: bad input, the command line, files


class InputError(ValueError):
    """Something read from outside is not as it must be. One line: where, and what was expected."""


def setting(default, help: str, **argparse_options):
    """One field of a settings dataclass: its default, its sentence, and what argparse needs beyond its type;
    also `flags=("-m",)` for short names, `positional=True`, and `least`, below which a number is refused.
    """
    make = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**make, metadata={"help": help, **argparse_options})


def command_line(settings: type, argv: list[str] | None = None, description: str | None = None,
                 prog: str | None = None):
    """Read `argv` (default: sys.argv[1:]) into an instance of the dataclass `settings`: field a_b is --a-b,
    a boolean also --no-a-b. What does not fit ends the program with one line and status 2.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False,
                                     usage=argparse.SUPPRESS,  # an error is one line; --help has the rest
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults, least = vars(settings()), {}
    for field in dataclasses.fields(settings):
        options, default = dict(field.metadata), defaults[field.name]
        name = "--" + field.name.replace("_", "-")
        names = [field.name] if options.pop("positional", False) else [*options.pop("flags", ()), name]
        least[field.name] = options.pop("least", None)
        if isinstance(default, bool) or field.type == "bool | None":
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, (int, float)):
            options["type"] = type(default)
        if default not in ("", [], None) and default is not False:
            options["help"] += f" (default: {default})"
        options["help"] = options["help"].replace("%", "%%")
        parser.add_argument(*names, default=default, **options)
    values = vars(parser.parse_intermixed_args(argv))  # options may stand between positional arguments
    for name, bound in least.items():
        if bound is not None and values[name] < bound:
            option = "--" + name.replace("_", "-")
            parser.error(f"argument {option}: expected at least {bound}, found {values[name]}")
    return settings(**values)


def run_main(main: Callable[[], int | None]) -> None:
    """Run `main` and exit: bad input is one line on stderr and status 2, Ctrl-C 130, a closed pipe 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is told to stop saves as on Ctrl-C
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what a console cannot show ends no run
    status = 0
    try:
        status = main() or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # One of several ranks. Python's teardown can abort it while gloo's threads still hold objects
        # (pytorch pull request 179291), so leave without one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def stream_at(path: str | Path) -> str | Path | int | None:
    """What to open where `path` is no file that could be replaced: 1 or 2 if it is our own standard output or
    error, else `path` (a pipe, a device, a folder, links in a circle). None for a file, or nothing yet.
    """
    for number in (1, 2):
        with contextlib.suppress(OSError):  # nothing is there, or the stream is closed
            if os.path.samefile(path, number):
                return number
    circle = os.path.islink(os.path.realpath(path))
    return path if circle or os.path.exists(path) and not os.path.isfile(path) else None


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator:
    """Open `path` to write text ("w": UTF-8, "\\n" line ends) or bytes ("wb"); a name in .gz is compressed.

    It appears whole or not at all: a file beside it is renamed at the end, with the old one's mode. Missing
    folders are made, symbolic links are followed. Pipes, devices and our own stdout are written to directly.
    """
    text = {} if mode == "wb" else {"encoding": UTF8[0], "errors": UTF8[1], "newline": "\n"}
    stream = stream_at(path)
    if stream is not None:
        print(end="", flush=True)  # first what was printed before
        with open(stream, mode, closefd=not isinstance(stream, int), **text) as file:
            yield file
        return
    opener = gzip.open if Path(path).suffix == ".gz" else open
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with opener(part, "wb" if mode == "wb" else "wt", **text) as file:
            yield file
        with contextlib.suppress(OSError):  # there is no old file, or its disk knows no modes
            shutil.copymode(path, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


NO_TEXT = {  # how files begin that we cannot read
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\3\4": "a zip archive", b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1\x15": "Parquet", b"%PDF-": "PDF", b"version https://git-lfs": "a Git LFS pointer, not the data"}


@contextlib.contextmanager
def open_bytes(path: str | Path) -> Iterator:
    """Open `path` ("-": standard input) to read bytes; gzip is unpacked, a byte order mark left out.
    InputError: damaged gzip, a beginning that no UTF-8 text has, a UnicodeDecodeError inside the block.
    """
    name = "standard input" if path == "-" else path
    standard = path == "-" and io.BytesIO(sys.stdin.buffer.read() if sys.stdin else b"")  # None: it is closed
    try:
        with io.BufferedReader(standard or io.FileIO(path)) as file:
            if Path(path).suffix == ".gz" or file.peek(2).startswith(b"\x1f\x8b"):
                file = gzip.open(file)
            head = file.peek(32)
            what = next((what for start, what in NO_TEXT.items() if head.startswith(start)), "")
            if what or b"\0" in head[:4]:  # UTF-16 may lack its mark
                raise InputError(f"{name}: looks like {what or 'UTF-16'}; expected text in UTF-8")
            if head.startswith(b"\xef\xbb\xbf"):
                file.read(3)
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{name}: not a readable gzip file ({error})") from None
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise InputError(f"{name}:{line}: expected UTF-8 text, found the byte 0x{byte:02x}") from None


def read_text(path: str | Path) -> str:
    """The text of `path` ("-": standard input). InputError: see open_bytes; it names the line."""
    with open_bytes(path) as file:
        return file.read().decode("utf-8")


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON list or a JSONL file, each with its place ("file: record n", "file:line")."""
    content, decode, end, line = read_text(path), json.JSONDecoder().raw_decode, 0, 1
    broken = re.search(r"\\u[dD][89a-fA-F]", content)  # half a surrogate pair fits into no file
    while (start := re.compile(r"[\s\ufeff]*").match(content, end).end()) < len(content):
        line += content.count("\n", end, start)
        try:
            value, end = decode(content, start)
            if broken:
                value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{line}: expected JSON ({error})") from None
        is_list = isinstance(value, list)
        if not is_list and "\n" in content[start:end]:
            raise InputError(f"{path}:{line}: a JSON object over several lines; expected one object per line "
                             "(JSONL) or one JSON list")
        for n, record in enumerate(value if is_list else [value], 1):
            where = f"{path}: record {n}" if is_list else f"{path}:{line}"
            if not isinstance(record, dict):
                raise InputError(f"{where}: expected a JSON object, found {record!r:.40}")
            yield where, record
        line += content.count("\n", start, end)


# ------------------------------------------------------------------------------------------------------------
# TREC qrels and runs

UTF8 = ("utf-8", "surrogateescape")  # ids are bytes: what is not UTF-8 becomes surrogates, and itself again
TREC_FORMATS = {  # fields, the value's place, its type and how far from 0 it may be
    "qrels": ("qid iter docid label", 3, int, 2**63 - 1),
    "run": ("qid Q0 docid rank score tag", 4, float, math.inf)}


def trec_id(docid: str) -> str:
    """`docid` as TREC files can hold it: ASCII white space inside becomes `_` (BRIGHT has such ids)."""
    return re.sub(r"\s+", "_", docid.strip(string.whitespace), flags=re.ASCII)


def read_trec(path: str | Path, kind: str, as_text: bool = False) -> dict:
    """{qid: {docid: value}} of "qrels" or a "run" (.gz too), in the file's order; labels int, scores float.

    As trec_eval reads them: ids are bytes, fields stand between ASCII white space, `#` lines are skipped,
    blank lines only in runs, a run's fields after the sixth are ignored. InputError names the line that has
    the wrong width, no number for a value (trec_eval takes it for 0), or a document that came before.
    `as_text`: ids are strings, and fields too many mean a docid with spaces, which become `_`.
    """
    form, place, number, limit = TREC_FORMATS[kind]
    width, hash_sign, underscore = len(form.split()), *b"#_"  # `35 in text` is faster than `b"#" in`
    table: dict[bytes, dict[bytes, float]] = {}
    newest, n, line = None, 1, b"nothing"
    with open_bytes(path) as file:
        for n, line in enumerate(file, 1):
            fields = line.split()
            if len(fields) != width or fields[0][0] == hash_sign:
                if fields and fields[0][0] == hash_sign or kind == "run" and not fields:
                    continue
                spare = len(fields) - width
                if spare < 0 or kind == "qrels" and not as_text or b"\r" in line.strip():  # \r ends no line
                    break
                if as_text:
                    fields[2:3 + spare] = [b"_".join(fields[2:3 + spare])]
            qid, docid, text = fields[0], fields[2], fields[place]
            if qid != newest:  # one look-up for each query and not for each line
                row, newest = table.setdefault(qid, {}), qid
            try:
                value = number(text)
            except ValueError:
                break
            # Not within the limits: NaN too. Python reads 1_000 as a number.
            if docid in row or not -limit <= value <= limit or underscore in text or 0 in line:
                break
            row[docid] = value
        else:
            if table:
                return table if not as_text else {
                    qid.decode(*UTF8): {docid.decode(*UTF8): value for docid, value in row.items()}
                    for qid, row in table.items()}
    found = line.decode("utf-8", "replace")
    raise InputError(f"{path}:{n}: expected `{form}`, each document once for a query, found {found!r:.80}")


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """{qid: {docid: label}} in the file's order. Spaces in docids become `_`. InputError: see read_trec."""
    return read_trec(path, "qrels", as_text=True)


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """{qid: {docid: score}} in the file's order; the rank column is ignored. InputError: see read_trec."""
    return read_trec(path, "run", as_text=True)


def write_run(path: str | Path, ranking: dict[str, list[str]], tag: str) -> None:
    """Write {qid: docids, best first} as a TREC run, with scores n-1 to 0, so that no tie can undo the order.
    Docids are written as trec_id gives them. InputError: see check_run.
    """
    check_run(path, ranking, tag)
    with atomic_write(path) as file:
        for qid, docids in ranking.items():
            for rank, docid in enumerate(docids, 1):
                file.write(f"{qid} Q0 {trec_id(docid)} {rank} {len(docids) - rank} {tag}\n")


def check_run(path: str | Path, ranking: dict[str, list[str]], tag: str) -> None:
    """InputError where write_run could not write this, in whatever order: to be asked before long work."""
    if stream_at(path) is not None or not os.path.basename(path):
        raise InputError(f"{path}: is a folder, a pipe or a device; expected the name of a file to write")
    for qid, docids in ranking.items():
        names = [trec_id(docid) for docid in docids]
        bad = [name for name in (qid, tag, *names) if not re.fullmatch(r"[^\s\0]+", name, re.ASCII)]
        if bad or qid.startswith("#"):
            raise InputError(f"{path}: expected ids and a tag without white space, and no # before a "
                             f"query's, found {(bad or [qid])[0]!r}")
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise InputError(f"{path}: query {qid} has two documents {twice!r} (white space becomes _)")


def write_qrels(path: str | Path, qrels: dict[str, dict[str, int]]) -> None:
    """Write {qid: {docid: label}} as TREC judgements."""
    with atomic_write(path) as file:
        for qid, labels in qrels.items():
            for docid, label in labels.items():
                file.write(f"{qid} 0 {trec_id(docid)} {label}\n")


# ------------------------------------------------------------------------------------------------------------
# First-stage candidates

TEXT_FIELDS = ("contents", "content", "text", "segment", "passage", "body", "doc")  # where a text may be


@dataclasses.dataclass
class Candidates:
    """One query's first-stage list, best first: docids, texts and scores are parallel."""

    qid: str
    query: str
    docids: list[str]
    texts: list[str]
    scores: list[float]


def _field(record: dict, names: Iterable[str], what: str, where: str) -> str:
    """The string under the first of `names` that is not empty in `record`; a whole number is taken as one
    (ids). InputError."""
    values = [record[name] for name in names if record.get(name) is not None] or [None]
    value = next((value for value in values if value != ""), "")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: expected {what} as a string ({', '.join(names)}), found {value!r:.40}")
    return value.encode("utf-8", "replace").decode()  # JSON can smuggle in half a surrogate pair


def _candidates(record: dict, where: str, counts: Counter) -> Candidates | None:
    """The list in one record, of any shape that read_candidates names; None if it is empty. `counts` receives
    the number of records so far, and what there is to tell of them.
    """
    hits = next((record[name] for name in ("candidates", "hits", "ctxs") if name in record), None)
    if not isinstance(hits, list) or not all(isinstance(hit, (dict, str)) for hit in hits):
        raise InputError(f'{where}: expected one object per query, with objects or strings in a list '
                         '"candidates" (rank_llm), "hits" (RankGPT) or "ctxs" (Rankify), found the fields '
                         f"{', '.join(record):.60}")
    counts["records"] += 1
    if not hits:
        counts["without candidates are left out"] += 1
        return None
    hits = [{"text": hit} if isinstance(hit, str) else hit for hit in hits]
    docs = [hit["doc"] if isinstance(hit.get("doc"), dict) else hit for hit in hits]
    both = [doc | hit for doc, hit in zip(docs, hits)]  # where an id may be
    numbered = all(fields.get(name) is None for fields in both for name in ("docid", "id"))
    counts["have candidates without ids: their places, from 1, are taken"] += numbered
    scored = any(hit.get("score") is not None for hit in hits)
    head = record["query"] if isinstance(record.get("query"), dict) else record
    spare = {"query_id": head.get("id", counts["records"] if numbered else None)}
    qid = _field(spare | hits[0] | record | head, ("qid", "query_id"), "the query's id", where)
    query = _field(head, ("text", "query", "question"), "the query's text", where)
    result = Candidates(qid, query, [], [], [])
    for n, (hit, doc, fields) in enumerate(zip(hits, docs, both), 1):
        here = f"{where}, passage {n}"
        score = hit.get("score") if scored else len(hits) - n  # where none has one: the place in the list
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not -1e300 < score < 1e300:
            raise InputError(f"{here}: expected a finite number as score, found {score!r:.40}")
        text = _field(doc, TEXT_FIELDS, "the passage's text", here)
        title = _field(doc, ("title",), "a title", here) if doc.get("title") else ""
        docid = str(n) if numbered else _field(fields, ("docid", "id"), "the passage's id", here)
        result.docids.append(docid)
        result.texts.append(f"{title} {text}".strip() if title else text)
        result.scores.append(float(score))
    if "" in (qid, *result.docids) or len(set(result.docids)) < len(hits):
        raise InputError(f"{where}: expected ids that are not empty, and no passage twice for query {qid!r}")
    return result


def read_candidates(path: str | Path) -> list[Candidates]:
    """Read first-stage lists in the file's order: that order is the ranking, scores are only carried along.

    One object per line or one JSON list, .gz of each, of one of three shapes:
    rank_llm           {"query": {"text", "qid"}, "candidates": [{"docid", "score", "doc": {"contents"}}]}
    RankGPT, REARANK   {"query", "hits": [{"content", "qid", "docid", "score"}]}
    Rankify            {"question", "query_id", "ctxs": [{"id", "title", "text", "score"}]}
    (The last is what Rankify's own loader reads; we have not opened one of its files.)

    A passage or its `doc` may be a plain string; of TEXT_FIELDS the first that is not empty counts. A list
    may have no scores. If none of its passages has an id, their places from 1 are the ids, and the record's
    number that of a query without one. Queries without passages are left out, and counted on stderr.
    """
    queries, counts = {}, Counter()
    for where, record in read_records(path):
        query = _candidates(record, where, counts)
        if query and query.qid in queries:
            raise InputError(f"{where}: query {query.qid} is there twice")
        if query:
            queries[query.qid] = query
    if not queries:
        found = "only queries without any" if counts["records"] else "an empty file"
        raise InputError(f"{path}: expected candidates, found {found}")
    for what, count in counts.items():
        if what != "records" and count:
            print(f"{path}: {count} queries {what}", file=sys.stderr)
    return list(queries.values())


def write_candidates(path: str | Path, candidates: Iterable[Candidates]) -> None:
    """Write rank_llm JSONL, one query a line; read_candidates gives the same back."""
    with atomic_write(path) as file:
        for query in candidates:
            hits = [{"docid": docid, "score": float(score), "doc": {"contents": text}}
                    for docid, text, score in zip(query.docids, query.texts, query.scores, strict=True)]
            record = {"query": {"text": query.query, "qid": query.qid}, "candidates": hits}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------------------
# Initial state expansion (paper section 3.2)

STAGES = {  # as the authors' notebook counts them; on DL21 + DL22 + DL23: 211, 179, 17900, 13312, 12603
    "judged": "queries with candidates and judgements",
    "found": "queries whose first-stage NDCG@10 is above 0 (the paper trains on 179)",
    "draws": "draws", "above": "draws that pass the NDCG@10 filter",
    "kept": "instances (with --keep initial: those with something to gain as well)"}


@dataclasses.dataclass
class Instance:
    """One training prompt: passages in their initial order with the label of each, and all judged labels of
    the query (`ideal`: the ideal of NDCG is taken over them, not over the window).
    """

    qid: str
    query: str
    docids: list[str]
    texts: list[str]
    labels: list[int]
    ideal: list[int]

    def json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False) + "\n"


def judged_labels(query: Candidates, judged: dict[str, int]) -> list[int]:
    """The labels of a list's passages; without a judgement, or below 0: not relevant."""
    return [max(0, judged.get(trec_id(docid), 0)) for docid in query.docids]


def expand(candidates: list[Candidates], qrels: dict[str, dict[str, int]], draws: int = 100, size: int = 20,
           order: str = "retrieval", keep: str = "initial", min_ndcg: float = 0.1, seed: int = 0,
           exclude: Container[str] = (), counts: Counter | None = None) -> list[Instance]:
    """Many prompts from few queries: of each list `draws` times `size` passages, drawn without replacement.

    Dropped: queries without judgements or with a list of NDCG@10 = 0, and those in `exclude` (held out).
    `order`: a draw stays in "retrieval" order or is "shuffled". `keep`: draws whose "initial" NDCG@10 is at
    least `min_ndcg` and that have something to gain, whose "best" possible one is, or "all". A list of at
    most `size` passages gives one draw, the whole list. `counts` receives how many passed each of STAGES.
    """
    known = order in ("retrieval", "shuffled") and keep in ("initial", "best", "all")
    if not known or min(draws, size) < 1:
        raise InputError(f"no expansion with order {order}, keep {keep}, {draws} draws of {size} passages")
    instances, counts = [], Counter() if counts is None else counts
    for query in candidates:
        judged = qrels.get(query.qid)
        if not judged or query.qid in exclude:
            continue
        labels, ideal = judged_labels(query, judged), list(judged.values())
        counts["judged"] += 1
        if ndcg(labels, ideal=ideal) == 0:
            continue
        counts["found"] += 1
        # Each query has its own random stream, so that other queries change nothing. It is seeded by the text
        # itself: hash() differs from process to process.
        rng = random.Random(f"{seed}\t{query.qid}")
        for _ in range(draws if len(labels) > size else 1):
            places = rng.sample(range(len(labels)), min(size, len(labels)))  # the same ones in both orders
            if order == "retrieval":
                places.sort()
            drawn = [labels[place] for place in places]
            initial, best = ndcg(drawn, ideal=ideal), ndcg(sorted(drawn, reverse=True), ideal=ideal)
            above = keep == "all" or (initial if keep == "initial" else best) >= min_ndcg
            kept = above and (keep != "initial" or best > initial)
            counts.update(draws=1, above=above, kept=kept)
            if kept:
                docids, texts = [query.docids[p] for p in places], [query.texts[p] for p in places]
                instances.append(Instance(query.qid, query.query, docids, texts, drawn, ideal))
    return instances


def write_instances(path: str | Path, instances: Iterable[Instance]) -> None:
    """One instance a line, as JSON; read_instances gives the same back."""
    with atomic_write(path) as file:
        file.writelines(instance.json() for instance in instances)


def read_instances(path: str | Path) -> list[Instance]:
    """Read what write_instances wrote (or somebody made in that form). InputError names the bad line."""
    instances, names = [], [field.name for field in dataclasses.fields(Instance)]
    for where, record in read_records(path):
        qid, query, *lists = [record.get(name) for name in names]
        if set(record) != set(names) or not all(isinstance(values, list) for values in lists):
            raise InputError(f"{where}: expected qid, query and the lists docids, texts, labels, ideal")
        docids, texts, labels, ideal = lists
        strings, numbers = {type(x) for x in [qid, query, *docids, *texts]}, {type(x) for x in labels + ideal}
        if strings != {str} or numbers != {int} or not len(docids) == len(texts) == len(labels) > 0:
            raise InputError(f"{where}: expected as many texts (strings) and labels (integers) as docids "
                             "(strings), and at least one")
        instances.append(Instance(**record))
    return instances


# ------------------------------------------------------------------------------------------------------------
# Training data for grpo.py


def training_instances(data: list[str], qrels: Iterable[str] = (),
                       **expansion) -> tuple[list[Instance], dict]:
    """(instances, what they are) of files or data sets; candidates go through `expand` with `expansion`.

    Each of `data` is a file of instances, a file of candidates (`qrels`: the files with their judgements) or
    a name: "rearank_12k" or one of TABLE_1, downloaded where it is missing. ["auto"] is rearank_12k if it is
    there, else DL21 and DL22. What they are: {"data": what gives the same again, "instances" and "queries":
    how many, "sha256" of the file that write_instances would write}.
    """
    counts = expansion.setdefault("counts", Counter())
    fallback = data == ["auto"] and not Path(cache_folder(), "rearank_12k", WINDOWS).exists()
    if data == ["auto"]:
        data = ["dl21", "dl22"] if fallback else ["rearank_12k"]
    judged: dict[str, dict[str, int]] = {}
    for path in qrels:
        for qid, labels in read_qrels(path).items():
            judged.setdefault(qid, {}).update(labels)
    instances, seen = [], {}
    for name in data:
        path, labels = name, judged
        if name in TABLE_1:
            path, judgements = download(name)
            labels = read_qrels(judgements)
        elif name == "rearank_12k":
            path = download(name)[0]
        elif not Path(name).is_file():  # a pipe could not be read twice
            raise InputError(f"{name}: expected a file, auto alone, or of rearank_12k, {', '.join(TABLE_1)}")
        if "labels" in next(read_records(path), ("", {}))[1]:
            instances += read_instances(path)
            continue
        if not labels:
            raise InputError(f"{name}: expected instances, or --qrels with judgements of these candidates")
        found = read_candidates(path)
        if twice := [query.qid for query in found if query.qid in seen]:
            raise InputError(f"query {twice[0]} is in both {seen[twice[0]]} and {name}")
        seen |= {query.qid: name for query in found}
        instances += expand(found, labels, **expansion)
    if not instances:
        raise InputError(f"{' '.join(data)}: no instances; expected candidates and judgements of the same "
                         "queries, with something relevant in the lists")
    if fallback:
        print(f"training data: DL21 and DL22, {counts['found']} of the paper's 179 queries; the authors' own "
              "windows have all of them: python data.py download rearank_12k", file=sys.stderr)
    sha256 = hashlib.sha256("".join(instance.json() for instance in instances).encode(*UTF8)).hexdigest()
    queries = len({instance.qid for instance in instances})
    return instances, {"data": data, "instances": len(instances), "queries": queries, "sha256": sha256}


# ------------------------------------------------------------------------------------------------------------
# BRIGHT: 12 splits, reasoning-intensive queries (arXiv 2407.12883)

BRIGHT_SPLITS = ("biology earth_science economics psychology robotics stackoverflow sustainable_living pony "
                 "leetcode aops theoremqa_theorems theoremqa_questions").split()
BRIGHT_FILES = {  # below a folder, as in the authors' archive or of castorini: the first that is there
    "queries": ("pyserini_queries/{}.tsv", "topics.bright-{}.tsv*"),
    "corpus": ("pyserini_corpus/{}/{}.jsonl",),
    "qrels": ("pyserini_qrels/{}.tsv", "qrels.bright-{}.txt*"),
    "fixed qrels": ("qrels.bright-{}.fixed.txt*",),
    "exclude": ("exclude.bright-{}.txt*", "topics.bright-{}-original.jsonl*"),
    "run": ("bm25.{}.filtered.trec", "*{}*.trec*", "*{}*.txt*")}


def bright_file(folder: str | Path, split: str, kind: str, needed: bool = True) -> Path | None:
    """The file of `split` of that kind (BRIGHT_FILES) below `folder`, or None; InputError if two fit."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: expected a folder with BRIGHT files")
    for pattern in BRIGHT_FILES[kind]:
        # "?" stands for "_" and "-": the archive has theoremqa_theorems, castorini theoremqa-theorems
        found = sorted(Path(folder).rglob(pattern.replace("{}", split.replace("_", "?"))))
        if len(found) > 1:
            raise InputError(f"{folder}: {found[0]} and {found[1]} could both be the {kind} of {split}")
        if found:
            return found[0]
    if needed:
        raise InputError(f"{folder}: no {kind} of BRIGHT's {split} (python data.py download bright)")


def read_pairs(path: str | Path) -> Iterator[tuple[str, str]]:
    """(id, rest) of each line that is not blank: a query and its text, or a query and an excluded docid."""
    for n, line in enumerate(read_text(path).split("\n"), 1):
        words = line.strip().split(maxsplit=1)
        if len(words) == 1:
            raise InputError(f"{path}:{n}: expected an id and a text or second id, found {line!r:.60}")
        if words:
            yield words[0], words[1]


def read_excluded(path: str | Path) -> dict[str, set[str]]:
    """{qid: excluded documents} from lines "qid docid", or from BRIGHT's own rows as JSONL."""
    is_json = read_text(path).lstrip().startswith("{")
    pairs = [] if is_json else read_pairs(path)
    for where, row in read_records(path) if is_json else ():
        if not isinstance(row.get("excluded_ids"), list):
            raise InputError(f"{where}: expected excluded_ids as a list")
        qid = _field(row, ("id",), "the query's id", where)
        pairs += [(qid, docid) for docid in row["excluded_ids"] if docid != "N/A"]
    excluded: dict[str, set[str]] = {}
    for qid, docid in pairs:
        excluded.setdefault(qid, set()).add(trec_id(docid))
    return excluded


def read_bright(split: str, folder: str | Path, k: int = 100) -> list[Candidates]:
    """A split's BM25 lists with passages: excluded documents go first, then the list is cut to `k`.
    (The archive's runs come filtered, but after a cut to 100: for whole lists put longer runs there.)
    """
    queries = dict(read_pairs(bright_file(folder, split, "queries")))
    passages = {trec_id(_field(record, ("id",), "the passage's id", where)):
                _field(record, TEXT_FIELDS, "the passage's text", where)
                for where, record in read_records(bright_file(folder, split, "corpus"))}
    run, exclusions = bright_file(folder, split, "run"), bright_file(folder, split, "exclude", needed=False)
    excluded, lists = read_excluded(exclusions) if exclusions else {}, []
    for qid, scores in read_run(run).items():
        ranked = sorted(scores, key=lambda docid: (scores[docid], docid), reverse=True)  # trec_eval's order
        docids = [docid for docid in ranked if docid not in excluded.get(qid, ())][:k]
        try:
            texts, kept = [passages[docid] for docid in docids], [scores[docid] for docid in docids]
            lists.append(Candidates(qid, queries[qid], docids, texts, kept))
        except KeyError as missing:
            raise InputError(f"{run}: {missing} is not in BRIGHT's {split}") from None
    return lists


# ------------------------------------------------------------------------------------------------------------
# Downloads

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
    """Fetch a data set into cache_folder()/name where it is missing or damaged; [candidates, judgements], of
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
    """Bring one file to `folder`, unless it is there: verified, or nothing at all."""
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
    """Whether the hub, or its mirror in HF_ENDPOINT, can be reached: its client tries for half a minute."""
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
    """The content of an address, or of owner/name/file on the hub. InputError: put it at `path` by hand."""
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
    """Fetch a .tar.gz and unpack it: `folder` appears whole or not at all. InputError: unsafe or damaged."""
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
    """The authors' own training windows (le723z/rearank_12k on the hub), labelled by NIST's judgements.
    They come in pages, each kept as it arrives, so that an interrupted download goes on where it was.
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
                found = _candidates(row, url, Counter())
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
    """(the rows from `offset` on, how many there are in all); kept at `path` once all of a page has come."""
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


# ------------------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass
class Settings:
    """The settings of all commands."""

    command: str = setting("", "download, expand or bright", positional=True, nargs="?")
    names: list[str] = setting(list, "download: " + ", ".join([*TABLE_1, "bright", "rearank_12k"]),
                               positional=True, nargs="*")
    candidates: list[str] = setting(list, "expand: lists, files or names (default: dl21 dl22)", nargs="+")
    qrels: list[str] = setting(list, "expand: judgements of the files", nargs="+")
    draws: int = setting(100, "expand: draws of each query (the paper's text: 50)")
    size: int = setting(20, "expand: passages of a draw")
    order: str = setting("retrieval", "expand: order of a draw's passages (the paper's text: shuffled)",
                         choices=("retrieval", "shuffled"))
    keep: str = setting("initial", "expand: whose NDCG@10 must reach --min-ndcg: the draw's own, its best "
                        "order's, nobody's", choices=("initial", "best", "all"))
    min_ndcg: float = setting(0.1, "expand: least NDCG@10 of a draw")
    seed: int = setting(0, "expand: seed of the draws")
    exclude_queries: str = setting("", "expand: a file of held-out queries, ids first (qrels, runs, topics)")
    output: str = setting("", "expand: file (default instances.jsonl); bright: folder (bright-candidates)")
    folder: str = setting("", "bright: the unpacked archive (default: where download puts it)")
    splits: list[str] = setting(list, "bright: some of the 12", nargs="+", choices=BRIGHT_SPLITS, metavar="S")


def download_command(settings: Settings) -> int:
    """Print where the files are, and NDCG@10 of the first stage beside the paper's: is it the same list?
    What cannot be had is one line on stderr and status 2 at the end; the others are still fetched.
    """
    failed = False
    for name in settings.names:
        try:
            files = download(name)
            print(f"{name}: {' '.join(map(str, files))}")
            if name in TABLE_1:
                lists, qrels = read_candidates(files[0]), read_qrels(files[1])
                papers = f"{TABLE_1[name][-1]:.2f}" if TABLE_1[name][-1] else "is not given"
                judged = [(query, qrels[query.qid]) for query in lists if query.qid in qrels]
                values = [100 * ndcg(judged_labels(query, labels), ideal=list(labels.values()))
                          for query, labels in judged]
                print(f"{name}: NDCG@10 x 100 of the lists {sum(values) / max(1, len(values)):.2f} "
                      f"({len(values)} queries), the paper's BM25 {papers}")
        except (InputError, OSError) as error:
            print(f"data.py: {name}: {error}", file=sys.stderr)
            failed = True
    return 2 if failed else 0


def expand_command(settings: Settings) -> None:
    """Write the instances and print how many are left at every stage."""
    lines = read_text(settings.exclude_queries).split("\n") if settings.exclude_queries else []
    if lines[:1] and lines[0].lstrip().startswith(("{", "[")):
        raise InputError(f"{settings.exclude_queries}: expected lines, a query's id first, found JSON")
    names = ("draws", "size", "order", "keep", "min_ndcg", "seed")
    options = {name: getattr(settings, name) for name in names}
    output, inputs = settings.output or "instances.jsonl", [*settings.candidates, *settings.qrels]
    if os.path.realpath(output) in map(os.path.realpath, [*inputs, settings.exclude_queries]):
        raise InputError(f"--output {output}: would overwrite an input; expected another name")
    held_out, counts = {line.split()[0] for line in lines if line.strip()}, Counter()
    instances, _ = training_instances(settings.candidates or ["dl21", "dl22"], settings.qrels, counts=counts,
                                      exclude=held_out, **options)
    write_instances(output, instances)
    for stage, meaning in STAGES.items():
        print(f"{counts[stage]:7,}  {meaning}")
    print(f"written to {output}")


def bright_command(settings: Settings) -> None:
    """Write OUTPUT/split.jsonl for each split."""
    for split in settings.splits or BRIGHT_SPLITS:
        lists = read_bright(split, settings.folder or cache_folder() / "bright")
        write_candidates(Path(settings.output or "bright-candidates", f"{split}.jsonl"), lists)
        print(f"{split:20s}{len(lists):5d} queries, {sum(len(query.docids) for query in lists):6d} passages")


def main(argv: list[str] | None = None) -> int | None:
    """Run the command line; without a command, print what there is."""
    settings = command_line(Settings, argv, __doc__, "data.py")
    commands = {"download": download_command, "expand": expand_command, "bright": bright_command}
    if not settings.command:
        print(__doc__)
        return 0
    if settings.command not in commands or bool(settings.names) != (settings.command == "download"):
        given = " ".join([settings.command, *settings.names])
        raise InputError(f"no command {given!r}: expected download NAMES, expand or bright, and options")
    return commands[settings.command](settings)


if __name__ == "__main__":
    run_main(main)
