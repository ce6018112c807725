"""Evaluate TREC runs: what NIST's trec_eval 10 prints, byte for byte, and whether one run is really better than another.

    python eval.py QRELS RUN                           ndcg_cut_10, map, recip_rank, recall_100 and P_10, as trec_eval prints them
    python eval.py QRELS RUN -m ndcg_cut.5,10 -q       choose measures and cutoffs; -q adds a line for each query
    python eval.py QRELS BM25 RERANKED ...             a table: means with 95 % intervals, each run tested against the first

The paper's tables are NDCG@10 x 100 (ndcg_cut_10). Files ending in .gz are read as such.

How it works: data.read_trec turns a file into columns of numbers, `judge` ranks all queries of a run at once and looks up the retrieved
documents that have a judgement, and each measure below is a few lines of numpy over those documents. Sums run in trec_eval's order (by
rank, then by query), so that not even the last digit differs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence

import numpy as np

from data import InputError, TrecTable, command_line, pack_ids, pair_keys, read_trec, run_main, setting, widen

# ---------------------------------------------------------------------------------------------------------------------
# Who was retrieved where, and what the assessors said


@dataclasses.dataclass
class Judged:
    """A run seen by the measures. Q queries; m retrieved documents with a judgement; p judgements in all.

    Documents without a judgement need no rows: they only push others down. Neither do labels below 0 count for anything.
    """

    qids: list[bytes]          # (Q) evaluated queries, in byte order
    num_ret: np.ndarray        # (Q,) documents retrieved
    query: np.ndarray          # (m,) 0..Q-1, rising
    rank: np.ndarray           # (m,) 1 for the best, rising inside a query
    label: np.ndarray          # (m,) >= 0
    pool_query: np.ndarray     # (p,) the judgements of these queries, retrieved or not
    pool_label: np.ndarray     # (p,) >= 0, falling inside a query: the best possible ranking
    level: int                 # the least label that counts as relevant


def judge(qrels: TrecTable, run: TrecTable, level: int = 1) -> Judged:
    """Rank the run and look up its labels, for the queries in both."""
    qids = sorted(set(qrels.qids) & set(run.qids))
    number = {qid: n for n, qid in enumerate(qids)}
    query, docids, scores = _only(run, number)
    pool_query, pool_docids, pool_label = _only(qrels, number)
    rows, found = _matches(query, docids, pool_query, pool_docids)
    rank, label = ranks(query, docids, scores, len(qids))[rows], pool_label[found]
    order = np.lexsort((rank, query[rows]))
    order = order[label[order] >= 0]
    pool = np.lexsort((-pool_label, pool_query))
    pool = pool[pool_label[pool] >= 0]
    return Judged(qids, np.bincount(query, minlength=len(qids)), query[rows][order], rank[order], label[order],
                  pool_query[pool], pool_label[pool], level)


def _only(table: TrecTable, number: dict[bytes, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of the queries in `number`, as (query's number, docids, values)."""
    query = np.array([number.get(qid, -1) for qid in table.qids], np.int32)[table.query]
    if len(number) == len(table.qids):
        return query, table.docids, table.values
    keep = query >= 0
    return query[keep], table.docids[:, keep], table.values[keep]


def ranks(query: np.ndarray, docids: np.ndarray, scores: np.ndarray, queries: int) -> np.ndarray:
    """(n,) each row's rank in its query, from 1: by falling score, equal scores by falling docid (trec_eval's order)."""
    changes = query[1:] != query[:-1]
    if np.count_nonzero(changes) == queries - 1 and (changes | (scores[1:] <= scores[:-1])).all():
        order = np.arange(len(query), dtype=np.int32)                          # most runs are written best first: no need to sort
    else:
        order = np.lexsort((-scores, query))
        query, scores = query[order], scores[order]
    place = places(query)
    rank = np.empty_like(place)
    rank[order] = place
    equal = (query[1:] == query[:-1]) & (scores[1:] == scores[:-1])
    tied = np.append(equal, False) | np.append(False, equal)
    if tied.any():                                                             # the same places, given out by docid
        block, rows = np.cumsum(~np.append(False, equal))[tied], order[tied]
        rank[rows[np.lexsort((*~docids[::-1, rows], block))]] = place[tied]
    return rank


def places(query: np.ndarray) -> np.ndarray:
    """(n,) 1, 2, 3, ... along the rows of each query, which stand together."""
    at = np.arange(len(query), dtype=np.int32)                                 # half the memory of int64, of which a run needs much
    first = np.where(np.append(True, query[1:] != query[:-1])[:len(query)], at, 0)
    return at - np.maximum.accumulate(first, out=first) + 1


