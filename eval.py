"""Evaluate TREC runs as NIST's trec_eval 10 does, byte for byte, and test whether one run is really better.

    python eval.py QRELS RUN                       the default measures, as trec_eval prints them
    python eval.py QRELS RUN -m ndcg_cut.5,10 -q   choose measures and cutoffs; -q adds a line for each query
    python eval.py QRELS BM25 RERANKED ...         a table: means, 95 % intervals, tests against the first run
    python eval.py --bright RUNS_FOLDER            BRIGHT's headline: NDCG@10 of the splits and their mean

The paper's tables show ndcg_cut_10 x 100. How it works: `judge` sorts each query's documents and notes the
ranks of those with a judgement. Each measure is then a few lines for one query. Sums are plain and in
trec_eval's order (by rank, then by query), so that the last digit is the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from data import BRIGHT_SPLITS, bright_file, read_excluded
from support.cli import InputError, command_line, run_main, setting
from support.download import cache_folder
from support.files import read_qrels, read_run, read_trec
from support.streams import UTF8

# ------------------------------------------------------------------------------------------------------------
# The ranks and labels of the judged documents


@dataclasses.dataclass
class Judged:
    """One query of a run, as the measures see it. Documents without a judgement need no entry: they only push
    others down. Labels below 0 are neither relevant nor, for bpref, nonrelevant."""

    num_ret: int                   # documents retrieved
    found: list[tuple[int, int]]   # (rank, label) of those with a judgement, by rank; 1 is the best
    pool: list[int]                # labels of all the query's judgements, falling: the best possible ranking
    level: int                     # the least label that counts as relevant, at least 0


def judge(qrels: dict[bytes, dict[bytes, int]], run: dict[bytes, dict[bytes, float]],
          level: int) -> dict[bytes, Judged]:
    """Rank {qid: {docid: score}} and look up {qid: {docid: label}}, for the queries of both, in byte order.

    Documents are ordered as in trec_eval: by falling score, equal scores by falling docid (as bytes).
    """
    judged = {}
    for qid in sorted(qrels.keys() & run.keys()):
        labels = qrels[qid]
        ranking = enumerate(sorted(zip(run[qid].values(), run[qid]), reverse=True), 1)
        found = [(rank, labels[docid]) for rank, (_, docid) in ranking if docid in labels]
        judged[qid] = Judged(len(run[qid]), found, sorted(labels.values(), reverse=True), max(level, 0))
    return judged


# ------------------------------------------------------------------------------------------------------------
# The measures of one query: Judged and a cutoff in, a number out

EVERYTHING = sys.maxsize  # the cutoff of a measure that has none


def plain_sum(values: Iterable[float]) -> float:
    """Add from left to right, as trec_eval does. (From Python 3.12 on, sum() compensates for rounding.)"""
    total = 0.0
    for value in values:
        total += value
    return total


def share(part: float, whole: float) -> float:
    """part / whole, or 0 if the whole is 0: a query without relevant documents has 0 in all measures."""
    return part / whole if whole else 0.0


def num_rel(j: Judged, k: int = EVERYTHING) -> int:
    """R, the relevant documents of the query, retrieved or not."""
    return sum(label >= j.level for label in j.pool)


def relevant_ranks(j: Judged, k: int) -> list[int]:
    """The ranks of the relevant documents among the first k, rising."""
    return [rank for rank, label in j.found if label >= j.level and rank <= k]


def num_rel_ret(j: Judged, k: int) -> int:
    """Relevant documents among the first k."""
    return len(relevant_ranks(j, k))


def reciprocal_rank(j: Judged, k: int) -> float:
    """1 / rank of the first relevant document."""
    ranks = relevant_ranks(j, k)
    return 1 / ranks[0] if ranks else 0.0


def average_precision(j: Judged, k: int) -> float:
    """The precision at the rank of each relevant document (0 if not among the first k), averaged over R."""
    precisions = [n / rank for n, rank in enumerate(relevant_ranks(j, k), 1)]
    return share(plain_sum(precisions), num_rel(j))


def bpref(j: Judged, k: int) -> float:
    """For each relevant document, how few of the first R judged nonrelevant ones are ranked above it."""
    R, N = num_rel(j), sum(0 <= label < j.level for label in j.pool)
    above, good = 0, []  # judged nonrelevant documents so far; a value for each relevant document
    for _, label in j.found:
        if label >= j.level:
            good.append(1 - share(min(above, R), min(N, R)))
        elif label >= 0:
            above += 1
    return share(plain_sum(good), R)


def dcg(ranking: Iterable[tuple[int, int]], k: int) -> float:
    """The sum of label / log2(1 + rank) over the first k of these (rank, label), whatever `level` is."""
    return plain_sum(label / math.log2(1 + rank) for rank, label in ranking if rank <= k and label > 0)


def normalized_dcg(j: Judged, k: int) -> float:
    """DCG divided by that of the best possible ranking, which has all judged documents, retrieved or not."""
    return share(dcg(j.found, k), dcg(enumerate(j.pool, 1), k))


def share_judged(j: Judged, k: int) -> float:
    """The share of the first k with a judgement, as ir_measures' Judged@k: of all if fewer were retrieved."""
    return share(sum(rank <= k for rank, _ in j.found), min(k, j.num_ret))


