"""Data for REARANK (arXiv 2505.20046): file formats, training instances, BRIGHT, downloads, BM25, the toy task.

    python data.py download dl19 dl21 bright                     public files: fetched, verified, unpacked below $REARANK_DATA
    python data.py expand --candidates C --qrels Q --output F    initial state expansion, with the counts at every stage
    python data.py bm25 CORPUS QUERIES --output F --k 100        first-stage lists from documents of your own, without Java
    python data.py bright --output FOLDER                        BRIGHT's first-stage lists, without the excluded documents
    python data.py bright-eval --runs FOLDER                     NDCG@10 of each BRIGHT split and the mean of the 12

`python data.py COMMAND --help` lists the settings of a command. Everything read from outside is checked (InputError: file, line, what
was expected); everything written appears whole or not at all.

Where we depart from the paper, or had to choose:
- Expansion (section 3.2): the text contradicts itself (179 queries x 50 draws are fewer than its 12k instances; the filter looks at the
  initial NDCG@10 in section 4.1 and at the best possible one in Table 3). The defaults follow the authors' public notebook: 100 draws of
  20, kept in retrieval order, initial NDCG@10 of at least 0.1 with the ideal over all judgements, and something to gain. The text's
  variant is `--draws 50 --order shuffled --keep best`.
- Training queries: DL21 and DL22 by default; the passages of DL23 have no public file. Passages stay whole here, prompts cut them.
- BRIGHT (section 4): excluded documents leave the candidates before the list is cut to 100, never the judgements.

No data comes with the code. MS MARCO's passages (dl19 to dl23) are for non-commercial research only, TREC's judgements are NIST's (public
domain in the US), BRIGHT is CC BY 4.0, and each BEIR set has terms of its own.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import signal
import shutil
import stat
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np

from reward import ndcg

# ---------------------------------------------------------------------------------------------------------------------
# Shared by every script: bad input, the command line, files


class InputError(ValueError):
    """Something read from outside is not as it must be. The message is one line: where, and what was expected."""


def setting(default, help: str, **argparse_options):
    """One field of a settings dataclass: its default, its sentence, and what argparse needs beyond its type.

    `flags=("-m",)` adds short names; `positional=True` makes it a positional argument (give `nargs` if it repeats); a number below
    `least` is refused.
    """
    make = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**make, metadata={"help": help, **argparse_options})


def command_line(settings: type, argv: list[str] | None = None, description: str | None = None, prog: str | None = None):
    """Read `argv` (default: sys.argv[1:]) into an instance of the dataclass `settings`: field a_b is the option --a-b.

    Booleans become --a-b / --no-a-b. An argument that does not fit ends the program with status 2 and one line.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda file=None: None  # an error is one line; --help has the rest
    bounds = {}
    for field in dataclasses.fields(settings):
        options = dict(field.metadata)
        bounds[field.name] = options.pop("least", None)
        flags, positional, help = options.pop("flags", ()), options.pop("positional", False), options.pop("help", "")
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        kind = getattr(field.type, "__name__", str(field.type)).replace("| None", "").strip()
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif "action" not in options:
            options.setdefault("type", {"int": int, "float": float}.get(kind, str))
        if positional:
            parser.add_argument(field.name, help=help, **options)
            continue
        shown = "" if default in (None, "", (), []) or kind == "bool" and not default else f" (default: {default})"
        parser.add_argument(*flags, "--" + field.name.replace("_", "-"), dest=field.name, default=default,
                            help=(help + shown).replace("%", "%%"), **options)
    values = vars(parser.parse_args(argv))
    for name, least in bounds.items():
        if least is not None and values[name] < least:
            parser.error(f"argument --{name.replace('_', '-')}: expected at least {least}, found {values[name]}")
    return settings(**values)


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: bad input is one line on stderr and status 2, Ctrl-C 130, a closed pipe 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is told to stop saves as on Ctrl-C
    try:
        sys.exit(main() or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError) as error:
        reason = error if isinstance(error, InputError) or not error.filename else f"{error.filename}: {error.strerror}"
        print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator:
    """Open `path` for writing so that it appears whole or not at all: a temporary file beside it, renamed at the end.

    A name ending in .gz is compressed. Missing folders are made. Text is UTF-8 with "\\n" line ends.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(part, mode if "b" in mode else mode + "t", **text) as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_bytes(path: str | Path) -> bytes:
    """The whole file, decompressed where its name ends in .gz. InputError where the gzip data is damaged."""
    with open(path, "rb") as file:
        content = file.read()
    if Path(path).suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable gzip file ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# TREC qrels and runs
#
# One parser for both, over bytes: a run of MS MARCO's size has 7 million lines, and a dict entry for each costs more time and memory than
# all of the evaluation. So a file becomes columns of numbers; ids are packed eight bytes to an integer, and compare as their bytes do.

WORD = np.uint64
TREC_FORMATS = {"qrels": (4, 3, int, "qid iter docid label"),                  # fields, the value's place among them, its type
                "run": (6, 4, float, "qid Q0 docid rank score tag")}


@dataclasses.dataclass
class TrecTable:
    """A qrels file or a run as columns, one row a line, in the file's order (n rows; W words of 8 bytes for the longest docid)."""

    qids: list[bytes]      # the different query ids, in order of first appearance
    query: np.ndarray      # (n,) int32: each row's place in qids
    docids: np.ndarray     # (W, n) uint64: the id's bytes, then zeros; the first word is the most significant
    values: np.ndarray     # (n,) float64 scores, or int64 labels


class _BadRow(Exception):
    """Row `args[0]` of the present chunk is not as it must be."""


def trec_id(docid: str) -> str:
    """`docid` as TREC files can hold it: ASCII white space inside becomes `_`, around it goes (some of BRIGHT's ids have spaces)."""
    return b"_".join(docid.encode("utf-8", "surrogateescape").split()).decode("utf-8", "surrogateescape")


