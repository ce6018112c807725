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
  defaults are those of the authors' public notebook: 100 draws of 20, kept in retrieval order, an initial
  NDCG@10 of at least 0.1 with the ideal over all judgements, and something to gain. The text's variant is
  `--draws 50 --order shuffled --keep best`.
- Training data: the passages of DL23, a third of the paper's queries, have no public file. So it is either
  the authors' own windows (rearank_12k) or what DL21 and DL22 give. Passages stay whole; prompts cut them.
- BRIGHT (section 4): excluded documents leave the candidates before the cut to 100, never the judgements.

No data comes with the code. MS MARCO's passages (dl19 to dl22, rearank_12k) are for non-commercial research
only, TREC's judgements are NIST's, BRIGHT is CC BY 4.0, and each BEIR set has terms of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

from reward import ndcg

# ---- Shared by every script: bad input, the command line, files --------------------------------------------


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
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda file=None: None  # an error is one line; --help has the rest
    fields = dataclasses.fields(settings)
    for field in fields:
        options = dict(field.metadata)
        options.pop("least", None)
        flags, positional = options.pop("flags", ()), options.pop("positional", False)
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        kind = getattr(field.type, "__name__", str(field.type)).replace("| None", "").strip()
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif "action" not in options:
            options.setdefault("type", {"int": int, "float": float}.get(kind, str))
        if not positional and default not in (None, "", (), []) and default is not False:
            options["help"] += f" (default: {default})"
        options["help"] = options["help"].replace("%", "%%")
        names = [field.name] if positional else [*flags, "--" + field.name.replace("_", "-")]
        parser.add_argument(*names, default=default, **options)
    values = vars(parser.parse_intermixed_args(argv))  # options may stand between positional arguments
    for field in fields:
        least, value = field.metadata.get("least"), values[field.name]
        if least is not None and value < least:
            name = field.name.replace("_", "-")
            parser.error(f"argument --{name}: expected at least {least}, found {value}")
    return settings(**values)


def run_main(main: Callable[[], int | None]) -> None:
    """Run `main` and exit: bad input is one line on stderr and status 2, Ctrl-C 130, a closed pipe 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is told to stop saves as on Ctrl-C
    try:
        sys.exit(main() or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def one_line(error: Exception) -> str:
    """What an error says, in one line; for one of the operating system "file: reason"."""
    named = getattr(error, "filename", None) and getattr(error, "strerror", None)
    return f"{error.filename}: {error.strerror}" if named else " ".join(str(error).split())


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator:
    """Open `path` to write text ("w": UTF-8, "\\n" line ends) or bytes ("wb"); a name in .gz is compressed.

    It appears whole or not at all: a file beside it is renamed at the end. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    text = {} if mode == "wb" else {"encoding": "utf-8", "newline": "\n"}
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(part, "wb" if mode == "wb" else "wt", **text) as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def open_bytes(path: str | Path) -> Iterator:
    """Open `path` to read bytes, those in a .gz, without a byte order mark. InputError for damaged gzip."""
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as file:
            if file.peek(3).startswith(b"\xef\xbb\xbf"):
                file.read(3)
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: not a readable gzip file ({error})") from None