CUTS = (5, 10, 15, 20, 30, 100, 200, 500, 1000)
MEASURES: dict[str, tuple[Callable[[Judged, int], float], tuple[int, ...]]] = {
    # in trec_eval's order: the function, and its cutoffs if none are named
    "num_q": (lambda j, k: 1, ()),
    "num_ret": (lambda j, k: j.num_ret, ()),
    "num_rel": (num_rel, ()), "num_rel_ret": (num_rel_ret, ()),
    "map": (average_precision, ()), "bpref": (bpref, ()), "recip_rank": (reciprocal_rank, ()),
    "P": (lambda j, k: num_rel_ret(j, k) / k, CUTS),  # over k also where fewer than k were retrieved
    "recall": (lambda j, k: share(num_rel_ret(j, k), num_rel(j)), CUTS),
    "ndcg": (normalized_dcg, ()), "ndcg_cut": (normalized_dcg, CUTS), "map_cut": (average_precision, CUTS),
    "success": (lambda j, k: num_rel_ret(j, k) > 0, (1, 5, 10)),
    "judged": (share_judged, CUTS)}  # not trec_eval's
COUNTS = ("num_q", "num_ret", "num_rel", "num_rel_ret")  # summed, not averaged, and printed as integers
INTERVAL = ("mean", "low", "high")
DEFAULT = ("ndcg_cut.10", "map", "recip_rank", "recall.100", "P.10")


OTHER_NAMES = {"mrr": "recip_rank", "rr": "recip_rank", "precision": "P", "r": "recall", "hit": "success"}


def did_you_mean(name: str) -> str:
    """The measure that `name` may mean, as a question: "nDCG@10" and "ndcg_cut_10" are ndcg_cut.10. Or ""."""
    known = {measure.replace("_", "").lower(): measure for measure in MEASURES} | OTHER_NAMES
    measure = known.get(re.sub("[^a-z]", "", name.lower()).removesuffix("at"), "")
    cutoffs = re.findall("[0-9]+", name)
    if cutoffs and f"{measure}_cut" in MEASURES:
        measure += "_cut"
    if cutoffs and measure:
        measure += f".{','.join(cutoffs)}" if MEASURES[measure][1] else ", which has no cutoff"
    return measure and f": did you mean -m {measure}?"


def parse_measures(names: Sequence[str], merge: bool = True) -> dict[str, list[int]]:
    """{measure: its cutoffs, rising} in trec_eval's order, from names like "ndcg_cut.5,10".

    Of several lists of cutoffs for a measure trec_eval uses the first; `merge` unites them. InputError.
    """
    lists: dict[str, list[list[int]]] = {}
    for name in names:
        measure, point, text = name.partition(".")
        if measure not in MEASURES:
            hint = did_you_mean(name) or f": expected {' '.join(MEASURES)}"
            raise InputError(f"unknown measure {name!r}{hint}")
        if point and not MEASURES[measure][1]:
            raise InputError(f"measure {name!r}{did_you_mean(name)}")
        is_list = re.fullmatch(r"0*[1-9][0-9]{0,8}(,0*[1-9][0-9]{0,8})*", text)
        cutoffs = [int(cut) for cut in text.split(",")] if is_list else []
        if point and not is_list or len(set(cutoffs)) < len(cutoffs):
            raise InputError(f"measure {name!r}: expected cutoffs above 0, each once, as in P.5,10; or none")
        lists.setdefault(measure, []).append(cutoffs)
    chosen = {}
    for measure in [measure for measure in MEASURES if measure in lists]:
        used, named = lists[measure], [cutoffs for cutoffs in lists[measure] if cutoffs]
        if not merge:
            used = named[:1] or [[]]
            if len(named) > 1:
                print(f"{measure}: as in trec_eval, only the first list of cutoffs counts (one list: "
                      f"{measure}.5,10)", file=sys.stderr)
        chosen[measure] = sorted({cut for cutoffs in used for cut in cutoffs or MEASURES[measure][1]})
    return chosen


