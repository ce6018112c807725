"""Evaluate TREC runs as NIST's trec_eval 10 does, byte for byte, and test whether one run is really better.

    python eval.py QRELS RUN                       the default measures, as trec_eval prints them
    python eval.py QRELS RUN -m ndcg_cut.5,10 -q   choose measures and cutoffs; -q adds a line for each query
    python eval.py QRELS BM25 RERANKED ...         a table: means, 95 % intervals, tests against the first run
    python eval.py --bright RUNS_FOLDER            BRIGHT's headline: NDCG@10 of the splits and their mean

The paper's tables show ndcg_cut_10 x 100. `Query` sorts one query's documents and notes the ranks of those
with a judgement. Each measure is then a few lines. Sums are in trec_eval's order: their last digit is equal.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from data import BRIGHT_SPLITS, bright_file, read_excluded
from support.cli import InputError, command_line, refuse, run_main, setting
from support.download import cache_folder
from support.files import read_qrels, read_run, read_trec
from support.streams import UTF8

# ------------------------------------------------------------------------------------------------------------
# The measures of one query


def plain_sum(values: Iterable[float]) -> float:
    """Add from left to right, as trec_eval does. (From Python 3.12 on, sum() compensates for rounding.)"""
    total = 0.0
    for value in values:
        total += value
    return total


def share(part: float, whole: float) -> float:
    """part / whole, or 0 if the whole is 0: a query without relevant documents has 0 in all measures."""
    return part / whole if whole else 0.0


class Query:
    """The ranks (from 1) and labels of one query's judged documents. Each measure is a method, k its cutoff.
    Documents without a judgement need no entry: they only push others down."""

    def __init__(self, labels: dict[bytes, int], scores: dict[bytes, float], level: int):
        """Rank {docid: score} as trec_eval does: by falling score, equal scores by falling docid (as bytes).
        Look up {docid: label}: from `level` on is relevant, below 0 neither relevant nor nonrelevant."""
        level = max(level, 0)
        ranking = enumerate(sorted(zip(scores.values(), scores), reverse=True), 1)
        # (rank, label) of the run and of the best possible ranking, which has all judged documents
        self.found = [(rank, labels[docid]) for rank, (_, docid) in ranking if docid in labels]
        self.best = [*enumerate(sorted(labels.values(), reverse=True), 1)]
        self.relevant = [rank for rank, label in self.found if label >= level]
        self.nonrelevant = [rank for rank, label in self.found if 0 <= label < level]
        self.all_relevant = sum(label >= level for label in labels.values())  # retrieved or not
        self.all_nonrelevant = sum(0 <= label < level for label in labels.values())
        self.all_retrieved = len(scores)

    def num_rel_ret(self, k: int) -> int:
        """Relevant documents among the first k."""
        return sum(rank <= k for rank in self.relevant)

    def average_precision(self, k: int) -> float:
        """The precision at each relevant document's rank (0 if not among the first k), averaged over all."""
        precisions = (n / rank for n, rank in enumerate(self.relevant, 1) if rank <= k)
        return share(plain_sum(precisions), self.all_relevant)

    def bpref(self, k: int) -> float:
        """For each of the R relevant documents, how few of the first R nonrelevant ones are ranked above."""
        R, N = self.all_relevant, self.all_nonrelevant
        above = [bisect.bisect(self.nonrelevant, rank) for rank in self.relevant]  # how many ranks are lower
        return share(plain_sum(1 - share(min(n, R), min(N, R)) for n in above), R)

    def normalized_dcg(self, k: int) -> float:
        """The sum of label / log2(1 + rank) over the first k, divided by that of the best possible ranking.
        The gain is the label itself, whatever `level` is. The best ranking has all judged documents,
        retrieved or not. (This is reward.ndcg for a list in which some documents have no label.)"""
        def dcg(pairs):
            return plain_sum(label / math.log2(1 + rank) for rank, label in pairs if rank <= k and label > 0)

        return share(dcg(self.found), dcg(self.best))

    def judged(self, k: int) -> float:
        """The share of the first k that has a judgement: of all retrieved, if these are fewer than k."""
        return share(sum(rank <= k for rank, _ in self.found), min(k, self.all_retrieved))


CUTS = (5, 10, 15, 20, 30, 100, 200, 500, 1000)
EVERYTHING = sys.maxsize  # the cutoff of a measure that has none
MEASURES: dict[str, tuple[Callable[[Query, int], float], tuple[int, ...]]] = {
    # in trec_eval's order: the function, and its cutoffs if none are named
    "num_q": (lambda q, k: 1, ()), "num_ret": (lambda q, k: q.all_retrieved, ()),
    "num_rel": (lambda q, k: q.all_relevant, ()), "num_rel_ret": (Query.num_rel_ret, ()),
    "map": (Query.average_precision, ()), "bpref": (Query.bpref, ()),
    "recip_rank": (lambda q, k: 1 / q.relevant[0] if q.relevant else 0, ()),
    "P": (lambda q, k: q.num_rel_ret(k) / k, CUTS),  # over k also where fewer than k were retrieved
    "recall": (lambda q, k: share(q.num_rel_ret(k), q.all_relevant), CUTS),
    "ndcg": (Query.normalized_dcg, ()), "ndcg_cut": (Query.normalized_dcg, CUTS),
    "map_cut": (Query.average_precision, CUTS), "success": (lambda q, k: q.num_rel_ret(k) > 0, (1, 5, 10)),
    "judged": (Query.judged, CUTS)}  # ir_measures' Judged@k; trec_eval has none