def pack_ids(ids: Sequence[bytes]) -> np.ndarray:
    """(W, n) words, as in TrecTable.docids."""
    width = max(1, -(-max(map(len, ids), default=0) // 8))
    return np.array(ids, f"S{8 * width}").view(">u8").reshape(-1, width).T.astype(WORD)


def unpack_ids(words: np.ndarray) -> list[bytes]:
    """What pack_ids was given."""
    return np.ascontiguousarray(words.T, ">u8").view(f"S{8 * len(words)}").ravel().tolist()


def widen(words: np.ndarray, width: int) -> np.ndarray:
    """(width, n): the same ids in more words, the new ones zero."""
    return np.concatenate([words, np.zeros((width - len(words), words.shape[1]), WORD)]) if len(words) < width else words


def pair_keys(query: np.ndarray, docids: np.ndarray, salt: int = 0) -> np.ndarray:
    """(n,) uint64: a hash of (query, docid). Equal pairs have equal keys; whoever finds equal keys must still compare the pairs."""
    keys = (query.astype(WORD) + WORD(salt)) * WORD(0xD6E8FEB86659FD93)         # any large odd factors will do
    for word in docids:
        keys ^= word
        keys *= WORD(0x9E3779B97F4A7C15)
        keys ^= keys >> WORD(29)
    return keys


def read_trec(path: str | Path, kind: str, spaces: bool = False) -> TrecTable:
    """Read "qrels" or a "run" (.gz too) as trec_eval does: fields between ASCII white space, `#` lines skipped, blank ones only in runs.

    A run's fields after the sixth are ignored; with `spaces` more fields than expected mean a docid with spaces, which become `_`.
    InputError for a line of the wrong width, a value that is no number, a document twice for one query, or no lines at all.
    """
    numbers: dict[bytes, int] = {}
    queries, docids, values, rows = [], [], [], 0
    try:
        for chunk in _whole_lines(path):
            ends = _field_ends(chunk, kind)
            if ends is None:
                chunk = _regular_lines(chunk, kind, spaces)
                ends = _field_ends(chunk, kind, regular=True)
            if len(ends):
                for column, part in zip((queries, docids, values), _columns(chunk, ends, kind, numbers)):
                    column.append(part)
            rows += len(ends)
        if not rows:
            raise InputError(f"{path}:1: expected `{TREC_FORMATS[kind][3]}`, found nothing")
    except _BadRow as bad:
        number, line = _line(path, kind, rows + bad.args[0])
        raise InputError(f"{path}:{number}: expected `{TREC_FORMATS[kind][3]}`, found {line!r:.80}") from None
    width = max(map(len, docids))
    table = TrecTable(list(numbers), np.concatenate(queries), np.concatenate([widen(part, width) for part in docids], axis=1),
                      np.concatenate(values))
    del queries, docids, values
    again = _repeated_row(table)
    if again is not None:
        number, line = _line(path, kind, again)
        raise InputError(f"{path}:{number}: expected a document only once for each query, found {line!r:.80} again")
    return table


def _whole_lines(path: str | Path, size: int = 1 << 20) -> Iterator[bytes]:
    """A file's bytes, about `size` at a time, cut between lines: memory stays small and in the processor's cache."""
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as file:
            while chunk := file.read(size):
                chunk += file.readline()
                yield chunk if chunk.endswith(b"\n") else chunk + b"\n"
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: not a readable gzip file ({error})") from None


def _field_ends(chunk: bytes, kind: str, regular: bool = False) -> np.ndarray | None:
    """(n, width) positions of the white space after each field; None unless all lines are `width` fields, one blank or tab between.

    `regular` lines come from _regular_lines: nothing is left to check, and all other control characters belong to ids.
    """
    width, text = TREC_FORMATS[kind][0], np.frombuffer(chunk, np.uint8)
    if regular:
        return np.flatnonzero((text == 32) | (text == 10)).reshape(-1, width)
    ends = np.flatnonzero(text <= 32)
    if len(ends) % width or (np.diff(ends, prepend=-1) < 2).any():             # an empty field
        return None
    white = text[ends].reshape(-1, width)
    begins = np.append(0, ends[width - 1:-1:width] + 1)
    usual = (white[:, -1] == 10).all() and ((white[:, :-1] == 32) | (white[:, :-1] == 9)).all() and (text[begins] != ord("#")).all()
    return ends.reshape(-1, width) if usual else None


def _split(line: bytes, kind: str, spaces: bool) -> list[bytes] | None:
    """A line's fields, none where trec_eval skips it, None where it has the wrong width."""
    width, fields = TREC_FORMATS[kind][0], line.split()
    if fields and fields[0].startswith(b"#") or not fields and kind == "run":
        return []
    if spaces and len(fields) > width:                                         # split from both ends: what remains is the docid
        last = len(fields) - (width - 3)
        fields[2:last] = [b"_".join(fields[2:last])]
    return fields[:width] if len(fields) == width or len(fields) > width and kind == "run" else None


def _regular_lines(chunk: bytes, kind: str, spaces: bool) -> bytes:
    """The lines that count, with one blank between fields. Slow, and seldom needed. _BadRow for a line of the wrong width."""
    lines = []
    for line in chunk.split(b"\n")[:-1]:
        fields = _split(line, kind, spaces)
        if fields is None or b"\0" in line:                                    # a zero byte would end a packed id
            raise _BadRow(len(lines))
        if fields:
            lines.append(b" ".join(fields) + b"\n")
    return b"".join(lines)


def _columns(chunk: bytes, ends: np.ndarray, kind: str, numbers: dict[bytes, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A chunk's query, docids and values, as in TrecTable; a new query id gets the next number in `numbers`."""
    _, field, convert, _ = TREC_FORMATS[kind]
    text = np.frombuffer(chunk + bytes(8), np.uint8)                           # eight bytes can be read from any place
    qids = _words(text, np.append(0, ends[:-1, -1] + 1), ends[:, 0])
    changes = np.append(0, 1 + np.flatnonzero((qids[:, 1:] != qids[:, :-1]).any(axis=0)))
    runs = [numbers.setdefault(qid, len(numbers)) for qid in unpack_ids(qids[:, changes])]
    query = np.repeat(np.array(runs, np.int32), np.diff(changes, append=len(ends)))
    docids, values = (_words(text, ends[:, i - 1] + 1, ends[:, i]) for i in (2, field))
    return query, docids, _numbers(unpack_ids(values), convert)


def _words(text: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(W, n): the bytes of text[begin:end] for each of n fields, packed as in TrecTable.docids."""
    anywhere = np.ndarray(len(text) - 7, ">u8", text, strides=1)               # [i]: the eight bytes from i on, as one integer
    masks = np.array([2**64 - (1 << 8 * n) for n in range(8)] + [0], WORD)     # [n]: without the last n bytes
    words = []
    for place in range(0, int((end - begin).max()), 8):
        word = anywhere[np.minimum(begin + place, len(anywhere) - 1)].astype(WORD)
        words.append(word & masks[np.clip(begin + place + 8 - end, 0, 8)])
    return np.stack(words)


def _numbers(fields: list[bytes], convert: type) -> np.ndarray:
    """(n,) float64 or int64 values. _BadRow for the first that is no number (trec_eval would silently take it for 0)."""
    try:
        values = np.fromiter(map(convert, fields), convert, len(fields))
        if not np.isnan(values).any() and b"_" not in b"".join(fields):        # Python reads 1_000 as a number
            return values
    except (ValueError, OverflowError):
        pass
    if len(fields) == 1:
        raise _BadRow(0)
    for row, field in enumerate(fields):
        try:
            _numbers([field], convert)
        except _BadRow:
            raise _BadRow(row) from None


def _repeated_row(table: TrecTable) -> int | None:
    """The first row whose query and document were in a row before it."""
    keys = pair_keys(table.query, table.docids)
    ordered, seen = np.sort(keys), set()
    equal = ordered[1:][ordered[1:] == ordered[:-1]]
    for row in np.flatnonzero(np.isin(keys, equal)) if len(equal) else ():
        pair = (int(table.query[row]), table.docids[:, row].tobytes())
        if pair in seen:
            return int(row)
        seen.add(pair)
    return None


def _line(path: str | Path, kind: str, row: int) -> tuple[int, str]:
    """Number and text of the line that a table's row comes from. Looked up only to complain: counting all along would cost time."""
    lines = (line for chunk in _whole_lines(path) for line in chunk.split(b"\n")[:-1])
    for number, line in enumerate(lines, 1):
        row -= _split(line, kind, False) != []
        if row < 0:
            return number, line.decode("utf-8", "replace")
    return 0, "a line that cannot be read twice"                               # a pipe


def _read_dicts(path: str | Path, kind: str) -> dict[str, dict]:
    table = read_trec(path, kind, spaces=True)
    qids, docids = ([name.decode("utf-8", "surrogateescape") for name in names] for names in (table.qids, unpack_ids(table.docids)))
    result: dict[str, dict] = {qid: {} for qid in qids}
    for query, docid, value in zip(table.query.tolist(), docids, table.values.tolist()):
        result[qids[query]][docid] = value
    return result


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """{qid: {docid: label}} in the file's order. Spaces in docids become `_` (trec_id). InputError: see read_trec."""
    return _read_dicts(path, "qrels")


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """{qid: {docid: score}} in the file's order; the rank column is ignored. Otherwise as read_qrels."""
    return _read_dicts(path, "run")


def write_run(path: str | Path, ranking: dict[str, list[str]], tag: str) -> None:
    """Write {qid: docids, best first} as a TREC run, with the scores n-1, n-2, ..., 0, so that no tie rule can undo the order.

    Docids are written as trec_id gives them. InputError where two of a query's would then be one, or what no such file can hold.
    """
    check_run(path, ranking, tag)
    with atomic_write(path, "wb") as file:
        for qid, docids in ranking.items():
            lines = (f"{qid} Q0 {trec_id(docid)} {rank} {len(docids) - rank} {tag}\n" for rank, docid in enumerate(docids, 1))
            file.write("".join(lines).encode("utf-8", "surrogateescape"))


def check_run(path: str | Path, ranking: dict[str, list[str]], tag: str) -> None:
    """InputError where `write_run` could not write this: no order changes that, so it can be asked before long work."""
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a run file to write")
    for qid, docids in ranking.items():
        names = [trec_id(docid) for docid in docids]
        for name in (qid, tag, *names):
            if not re.fullmatch(r"[^\s\0]+", name, re.ASCII) or qid.startswith("#"):
                raise InputError(f"{path}: expected ids and a tag without white space, and no # before a query id, found {name!r}")
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise InputError(f"{path}: query {qid} has two documents {twice!r} (white space in ids is written as _)")


def write_qrels(path: str | Path, qrels: dict[str, dict[str, int]]) -> None:
    """Write {qid: {docid: label}} as TREC judgements."""
    with atomic_write(path) as file:
        file.writelines(f"{qid} 0 {trec_id(docid)} {label}\n" for qid, labels in qrels.items() for docid, label in labels.items())


# ---------------------------------------------------------------------------------------------------------------------
# First-stage candidates: rank_llm JSONL and JSON, RankGPT/REARANK "hits" JSON

TEXT_FIELDS = ("contents", "content", "text", "segment", "passage", "body")  # names under which the field keeps a passage's text


@dataclasses.dataclass
class Candidates:
    """One query's first-stage list, best first: docids, texts and scores are parallel."""

    qid: str
    query: str
    docids: list[str]
    texts: list[str]
    scores: list[float]


def read_text(path: str | Path) -> str:
    """The whole file as text (UTF-8, .gz too, a byte order mark dropped). InputError names the line that is not UTF-8."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: expected UTF-8 text, found the byte 0x{content[error.start]:02x}") from None


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON list or of a JSONL file, told apart by content, each with its place ("file:line", "file: record n")."""

    def parse(text: str, where: str):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: expected JSON ({error})") from None

    content = read_text(path)
    if content.lstrip().startswith("["):
        entries = ((f"{path}: record {n}", entry) for n, entry in enumerate(parse(content, str(path)), 1))
    else:  # only "\n" ends a line: str.splitlines would also cut at a U+2028 inside a JSON string
        lines = enumerate(content.split("\n"), 1)
        entries = ((f"{path}:{n}", parse(line, f"{path}:{n}")) for n, line in lines if line.strip())
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected a JSON object, found {entry!r:.40}")
        yield where, entry


def _string(value, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: expected {what} as a string, found {value!r:.40}")
    return value.encode("utf-8", "replace").decode()  # JSON can smuggle in half a surrogate pair, which no file can hold


def _identifier(value, what: str, where: str) -> str:
    return _string(str(value) if isinstance(value, int) and not isinstance(value, bool) else value or None, what, where)


def _repeated(values: Iterable[str]) -> str | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _passage_text(record: dict, where: str) -> str:
    """The passage's text, after its title where it has one."""
    text = next((record[name] for name in TEXT_FIELDS if name in record), None)
    text = _string(text, f"a passage's text (under {', '.join(TEXT_FIELDS)})", where)
    return f"{_string(record['title'], 'a title', where)} {text}".strip() if record.get("title") else text


def _candidates(record: dict, where: str) -> Candidates:
    hits = record.get("candidates", record.get("hits"))
    if not isinstance(hits, list) or not all(isinstance(hit, dict) and isinstance(hit.get("doc", {}), dict) for hit in hits):
        raise InputError(f'{where}: expected a list of objects under "candidates" (rank_llm) or "hits" (RankGPT, REARANK)')
    query, qid = record.get("query"), record.get("qid")
    if isinstance(query, dict):
        query, qid = query.get("text"), query.get("qid")
    elif qid is None and hits:
        qid = hits[0].get("qid")
    result = Candidates(_identifier(qid, "the query's id (qid)", where), _string(query, "the query's text", where), [], [], [])
    for n, hit in enumerate(hits, 1):
        here = f"{where}, passage {n}"
        score = hit.get("score")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not -1e300 < score < 1e300:
            raise InputError(f"{here}: expected a finite number as score, found {score!r:.40}")
        result.docids.append(_identifier(hit.get("docid"), "the passage's id (docid)", here))
        result.texts.append(_passage_text(hit.get("doc", hit), here))
        result.scores.append(float(score))
    if _repeated(result.docids) is not None:
        raise InputError(f"{where}: passage {_repeated(result.docids)} is there twice for query {result.qid}")
    return result


def read_candidates(path: str | Path) -> list[Candidates]:
    """Read first-stage lists, in the file's order: that order is the ranking, scores are only carried along.

    rank_llm: {"query": {"text", "qid"}, "candidates": [{"docid", "score", "doc": {"contents", ...}}]}; RankGPT and REARANK:
    {"query", "hits": [{"content", "qid", "docid", "score"}]}; one object a line or one JSON list, .gz of each. Ids become strings.
    InputError names file and line (or record) where a field is missing or of the wrong type, a passage or a query is there twice.
    """
    queries: dict[str, Candidates] = {}
    for where, record in read_records(path):
        query = _candidates(record, where)
        if query.qid in queries:
            raise InputError(f"{where}: query {query.qid} is there twice")
        queries[query.qid] = query
    if not queries:
        raise InputError(f"{path}: expected candidates, found an empty file")
    return list(queries.values())


def write_candidates(path: str | Path, candidates: Iterable[Candidates]) -> None:
    """Write rank_llm JSONL, one query a line; read_candidates gives the same back."""
    with atomic_write(path) as file:
        for query in candidates:
            hits = [{"docid": docid, "score": float(score), "doc": {"contents": text}}
                    for docid, text, score in zip(query.docids, query.texts, query.scores, strict=True)]
            line = {"query": {"text": query.query, "qid": query.qid}, "candidates": hits}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Initial state expansion (paper section 3.2)

PAPER_QUERIES = 179  # of the 211 judged queries of DL21, DL22 and DL23 those whose BM25 list has an NDCG@10 above 0


@dataclasses.dataclass
class Instance:
    """One training prompt: a window of passages in their initial order, with the label of each.

    `ideal` are all judged labels of the query (the ideal of NDCG is taken over them, not over the window).
    """

    qid: str
    query: str
    docids: list[str]
    texts: list[str]
    labels: list[int]
    ideal: list[int]


def expand(candidates: list[Candidates], qrels: dict[str, dict[str, int]], draws: int = 100, size: int = 20, order: str = "retrieval",
           keep: str = "initial", min_ndcg: float = 0.1, seed: int = 0, exclude: Container[str] = (),
           counts: Counter | None = None) -> list[Instance]:
    """Many training prompts from few queries: of each list `draws` times `size` passages, drawn without replacement.

    Queries without judgements or with a list of NDCG@10 = 0 are dropped, and those whose id is in `exclude` (held out). `order`:
    a draw stays in "retrieval" order or is "shuffled". `keep`: draws whose "initial" NDCG@10 is at least `min_ndcg` and that have
    something to gain, whose "best" possible NDCG@10 is at least `min_ndcg`, or "all". A list of at most `size` passages gives one
    draw, the whole list. `counts`, if given, receives how many passed each stage (see STAGES). Every query draws from its own random
    stream, made from seed and qid: other queries, or their order, change nothing. InputError (a ValueError) where a setting makes no sense.
    """
    if order not in ("retrieval", "shuffled") or keep not in ("initial", "best", "all") or draws < 1 or size < 1:
        raise InputError(f"expected order retrieval|shuffled, keep initial|best|all, draws >= 1 and size >= 1, found {order}, {keep}, "
                         f"{draws} and {size}")
    counts = Counter() if counts is None else counts
    instances = []
    for query in candidates:
        judged = qrels.get(query.qid)
        if not judged or query.qid in exclude:
            continue
        labels, ideal = [max(0, judged.get(trec_id(docid), 0)) for docid in query.docids], list(judged.values())
        counts["judged"] += 1
        if ndcg(labels, ideal=ideal) == 0:
            continue
        counts["found"] += 1
        rng = random.Random(f"{seed}\t{query.qid}")  # seeds by the text itself; hash() would differ from process to process
        for _ in range(draws if len(labels) > size else 1):
            positions = rng.sample(range(len(labels)), min(size, len(labels)))  # both orders draw the same passages
            if order == "retrieval":
                positions.sort()
            drawn = [labels[position] for position in positions]
            initial, best = ndcg(drawn, ideal=ideal), ndcg(sorted(drawn, reverse=True), ideal=ideal)
            above = keep == "all" or (initial if keep == "initial" else best) >= min_ndcg
            kept = above and (keep != "initial" or best > initial)
            counts.update(draws=1, above=above, kept=kept)
            if kept:
                docids, texts = [query.docids[p] for p in positions], [query.texts[p] for p in positions]
                instances.append(Instance(query.qid, query.query, docids, texts, drawn, ideal))
    return instances


STAGES = {  # the stages as the authors' notebook prints them; on DL21 + DL22 + DL23: 211, 179, 17900, 13312, 12603
    "judged": "queries with candidates and judgements",
    "found": "queries whose first-stage NDCG@10 is above 0",
    "draws": "draws",
    "above": "draws that pass the NDCG@10 filter",
    "kept": "instances: draws with something to gain as well",
}


def repeated_passages(candidates: list[Candidates], qrels: dict[str, dict[str, int]]) -> tuple[int, int]:
    """(passages whose text another passage of the same list already has, those of them whose label differs from its label).

    Label differences between equal texts are noise that no ranker can learn: MS MARCO v2 has 795 repeats in DL21's 5,300 passages.
    """
    repeats = differing = 0
    for query in candidates:
        judged, first = qrels.get(query.qid, {}), {}  # first: text with white space collapsed -> label of its first passage
        for docid, text in zip(query.docids, query.texts):
            text, label = " ".join(text.split()), judged.get(trec_id(docid), 0)
            repeats += text in first
            differing += first.setdefault(text, label) != label
    return repeats, differing


def write_instances(path: str | Path, instances: Iterable[Instance]) -> None:
    """One instance a line, as JSON; read_instances gives the same back."""
    with atomic_write(path) as file:
        for instance in instances:
            file.write(json.dumps(vars(instance), ensure_ascii=False) + "\n")


def read_instances(path: str | Path) -> list[Instance]:
    """Read what write_instances wrote (or somebody made in that form). InputError names the line that does not fit."""
    instances = []
    for where, record in read_records(path):
        lists = [record.get(name) for name in ("docids", "texts", "labels", "ideal")]
        if set(record) != {field.name for field in dataclasses.fields(Instance)} or not all(isinstance(values, list) for values in lists):
            raise InputError(f"{where}: expected qid, query and the lists docids, texts, labels, ideal")
        strings, numbers = [record["qid"], record["query"], *lists[0], *lists[1]], [*lists[2], *lists[3]]
        if {*map(type, strings)} != {str} or {*map(type, numbers)} != {int} or not len(lists[0]) == len(lists[1]) == len(lists[2]) > 0:
            raise InputError(f"{where}: expected as many texts (strings) and labels (integers) as docids (strings), and at least one")
        instances.append(Instance(**record))
    return instances


# ---------------------------------------------------------------------------------------------------------------------
# BRIGHT: 12 splits, reasoning-intensive queries (arXiv 2407.12883)

BRIGHT_SPLITS = ("biology", "earth_science", "economics", "psychology", "robotics", "stackoverflow", "sustainable_living", "pony",
                 "leetcode", "aops", "theoremqa_theorems", "theoremqa_questions")
# Where a file of a split lies below a folder, the first pattern that matches. The authors' archive writes theoremqa_theorems ({u}),
# castorini's files theoremqa-theorems ({h}).
BRIGHT_FILES = {
    "queries": ("**/pyserini_queries/{u}.tsv", "**/topics.bright-{h}.tsv*"),
    "corpus": ("**/pyserini_corpus/{u}/{u}.jsonl",),
    "qrels": ("**/pyserini_qrels/{u}.tsv", "**/qrels.bright-{h}.txt*"),
    "fixed qrels": ("**/qrels.bright-{h}.fixed.txt*",),
    "exclude": ("**/exclude.bright-{h}.txt*", "**/topics.bright-{h}-original.jsonl*"),
    "run": ("**/bm25.{u}.filtered.trec", "**/*{u}*.trec*", "**/*{h}*.trec*", "**/*{u}*.txt*", "**/*{h}*.txt*"),
}


def bright_file(folder: str | Path, split: str, kind: str) -> Path | None:
    """The file of `split` (with _ or -) of that kind (see BRIGHT_FILES) below `folder`, None if there is none.

    InputError for an unknown split, a folder that is not there, or where two files of one pattern could be meant.
    """
    under = split.replace("-", "_")
    if under not in BRIGHT_SPLITS:
        raise InputError(f"no BRIGHT split {split!r}: expected {', '.join(BRIGHT_SPLITS)}")
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: expected a folder with BRIGHT files")
    for pattern in BRIGHT_FILES[kind]:
        found = sorted(path for path in Path(folder).glob(pattern.format(u=under, h=under.replace("_", "-"))) if path.is_file())
        if len(found) > 1:
            raise InputError(f"{folder}: {found[0]} and {found[1]} could both be the {kind} of {split}")
        if found:
            return found[0]
    return None


def read_excluded(path: str | Path) -> dict[str, set[str]]:
    """{qid: documents to take out of its candidates}, ids with "_" for spaces: lines "qid docid" or BRIGHT's own rows as JSONL."""
    excluded: dict[str, set[str]] = {}
    if read_text(path).lstrip().startswith("{"):
        for where, record in read_records(path):
            docids = record.get("excluded_ids")
            if not isinstance(docids, list) or not all(isinstance(docid, str) for docid in docids):
                raise InputError(f"{where}: expected excluded_ids as a list of strings")
            qid = trec_id(_identifier(record.get("id"), "the query's id", where))
            excluded.setdefault(qid, set()).update(trec_id(docid) for docid in docids if docid != "N/A")
        return {qid: docids for qid, docids in excluded.items() if docids}
    for n, line in enumerate(read_text(path).split("\n"), 1):
        words = line.split(maxsplit=1)
        if len(words) == 1:
            raise InputError(f"{path}:{n}: expected `qid docid`, found {line!r:.40}")
        if words:
            excluded.setdefault(words[0], set()).add(trec_id(words[1].strip()))
    return excluded


def ranked(scores: dict[str, float], excluded: Container[str] = ()) -> list[str]:
    """Docids by falling score, equal scores by docid descending (trec_eval's order), without the excluded ones."""
    return [docid for docid in sorted(scores, key=lambda docid: (scores[docid], docid), reverse=True) if docid not in excluded]


def read_bright(split: str, folder: str | Path, exclude: dict[str, set[str]] | None = None, k: int = 100) -> list[Candidates]:
    """A split's BM25 lists with passages from the unpacked archive: excluded documents go first, then the list is cut to `k`.

    `exclude` as read_excluded gives it; by default from the split's own file below `folder`, where there is one. (The archive's runs come
    filtered, but the public scripts behind them cut to 100 first, which shortens leetcode's lists: put a longer run in the place of one.)
    """
    files = {kind: bright_file(folder, split, kind) for kind in ("queries", "corpus", "run", "exclude")}
    missing = [kind for kind in ("queries", "corpus", "run") if files[kind] is None]
    if missing:
        raise InputError(f"{folder}: no {' and no '.join(missing)} of BRIGHT's {split} (python data.py download bright)")
    if exclude is None:
        exclude = read_excluded(files["exclude"]) if files["exclude"] else {}
    queries, passages = dict(zip(*read_texts(files["queries"]))), dict(zip(*read_texts(files["corpus"])))
    passages = {trec_id(docid): text for docid, text in passages.items()}
    lists = []
    for qid, scores in read_run(files["run"]).items():
        docids = ranked(scores, exclude.get(qid, ()))[:k]
        unknown = [docid for docid in docids if docid not in passages] or ([] if qid in queries else [f"query {qid}"])
        if unknown:
            raise InputError(f"{files['run']}: {unknown[0]} is not in BRIGHT's {split}")
        lists.append(Candidates(qid, queries[qid], docids, [passages[docid] for docid in docids], [scores[docid] for docid in docids]))
    return lists


def bright_scores(run: str | Path, qrels: str | Path, excluded: dict[str, set[str]] | None = None) -> dict[str, float]:
    """NDCG@10 of each judged query, in trec_eval's order of the run; a query that the run lacks has 0 (as with trec_eval -c)."""
    excluded, scores, result = excluded or {}, read_run(run), {}
    for qid, judged in read_qrels(qrels).items():
        labels = [judged.get(docid, 0) for docid in ranked(scores.get(qid, {}), excluded.get(qid, ()))]
        result[qid] = ndcg(labels, ideal=list(judged.values()))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Downloads: the public files

LISTS = "https://huggingface.co/datasets/castorini/rank_llm_data/resolve/main/retrieve_results/BM25/retrieve_results_"
NIST = "https://trec.nist.gov/data/deep/"
BEIR = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/"
SOURCES: dict[str, dict[str, str]] = {  # data set -> {address: MD5 checksum, "" where none is published}; archives are unpacked
    "dl19": {LISTS + "dl19_top100.jsonl": "518ab9f821fb74d862589d1d141c208e",
             NIST + "2019qrels-pass.txt": "2f4be390198da108f6845c822e5ada14"},
    "dl20": {LISTS + "dl20_top100.jsonl": "3b6397f50fd78229e8d733243745a6d4",
             NIST + "2020qrels-pass.txt": "0355ccee7509ac0463e8278186cdd8d1"},
    "dl21": {LISTS + "dl21_top100.jsonl": "6ca5e405c55fc2280d66eb0afc7416f5",
             NIST + "2021.qrels.pass.final.txt": "c5b76ec95b589732edc9040302e22a2b"},
    "dl22": {LISTS + "dl22_top100.jsonl": "08322ee30bf084d1309f5c5a515f2f18",
             NIST + "2022.qrels.pass.withDupes.txt": "b36484d6cfd039664a570a4bf04f0eeb"},
    "dl23": {NIST + "2023.qrels.pass.withDupes.txt": "3a742d51ae65da2ece9c09b304b9e358"},
    "bright": {"https://huggingface.co/datasets/le723z/bright_tar/resolve/main/bright.tar.gz": ""},
    "beir-trec-covid": {BEIR + "trec-covid.zip": "ce62140cb23feb9becf6270d0d1fe6d1"},
    "beir-nfcorpus": {BEIR + "nfcorpus.zip": "a89dba18a62ef92f7d323ec890a0d38d"},
    "beir-dbpedia-entity": {BEIR + "dbpedia-entity.zip": "c2a39eb420a3164af735795df012ac2c"},
    "beir-scifact": {BEIR + "scifact.zip": "5f7d1de60b170fc8027bb7898e2efca1"},
}
DL23_PASSAGES = "dl23/retrieve_results_dl23_top100.jsonl"  # below the cache folder; only the user can put it there
TIMEOUT, TRIES, WAIT = 30.0, 3, 1.0  # seconds of silence that count as a stall; fruitless tries in a row; seconds before the second


def cache_folder() -> Path:
    """Where downloads are kept: the environment variable REARANK_DATA, or ~/.cache/rearank."""
    return Path(os.environ.get("REARANK_DATA") or "~/.cache/rearank").expanduser()


def file_md5(path: Path) -> str:
    """The MD5 of a file, in hexadecimal. (It is what the publishers give: it guards against damage, not against malice.)"""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def download(name: str) -> list[Path]:
    """Fetch a data set of SOURCES into cache_folder()/name unless it is there and valid. Returns its files; for an archive, its folder.

    InputError in one line: an unknown name, what cannot be reached, a wrong checksum, an unsafe or damaged archive.
    """
    if name not in SOURCES:
        raise InputError(f"no data set {name!r}: expected {', '.join(SOURCES)}")
    folder, places = cache_folder() / name, []
    for url, md5 in SOURCES[name].items():
        file = url.rsplit("/", 1)[-1]
        if not file.endswith((".zip", ".tar.gz")):
            places.append(fetch(url, folder / file, md5))
            continue
        if not folder.is_dir():
            archive = fetch(url, folder.with_name(file), md5)
            try:
                unpack(archive, folder)
            finally:
                archive.unlink()
        places.append(folder)
    return places


def fetch(url: str, path: Path, md5: str = "") -> Path:
    """Bring `url` to `path`, whole and verified or not at all. What has arrived before a cut stays in `path`.part and is continued."""
    if path.exists() and (not md5 or file_md5(path) == md5):
        return path
    import http.client

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part, before)
            break
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            code = getattr(error, "code", None)
            if code == 416:  # nothing after what we have: it is no beginning of this file
                part.unlink(missing_ok=True)
            failures = 1 if part.exists() and part.stat().st_size > before else failures + 1
            if failures >= TRIES or code in (401, 403, 404, 410):
                reason = getattr(error, "reason", None) or error
                raise InputError(f"cannot fetch {url} ({reason}); try again later or put the file at {path} by hand") from None
            time.sleep(WAIT * 2 ** (failures - 1))
    found = file_md5(part)
    if md5 and found != md5:
        part.unlink()
        raise InputError(f"{url}: wrong checksum, expected md5 {md5}, got {found}; nothing was kept")
    os.replace(part, path)
    return path


def _fetch_rest(url: str, part: Path, start: int) -> None:
    """Append to `part` what comes after its first `start` bytes; a server that does not know ranges sends all of it again."""
    import urllib.request

    from tqdm import tqdm

    headers = {"User-Agent": "rearank-from-scratch", **({"Range": f"bytes={start}-"} if start else {})}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        start = start if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (open(part, "ab" if start else "wb") as file,
              tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True, disable=None) as bar):
            while block := response.read(1 << 16):
                bar.update(file.write(block))
            if total is not None and file.tell() != total:  # read() ends silently where the connection does
                raise OSError(f"cut off after {file.tell():,} of {total:,} bytes")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar.gz so that `folder` appears whole or not at all; owners, modes and times are not taken over.

    InputError for a member that is not a plain file or folder (a link, a device) or would lie outside, and for a damaged archive.
    """
    import tarfile
    import zipfile

    staging = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        with (zipfile.ZipFile if archive.suffix == ".zip" else tarfile.open)(archive) as opened:
            for name, kind, open_member in _members(opened):
                path = PureWindowsPath(name)  # the stricter reading: both separators, and drives
                if path.anchor or ".." in path.parts or kind not in ("file", "folder"):
                    raise InputError(f"{archive.name}: unsafe member {name!r} ({kind}); nothing was unpacked")
                target = staging / name
                (target if kind == "folder" else target.parent).mkdir(parents=True, exist_ok=True)
                if kind == "file":
                    with open_member() as source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
        os.replace(staging, folder)
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, RuntimeError) as error:
        raise InputError(f"{archive.name}: cannot be unpacked ({' '.join(str(error).split())})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _members(opened) -> Iterator[tuple[str, str, Callable]]:
    """(name, "file", "folder" or what else it is, function that opens it) of each member of a ZipFile or TarFile."""
    if hasattr(opened, "infolist"):
        for info in opened.infolist():
            kind = {0: "file", stat.S_IFREG: "file", stat.S_IFDIR: "folder"}.get(stat.S_IFMT(info.external_attr >> 16), "link or device")
            yield info.filename, "folder" if info.is_dir() else kind, functools.partial(opened.open, info)
    else:
        for info in opened:
            kind = "file" if info.isfile() else "folder" if info.isdir() else "link or device"
            yield info.name, kind, functools.partial(opened.extractfile, info)


def training_pool() -> tuple[list[Candidates], dict[str, dict[str, int]]]:
    """(candidates, qrels) of the paper's training queries as far as they are public: DL21 and DL22, and DL23 if the user has its passages.

    Downloads what is missing, and says how many of the paper's 179 queries there are. Raises what `download` raises.
    """
    pool, qrels = [], {}
    for name in ("dl21", "dl22", "dl23"):
        passages = cache_folder() / DL23_PASSAGES
        if name == "dl23" and not passages.exists():
            continue
        *lists, judgements = download(name)
        pool += read_candidates(lists[0] if lists else passages)
        qrels.update(read_qrels(judgements))
    expand(pool, qrels, draws=1, counts=(counts := Counter()))
    print(f"training pool: {counts['found']} of the paper's {PAPER_QUERIES} training queries"
          + ("" if passages.exists() else f" (DL23's passages have no public file; if you have them, put them at {passages})"),
          file=sys.stderr)
    return pool, qrels


# ---------------------------------------------------------------------------------------------------------------------
# BM25: a first stage of one's own


def read_texts(path: str | Path, file: str = "corpus.jsonl") -> tuple[list[str], list[str]]:
    """(ids, texts) of passages or queries: TSV (id TAB text), JSONL ({"_id" or "id", "title"?, "text"}) or a BEIR folder, of which `file`.

    InputError names the line that has no tab or lacks a field, or an id that is there twice.
    """
    if Path(path).is_dir():
        found = sorted(Path(path).glob(f"**/{file}*"))
        if not found:
            raise InputError(f"{path}: expected {file} in this folder")
        path = found[0]
    pairs = []
    if read_text(path).lstrip()[:1] in ("{", "["):
        for where, record in read_records(path):
            identifier = next((record[name] for name in ("_id", "id", "docid", "qid") if name in record), None)
            pairs.append((_identifier(identifier, "an id (under _id, id, docid, qid)", where), _passage_text(record, where)))
    else:
        for n, line in enumerate(read_text(path).split("\n"), 1):
            identifier, tab, text = line.rstrip("\r").partition("\t")
            if not (identifier and tab) and line.strip():
                raise InputError(f"{path}:{n}: expected id TAB text, found {line!r:.60}")
            if tab:
                pairs.append((identifier, text))
    if not pairs:
        raise InputError(f"{path}: expected texts, found an empty file")
    identifiers, texts = map(list, zip(*pairs))
    if _repeated(identifiers) is not None:
        raise InputError(f"{path}: the id {_repeated(identifiers)} is there twice")
    return identifiers, texts


STOP_WORDS = ("a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was "
              "will with").split()  # Lucene's for English


def tokenize(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def singular(word: str) -> str:
    """English plurals without their ending (after Harman's S stemmer, 1991): ponies -> pony, horses -> horse; glass, bus stay."""
    if word.endswith("ies") and not word.endswith(("aies", "eies")) and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith(("us", "ss")) and len(word) > 3 else word


class Vocabulary(dict):
    """Word -> number of its stem, given in order of appearance from 1; 0 for stop words. Every different word is stemmed only once."""

    def __init__(self):
        super().__init__(dict.fromkeys(STOP_WORDS, 0))
        self.stems: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        number = self[word] = self.stems.setdefault(singular(word), len(self.stems) + 1)
        return number


class BM25:
    """An inverted index over passages, scored with BM25 (Robertson; constants and idf as Lucene and the paper's first stage have them):

        score(q, d) = sum over query words t of  idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|))
        idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))

    Everything except the query is known at indexing time, so the summands are stored: a query adds up a few arrays. Meant for up to about
    a million passages. It is not Lucene: plurals are stripped where Lucene's Porter stemmer takes off more, words are cut more simply
    (Chinese or Thai would need real segmentation), lengths are exact where Lucene rounds them to one byte. So lists are not those of the
    paper's BM25 columns: of DL19's 4,297 listed passages alone it makes lists of NDCG@10 0.47 (Lucene, all 8.8 million: 0.51).
    """

    def __init__(self, texts: Iterable[str], k1: float = 0.9, b: float = 0.4):
        """Index `texts`; results refer to them by position."""
        vocabulary, words, lengths = Vocabulary(), array.array("i"), array.array("i")
        for text in texts:
            tokens = tokenize(text)
            words.extend(map(vocabulary.__getitem__, tokens))
            lengths.append(len(tokens))
        self.stems, self.size = vocabulary.stems, len(lengths)
        if not self.stems:
            raise InputError("BM25: expected at least one passage with a word in it")
        words, passages = np.asarray(words), np.repeat(np.arange(self.size, dtype=np.int32), lengths)
        words, passages = words[words > 0], passages[words > 0]  # without stop words, which do not count as length either
        lengths = np.bincount(passages, minlength=self.size)
        # One number per token, word * N + passage. Sorted, equal numbers are one posting, and how many they are is its tf.
        tokens = np.multiply(words, self.size, dtype=np.int64) + passages
        tokens.sort()
        first = np.flatnonzero(np.diff(tokens, prepend=-1))
        tf = np.diff(first, append=len(tokens))
        word, passage = np.divmod(tokens[first], self.size)
        df = np.bincount(word)
        idf = np.log1p((self.size - df + 0.5) / (df + 0.5))
        norm = k1 * (1 - b + b * lengths / lengths.mean())
        self.passages = passage.astype(np.int32)  # all posting lists one after the other, passages rising in each
        self.weights = (idf[word] * tf / (tf + norm[passage])).astype(np.float32)
        self.offsets = np.append(0, np.cumsum(df))  # the list of word w is [offsets[w], offsets[w + 1])

    def search(self, query: str, k: int = 100) -> tuple[list[int], list[float]]:
        """(positions, scores) of the best `k` passages that share a word with the query; equal scores in the passages' order."""
        scores = np.zeros(self.size, np.float32)
        words = (self.stems.get(singular(word)) for word in tokenize(query) if word not in STOP_WORDS)
        for word in filter(None, words):  # a word that the query repeats counts as often
            postings = slice(self.offsets[word], self.offsets[word + 1])
            scores[self.passages[postings]] += self.weights[postings]  # no passage is there twice, so plain += adds all
        least = np.partition(scores, -k)[-k] if k < self.size else 0  # the k-th best score
        found = np.flatnonzero((scores >= least) & (scores > 0))
        best = found[np.argsort(-scores[found], kind="stable")][:k]
        return best.tolist(), scores[best].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The toy task: the whole of REARANK in miniature, for `python grpo.py` without data, downloads or a GPU

# Each concept can be said in three words. A query names three concepts; a passage's label is how many of them it covers.
TOY_CONCEPTS = tuple(tuple(words.split()) for words in (
    "rain storm cloud", "bread flour oven", "violin chord melody", "engine piston fuel", "forest oak leaf", "ocean tide reef",
    "planet orbit comet", "doctor fever pill", "goal referee stadium", "novel poem chapter", "coin bank loan", "bee honey hive"))
TOY_GRADES = ("0", "1", "2", "3")


def toy_combinations(held_out: bool) -> list[tuple[int, ...]]:
    """The triples of concepts that queries are made of: every fifth of the 220 is held out, so no split shares a triple."""
    triples = list(itertools.combinations(range(len(TOY_CONCEPTS)), 3))
    random.Random(0).shuffle(triples)
    return triples[: len(triples) // 5] if held_out else triples[len(triples) // 5:]


def toy_task(queries: int, passages: int, seed: int, held_out: bool = False,
             ) -> tuple[list[Candidates], dict[str, dict[str, int]]]:
    """Synthetic first-stage lists and their judgements: `queries` lists of `passages` passages of four words.

    Of eight passages two cover none of the query's concepts, four cover one, one two and one all three, in words that may differ
    from the query's. The first stage sees the label through noise wider than its scale, so its order is mediocre.
    """
    rng, combinations = random.Random(f"toy {seed} {held_out}"), toy_combinations(held_out)
    candidates, qrels = [], {}
    for number in range(queries):
        concepts, qid = rng.choice(combinations), f"{'test' if held_out else 'train'}{number}"
        others = [c for c in range(len(TOY_CONCEPTS)) if c not in concepts]
        found = []
        for i in range(passages):
            label = rng.choices((0, 1, 2, 3), weights=(2, 4, 1, 1))[0]
            covered = rng.sample(concepts, label) + rng.choices(others, k=4 - label)
            rng.shuffle(covered)
            text = " ".join(rng.choice(TOY_CONCEPTS[c]) for c in covered)
            found.append((label + rng.gauss(0, 5), f"{qid}-p{i}", text, label))
        found.sort(reverse=True)
        query = " ".join(rng.choice(TOY_CONCEPTS[c]) for c in concepts)
        scores, docids, texts, labels = map(list, zip(*found))
        candidates.append(Candidates(qid, query, docids, texts, scores))
        qrels[qid] = dict(zip(docids, labels))
    return candidates, qrels


def toy_keywords(query: str, text: str) -> list[str]:
    """The words of `text` that express one of the query's concepts, in the text's order: as many as the passage's label."""
    wanted = {concept for concept in TOY_CONCEPTS for word in query.split() if word in concept}
    return [word for word in text.split() if any(word in concept for concept in wanted)]


def toy_answer(query: str, texts: Sequence[str], graded: bool) -> str:
    """What the toy's teacher answers: of each passage its keywords and their number, the grade, in <think>; then an order.

    The order is by grade where `graded`, else it knows only relevant before irrelevant (ties stay in place).
    """
    keywords = [toy_keywords(query, text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: -(len(keywords[i]) if graded else min(len(keywords[i]), 1)))
    thoughts = " ".join(" ".join([f"[{i}]", *words, TOY_GRADES[len(words)]]) for i, words in enumerate(keywords, 1))
    return f"<think> {thoughts} </think> <answer> {' > '.join(f'[{i + 1}]' for i in order)} </answer>"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass
class DownloadSettings:
    """Fetch public data into $REARANK_DATA (default ~/.cache/rearank)."""

    names: list[str] = setting(list, "data sets: " + ", ".join(SOURCES), positional=True, nargs="+")


def download_command(settings: DownloadSettings) -> int:
    """Print where each file is; a data set that cannot be had is one line on stderr, and status 2 at the end."""
    failed = False
    for name in settings.names:
        try:
            for place in download(name):
                print(f"{name}: {place}")
        except InputError as error:
            print(f"data.py: {name}: {error}", file=sys.stderr)
            failed = True
        if name == "dl23":
            print(f"dl23: its passages have no public file; if you have them (as rank_llm JSONL): {cache_folder() / DL23_PASSAGES}")
    return 2 if failed else 0


@dataclasses.dataclass
class ExpandSettings:
    """Initial state expansion: many training instances from few judged queries (paper section 3.2)."""

    candidates: list[str] = setting(list, "first-stage lists; without any, the paper's public ones are fetched", nargs="+")
    qrels: list[str] = setting(list, "their judgements", nargs="+")
    output: str = setting("instances.jsonl", "where the instances go (JSONL)")
    draws: int = setting(100, "draws of each query (the paper's text: 50)")
    size: int = setting(20, "passages of a draw")
    order: str = setting("retrieval", "order of the passages in a draw (the paper's text: shuffled)", choices=("retrieval", "shuffled"))
    keep: str = setting("initial", "whose NDCG@10 must reach --min-ndcg: the draw as it is, its best order, or nobody's",
                        choices=("initial", "best", "all"))
    min_ndcg: float = setting(0.1, "least NDCG@10 of a draw")
    seed: int = setting(0, "seed of the draws")
    exclude_queries: str = setting("", "held-out queries, ids first on each line (a qrels file, run or topics file will do)")


def expand_command(settings: ExpandSettings) -> None:
    """Write the instances and print how many are left at every stage."""
    if bool(settings.candidates) != bool(settings.qrels):
        raise InputError("expected --candidates and --qrels together, or neither")
    if settings.candidates:
        candidates, qrels = [query for path in settings.candidates for query in read_candidates(path)], {}
        for path in settings.qrels:
            for qid, labels in read_qrels(path).items():
                qrels.setdefault(qid, {}).update(labels)
    else:
        candidates, qrels = training_pool()
    if (twice := _repeated(query.qid for query in candidates)) is not None:
        raise InputError(f"query {twice} is in more than one of {', '.join(settings.candidates)}")
    lines = read_text(settings.exclude_queries).split("\n") if settings.exclude_queries else []
    held_out, counts = {line.split()[0] for line in lines if line.strip()}, Counter()
    instances = expand(candidates, qrels, settings.draws, settings.size, settings.order, settings.keep, settings.min_ndcg, settings.seed,
                       held_out, counts)
    if not instances:
        raise InputError("no instances: expected candidates and judgements of the same queries, with something relevant in the lists")
    write_instances(settings.output, instances)
    print(f"{sum(query.qid in held_out for query in candidates):7,}  queries held out")
    for stage, meaning in STAGES.items():
        of_paper = f" (the paper trains on {PAPER_QUERIES})" if stage == "found" else ""
        print(f"{counts[stage]:7,}  {meaning}{of_paper}")
    repeats, differing = repeated_passages(candidates, qrels)
    print(f"{repeats:7,}  of {sum(len(query.docids) for query in candidates):,} passages repeat a text of their list, "
          f"{differing:,} of them with a different label\nwritten to {settings.output}")


@dataclasses.dataclass
class BM25Settings:
    """First-stage retrieval with BM25: the best passages of a corpus for each query."""

    corpus: str = setting("", "TSV (id TAB text), JSONL or a BEIR folder", positional=True)
    queries: str = setting("", "the same for the queries", positional=True)
    output: str = setting("bm25.jsonl", "candidates with their passages, for rearank.py --input")
    run: str = setting("", "also write a TREC run")
    k: int = setting(100, "passages of each query")
    k1: float = setting(0.9, "how slowly repeated words saturate")
    b: float = setting(0.4, "how much long passages are held back, 0 to 1")


def bm25_command(settings: BM25Settings) -> None:
    """Index, search, write; a query that matches nothing gets an empty list and is counted."""
    from tqdm import tqdm

    if settings.k < 1 or settings.k1 < 0 or not 0 <= settings.b <= 1:
        raise InputError("expected --k >= 1, --k1 >= 0 and --b from 0 to 1")
    (docids, texts), (qids, queries) = read_texts(settings.corpus), read_texts(settings.queries, "queries.jsonl")
    index = BM25(tqdm(texts, "index", disable=None), settings.k1, settings.b)
    lists = []
    for qid, query in zip(tqdm(qids, "search", disable=None), queries):
        found, scores = index.search(query, settings.k)
        lists.append(Candidates(qid, query, [docids[n] for n in found], [texts[n] for n in found], scores))
    write_candidates(settings.output, lists)
    if settings.run:
        write_run(settings.run, {query.qid: query.docids for query in lists}, "bm25")
    print(f"{len(docids):,} passages, {len(qids):,} queries, {sum(not query.docids for query in lists):,} of them without a match; "
          f"written to {settings.output}" + (f" and {settings.run}" if settings.run else ""))


@dataclasses.dataclass
class BrightSettings:
    """BRIGHT's first-stage lists as candidate files for rearank.py, one for each split, without the excluded documents."""

    folder: str = setting("", "the unpacked archive (default: where `download bright` puts it)")
    output: str = setting("bright-candidates", "folder for the candidate files")
    splits: list[str] = setting(list, "which of the 12 (default: all)", nargs="+")
    k: int = setting(100, "passages of each query, cut after the exclusion")


def bright_command(settings: BrightSettings) -> None:
    """Write OUTPUT/split.jsonl for each split."""
    for split in settings.splits or BRIGHT_SPLITS:
        lists = read_bright(split, settings.folder or cache_folder() / "bright", k=settings.k)
        write_candidates(Path(settings.output, f"{split}.jsonl"), lists)
        print(f"{split:20s}{len(lists):5d} queries, {min(len(query.docids) for query in lists)} to "
              f"{max(len(query.docids) for query in lists)} passages")


@dataclasses.dataclass
class BrightEvalSettings:
    """BRIGHT's headline: NDCG@10 x 100 of each split and the unweighted mean of the 12."""

    runs: str = setting("", "folder with a TREC run for each split: its name (biology) in the file's, ending .trec or .txt", required=True)
    qrels: str = setting("", "folder with the judgements (default: where `download bright` puts them)")
    fixed: bool = setting(False, "the corrected judgements of September 2025 (qrels.bright-*.fixed.txt) instead of the paper's")
    exclude: str = setting("", "folder with exclude.bright-*.txt or BRIGHT's own rows: take these documents out of the runs first")


def bright_eval_command(settings: BrightEvalSettings) -> None:
    """Print the table; where splits are missing the mean is marked as that of the rest."""
    means = []
    for split in BRIGHT_SPLITS:
        run = bright_file(settings.runs, split, "run")
        if run is None:
            print(f"{split:20s}    -   no run")
            continue
        folder = settings.qrels or cache_folder() / "bright"
        qrels = bright_file(folder, split, "fixed qrels" if settings.fixed else "qrels")
        if qrels is None:
            raise InputError(f"{folder}: no {'fixed ' * settings.fixed}judgements of BRIGHT's {split}")
        exclude = bright_file(settings.exclude, split, "exclude") if settings.exclude else None
        scores = bright_scores(run, qrels, read_excluded(exclude) if exclude else None)
        means.append(100 * sum(scores.values()) / len(scores))
        print(f"{split:20s}{means[-1]:7.2f}   {len(scores)} queries")
    if not means:
        raise InputError(f"{settings.runs}: no run of any BRIGHT split (biology.trec, ...)")
    print(f"{'mean':20s}{sum(means) / len(means):7.2f}   "
          + ("12 splits" if len(means) == 12 else f"{len(means)} of 12 splits only: not comparable with the headline"))


COMMANDS = {
    "download": (DownloadSettings, download_command),
    "expand": (ExpandSettings, expand_command),
    "bm25": (BM25Settings, bm25_command),
    "bright": (BrightSettings, bright_command),
    "bright-eval": (BrightEvalSettings, bright_eval_command),
}


def main(argv: list[str] | None = None) -> int | None:
    """Run `data.py COMMAND ...`; without a command, print what there is."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if argv[0] not in COMMANDS:
        raise InputError(f"no command {argv[0]!r}: expected {', '.join(COMMANDS)}")
    settings, command = COMMANDS[argv[0]]
    return command(command_line(settings, argv[1:], settings.__doc__, f"data.py {argv[0]}"))


if __name__ == "__main__":
    run_main(main)