def measure_all(judged: dict[bytes, Judged], measures: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """{qid: {name as trec_eval prints it: value}}, queries in byte order."""
    columns = {f"{measure}_{k}" if cutoffs else measure: (MEASURES[measure][0], k)
               for measure, cutoffs in measures.items() for k in cutoffs or [EVERYTHING]}
    return {qid.decode(*UTF8): {name: float(function(j, k)) for name, (function, k) in columns.items()}
            for qid, j in judged.items()}


def evaluate(qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]], measures: Sequence[str],
             level: int = 1) -> dict[str, dict[str, float]]:
    """{qid: {"ndcg_cut_10": value}} for the queries of both {qid: {docid: label}} and {qid: {docid: score}}.
    InputError for an unknown measure, labels that are no integers, scores of NaN.
    """
    def encoded(table, kind, expected):
        for value in (value for row in table.values() for value in row.values()):
            if not isinstance(value, kind) or value != value:
                raise InputError(f"expected {expected}, found {value!r}")
        return {qid.encode(*UTF8): {docid.encode(*UTF8): value for docid, value in row.items()}
                for qid, row in table.items()}

    judged = judge(encoded(qrels, numbers.Integral, "integers as labels"),
                   encoded(run, numbers.Real, "numbers as scores"), level)
    return measure_all(judged, parse_measures(measures))


# ------------------------------------------------------------------------------------------------------------
# Is the difference real? Queries are the sample.


