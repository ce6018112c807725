"""BM25 of data.py beside bm25s: indexing and searching the same passages, in turn, each in a fresh process.

    python benchmarks/bench_bm25.py [--size small|medium] [--repeats 3] [--json]

Passages are made up: 60 words each, drawn from 50,000 by Zipf's law; queries have 6 such words; 100 passages are asked for. Both sides
start from strings (tokenising counts) and run on one thread; seconds are CPU seconds, MiB the peak above what the process held before.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SIZES = {"small": (10_000, 200), "medium": (100_000, 1000)}  # passages, queries


def make_texts(count: int, words: int, seed: int) -> list[str]:
    """`count` texts of `words` words with Zipf's distribution over 50,000."""
    import numpy as np

    rng = np.random.default_rng(seed)
    chances = np.cumsum(1 / np.arange(1, 50_001))
    vocabulary, texts = [f"word{number}" for number in range(50_000)], []
    for _ in range(count):  # one by one, so that the peak before the measurement is the texts themselves
        texts.append(" ".join(vocabulary[n] for n in np.searchsorted(chances, rng.random(words) * chances[-1]).tolist()))
    return texts


def ours(passages: list[str], queries: list[str]) -> tuple[float, float]:
    """CPU seconds at the end of (indexing, searching) with data.BM25."""
    from data import BM25

    index = BM25(passages)
    indexed = time.process_time()
    for query in queries:
        index.search(query, 100)
    return indexed, time.process_time()


def theirs(passages: list[str], queries: list[str]) -> tuple[float, float]:
    """The same with bm25s, with its English stop words and without a stemmer."""
    import bm25s

    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    index.index(bm25s.tokenize(passages, stopwords="en", show_progress=False), show_progress=False)
    indexed = time.process_time()
    index.retrieve(bm25s.tokenize(queries, stopwords="en", show_progress=False), k=100, show_progress=False)
    return indexed, time.process_time()


def work(side: str, size: str) -> None:
    """What a child process does: one measurement, printed as JSON (seconds of indexing and searching, MiB)."""
    import data  # noqa: F401  (imports are outside of both measurements)

    if side == "bm25s":
        import bm25s  # noqa: F401
    count, asked = SIZES[size]
    passages, queries = make_texts(count, 60, 0), make_texts(asked, 6, 1)
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    indexed, searched = {"ours": ours, "bm25s": theirs}[side](passages, queries)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([indexed - begin, searched - indexed, (peak - baseline) / 1024]))


def measure(side: str, size: str) -> list[float]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--worker", side, "--size", size]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure both sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    parser.add_argument("--worker", choices=("ours", "bm25s"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options.size)
    pairs = [(measure("ours", options.size), measure("bm25s", options.size)) for _ in range(options.repeats)]
    median = [[statistics.median(pair[side][column] for pair in pairs) for column in range(3)] for side in (0, 1)]
    ratio = statistics.median(sum(peer[:2]) / sum(own[:2]) for own, peer in pairs)
    if options.json:
        print(json.dumps({"what": "bm25", "size": options.size, "peer": "bm25s", "ours_s": sum(median[0][:2]), "peer_s": sum(median[1][:2]),
                          "ratio": ratio, "ours_mib": median[0][2], "peer_mib": median[1][2], "repeats": options.repeats}))
        return None
    print("{:,} passages, {:,} queries, median of {}".format(*SIZES[options.size], options.repeats))
    print(f"{'':10s}{'index s':>10s}{'search s':>10s}{'peak MiB':>10s}")
    for name, row in zip(("data.py", "bm25s"), median):
        print(f"{name:10s}{row[0]:10.2f}{row[1]:10.2f}{row[2]:10.0f}")
    print(f"ratio bm25s / data.py of the whole: {ratio:.2f}")
    return None


if __name__ == "__main__":
    main()