def read_text(path: str | Path) -> str:
    """The whole file as text. InputError names the line that is not UTF-8."""
    with open_bytes(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise InputError(f"{path}:{line}: expected UTF-8 text, found the byte 0x{byte:02x}") from None


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON list or a JSONL file, each with its place ("file: record n", "file:line")."""
    content = read_text(path)
    is_list = content.lstrip().startswith("[")
    # Only "\n" ends a line: str.splitlines would also cut at a U+2028 inside a JSON string.
    for n, text in enumerate([content] if is_list else content.split("\n"), 1):
        where = str(path) if is_list else f"{path}:{n}"
        try:
            values = json.loads(text) if is_list else [json.loads(text)] if text.strip() else []
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: expected JSON ({error})") from None
        for m, value in enumerate(values, 1):
            where = f"{path}: record {m}" if is_list else where
            if not isinstance(value, dict):
                raise InputError(f"{where}: expected a JSON object, found {value!r:.40}")
            yield where, value


# ---- TREC qrels and runs -----------------------------------------------------------------------------------

TREC_FORMATS = {  # fields, the value's place, its type and how far from 0 it may be
    "qrels": ("qid iter docid label", 3, int, 2**63 - 1),
    "run": ("qid Q0 docid rank score tag", 4, float, math.inf)}


def encode(text: str) -> bytes:
    """UTF-8; what `decode` could not read becomes the bytes that it was."""
    return text.encode("utf-8", "surrogateescape")


def decode(content: bytes) -> str:
    """UTF-8, as ids in TREC files should be; bytes that are not are kept as surrogates."""
    return content.decode("utf-8", "surrogateescape")


def trec_id(docid: str) -> str:
    """`docid` as TREC files can hold it: ASCII white space inside becomes `_` (BRIGHT has such ids)."""
    return decode(b"_".join(encode(docid).split()))


def read_trec(path: str | Path, kind: str, as_text: bool = False) -> dict:
    """{qid: {docid: value}} of "qrels" or a "run" (.gz too), in the file's order; labels int, scores float.

    As trec_eval reads them: ids are bytes, fields stand between ASCII white space, `#` lines are skipped,
    blank lines only in runs, a run's fields after the sixth are ignored. `as_text`: ids are strings, and
    fields too many mean a docid with spaces, which become `_`. InputError names the line that has the wrong
    width, no number for a value (trec_eval takes it for 0), or a document that came before for its query.
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
                if as_text and len(fields) > width:  # split from both ends: what remains is the docid
                    last = len(fields) - (width - 3)
                    fields[2:last] = [b"_".join(fields[2:last])]
                elif len(fields) < width or kind == "qrels":
                    break
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
                return table if not as_text else {decode(qid): {decode(docid): row[docid] for docid in row}
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
    with atomic_write(path, "wb") as file:
        for qid, docids in ranking.items():
            for rank, docid in enumerate(docids, 1):
                file.write(encode(f"{qid} Q0 {trec_id(docid)} {rank} {len(docids) - rank} {tag}\n"))


def check_run(path: str | Path, ranking: dict[str, list[str]], tag: str) -> None:
    """InputError where write_run could not write this, in whatever order: to be asked before long work."""
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a run file to write")
    for qid, docids in ranking.items():
        names = [trec_id(docid) for docid in docids]
        for name in (qid, tag, *names):
            if not re.fullmatch(r"[^\s\0]+", name, re.ASCII) or qid.startswith("#"):
                raise InputError(f"{path}: expected ids and a tag without white space, and no # before a "
                                 f"query's, found {name!r}")
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise InputError(f"{path}: query {qid} has two documents {twice!r} (white space becomes _)")


def write_qrels(path: str | Path, qrels: dict[str, dict[str, int]]) -> None:
    """Write {qid: {docid: label}} as TREC judgements."""
    with atomic_write(path, "wb") as file:
        for qid, labels in qrels.items():
            for docid, label in labels.items():
                file.write(encode(f"{qid} 0 {trec_id(docid)} {label}\n"))


# ---- First-stage candidates --------------------------------------------------------------------------------

TEXT_FIELDS = ("contents", "content", "text", "segment", "passage", "body")  # where a passage's text may be


@dataclasses.dataclass
class Candidates:
    """One query's first-stage list, best first: docids, texts and scores are parallel."""

    qid: str
    query: str
    docids: list[str]
    texts: list[str]
    scores: list[float]


def _field(record: dict, names: Iterable[str], what: str, where: str) -> str:
    """The string under the first of `names` in `record`; a whole number is taken as one (ids). InputError."""
    value = next((record[name] for name in names if name in record), None)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: expected {what} as a string ({', '.join(names)}), found {value!r:.40}")
    return value.encode("utf-8", "replace").decode()  # JSON can smuggle in half a surrogate pair


def _candidates(record: dict, where: str) -> Candidates:
    """The list in one record, of any shape that read_candidates names."""
    hits = next((record[name] for name in ("candidates", "hits", "ctxs") if name in record), None)
    if not isinstance(hits, list) or not all(isinstance(hit, dict) and isinstance(hit.get("doc", {}), dict)
                                             for hit in hits):
        raise InputError(f'{where}: expected objects in a list "candidates" (rank_llm), "hits" (RankGPT) or '
                         '"ctxs" (Rankify)')
    head = record["query"] if isinstance(record.get("query"), dict) else record
    qid = _field({**dict(*hits[:1]), **head}, ("qid", "query_id"), "the query's id", where)
    query = _field(head, ("text", "query", "question"), "the query's text", where)
    result = Candidates(qid, query, [], [], [])
    for n, hit in enumerate(hits, 1):
        here, doc, score = f"{where}, passage {n}", hit.get("doc", hit), hit.get("score")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not -1e300 < score < 1e300:
            raise InputError(f"{here}: expected a finite number as score, found {score!r:.40}")
        text = _field(doc, TEXT_FIELDS, "the passage's text", here)
        title = _field(doc, ("title",), "a title", here) if doc.get("title") else ""
        result.docids.append(_field(hit, ("docid", "id"), "the passage's id", here))
        result.texts.append(f"{title} {text}".strip() if title else text)
        result.scores.append(float(score))
    if "" in (qid, *result.docids) or len(set(result.docids)) < len(hits):
        raise InputError(f"{where}: expected ids that are not empty, and no passage twice for query {qid!r}")
    return result


def read_candidates(path: str | Path) -> list[Candidates]:
    """Read first-stage lists in the file's order: that order is the ranking, scores are only carried along.

    One object a line or one JSON list, .gz of each, of one of three shapes; ids become strings:
    rank_llm           {"query": {"text", "qid"}, "candidates": [{"docid", "score", "doc": {"contents"}}]}
    RankGPT, REARANK   {"query", "hits": [{"content", "qid", "docid", "score"}]}
    Rankify            {"question", "query_id", "ctxs": [{"id", "title", "text", "score"}]}
    (The last is what Rankify's own loader reads; we have not opened one of its files.) InputError names file
    and line or record where a field is missing or of the wrong type, a passage or a query is there twice.
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
            record = {"query": {"text": query.query, "qid": query.qid}, "candidates": hits}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


# ---- Initial state expansion (paper section 3.2) -----------------------------------------------------------

STAGES = {  # as the authors' notebook counts them; on DL21 + DL22 + DL23: 211, 179, 17900, 13312, 12603
    "judged": "queries with candidates and judgements",
    "found": "queries whose first-stage NDCG@10 is above 0 (the paper trains on 179)",
    "draws": "draws", "above": "draws that pass the NDCG@10 filter",
    "kept": "instances: draws with something to gain as well"}


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


def _labels(query: Candidates, judged: dict[str, int]) -> list[int]:
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
    InputError where a setting makes no sense.
    """
    known = order in ("retrieval", "shuffled") and keep in ("initial", "best", "all")
    if not known or min(draws, size) < 1:
        raise InputError("expected order retrieval|shuffled, keep initial|best|all, draws and size >= 1, "
                         f"found {order}, {keep}, {draws} and {size}")
    instances, counts = [], Counter() if counts is None else counts
    for query in candidates:
        judged = qrels.get(query.qid)
        if not judged or query.qid in exclude:
            continue
        labels, ideal = _labels(query, judged), list(judged.values())
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


def _instance_line(instance: Instance) -> str:
    return json.dumps(vars(instance), ensure_ascii=False) + "\n"


def write_instances(path: str | Path, instances: Iterable[Instance]) -> None:
    """One instance a line, as JSON; read_instances gives the same back."""
    with atomic_write(path) as file:
        file.writelines(map(_instance_line, instances))


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


# ---- Training data for grpo.py -----------------------------------------------------------------------------


def training_instances(data: list[str], qrels: Iterable[str] = (),
                       **expansion) -> tuple[list[Instance], dict]:
    """(instances, what they are) of files or data sets; candidates go through `expand` with `expansion`.

    Each of `data` is a file of instances, a file of candidates (`qrels`: the files with their judgements) or
    a name: "rearank_12k" or one of TABLE_1, downloaded where it is missing. ["auto"] is rearank_12k if it is
    there, else DL21 and DL22. What they are: {"data": the names and files, never "auto", that give the same
    again, "instances": n, "queries": n, "sha256" of the file that write_instances would write}. InputError
    where nothing is left, or for a query that is in two lists of candidates.
    """
    counts = expansion.setdefault("counts", Counter())
    if "auto" in data and len(data) > 1:
        raise InputError("auto: expected no other data beside it")
    pool = "auto" in data and not Path(cache_folder(), "rearank_12k", WINDOWS).exists()
    chosen = list(data) if "auto" not in data else ["dl21", "dl22"] if pool else ["rearank_12k"]
    judged: dict[str, dict[str, int]] = {}
    for path in qrels:
        for qid, labels in read_qrels(path).items():
            judged.setdefault(qid, {}).update(labels)
    instances, seen = [], {}
    for name in chosen:
        found, labels = _load(name, judged)
        for query in found if labels else ():
            if query.qid in seen:
                raise InputError(f"query {query.qid} is in both {seen[query.qid]} and {name}")
            seen[query.qid] = name
        instances += expand(found, labels, **expansion) if labels else found
    if not instances:
        raise InputError(f"{' '.join(chosen)}: no instances; expected candidates and judgements of the same "
                         "queries, with something relevant in the lists")
    if pool:
        print(f"training data: DL21 and DL22, {counts['found']} of the paper's 179 queries; the authors' own "
              "windows have all of them: python data.py download rearank_12k", file=sys.stderr)
    queries, sha256 = {instance.qid for instance in instances}, hashlib.sha256()
    for instance in instances:
        sha256.update(_instance_line(instance).encode("utf-8", "surrogatepass"))
    return instances, {"data": chosen, "instances": len(instances), "queries": len(queries),
                       "sha256": sha256.hexdigest()}


def _load(name: str, judged: dict) -> tuple[list[Instance], None] | tuple[list[Candidates], dict]:
    """(instances, None) or (candidates, qrels) of one entry of `data`; `judged`: what the qrels files say."""
    if name in TABLE_1:
        candidates, qrels = download(name)
        return read_candidates(candidates), read_qrels(qrels)
    if name == "rearank_12k":
        return read_instances(*download(name)), None
    if not Path(name).exists():
        raise InputError(f"{name}: expected a file or one of auto, rearank_12k, {', '.join(TABLE_1)}")
    if "labels" in next(read_records(name), ("", {}))[1]:
        return read_instances(name), None
    if not judged:
        raise InputError(f"{name}: expected instances, or --qrels with the judgements of these candidates")
    return read_candidates(name), judged


# ---- BRIGHT: 12 splits, reasoning-intensive queries (arXiv 2407.12883) -------------------------------------

BRIGHT_SPLITS = ("biology earth_science economics psychology robotics stackoverflow sustainable_living pony "
                 "leetcode aops theoremqa_theorems theoremqa_questions").split()
# Where a file of a split lies below a folder, the first pattern that matches. The authors' archive writes
# theoremqa_theorems ({u}), castorini's files theoremqa-theorems ({h}).
BRIGHT_FILES = {
    "queries": ("**/pyserini_queries/{u}.tsv", "**/topics.bright-{h}.tsv*"),
    "corpus": ("**/pyserini_corpus/{u}/{u}.jsonl",),
    "qrels": ("**/pyserini_qrels/{u}.tsv", "**/qrels.bright-{h}.txt*"),
    "fixed qrels": ("**/qrels.bright-{h}.fixed.txt*",),
    "exclude": ("**/exclude.bright-{h}.txt*", "**/topics.bright-{h}-original.jsonl*"),
    "run": ("**/bm25.{u}.filtered.trec", *(f"**/*{{{x}}}*.{end}*" for end in ("trec", "txt") for x in "uh"))}


def bright_file(folder: str | Path, split: str, kind: str) -> Path | None:
    """The file of `split` of that kind (BRIGHT_FILES) below `folder`, or None. InputError if two fit."""
    under = split.replace("-", "_")
    if under not in BRIGHT_SPLITS:
        raise InputError(f"no BRIGHT split {split!r}: expected {', '.join(BRIGHT_SPLITS)}")
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: expected a folder with BRIGHT files")
    for pattern in BRIGHT_FILES[kind]:
        found = sorted(Path(folder).glob(pattern.format(u=under, h=under.replace("_", "-"))))
        if len(found) > 1:
            raise InputError(f"{folder}: {found[0]} and {found[1]} could both be the {kind} of {split}")
        if found:
            return found[0]
    return None


def read_pairs(path: str | Path) -> Iterator[tuple[str, str]]:
    """(id, rest) of each line that is not blank: a query and its text, or a query and an excluded docid."""
    for n, line in enumerate(read_text(path).split("\n"), 1):
        words = line.strip().split(maxsplit=1)
        if len(words) == 1:
            raise InputError(f"{path}:{n}: expected an id and a text or second id, found {line!r:.60}")
        if words:
            yield words[0], words[1]


def read_excluded(path: str | Path) -> dict[str, set[str]]:
    """{qid: documents to take out of its candidates}, ids with "_" for spaces, queries without any left out;
    from lines "qid docid" or BRIGHT's own rows as JSONL ({"id", "excluded_ids"}, where "N/A" means none).
    """
    excluded: dict[str, set[str]] = {}
    rows = read_records(path) if read_text(path).lstrip().startswith("{") else ()
    for where, row in rows:
        docids = row.get("excluded_ids")
        if not isinstance(docids, list) or not all(isinstance(docid, str) for docid in docids):
            raise InputError(f"{where}: expected excluded_ids as a list of strings")
        if docids := {trec_id(docid) for docid in docids if docid != "N/A"}:
            excluded.setdefault(_field(row, ("id",), "the query's id", where), set()).update(docids)
    for qid, docid in () if rows else read_pairs(path):
        excluded.setdefault(qid, set()).add(trec_id(docid))
    return excluded


def read_bright(split: str, folder: str | Path, exclude: dict[str, set[str]] | None = None, k: int = 100,
                ) -> list[Candidates]:
    """A split's BM25 lists with passages: excluded documents go first, then the list is cut to `k`.

    `exclude` as read_excluded gives it; by default from the split's own file below `folder`, if it has one.
    (The archive's runs come filtered, but after a cut to 100: for whole lists put longer runs there.)
    """
    files = {kind: bright_file(folder, split, kind) for kind in ("queries", "corpus", "run", "exclude")}
    if missing := [kind for kind in ("queries", "corpus", "run") if files[kind] is None]:
        raise InputError(f"{folder}: no {' and no '.join(missing)} of BRIGHT's {split} "
                         "(python data.py download bright)")
    if exclude is None:
        exclude = read_excluded(files["exclude"]) if files["exclude"] else {}
    queries = dict(read_pairs(files["queries"]))
    passages = {trec_id(_field(record, ("id",), "the passage's id", where)):
                _field(record, TEXT_FIELDS, "the passage's text", where)
                for where, record in read_records(files["corpus"])}
    lists = []
    for qid, scores in read_run(files["run"]).items():
        ranked = sorted(scores, key=lambda docid: (scores[docid], docid), reverse=True)  # trec_eval's order
        docids = [docid for docid in ranked if docid not in exclude.get(qid, ())][:k]
        if qid not in queries or (unknown := [docid for docid in docids if docid not in passages]):
            what = f"query {qid}" if qid not in queries else unknown[0]
            raise InputError(f"{files['run']}: {what} is not in BRIGHT's {split}")
        texts, kept = [passages[docid] for docid in docids], [scores[docid] for docid in docids]
        lists.append(Candidates(qid, queries[qid], docids, texts, kept))
    return lists


# ---- Downloads ---------------------------------------------------------------------------------------------

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
        return [folder if folder.is_dir() else unpack(from_hub(BRIGHT_ARCHIVE, folder), folder)]
    if name not in TABLE_1:
        raise InputError(f"no data set {name!r}: expected {', '.join([*TABLE_1, 'bright', 'rearank_12k'])}")
    candidates, candidates_md5, qrels, qrels_md5, _ = TABLE_1[name]
    return [fetch(candidates, folder, candidates_md5), fetch(qrels, folder, qrels_md5)]


def fetch(source: str, folder: Path, md5: str) -> Path:
    """Bring one file (an address, or owner/name/file on the hub) to `folder`: verified, or nothing at all."""
    path = folder / source.rsplit("/", 1)[-1]
    if path.exists() and md5 in ("", hashlib.md5(path.read_bytes()).hexdigest()):
        return path
    by_hand = f"or put the file at {path} by hand"
    copy = None if source.startswith("http") else from_hub(source, path)
    content = copy.read_bytes() if copy else read_url(source, by_hand)
    found = hashlib.md5(content).hexdigest()  # against damage; it is no protection from malice
    if md5 not in ("", found) or content.lstrip().startswith(b"<"):  # the latter: a page about an error
        if copy:
            copy.resolve().unlink()  # or the hub's cache would give it again
        expected = f"a file of MD5 {md5}" if md5 else "data"
        raise InputError(f"{source}: expected {expected}, found {content[:20]!r} (MD5 {found}); nothing was "
                         f"kept: try again later {by_hand}")
    if not md5:
        print(f"{source}: no checksum is published for this file", file=sys.stderr)
    with atomic_write(path, "wb") as file:
        file.write(content)
    return path


def from_hub(source: str, by_hand: Path) -> Path:
    """A data set's file in the hub's own cache: resumed, from a mirror, offline, as the hub's HF_... say."""
    from huggingface_hub import hf_hub_download

    owner, name, file = source.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))
    except Exception as error:  # whatever the hub's client and its HTTP library raise
        reason = one_line(error)[:200]
        raise InputError(f"cannot fetch {source} from the hub ({reason}); try again later or put it at "
                         f"{by_hand} by hand") from None


