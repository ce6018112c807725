"""eval.py against pytrec_eval: whole processes on the same files with the same five measures, in turn.

    python benchmarks/bench_eval.py [--size dl19|msmarco|all] [--repeats 5] [--json]

dl19 has the size of that track (43 queries x 100 documents, 215 judgements per query), msmarco the size of
the MS MARCO dev set (6,980 x 1,000; 1 judgement). The files are synthetic and written to a temporary folder
(260 MB). pytrec_eval reads them by its own parse_qrel and parse_run. Seconds are CPU seconds (user + system)
of a whole process, imports included. MiB is the peak above a process that only imports. Both must print the
same numbers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"dl19": (43, 100, 215), "msmarco": (6980, 1000, 1)}  # queries; retrieved and judged per query
PEER = """
import sys, pytrec_eval
with open(sys.argv[1]) as file:
    qrels = pytrec_eval.parse_qrel(file)
with open(sys.argv[2]) as file:
    run = pytrec_eval.parse_run(file)
measures = {"ndcg_cut.10", "map", "recip_rank", "recall.100", "P.10"}
found = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
for name in ("map", "recip_rank", "P_10", "recall_100", "ndcg_cut_10"):
    print(f"{name:22s}\\tall\\t{sum(found[qid][name] for qid in sorted(found)) / len(found):6.4f}")
"""


def write_files(folder: Path, queries: int, retrieved: int, judged: int) -> None:
    """Write a run with scores like BM25's, and judgements of retrieved and other documents.

    Scores are float32 numbers, since pytrec_eval stores float32.
    """
    rng = np.random.default_rng(0)
    with (open(folder / "run", "w", encoding="utf-8") as run,
          open(folder / "qrels", "w", encoding="utf-8") as qrels):
        for qid in np.sort(rng.choice(1_000_000, queries, replace=False)).tolist():
            docids = rng.choice(8_841_823, retrieved + judged, replace=False)
            scores = np.sort(rng.gamma(8, 2, retrieved).astype(np.float32))[::-1]
            lines = zip(docids.tolist(), scores.tolist())
            for rank, (docid, score) in enumerate(lines, 1):
                run.write(f"{qid} Q0 {docid} {rank} {score:.9g} bm25\n")
            found = rng.choice(docids[:retrieved], min(retrieved // 2, (judged + 1) // 2), replace=False)
            pool = np.append(found, docids[retrieved:])[:judged]
            for docid in pool.tolist():
                qrels.write(f"{qid} 0 {docid} {rng.integers(0, 4) if judged > 1 else 1}\n")


def measure(command: list[str]) -> tuple[float, float, float, bytes]:
    """Run a child process. Returns its (CPU seconds, seconds, peak MiB, output)."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE) as child:
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[:2]} failed with status {child.returncode}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss / 1024, output


def compare(size: str, repeats: int) -> dict:
    """Run pairs of processes in turn. Returns medians, and the median of the pairs' ratios."""
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), *SIZES[size])
        files = [f"{folder}/qrels", f"{folder}/run"]
        ours, peer = ([str(ROOT / "eval.py"), *files], ["-c", PEER, *files])
        measure(ours), measure(peer)  # warm-up: loads files and bytecode into memory
        pairs = [(measure(ours), measure(peer)) for _ in range(repeats)]
    if any(one[3] != other[3] for one, other in pairs):
        raise SystemExit(f"the numbers differ:\n{pairs[0][0][3].decode()}{pairs[0][1][3].decode()}")
    bare = [measure(["-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}"])[2]
            for module in ("eval", "pytrec_eval")]
    ours, peer = ([statistics.median(values) for values in zip(*(pair[side][:3] for pair in pairs))]
                  for side in (0, 1))
    return {"what": "eval", "size": size, "peer": "pytrec_eval", "ours_s": ours[0], "peer_s": peer[0],
            "ratio": statistics.median(other[0] / one[0] for one, other in pairs),
            "ours_mib": ours[2] - bare[0], "peer_mib": peer[2] - bare[1], "repeats": repeats,
            "ours_wall_s": ours[1], "ours_peak_mib": ours[2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=(*SIZES, "all"), default="all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print(f"{'size':8s}  {'eval.py':>9s}  {'pytrec_eval':>11s}  {'ratio':>5s}  {'MiB':>5s}  {'MiB':>5s}  "
              "(CPU seconds; ours, peer)")
    for size in SIZES if args.size == "all" else [args.size]:
        row = compare(size, args.repeats)
        if args.json:
            rounded = {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}
            print(json.dumps(rounded), flush=True)
            continue
        print(f"{size:8s}  {row['ours_s']:7.2f} s  {row['peer_s']:9.2f} s  {row['ratio']:5.2f}  "
              f"{row['ours_mib']:5.0f}  {row['peer_mib']:5.0f}  (ours: {row['ours_wall_s']:.2f} s on the "
              f"clock, {row['ours_peak_mib']:.0f} MiB with Python and numpy)", flush=True)


if __name__ == "__main__":
    main()