def _matches(query: np.ndarray, docids: np.ndarray, pool_query: np.ndarray, pool_docids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the run whose (query, docid) has a judgement, and the place of that in the pool."""
    width = max(len(docids), len(pool_docids))
    docids, pool_docids = widen(docids, width), widen(pool_docids, width)
    for salt in itertools.count():                                             # until the judgements do not collide: salt 0, as a rule
        keys = pair_keys(pool_query, pool_docids, salt)
        sorter = np.argsort(keys)
        ordered = keys[sorter]
        if (ordered[1:] != ordered[:-1]).all():
            break
    table = np.zeros(1 << 22, bool)                                            # throws out most rows for the price of one look
    low_bits = np.uint64(len(table) - 1)
    table[keys & low_bits] = True
    keys = pair_keys(query, docids, salt)
    rows = np.flatnonzero(table[keys & low_bits])
    found = sorter[np.searchsorted(ordered, keys[rows]).clip(max=len(ordered) - 1)]
    same = (query[rows] == pool_query[found]) & (docids[:, rows] == pool_docids[:, found]).all(axis=0)
    return rows[same], found[same]


# ---------------------------------------------------------------------------------------------------------------------
# The measures: Judged and a cutoff in, (Q,) float64 out

EVERYTHING = sys.maxsize                                                       # the cutoff of a measure that has none


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where the whole is 0 (a query without anything relevant has 0 in all measures)."""
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)


def num_rel(j: Judged, k: int = EVERYTHING) -> np.ndarray:
    """R, the relevant documents of the query, retrieved or not."""
    return np.bincount(j.pool_query[j.pool_label >= j.level], minlength=len(j.qids)).astype(float)


def num_rel_ret(j: Judged, k: int = EVERYTHING) -> np.ndarray:
    """Relevant documents among the first k."""
    return np.bincount(j.query[(j.label >= j.level) & (j.rank <= k)], minlength=len(j.qids)).astype(float)


def precision(j: Judged, k: int) -> np.ndarray:
    """Relevant documents among the first k, over k (also where fewer than k were retrieved)."""
    return num_rel_ret(j, k) / k


def recall(j: Judged, k: int) -> np.ndarray:
    """Relevant documents among the first k, over R."""
    return share(num_rel_ret(j, k), num_rel(j))


def success(j: Judged, k: int) -> np.ndarray:
    """1 if anything relevant is among the first k."""
    return (num_rel_ret(j, k) > 0).astype(float)


def reciprocal_rank(j: Judged, k: int = EVERYTHING) -> np.ndarray:
    """1 / rank of the first relevant document."""
    query, rank = j.query[j.label >= j.level], j.rank[j.label >= j.level]
    first = places(query) == 1
    return np.bincount(query[first], 1 / rank[first], len(j.qids))


def average_precision(j: Judged, k: int = EVERYTHING) -> np.ndarray:
    """The precision at the rank of each relevant document (0 for one that is not among the first k), averaged over all R."""
    query, rank = j.query[j.label >= j.level], j.rank[j.label >= j.level]
    found = rank <= k
    return share(np.bincount(query[found], (places(query) / rank)[found], len(j.qids)), num_rel(j))


def bpref(j: Judged, k: int = EVERYTHING) -> np.ndarray:
    """Of the judged nonrelevant documents (N; the first R of them count), how few stand above each relevant one. Ignores the unjudged."""
    relevant = j.label >= j.level
    query = j.query[relevant]
    above = places(j.query)[relevant] - places(query)                          # judged nonrelevant documents ranked higher
    R, N = num_rel(j), np.bincount(j.pool_query[j.pool_label < j.level], minlength=len(j.qids))
    return share(np.bincount(query, 1 - share(np.minimum(above, R[query]), np.minimum(N, R)[query]), len(j.qids)), R)


def ndcg(j: Judged, k: int = EVERYTHING) -> np.ndarray:
    """Discounted cumulative gain, the sum of label / log2(1 + rank) over the first k, over that of the best possible ranking.

    The gain is the label itself, so NDCG does not depend on the level; the best ranking has all judged documents, retrieved or not.
    """
    def dcg(query, rank, label):
        query, rank, label = (column[(rank <= k) & (label > 0)] for column in (query, rank, label))
        discount = np.array([math.log2(1 + r) for r in range(1, rank.max(initial=0) + 1)])    # numpy's log2 differs in some last bits
        return np.bincount(query, label / discount[rank - 1], len(j.qids))

    return share(dcg(j.query, j.rank, j.label), dcg(j.pool_query, places(j.pool_query), j.pool_label))