def bootstrap_interval(values: Sequence[float], seed: int = 0, resamples: int = 10_000,
                       level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its bootstrap interval. ValueError without values.

    A share `level` of the samples drawn from the values with replacement has its mean there (Efron).
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("expected at least one value")
    rng, block = np.random.default_rng(seed), max(1, 1_000_000 // len(values))
    shapes = [(min(block, resamples - done), len(values)) for done in range(0, resamples, block)]
    means = np.concatenate([values[rng.integers(0, len(values), shape)].mean(axis=1) for shape in shapes])
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(values.mean()), float(low), float(high)


def randomisation_test(deltas: Sequence[float], seed: int = 0, samples: int = 10_000,
                       exact: int = 16) -> float:
    """Two-sided p-value of paired differences, by Fisher's randomisation test.

    If the runs were alike, each difference could as well have the other sign. p is the share of sign patterns
    whose sum is at least as far from 0 as the observed one: among all 2^n for at most `exact` differences
    that are not 0, else among `samples` random patterns and the observed one (so that p is never 0).
    """
    deltas = np.asarray(deltas, float)
    deltas = deltas[deltas != 0]
    n, seen = len(deltas), abs(deltas.sum()) - 1e-12 * abs(deltas).sum()  # equal sums may differ by rounding
    if n <= exact:
        flips = np.arange(2**n)[:, None] >> np.arange(n) & 1
        return float(np.mean(abs((1 - 2 * flips) @ deltas) >= seen))
    rng, block, extreme = np.random.default_rng(seed), max(1, 1_000_000 // n), 1
    for done in range(0, samples, block):
        flips = rng.integers(0, 2, (min(block, samples - done), n), dtype=np.int8)
        extreme += np.count_nonzero(abs((1 - 2 * flips) @ deltas) >= seen)
    return float(extreme / (samples + 1))


# ------------------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass
class EvalSettings:
    """Evaluate TREC runs as NIST's trec_eval does, and compare several."""

    judgements: str = setting("", "lines `qid iter docid label`", positional=True, nargs="?", metavar="QRELS")
    runs: list[str] = setting(list, "lines `qid Q0 docid rank score tag` (-: standard input); several: "
                              "compared with the first", positional=True, nargs="*", metavar="RUN")
    measure: list[str] = setting(list, "measure, with cutoffs if you like (P.5,10); may be repeated (default "
                                 f"{' '.join(DEFAULT)})", flags=("-m",), action="append", metavar="NAME")
    queries: bool = setting(False, "a line for each query too; of several runs differences", flags=("-q",))
    complete: bool = setting(False, "judged queries that the run lacks count as 0", flags=("-c",))
    level: int = setting(1, "least label that is relevant, for all but ndcg", flags=("-l",), minimum=0)
    seed: int = setting(0, "seed of intervals and tests")
    json: bool = setting(False, "the numbers as JSON")
    bright: str = setting("", "instead of all that: a folder with a run of each BRIGHT split (biology.trec)")
    qrels: str = setting("", "BRIGHT's judgements (default: the folder where data.py download puts them)")
    fixed: bool = setting(False, "BRIGHT's corrected judgements (September 2025) instead of the paper's")
    exclude: str = setting("", "a folder with exclude.bright-*.txt or BRIGHT's rows: taken out of the runs")


def evaluate_file(qrels: dict[bytes, dict[bytes, int]], path: str, measures: dict[str, list[int]],
                  settings: EvalSettings) -> dict:
    """{"run": path, "queries": {qid: {name: value}} in byte order, "totals": the "all" lines' values,
    "judged": its judged_10}. InputError if the run has no query in common with the judgements."""
    judged = judge(qrels, read_trec(path, "run"), settings.level)
    if not judged:
        raise InputError(f"{path}: no query in common with {settings.judgements}")
    queries = measure_all(judged, measures)
    num_q, totals = len(qrels) if settings.complete else len(queries), {}
    for name in next(iter(queries.values())):
        total = plain_sum(row[name] for row in queries.values())
        totals[name] = total if name in COUNTS else total / num_q
    if settings.complete:  # trec_eval then counts the relevant documents of any level
        num_rel = sum(label > 0 for labels in qrels.values() for label in labels.values())
        counts = {"num_q": num_q, "num_rel": num_rel}
        totals = {name: counts.get(name, value) for name, value in totals.items()}
    for row in queries.values():
        row.pop("num_q", None)  # trec_eval has no line of it for a query
    mean_judged = plain_sum(share_judged(j, 10) for j in judged.values()) / len(judged)
    return {"run": path, "queries": queries, "totals": totals, "judged": mean_judged}


def trec_lines(result: dict, queries: bool) -> str:
    """What trec_eval prints."""
    rows = [*(result["queries"].items() if queries else ()), ("all", result["totals"])]
    return "".join(f"{name:22s}\t{qid}\t{f'{value:.0f}' if name in COUNTS else f'{value:6.4f}'}\n"
                   for qid, row in rows for name, value in row.items())


def warn(results: list[dict], num_q: int, complete: bool) -> None:
    """Say on stderr why the means of these runs may not compare. `num_q`: queries with judgements."""
    lacking = [result for result in results if len(result["queries"]) < num_q and not complete]
    for result in lacking:
        missing = num_q - len(result["queries"])
        print(f"{result['run']} lacks {missing} of {num_q} judged queries; -c counts them as 0",
              file=sys.stderr)
    if len({tuple(result["queries"]) for result in lacking}) > 1:
        print("these runs lack different queries: their means do not compare, the paired differences do",
              file=sys.stderr)
    shares = [result["judged"] for result in results]
    if round(max(shares) - min(shares), 9) > 0.05:
        named = ", ".join(f"{result['run']} {result['judged']:.2f}" for result in results)
        print(f"judged_10 differs: {named}; documents without a judgement count as not relevant",
              file=sys.stderr)


def progress(items, name: str):
    """`items`, with a bar on stderr where that is a terminal."""
    from tqdm import tqdm  # here: one run needs none, and should start at once

    return tqdm(items, name, leave=False, disable=None)


def compare(results: list[dict], judged: list[str], settings: EvalSettings) -> list[dict]:
    """One dict per run: totals, or means with 95 % intervals and the paired difference from the first run.
    Differences are over the queries of both runs; with -c, over all queries of the judgements, `judged`."""
    def column(queries, name, qids):
        return np.array([queries[qid][name] if qid in queries else 0.0 for qid in qids])

    rows, first = [], results[0]["queries"]
    for result in results:
        queries = result["queries"]
        qids, shared = [*queries], sorted(queries.keys() & first.keys())
        if settings.complete:
            qids = shared = judged
        rows.append(row := {"run": result["run"], "num_q": len(qids), "measures": {}})
        for name, total in progress(result["totals"].items(), result["run"]):
            if name in COUNTS:
                row["measures"][name] = {"total": int(total)}
                continue
            interval = bootstrap_interval(column(queries, name, qids), settings.seed)
            row["measures"][name] = entry = dict(zip(INTERVAL, interval)) | {"mean": total}
            if result is not results[0] and shared:
                deltas = column(queries, name, shared) - column(first, name, shared)
                gain = dict(zip(INTERVAL, bootstrap_interval(deltas, settings.seed)))
                entry["difference"] = {"num_q": len(shared), **gain,
                                       "p": randomisation_test(deltas, settings.seed)}
        if settings.queries:
            row["queries"] = queries
    return rows


def table_lines(rows: list[dict]) -> str:
    """One table per measure, one row per run; above them, if asked for, the values of each query."""
    lines, width = [], max(len(row["run"]) for row in rows)
    head = "  queries    mean   95 % interval     difference from the first       p"
    for qid, values in rows[0].get("queries", {}).items():
        for name, value in values.items():
            others = (row["queries"].get(qid) for row in rows[1:])
            gains = "\t".join("-" if other is None else f"{other[name] - value:+.4f}" for other in others)
            lines.append(f"{name:22s}\t{qid}\t{value:6.4f}\t{gains}")
    for name in rows[0]["measures"]:
        lines += ["", f"{name:{width}s}{head}"]
        for row in rows:
            entry = row["measures"][name]
            form = "{total:6d}" if "total" in entry else "{mean:6.4f}  {low:6.4f} {high:6.4f}"
            line = f"{row['run']:{width}s}  {row['num_q']:7d}  {form.format(**entry)}"
            if "difference" in entry:
                form = "   {mean:+7.4f}  ({low:+7.4f} {high:+7.4f})  {p:7.4f}"
                line += form.format(**entry["difference"])
            lines.append(line)
    lines += ["", "Intervals: bootstrap over queries. p: paired randomisation test, two-sided.", ""]
    return "\n".join(lines).lstrip("\n")


def bright_table(settings: EvalSettings) -> None:
    """Print NDCG@10 x 100 of each BRIGHT split, 0 for queries without results, and their unweighted mean."""
    means, folder = [], settings.qrels or cache_folder() / "bright"
    for split in BRIGHT_SPLITS:
        if not (path := bright_file(settings.bright, split, "run", needed=False)):
            print(f"{split:20s}    -   no run")
            continue
        qrels = read_qrels(bright_file(folder, split, "fixed qrels" if settings.fixed else "qrels"))
        exclusions = settings.exclude and bright_file(settings.exclude, split, "exclude", needed=False)
        excluded = read_excluded(exclusions) if exclusions else {}
        run = {qid: {docid: score for docid, score in scores.items() if docid not in excluded.get(qid, ())}
               for qid, scores in read_run(path).items()}
        values = evaluate(qrels, run, ["ndcg_cut.10"]).values()
        means.append(100 * sum(row["ndcg_cut_10"] for row in values) / len(qrels))
        print(f"{split:20s}{means[-1]:7.2f}   {len(qrels)} queries")
    if not means:
        raise InputError(f"{settings.bright}: no run of any BRIGHT split (biology.trec, ...)")
    some = " of 12 only: not comparable with the headline" if len(means) < 12 else ""
    print(f"{'mean':20s}{sum(means) / len(means):7.2f}   {len(means)} splits{some}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    settings = command_line(EvalSettings, argv, __doc__, "eval.py")
    if bool(settings.bright) == bool(settings.runs) or not settings.bright and settings.qrels:
        raise InputError("expected QRELS and at least one RUN, or --bright RUNS_FOLDER (with --qrels FOLDER)")
    if settings.bright:
        return bright_table(settings)
    if hasattr(sys.stdout, "reconfigure"):  # ids are bytes, in whatever encoding
        sys.stdout.reconfigure(encoding=UTF8[0], errors=UTF8[1])
    measures = parse_measures(settings.measure or DEFAULT, merge=False)
    qrels = read_trec(settings.judgements, "qrels")
    runs = settings.runs if len(settings.runs) == 1 else progress(settings.runs, "reading")
    results = [evaluate_file(qrels, path, measures, settings) for path in runs]
    if len(results) == 1 and not settings.json:
        sys.stdout.write(trec_lines(results[0], settings.queries))
        return
    warn(results, len(qrels), settings.complete)
    rows = compare(results, [qid.decode(*UTF8) for qid in sorted(qrels)], settings)
    table = json.dumps({"qrels": settings.judgements, "runs": rows}, indent=1) + "\n"
    sys.stdout.write(table if settings.json else table_lines(rows))


if __name__ == "__main__":
    run_main(main)
