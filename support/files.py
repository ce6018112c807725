"""Read and write TREC judgements and runs, first-stage lists, and training instances.

Readers check their input: an InputError names the file, the line and the expected form. Writers replace a
file in one step, so that nobody sees half of it (streams.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from support.cli import InputError
from support.streams import UTF8, atomic_write, open_bytes, read_text, stream_at

# --- TREC judgements (qrels) and runs

TREC_FORMATS = {  # fields, the value's position and type, and the largest value allowed
    "qrels": ("qid iter docid label", 3, int, 2**63 - 1),
    "run": ("qid Q0 docid rank score tag", 4, float, math.inf)}


def trec_id(docid: str) -> str:
    """`docid` for a TREC file: ASCII white space inside becomes `_` (BRIGHT has such ids)."""
    return re.sub(r"\s+", "_", docid.strip(string.whitespace), flags=re.ASCII)


def read_trec(path: str | Path, kind: str, as_text: bool = False) -> dict:
    """{qid: {docid: value}} of "qrels" or a "run", in the file's order. Labels are int, scores float.

    Read as trec_eval does: ids are bytes, ASCII white space separates fields, `#` lines are skipped, blank
    lines are allowed only in runs, a run's fields after the sixth are ignored. InputError for a line with
    too few fields, without a number as value (trec_eval reads 0), or with a document that came before.
    `as_text`: ids are strings, and too many fields mean a docid with spaces, which become `_`.
    """
    form, place, number, limit = TREC_FORMATS[kind]
    width, hash_sign, underscore = len(form.split()), *b"#_"  # `35 in text` is faster than `b"#" in`
    table: dict[bytes, dict[bytes, float]] = {}
    newest = None

    def bad_line(n: int, line: bytes) -> InputError:
        found = line.decode("utf-8", "replace")
        return InputError(f"{path}:{n}: expected `{form}`, each document once per query, found {found!r:.80}")

    with open_bytes(path) as file:
        for n, line in enumerate(file, 1):
            fields = line.split()
            if len(fields) != width or fields[0][0] == hash_sign:
                if fields and fields[0][0] == hash_sign or kind == "run" and not fields:
                    continue
                spare = len(fields) - width
                if spare < 0 or kind == "qrels" and not as_text or b"\r" in line.strip():  # \r ends no line
                    raise bad_line(n, line)
                if as_text:
                    fields[2:3 + spare] = [b"_".join(fields[2:3 + spare])]
            qid, docid, text = fields[0], fields[2], fields[place]
            if qid != newest:  # one look-up per query, not per line
                row, newest = table.setdefault(qid, {}), qid
            try:
                value = number(text)
            except ValueError:
                raise bad_line(n, line) from None
            # NaN is not within the limits. Python reads 1_000 as a number.
            if docid in row or not -limit <= value <= limit or underscore in text or 0 in line:
                raise bad_line(n, line)
            row[docid] = value
    if not table:
        raise bad_line(1, b"nothing")
    if not as_text:
        return table
    return {qid.decode(*UTF8): {docid.decode(*UTF8): value for docid, value in row.items()}
            for qid, row in table.items()}


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """{qid: {docid: label}} in the file's order, as text. InputError: see read_trec."""
    return read_trec(path, "qrels", as_text=True)


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """{qid: {docid: score}} in the file's order, as text; ranks are ignored. InputError: see read_trec."""
    return read_trec(path, "run", as_text=True)


def write_run(path: str | Path, ranking: dict[str, list[str]], tag: str) -> None:
    """Write {qid: docids, best first} as a TREC run. Scores fall from n-1 to 0, so there are no ties.
    InputError: see check_run.
    """
    check_run(path, ranking, tag)
    with atomic_write(path) as file:
        for qid, docids in ranking.items():
            for rank, docid in enumerate(docids, 1):
                file.write(f"{qid} Q0 {trec_id(docid)} {rank} {len(docids) - rank} {tag}\n")


def check_run(path: str | Path, ranking: dict[str, list[str]], tag: str) -> None:
    """InputError if write_run could not write these ids. Called before long work, in any order of docids."""
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

# --- JSON

def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON list or a JSONL file, each with its place ("file: record n", "file:line")."""
    content, decode, end, line = read_text(path), json.JSONDecoder().raw_decode, 0, 1
    broken = re.search(r"\\u[dD][89a-fA-F]", content)  # maybe half a surrogate pair, which UTF-8 cannot hold
    spaces = re.compile(r"[\s\ufeff]*")
    while (start := spaces.match(content, end).end()) < len(content):
        line += content.count("\n", end, start)
        try:
            value, end = decode(content, start)
            if broken:
                value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        except (ValueError, RecursionError) as error:
            if len(content[start:].partition("\n")[0].split()) == 6 and content[start] not in "[{":
                raise InputError(f"{path}:{line}: looks like a TREC run, which has no texts; expected JSON "
                                 "(docs/rerank.md, From a TREC run, joins both)") from None
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

# --- First-stage lists

TEXT_FIELDS = ("contents", "content", "text", "segment", "passage", "body", "doc")  # names of the text


@dataclasses.dataclass
class Candidates:
    """One query's first-stage list, best first: docids, texts and scores are parallel."""

    qid: str
    query: str
    docids: list[str]
    texts: list[str]
    scores: list[float]


def text_field(record: dict, names: Iterable[str], what: str, where: str) -> str:
    """The string under the first of `names` that is not empty in `record`. Whole numbers (ids) become text.
    InputError if there is no string.
    """
    values = [record[name] for name in names if record.get(name) is not None] or [None]
    value = next((value for value in values if value != ""), "")
    if type(value) is int:  # a boolean is none
        value = str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: expected {what} as a string ({', '.join(names)}), found {value!r:.40}")
    return value.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair


def candidates_of(record: dict, where: str, counts: Counter) -> Candidates | None:
    """The list in one record, in any form of read_candidates; None if it is empty. InputError if it is bad.
    `counts` is updated: the number of records, and of queries that stderr has to mention.
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
    docs = [hit["doc"] if isinstance(hit.get("doc"), dict) else hit for hit in hits]  # they hold the texts
    both = [doc | hit for doc, hit in zip(docs, hits)]  # either may hold the id
    numbered = all(fields.get(name) is None for fields in both for name in ("docid", "id"))
    counts["have candidates without ids: their places, from 1, are taken"] += numbered
    scored = any(hit.get("score") is not None for hit in hits)
    head = record["query"] if isinstance(record.get("query"), dict) else record
    spare = {"query_id": head.get("id", counts["records"] if numbered else None)}
    qid = text_field(spare | hits[0] | record | head, ("qid", "query_id"), "the query's id", where)
    query = text_field(head, ("text", "query", "question"), "the query's text", where)
    result = Candidates(qid, query, [], [], [])
    for n, (hit, doc, fields) in enumerate(zip(hits, docs, both), 1):
        here = f"{where}, passage {n}"
        score = hit.get("score") if scored else len(hits) - n  # without scores, the position gives one
        if type(score) not in (int, float) or not -1e300 < score < 1e300:
            raise InputError(f"{here}: expected a finite number as score, found {score!r:.40}")
        text = text_field(doc, TEXT_FIELDS, "the passage's text", here)
        title = text_field(doc, ("title",), "a title", here) if doc.get("title") else ""
        docid = str(n) if numbered else text_field(fields, ("docid", "id"), "the passage's id", here)
        result.docids.append(docid)
        result.texts.append(f"{title} {text}".strip() if title else text)
        result.scores.append(float(score))
    if "" in (qid, *result.docids) or len(set(result.docids)) < len(hits):
        raise InputError(f"{where}: expected ids that are not empty, and no passage twice for query {qid!r}")
    return result


def read_candidates(path: str | Path) -> list[Candidates]:
    """Read first-stage lists in the file's order, which is the ranking. Scores are only kept with it.

    The file is JSONL or one JSON list, maybe compressed (gzip). An object has one of three forms:
    rank_llm           {"query": {"text", "qid"}, "candidates": [{"docid", "score", "doc": {"contents"}}]}
    RankGPT, REARANK   {"query", "hits": [{"content", "qid", "docid", "score"}]}
    Rankify            {"question", "query_id", "ctxs": [{"id", "title", "text", "score"}]}
    (as Rankify's own loader reads it; we have not opened one of its files)

    A passage or its `doc` may be a plain string. The first of TEXT_FIELDS that is not empty is the text.
    Scores may be missing. If no passage has an id, their positions from 1 are the ids, and a query without
    an id gets its record's number. Queries without passages are left out and counted on stderr.
    """
    queries, counts = {}, Counter()
    for where, record in read_records(path):
        query = candidates_of(record, where, counts)
        if query and queries.setdefault(query.qid, query) is not query:
            raise InputError(f"{where}: query {query.qid} is there twice")
    if not queries:
        found = "only queries without any" if counts["records"] else "an empty file"
        raise InputError(f"{path}: expected candidates, found {found}")
    for what, count in counts.items():
        if what != "records" and count:
            print(f"{path}: {count} queries {what}", file=sys.stderr)
    return list(queries.values())


def read_held_out(path: str, qrels_path: str, trained_on: set[str]) -> tuple[list[Candidates], dict]:
    """(candidates, qrels) of --eval-data, those with judgements. InputError for one that is trained on."""
    qrels = read_qrels(qrels_path) if qrels_path else {}
    candidates = [c for c in read_candidates(path) if c.qid in qrels]
    if len(candidates) < 2:
        raise InputError("--eval-data: expected --eval-qrels with judgements of at least two of its queries")
    if both := sorted(trained_on & {c.qid for c in candidates}):
        raise InputError(f"--eval-data: query {both[0]} is trained on; a held-out query must not be")
    return candidates, qrels


def write_candidates(path: str | Path, candidates: Iterable[Candidates]) -> None:
    """Write rank_llm JSONL, one query per line. read_candidates reads the same back."""
    with atomic_write(path) as file:
        for query in candidates:
            hits = [{"docid": docid, "score": float(score), "doc": {"contents": text}}
                    for docid, text, score in zip(query.docids, query.texts, query.scores, strict=True)]
            record = {"query": {"text": query.query, "qid": query.qid}, "candidates": hits}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

# --- Training instances

@dataclasses.dataclass
class Instance:
    """One training prompt: passages in their initial order, and their labels. `ideal` has all judged labels
    of the query: NDCG's ideal ranking is taken over them, not over the window.
    """

    qid: str
    query: str
    docids: list[str]
    texts: list[str]
    labels: list[int]
    ideal: list[int]

    def json(self) -> str:
        """The instance as a line of JSONL."""
        return json.dumps(vars(self), ensure_ascii=False) + "\n"


def judged_labels(query: Candidates, judged: dict[str, int]) -> list[int]:
    """The labels of a list's passages; 0 for those without a judgement or with a negative one."""
    return [max(0, judged.get(trec_id(docid), 0)) for docid in query.docids]


def write_instances(path: str | Path, instances: Iterable[Instance]) -> None:
    """Write JSONL, one instance per line. read_instances reads the same back."""
    with atomic_write(path) as file:
        file.writelines(instance.json() for instance in instances)


def read_instances(path: str | Path) -> list[Instance]:
    """Read a file that write_instances wrote, or one in that form. InputError names the bad line."""
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