def read_url(url: str, advice: str) -> bytes:
    """The whole answer, after a few tries. InputError in one line that ends with `advice`."""
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    for n in range(1, TRIES + 1):
        try:
            with urlopen(Request(url, headers={"User-Agent": "rearank"}), timeout=TIMEOUT) as response:
                return response.read()
        except (OSError, HTTPException) as error:  # a refusal, a timeout, an answer that was cut off
            if n == TRIES or getattr(error, "code", 500) in (401, 403, 404, 410):
                reason = one_line(error)
                raise InputError(f"cannot fetch {url} ({reason}); try again later {advice}") from None
            time.sleep(WAIT * 2 ** (n - 1))


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a .tar.gz so that `folder` appears whole or not at all. InputError: unsafe or damaged."""
    import tarfile

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        with tarfile.open(archive) as opened:
            opened.extractall(staging, filter="data")  # no devices, nothing that lies or leads outside
        os.replace(staging, folder)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise InputError(f"{archive}: unsafe or damaged, nothing was unpacked ({one_line(error)})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def download_windows(folder: Path) -> Path:
    """The authors' own training windows (le723z/rearank_12k on the hub), labelled by NIST's judgements.

    They come page by page. Each page is kept as it arrives, so that an interrupted download goes on where it
    was; the file of instances appears at the end. InputError: as `download`.
    """
    from tqdm import tqdm

    output, pages, qrels, instances = folder / WINDOWS, folder / "pages", {}, []
    if output.exists():
        return output
    for name, source in {"dl21": TABLE_1["dl21"][2:4], "dl22": TABLE_1["dl22"][2:4], "dl23": DL23}.items():
        qrels |= read_qrels(fetch(source[0], cache_folder() / name, source[1]))
    query = "dataset=le723z%2Frearank_12k"
    splits = kept_json(f"{ROWS}/splits?{query}", pages / "splits.json")["splits"]
    query += next(f"&config={split['config']}&split=train" for split in splits if split["split"] == "train")
    with tqdm(desc="rearank_12k", unit=" rows", disable=None) as bar:
        while not instances or len(instances) < bar.total:
            offset = len(instances)
            url = f"{ROWS}/rows?{query}&offset={offset}&length={PAGE}"
            page = kept_json(url, pages / f"{offset:06d}.json", offset)
            if bar.total not in (None, page["num_rows_total"]):
                raise InputError(f"{url}: the number of rows has changed from {bar.total}; remove {pages}")
            bar.total = page["num_rows_total"]
            for row in page["rows"]:
                found = _candidates(row["row"], f"{url}, row {row['row_idx']}")
                if found.qid not in qrels:
                    raise InputError(f"{url}: query {found.qid} has no judgements in DL21, DL22 and DL23")
                judged = qrels[found.qid]
                instances.append(Instance(found.qid, found.query, found.docids, found.texts,
                                          _labels(found, judged), list(judged.values())))
            bar.update(len(instances) - offset)
    if len(instances) != 12_603:
        print(f"rearank_12k: {len(instances):,} windows; the paper has 12,603", file=sys.stderr)
    write_instances(output, instances)
    shutil.rmtree(pages)
    return output


def kept_json(url: str, path: Path, offset: int | None = None) -> dict:
    """What the rows service answers at `url`, kept at `path` as it came: {"splits": [{"config", "split"}]};
    with `offset` the rows from there, {"rows": [{"row_idx", "row", "truncated_cells"}], "num_rows_total"}.
    InputError for anything else, and where a row is missing or cut.
    """
    advice = "with the same command (the pages that have arrived are kept)"
    content = path.read_bytes() if path.exists() else read_url(url, advice)
    try:
        answer = json.loads(content)
        if offset is None:
            whole = any(split["split"] == "train" and split["config"] for split in answer["splits"])
        else:
            rows, end = answer["rows"], min(offset + PAGE, answer["num_rows_total"])
            there = offset < end and [row["row_idx"] for row in rows] == [*range(offset, end)]
            whole = there and not any(row["truncated_cells"] for row in rows)
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        path.unlink(missing_ok=True)
        raise InputError(f"{url}: expected whole rows as JSON, found {content[:40]!r}; try again {advice}")
    if not path.exists():
        with atomic_write(path, "wb") as file:
            file.write(content)
    return answer


# ---- Command line ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class DownloadSettings:
    """Fetch public data into $REARANK_DATA (default ~/.cache/rearank)."""

    names: list[str] = setting(list, "data sets: " + ", ".join([*TABLE_1, "bright", "rearank_12k"]),
                               positional=True, nargs="+")


def download_command(settings: DownloadSettings) -> int:
    """Print where the files are, and NDCG@10 of the first stage beside the paper's: is it the same list?

    A data set that cannot be had is one line on stderr and status 2 at the end; the others are still fetched.
    """
    failed = False
    for name in settings.names:
        try:
            files = download(name)
            print(f"{name}: {' '.join(map(str, files))}")
            if name not in TABLE_1:
                continue
            lists, qrels, paper = read_candidates(files[0]), read_qrels(files[1]), TABLE_1[name][-1]
            values = [100 * ndcg(_labels(query, qrels[query.qid]), ideal=list(qrels[query.qid].values()))
                      for query in lists if query.qid in qrels]
            mean, papers = sum(values) / max(1, len(values)), f"{paper:.2f}" if paper else "is not given"
            print(f"{name}: NDCG@10 x 100 of the lists {mean:.2f} ({len(values)} queries), the paper's BM25 "
                  f"{papers}")
        except (InputError, OSError) as error:
            print(f"data.py: {name}: {one_line(error)}", file=sys.stderr)
            failed = True
    return 2 if failed else 0


@dataclasses.dataclass
class ExpandSettings:
    """Initial state expansion: many training instances from few judged queries (paper section 3.2)."""

    candidates: list[str] = setting(list, "first-stage lists, files or names (default: dl21 dl22)", nargs="+")
    qrels: list[str] = setting(list, "judgements of the files", nargs="+")
    output: str = setting("instances.jsonl", "where the instances go (JSONL)")
    draws: int = setting(100, "draws of each query (the paper's text: 50)")
    size: int = setting(20, "passages of a draw")
    order: str = setting("retrieval", "order of the passages in a draw (the paper's text: shuffled)",
                         choices=("retrieval", "shuffled"))
    keep: str = setting("initial", "whose NDCG@10 must reach --min-ndcg: the draw's own, its best order's, "
                        "nobody's", choices=("initial", "best", "all"))
    min_ndcg: float = setting(0.1, "least NDCG@10 of a draw")
    seed: int = setting(0, "seed of the draws")
    exclude_queries: str = setting("", "held-out queries, ids first on each line (as in qrels, runs, topics)")


def expand_command(settings: ExpandSettings) -> None:
    """Write the instances and print how many are left at every stage."""
    options, counts = vars(settings).copy(), Counter()
    data, qrels, output = options.pop("candidates"), options.pop("qrels"), options.pop("output")
    lines = read_text(path).split("\n") if (path := options.pop("exclude_queries")) else []
    options["exclude"] = {line.split()[0] for line in lines if line.strip()}
    instances, _ = training_instances(data or ["dl21", "dl22"], qrels, counts=counts, **options)
    write_instances(output, instances)
    for stage, meaning in STAGES.items():
        print(f"{counts[stage]:7,}  {meaning}")
    print(f"written to {output}")


@dataclasses.dataclass
class BrightSettings:
    """BRIGHT's first-stage lists as files for rearank.py, one a split, excluded documents taken out."""

    folder: str = setting("", "the unpacked archive (default: where `download bright` puts it)")
    output: str = setting("bright-candidates", "folder for the candidate files")
    splits: list[str] = setting(list, "which of the 12 (default: all)", nargs="+")
    k: int = setting(100, "passages of each query, cut after the exclusion", least=1)


def bright_command(settings: BrightSettings) -> None:
    """Write OUTPUT/split.jsonl for each split."""
    for split in settings.splits or BRIGHT_SPLITS:
        lists = read_bright(split, settings.folder or cache_folder() / "bright", k=settings.k)
        write_candidates(Path(settings.output, f"{split}.jsonl"), lists)
        lengths = [len(query.docids) for query in lists]
        print(f"{split:20s}{len(lists):5d} queries, {min(lengths)} to {max(lengths)} passages")


COMMANDS = {"download": (DownloadSettings, download_command), "expand": (ExpandSettings, expand_command),
            "bright": (BrightSettings, bright_command)}


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