COUNTS = ("num_q", "num_ret", "num_rel", "num_rel_ret")  # summed, not averaged, and printed as integers
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
    """{measure: its cutoffs, rising} in trec_eval's order, from names like "ndcg_cut.5,10". InputError.
    Of several lists of cutoffs for a measure trec_eval uses the first; `merge` unites them."""
    lists: dict[str, list[list[int]]] = {}
    for name in names:
        if re.search(r"\S[,\s]+[A-Za-z]", name):
            raise InputError(f"measure {name!r}: each measure needs its own -m")
        measure, point, text = name.partition(".")
        if measure not in MEASURES or point and not MEASURES[measure][1]:
            hint = did_you_mean(name) or f": expected {' '.join(MEASURES)}"
            raise InputError(f"unknown measure {name!r}{hint}")
        is_list = re.fullmatch(r"0*[1-9][0-9]{0,8}(,0*[1-9][0-9]{0,8})*", text)
        cutoffs = [int(cut) for cut in text.split(",")] if is_list else []
        if point and not is_list or len(set(cutoffs)) < len(cutoffs):
            raise InputError(f"measure {name!r}: expected cutoffs above 0, each once, as in P.5,10; or none")
        lists.setdefault(measure, []).append(cutoffs)
    chosen = {}
    for measure in [measure for measure in MEASURES if measure in lists]:
        named = [cutoffs for cutoffs in lists[measure] if cutoffs]
        if len(named) > 1 and not merge:
            print(f"{measure}: as in trec_eval, only the first list of cutoffs counts (one list: "
                  f"{measure}.5,10)", file=sys.stderr)
        used = lists[measure] if merge else named[:1] or [[]]
        chosen[measure] = sorted({cut for cutoffs in used for cut in cutoffs or MEASURES[measure][1]})
    return chosen


def judge(qrels: dict[bytes, dict], run: dict[bytes, dict], level: int) -> dict[bytes, Query]:
    """For the queries that both have, in byte order."""
    return {qid: Query(qrels[qid], run[qid], level) for qid in sorted(qrels.keys() & run.keys())}