CUTOFFS = (5, 10, 15, 20, 30, 100, 200, 500, 1000)
MEASURES: dict[str, tuple[Callable[..., np.ndarray], tuple[int, ...]]] = {     # in trec_eval's order: function, cutoffs if none are named
    "num_q": (lambda j: np.ones(len(j.qids)), ()), "num_ret": (lambda j: j.num_ret.astype(float), ()),
    "num_rel": (num_rel, ()), "num_rel_ret": (num_rel_ret, ()), "map": (average_precision, ()), "bpref": (bpref, ()),
    "recip_rank": (reciprocal_rank, ()), "P": (precision, CUTOFFS), "recall": (recall, CUTOFFS), "ndcg": (ndcg, ()),
    "ndcg_cut": (ndcg, CUTOFFS), "map_cut": (average_precision, CUTOFFS), "success": (success, (1, 5, 10))}
COUNTS = ("num_q", "num_ret", "num_rel", "num_rel_ret")                        # summed, not averaged, and printed as integers
DEFAULT = ("ndcg_cut.10", "map", "recip_rank", "recall.100", "P.10")


def parse_measures(names: Sequence[str], merge: bool = True) -> dict[str, list[int]]:
    """{measure: its cutoffs, rising (none for map and the like)} in trec_eval's order, from names like "ndcg_cut.5,10".

    Of several lists for one measure trec_eval uses the first only; `merge` unites them. InputError for what trec_eval would refuse.
    """
    lists: dict[str, list[list[int]]] = {}
    for name in names:
        measure, point, cutoffs = name.partition(".")
        if measure not in MEASURES:
            raise InputError(f"unknown measure {name!r}: expected {' '.join(MEASURES)}")
        default = MEASURES[measure][1]
        if point and not default:
            raise InputError(f"measure {name!r}: expected {measure} without cutoffs")
        if point and not re.fullmatch(r"0*[1-9][0-9]{0,8}(,0*[1-9][0-9]{0,8})*", cutoffs):
            raise InputError(f"measure {name!r}: expected cutoffs above 0, as in {measure}.5,10")
        found = [int(cut) for cut in cutoffs.split(",")] if point else []
        if len(set(found)) < len(found):
            raise InputError(f"measure {name!r}: expected each cutoff once")
        lists.setdefault(measure, []).append(found)
    chosen = {}
    for measure, (_, default) in MEASURES.items():
        if measure in lists:
            explicit = [found for found in lists[measure] if found]
            if len(explicit) > 1 and not merge:
                print(f"{measure}: as in trec_eval, only the first list of cutoffs counts (one list: {measure}.5,10)", file=sys.stderr)
            used = [found or default for found in lists[measure]] if merge else explicit[:1] or [default]
            chosen[measure] = sorted({cut for found in used for cut in found})
    return chosen


def measure_all(judged: Judged, measures: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """{name as trec_eval prints it: (Q,) values}."""
    values = {}
    for measure, cutoffs in measures.items():
        function = MEASURES[measure][0]
        values |= {f"{measure}_{k}": function(judged, k) for k in cutoffs} or {measure: function(judged)}
    return values


def evaluate(qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]], measures: Sequence[str], level: int = 1,
             ) -> dict[str, dict[str, float]]:
    """{qid: {"ndcg_cut_10": value, ...}} for each query in both. `qrels` is {qid: {docid: label}}, `run` {qid: {docid: score}}.

    The same code as for files, so the same numbers. InputError for an unknown measure, a label that is no integer or a score that is NaN.
    """
    def table(dicts, kind):
        rows = [(n, docid.encode("utf-8", "surrogateescape"), value)
                for n, row in enumerate(dicts.values()) for docid, value in row.items()]
        query, docids, values = (list(column) for column in zip(*rows)) if rows else ([], [], [])
        numbers = np.array(values) if rows else np.zeros(0, kind)
        if not np.can_cast(numbers.dtype, kind) or np.isnan(numbers).any():
            raise InputError(f"expected {'integers as labels' if kind is np.int64 else 'numbers as scores'}")
        qids = [qid.encode("utf-8", "surrogateescape") for qid in dicts]
        return TrecTable(qids, np.array(query, np.int32), pack_ids(docids), numbers.astype(kind))

    chosen = parse_measures(measures)
    judged = judge(table(qrels, np.int64), table(run, np.float64), level)
    values = measure_all(judged, chosen)
    return {qid.decode("utf-8", "surrogateescape"): {name: float(column[n]) for name, column in values.items()}
            for n, qid in enumerate(judged.qids)}


