"""Data for REARANK (arXiv 2505.20046): training instances, BRIGHT's first-stage lists, downloads.

    python data.py download dl19 covid bright        test sets: candidates with passages, judgements
    python data.py download rearank_12k              the 12,603 windows that the authors trained on
    python data.py expand --candidates C --qrels Q   initial state expansion, with the counts at every stage
    python data.py bright --output FOLDER            BRIGHT's first-stage lists, without excluded documents

Downloads go to $REARANK_DATA, by default ~/.cache/rearank.

Where we depart from the paper, or had to choose:
- Expansion (section 3.2). The text contradicts itself: 179 queries x 50 draws are fewer than its 12k
  instances, and the filter is on the initial NDCG@10 in section 4.1, on the best possible one in Table 3. The
  defaults are those of the authors' public notebook. The text's variant is
  `--draws 50 --order shuffled --keep best`.
- Training data. The passages of DL23, a third of the paper's queries, have no public file. So train either on
  the authors' own windows (rearank_12k) or on what DL21 and DL22 give.
- BRIGHT (section 4). Excluded documents leave the candidates before the cut to 100, never the judgements.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from reward import ndcg
from support.cli import InputError, command_line, refuse, run_main, setting
from support.download import TABLE_1, WINDOWS, cache_folder, download
# Not all of these are used here: `from data import read_run` and the like work as well.
from support.files import (TEXT_FIELDS, Candidates, Instance, judged_labels, read_candidates, read_instances,
                           read_qrels, read_records, read_run, text_field, trec_id, write_candidates,
                           write_instances, write_qrels, write_run)
from support.streams import UTF8, read_text

# ------------------------------------------------------------------------------------------------------------
# Initial state expansion (paper section 3.2)

STAGES = {  # as the authors' notebook counts them; on DL21 + DL22 + DL23: 211, 179, 17900, 13312, 12603
    "judged": "queries with candidates and judgements",
    "found": "queries whose first-stage NDCG@10 is above 0 (the paper trains on 179)",
    "draws": "draws", "above": "draws that pass the NDCG@10 filter",
    "kept": "instances (with --keep initial: those with something to gain as well)"}


def expand(candidates: list[Candidates], qrels: dict[str, dict[str, int]], draws: int = 100, size: int = 20,
           order: str = "retrieval", keep: str = "initial", min_ndcg: float = 0.1, seed: int = 0,
           exclude: Container[str] = (), counts: Counter | None = None) -> list[Instance]:
    """Make many training prompts from few queries: draw `size` passages of each list, `draws` times.

    Queries without judgements, with a list of NDCG@10 = 0, or in `exclude` (held out) are dropped. `order`: a
    draw stays in "retrieval" order or is "shuffled". `keep`: "initial" keeps draws whose NDCG@10 is at least
    `min_ndcg` and can be improved, "best" those whose best possible NDCG@10 is, "all" keeps all. A list of at
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
        # Each query has its own random numbers, so that other queries do not change its draws. The seed is a
        # text, since hash() differs from process to process.
        rng = random.Random(f"{seed}\t{query.qid}")
        for _ in range(draws if len(labels) > size else 1):
            places = rng.sample(range(len(labels)), min(size, len(labels)))  # the same ones in both orders
            if order == "retrieval":
                places.sort()
            drawn = [labels[place] for place in places]
            initial, best = ndcg(drawn, ideal=ideal), ndcg(sorted(drawn, reverse=True), ideal=ideal)
            above = keep == "all" or (best if keep == "best" else initial) >= min_ndcg
            kept = above and (keep != "initial" or best > initial)
            counts.update(draws=1, above=above, kept=kept)
            if kept:
                docids, texts = [query.docids[p] for p in places], [query.texts[p] for p in places]
                instances.append(Instance(query.qid, query.query, docids, texts, drawn, ideal))
    return instances