def measure_all(judged: dict[bytes, Query], measures: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """{qid: {name as trec_eval prints it: value}}, queries in byte order."""
    columns = {f"{measure}_{k}" if cutoffs else measure: (MEASURES[measure][0], k)
               for measure, cutoffs in measures.items() for k in cutoffs or [EVERYTHING]}
    return {qid.decode(*UTF8): {name: float(function(query, k)) for name, (function, k) in columns.items()}
            for qid, query in judged.items()}


def evaluate(qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]], measures: Sequence[str],
             level: int = 1) -> dict[str, dict[str, float]]:
    """{qid: {"ndcg_cut_10": value}} for the queries of both {qid: {docid: label}} and {qid: {docid: score}}.
    InputError for an unknown measure, labels that are no integers, scores of NaN."""
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
    A share `level` of the samples drawn from the values with replacement has its mean there (Efron)."""
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
    that are not 0, else among `samples` random patterns and the observed one (so that p is never 0)."""
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
    "judged": {qid: judged_10}}. InputError if the run has no query in common with the judgements."""
    judged = judge(qrels, read_trec(path, "run"), settings.level)
    if not judged:
        raise InputError(f"{path}: no query in common with {settings.judgements}")
    queries = measure_all(judged, measures)
    num_q = len(qrels) if settings.complete else len(queries)
    sums = {name: plain_sum(row[name] for row in queries.values()) for name in next(iter(queries.values()))}
    totals = {name: total if name in COUNTS else total / num_q for name, total in sums.items()}
    if settings.complete:  # trec_eval then counts the relevant documents of any level
        num_rel = sum(label > 0 for labels in qrels.values() for label in labels.values())
        counts = {"num_q": num_q, "num_rel": num_rel}
        totals = {name: counts.get(name, value) for name, value in totals.items()}
    for row in queries.values():
        row.pop("num_q", None)  # trec_eval has no line of it for a query
    shares = {qid.decode(*UTF8): query.judged(10) for qid, query in judged.items()}
    return {"run": path, "queries": queries, "totals": totals, "judged": shares}


def trec_lines(result: dict, queries: bool) -> str:
    """What trec_eval prints."""
    rows = [*(result["queries"].items() if queries else ()), ("all", result["totals"])]
    return "".join(f"{name:22s}\t{qid}\t{f'{value:.0f}' if name in COUNTS else f'{value:6.4f}'}\n"
                   for qid, row in rows for name, value in row.items())


def warn(results: list[dict], num_q: int, complete: bool) -> None:
    """Report on stderr which queries are missing and whether judged_10 differs. `num_q`: judged queries."""
    lacking = [result for result in results if len(result["queries"]) < num_q and not complete]
    lines = [f"{result['run']} lacks {num_q - len(result['queries'])} of {num_q} judged queries; -c counts "
             "them as 0" for result in lacking]
    if len({tuple(result["queries"]) for result in lacking}) > 1:
        lines.append("they lack different queries: their means do not compare, the paired differences do")
    in_all = sorted(set.intersection(*(set(result["judged"]) for result in results)))
    shares = [share(plain_sum(result["judged"][qid] for qid in in_all), len(in_all)) for result in results]
    if round(max(shares) - min(shares), 9) > 0.05:
        named = ", ".join(f"{result['run']} {value:.2f}" for result, value in zip(results, shares))
        over = f" over the {len(in_all)} queries that all runs have" if len(in_all) < num_q else ""
        lines.append(f"judged_10 differs{over}: {named}; documents without a judgement count as not relevant")
    sys.stderr.write("".join(f"{line}\n" for line in lines))


def progress(items, name: str):
    """`items`, with a bar on stderr where that is a terminal."""
    from tqdm import tqdm  # here: one run needs none, and should start at once

    return tqdm(items, name, leave=False, disable=None)


def compare(results: list[dict], judged: list[str], settings: EvalSettings) -> list[dict]:
    """One dict per run: totals, or means with 95 % intervals and the paired difference from the first run.
    Differences are over the queries of both runs; with -c, over all queries of the judgements, `judged`."""
    def column(queries, name, qids):
        return np.array([queries[qid][name] if qid in queries else 0.0 for qid in qids])

    def interval(values):
        return dict(zip(("mean", "low", "high"), bootstrap_interval(values, settings.seed)))

    rows, first = [], results[0]["queries"]
    for result in results:
        queries, measures = result["queries"], {}
        answered = judged if settings.complete else [*queries]
        shared = judged if settings.complete else sorted(queries.keys() & first.keys())
        for name, total in progress(result["totals"].items(), result["run"]):
            if name in COUNTS:
                measures[name] = {"total": int(total)}
                continue
            measures[name] = interval(column(queries, name, answered)) | {"mean": total}
            if result is not results[0] and shared:
                deltas = column(queries, name, shared) - column(first, name, shared)
                measures[name]["difference"] = {"num_q": len(shared), **interval(deltas),
                                                "p": randomisation_test(deltas, settings.seed)}
        row = {"run": result["run"], "num_q": len(answered), "measures": measures}
        rows.append(row | {"queries": queries} if settings.queries else row)
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
    if bool(settings.bright) == bool(settings.judgements):
        raise InputError("expected QRELS and at least one RUN, or --bright RUNS_FOLDER (with --qrels FOLDER)")
    if settings.bright:
        for name, flag in (("measure", "-m"), ("queries", "-q"), ("complete", "-c"), ("level", "-l")):
            refuse(settings, [name], f"({flag}) has no effect with --bright")
        refuse(settings, ["seed", "json"], "has no effect with --bright")
        return bright_table(settings)
    refuse(settings, ["qrels", "fixed", "exclude"], "has no effect without --bright")
    for path in (settings.judgements, *settings.runs):  # in `-m map judged.10` the second is read as a file
        if (hint := did_you_mean(path)) and not Path(path).exists():
            raise InputError(f"{path}: no such file; each measure needs its own -m{hint}")
    if not settings.runs:
        raise InputError("expected a RUN after QRELS")
    if hasattr(sys.stdout, "reconfigure"):  # ids are bytes, in whatever encoding
        sys.stdout.reconfigure(encoding=UTF8[0], errors=UTF8[1])
    measures = parse_measures(settings.measure or DEFAULT, merge=False)
    qrels = read_trec(settings.judgements, "qrels")
    runs = settings.runs if len(settings.runs) == 1 else progress(settings.runs, "reading")
    results = [evaluate_file(qrels, path, measures, settings) for path in runs]
    warn(results, len(qrels), settings.complete)
    if len(results) == 1 and not settings.json:
        sys.stdout.write(trec_lines(results[0], settings.queries))
        return
    rows = compare(results, [qid.decode(*UTF8) for qid in sorted(qrels)], settings)
    table = json.dumps({"qrels": settings.judgements, "runs": rows}, indent=1) + "\n"
    sys.stdout.write(table if settings.json else table_lines(rows))


if __name__ == "__main__":
    run_main(main)