# ---------------------------------------------------------------------------------------------------------------------
# Is the difference real? Queries are the sample.


def bootstrap_interval(values: Sequence[float], seed: int = 0, resamples: int = 10_000, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high): the mean over queries, and where it falls in `level` of the samples drawn from them with replacement.

    Of paired differences it gives the interval of a gain. The percentile method (Efron); ValueError without any values.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("expected at least one value")
    rng, block = np.random.default_rng(seed), max(1, 1_000_000 // len(values))
    means = np.concatenate([values[rng.integers(0, len(values), (min(block, resamples - done), len(values)))].mean(axis=1)
                            for done in range(0, resamples, block)])
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(values.mean()), float(low), float(high)


def randomisation_test(deltas: Sequence[float], seed: int = 0, samples: int = 10_000, exact: int = 16) -> float:
    """Two-sided p-value of paired differences: were the two runs alike, each difference could as well have the other sign (Fisher).

    The share of sign patterns whose sum is at least as far from 0 as the one seen: of all 2^n patterns for at most `exact` differences that
    are not 0, else of `samples` random ones and the one seen, so that p is never 0 (Davison and Hinkley's +1).
    """
    deltas = np.asarray(deltas, float)
    deltas = deltas[deltas != 0]
    n, seen = len(deltas), abs(deltas.sum()) - 1e-12 * abs(deltas).sum()       # equal sums may differ by rounding
    if n <= exact:
        flips = np.arange(2**n)[:, None] >> np.arange(n) & 1
        return float(np.mean(abs((1 - 2 * flips) @ deltas) >= seen))
    rng, block, extreme = np.random.default_rng(seed), max(1, 1_000_000 // n), 1
    for done in range(0, samples, block):
        flips = rng.integers(0, 2, (min(block, samples - done), n), dtype=np.int8)
        extreme += np.count_nonzero(abs((1 - 2 * flips) @ deltas) >= seen)
    return float(extreme / (samples + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass
class Settings:
    """Evaluate TREC runs as NIST's trec_eval does, and compare several."""

    qrels: str = setting("", "judgements: qid iter docid label", positional=True)
    runs: list[str] = setting(list, "runs: qid Q0 docid rank score tag; several are compared with the first", positional=True, nargs="+")
    measure: list[str] = setting(list, f"measure, with cutoffs if you like (P.5,10); may be repeated (default: {' '.join(DEFAULT)})",
                                 flags=("-m",), action="append", metavar="MEASURE")
    queries: bool = setting(False, "a line for each query too (several runs: differences from the first)", flags=("-q",))
    complete: bool = setting(False, "judged queries that the run lacks count as 0", flags=("-c",))
    level: int = setting(1, "least label that is relevant, for all but ndcg", flags=("-l",))
    seed: int = setting(0, "seed of intervals and tests")
    json: bool = setting(False, "the numbers as JSON")


@dataclasses.dataclass
class Evaluation:
    """One run's numbers. `values` have an entry for each of `qids`, `totals` are the "all" lines."""

    run: str
    qids: list[str]
    values: dict[str, np.ndarray]
    totals: dict[str, float]


def evaluate_file(qrels: TrecTable, path: str, measures: dict[str, list[int]], settings: Settings) -> Evaluation:
    """Read and evaluate a run. InputError where it has no query in common with the judgements."""
    judged = judge(qrels, read_trec(path, "run"), settings.level)
    if not judged.qids:
        raise InputError(f"{path}: no query in common with {settings.qrels}")
    values = measure_all(judged, measures)
    num_q = len(qrels.qids) if settings.complete else len(judged.qids)
    totals = {name: float(np.cumsum(column)[-1]) / (1 if name in COUNTS else num_q) for name, column in values.items()}   # a plain sum
    if settings.complete:
        counts = {"num_q": num_q, "num_rel": int((qrels.values > 0).sum())}    # trec_eval does not ask for the level here
        totals |= {name: float(count) for name, count in counts.items() if name in totals}
    return Evaluation(path, [qid.decode("utf-8", "surrogateescape") for qid in judged.qids], values, totals)


def trec_lines(result: Evaluation, queries: bool) -> str:
    """What trec_eval prints."""
    def line(name, qid, value):
        return f"{name:22s}\t{qid}\t{f'{value:.0f}' if name in COUNTS else f'{value:6.4f}'}\n"

    columns = {name: column.tolist() for name, column in result.values.items() if name != "num_q"} if queries else {}
    single = [line(name, qid, column[n]) for n, qid in enumerate(result.qids) for name, column in columns.items()]
    return "".join(single + [line(name, "all", value) for name, value in result.totals.items()])


def compare(results: list[Evaluation], judged: list[str], settings: Settings) -> list[dict]:
    """One dict a run: totals or means with 95 % intervals, and the paired difference from the first run with its p-value.

    Differences are over the queries of both runs; with -c over all of `judged`, the queries of the judgements.
    """
    def column(result, name, qids):
        known = dict(zip(result.qids, result.values[name].tolist()))
        return np.array([known.get(qid, 0.0) for qid in qids])

    rows, first = [], results[0]
    for result in results:
        qids = judged if settings.complete else result.qids
        shared = judged if settings.complete else sorted(set(qids) & set(first.qids))
        rows.append(row := {"run": result.run, "num_q": len(qids), "measures": {}})
        for name, total in result.totals.items():
            if name in COUNTS:
                row["measures"][name] = {"total": int(total)}
                continue
            _, low, high = bootstrap_interval(column(result, name, qids), settings.seed)
            row["measures"][name] = {"mean": total, "low": low, "high": high}
            if result is not first and shared:
                deltas = column(result, name, shared) - column(first, name, shared)
                numbers = (*bootstrap_interval(deltas, settings.seed), randomisation_test(deltas, settings.seed))
                row["measures"][name]["difference"] = {"num_q": len(shared), **dict(zip(("mean", "low", "high", "p"), numbers))}
        if settings.queries:
            row["queries"] = {qid: {name: float(values[n]) for name, values in result.values.items() if name != "num_q"}
                              for n, qid in enumerate(result.qids)}
    return rows


def table_lines(rows: list[dict]) -> str:
    """One table a measure, one row a run; above them, where asked for, each query's value in the first run and the others' differences."""
    lines, width = [], max(len(row["run"]) for row in rows)
    for qid, values in rows[0].get("queries", {}).items():
        for name, value in values.items():
            others = (row["queries"].get(qid) for row in rows[1:])
            differences = "\t".join("-" if other is None else f"{other[name] - value:+.4f}" for other in others)
            lines.append(f"{name:22s}\t{qid}\t{value:6.4f}\t{differences}")
    for name in rows[0]["measures"]:
        lines += ["", f"{name:{width}s}  queries    mean   95 % interval     difference from the first       p"]
        for row in rows:
            numbers = row["measures"][name]
            if "total" in numbers:
                lines.append(f"{row['run']:{width}s}  {row['num_q']:7d}  {numbers['total']:6d}")
                continue
            line = f"{row['run']:{width}s}  {row['num_q']:7d}  {numbers['mean']:6.4f}  {numbers['low']:6.4f} {numbers['high']:6.4f}"
            if "difference" in numbers:
                gain = numbers["difference"]
                line += f"   {gain['mean']:+7.4f}  ({gain['low']:+7.4f} {gain['high']:+7.4f})  {gain['p']:7.4f}"
            lines.append(line)
    return "\n".join(lines + ["", "Intervals: bootstrap over queries. p: paired randomisation test, two-sided.", ""]).lstrip("\n")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    settings = command_line(Settings, argv, __doc__, "eval.py")
    if settings.level < 0:
        raise InputError(f"--level {settings.level}: expected 0 or more")
    if hasattr(sys.stdout, "reconfigure"):                                     # ids are bytes, in whatever encoding
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    measures = parse_measures(settings.measure or DEFAULT, merge=False)
    qrels = read_trec(settings.qrels, "qrels")
    results = [evaluate_file(qrels, path, measures, settings) for path in settings.runs]
    if len(results) == 1 and not settings.json:
        sys.stdout.write(trec_lines(results[0], settings.queries))
        return
    judged = sorted(qid.decode("utf-8", "surrogateescape") for qid in qrels.qids)
    rows = compare(results, judged, settings)
    sys.stdout.write(json.dumps({"qrels": settings.qrels, "runs": rows}, indent=1) + "\n" if settings.json else table_lines(rows))


if __name__ == "__main__":
    run_main(main)