def training_instances(data: list[str], qrels: Iterable[str] = (),
                       **expansion) -> tuple[list[Instance], dict]:
    """(training instances, a description of them) from files or data sets.

    Each of `data` is a file of instances, a file of candidates (`qrels`: the files with their judgements), or
    a name: "rearank_12k" or one of TABLE_1, downloaded if missing. Candidates go through `expand` with the
    options `expansion`. ["auto"] means rearank_12k if it has been downloaded, else DL21 and DL22. The
    description: {"data": names that give the same again, "instances" and "queries": how many, "sha256" of the
    file that write_instances would write}. InputError if no instance is left.
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
# BRIGHT

BRIGHT_SPLITS = ("biology earth_science economics psychology robotics stackoverflow sustainable_living pony "
                 "leetcode aops theoremqa_theorems theoremqa_questions").split()
BRIGHT_FILES = {  # below a folder, as in the authors' archive or of castorini: the first that is there
    "queries": ("pyserini_queries/{}.tsv", "topics.bright-{}.tsv*"),
    "corpus": ("pyserini_corpus/{}/{}.jsonl",),
    "qrels": ("pyserini_qrels/{}.tsv", "qrels.bright-{}.txt*"),
    "fixed qrels": ("qrels.bright-{}.fixed.txt*",),
    "exclude": ("exclude.bright-{}.txt*", "topics.bright-{}-original.jsonl*"),
    "run": ("bm25.{}.filtered.trec", "*{}*.trec", "*{}*.trec.gz", "*{}*.txt*")}


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
        qid = text_field(row, ("id",), "the query's id", where)
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
    passages = {trec_id(text_field(record, ("id",), "the passage's id", where)):
                text_field(record, TEXT_FIELDS, "the passage's text", where)
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
# Command line

EXPANSION = ("draws", "size", "order", "keep", "min_ndcg", "seed")  # of DataSettings, for `expand`


@dataclasses.dataclass
class DataSettings:
    """Settings of `python data.py`."""

    command: str = setting("", "download, expand or bright", positional=True, nargs="?")
    names: list[str] = setting(list, "download: " + ", ".join([*TABLE_1, "bright", "rearank_12k"]),
                               positional=True, nargs="*")
    output: str = setting("", "expand: file (default instances.jsonl); bright: folder (bright-candidates)")
    candidates: list[str] = setting(list, "lists, files or names (default: dl21 dl22)", nargs="+",
                                    group="expand")
    qrels: list[str] = setting(list, "judgements of the files", nargs="+")
    draws: int = setting(100, "draws of each query (the paper's text: 50)")
    size: int = setting(20, "passages of a draw")
    order: str = setting("retrieval", "order of a draw's passages (the paper's text: shuffled)",
                         choices=("retrieval", "shuffled"))
    keep: str = setting("initial", "what must reach --min-ndcg; initial: the draw's NDCG@10; best: its "
                        "ideal order's; all: nothing", choices=("initial", "best", "all"))
    min_ndcg: float = setting(0.1, "least NDCG@10 of a draw")
    seed: int = setting(0, "seed of the draws")
    exclude_queries: str = setting("", "a file of held-out queries, ids first (qrels, runs, topics)")
    folder: str = setting("", "the unpacked archive (default: where download puts it)", group="bright")
    splits: list[str] = setting(list, "some of the 12", nargs="+", choices=BRIGHT_SPLITS, metavar="S")


def download_command(settings: DataSettings) -> int:
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


def expand_command(settings: DataSettings) -> None:
    """Write the instances and print how many are left at every stage."""
    lines = read_text(settings.exclude_queries).split("\n") if settings.exclude_queries else []
    if lines[:1] and lines[0].lstrip().startswith(("{", "[")):
        raise InputError(f"{settings.exclude_queries}: expected lines, a query's id first, found JSON")
    options = {name: getattr(settings, name) for name in EXPANSION}
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


def bright_command(settings: DataSettings) -> None:
    """Write OUTPUT/split.jsonl for each split."""
    for split in settings.splits or BRIGHT_SPLITS:
        lists = read_bright(split, settings.folder or cache_folder() / "bright")
        write_candidates(Path(settings.output or "bright-candidates", f"{split}.jsonl"), lists)
        print(f"{split:20s}{len(lists):5d} queries, {sum(len(query.docids) for query in lists):6d} passages")


def main(argv: list[str] | None = None) -> int | None:
    """Run the command line; without a command, print what there is."""
    settings = command_line(DataSettings, argv, __doc__, "data.py")
    commands = {"download": download_command, "expand": expand_command, "bright": bright_command}
    if not settings.command:
        print(__doc__)
        return 0
    if settings.command not in commands or bool(settings.names) != (settings.command == "download"):
        given = " ".join([settings.command, *settings.names])
        raise InputError(f"no command {given!r}: expected download NAMES, expand or bright, and options")
    takes = {"download": ["names"], "bright": ["output", "folder", "splits"],
             "expand": ["output", "candidates", "qrels", *EXPANSION, "exclude_queries"]}[settings.command]
    refuse(settings, sorted(settings.given - {"command", *takes}), f"has no effect with {settings.command}")
    return commands[settings.command](settings)


if __name__ == "__main__":
    run_main(main)
