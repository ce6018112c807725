"""A reranking on disk: OUTPUT is the TREC run, OUTPUT.jsonl has a row per query and a row per window.

A run that was interrupted can be resumed from OUTPUT.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from support.cli import InputError
from support.files import Candidates, check_run, write_run
from support.prompt_file import prompt_record
from support.streams import atomic_write

# Options that cannot change an answer. All others must be the same when a run is resumed.
FREE_TO_CHANGE = ("input", "output", "resume", "stats", "limit", "format", "explain", "tag", "concurrency",
                  "timeout", "device", "documents", "query", "serve", "host")
CLOSING = ("ok", "repaired", "untagged", "truncated", "malformed", "empty", "error", "unchanged", "hit limit",
           "prompts shortened", "queries shortened", "passages", "passages shortened", "characters removed",
           "prompt tokens", "new tokens")


class RunOnDisk:
    """The files of a reranking: OUTPUT.jsonl grows with each query, OUTPUT is written at the end.

    `orders` has the finished queries, `counts` is for the closing line. InputError, before any work, where
    the files cannot be written or are another run's.
    """

    def __init__(self, settings, lists: list[Candidates], input_hash: str):
        self.settings, self.trace = settings, Path(settings.output + ".jsonl")
        self.check_outputs(lists)
        self.orders: dict[str, list[str]] = {}
        self.counts = Counter()
        self.reason = ""  # why the first window without an answer has none
        self.identity = {name: value for name, value in dataclasses.asdict(settings).items()
                         if name not in FREE_TO_CHANGE}
        self.identity["input"] = input_hash
        self.identity["prompt"] = prompt_record(settings.prompt)
        self.identity["server"] = "some address" if settings.server else ""  # the address may change
        self.kept = self.finished_lines(len(lists)) if settings.resume else []
        for line in self.kept:
            self.count(json.loads(line))

    def begin(self) -> None:
        """Begin to write, behind the lines of the run that is resumed."""
        with atomic_write(self.trace, "wb") as file:
            file.writelines(self.kept)
        self.file = open(self.trace, "a", encoding="utf-8", errors="replace", newline="\n")

    def check_outputs(self, lists: list[Candidates]) -> None:
        """InputError where writing would fail, or overwrite something that is needed."""
        settings, trace = self.settings, self.trace
        check_run(settings.output, {c.qid: c.docids for c in lists}, settings.tag)
        check_run(trace, {}, settings.tag)
        if os.path.isdir(settings.stats):
            raise InputError(f"--stats {settings.stats}: is a folder; expected the name of a file to write")
        taken = {os.path.realpath(settings.input)}
        for name in filter(None, (settings.output, trace, settings.stats)):
            if os.path.realpath(name) in taken:
                raise InputError(f"{name}: would overwrite the input or another output")
            taken.add(os.path.realpath(name))
        there = trace.read_bytes().count(b'"texts": ') if trace.exists() and not settings.resume else 0
        if 0 < there < len(lists):
            raise InputError(f"{trace} holds {there} of the {len(lists)} queries: pass --resume to go on, "
                             "or remove it")
        if there > len(lists):
            raise InputError(f"{trace} holds {there} queries, and this run has {len(lists)}: give another "
                             "--output, or remove it")

    def finished_lines(self, queries: int) -> list[bytes]:
        """The lines of OUTPUT.jsonl that a resumed run keeps. InputError where they are another run's.

        An incomplete line, or a window that got no answer, ends them. The rounding of a local model's answers
        depends on what shares their batch, so only whole batches are kept.
        """
        lines = self.trace.read_bytes().splitlines(True) if self.trace.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        runs, whole, end = [], [], 0  # of each query: the options it was ranked with, its lines
        try:
            while end < len(lines):
                query = json.loads(lines[end])
                found = lines[end:end + 1 + query["windows"]]
                runs.append(dict(query["run"]))
                if len(found) <= query["windows"] or not found:
                    break
                if any(json.loads(line)["status"] == "error" for line in found[1:]):
                    break
                whole.append(found)
                end += len(found)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"--resume: {self.trace} is not what rearank.py writes ({error!r})") from None
        for run in runs:
            for name in sorted({**self.identity, **run}):
                if run.get(name) != self.identity.get(name):
                    found = f"--{name.replace('_', '-')} {run.get(name)!r}"
                    if name == "prompt":
                        found += f"; {self.settings.prompt} is another"
                    raise InputError(f"--resume: {self.trace} was begun with "
                                     f"{'another input' if name == 'input' else found}")
        batch = 1 if self.settings.server else self.settings.max_num_seqs
        kept = len(whole) if len(whole) >= queries else len(whole) // batch * batch
        if kept < len(whole):
            print(f"--resume: keeps {kept} of {len(whole)} finished queries (whole batches of --max-num-seqs "
                  f"{batch})", file=sys.stderr)
        return [line for lines in whole[:kept] for line in lines]

    def add(self, c: Candidates, ranking) -> None:
        """Write a query's rows."""
        for row in self.rows(c, ranking):
            self.count(row)
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()

    def rows(self, c: Candidates, ranking) -> Iterator[dict]:
        """The query with its texts and final order, then a row per window."""
        order = [c.docids[result.index] for result in ranking] + c.docids[len(ranking):]
        yield {"qid": c.qid, "query": c.query, "docids": c.docids, "texts": c.texts, "order": order,
               "windows": len(ranking.windows), "run": self.identity}
        for w in ranking.windows:
            lengths = [len(" ".join(c.texts[p].split())) for p in w.positions]
            removed = [n - w.shortened.passage_chars for n in lengths if n > w.shortened.passage_chars]
            row = {"qid": c.qid, "docids": [c.docids[p] for p in w.positions], "status": w.status,
                   "order": [c.docids[p] for p in w.order], "reasoning": w.reasoning, "response": w.response,
                   "tokens": w.tokens, "prompt_tokens": w.prompt_tokens, "finished": w.finished,
                   "error": w.error, "prompt_shortened": w.shortened.prompt_shortened,
                   "query_chars_removed": w.shortened.query_chars_removed,
                   "passages_shortened": len(removed), "chars_removed": sum(removed),
                   "samples": [{"response": text, "status": status, "order": [c.docids[p] for p in places]}
                               for text, status, places in w.samples]}
            if self.settings.algorithm == "top-down":
                row["part"] = w.part
            if self.settings.shuffle:
                row["shares"] = w.shares
                for sample, shown in zip(row["samples"], w.shown):
                    sample["docids"] = [c.docids[p] for p in shown]
            yield row

    def count(self, row: dict) -> None:
        """Count a row, of this run or of the part that it resumes."""
        if "texts" in row:
            self.orders[row["qid"]] = row["order"]
            return
        self.counts.update({
            "calls": len(row["samples"]) or 1, "windows": 1, "rounds": int(row.get("part", 0) == 0),
            row["status"]: 1,
            "unchanged": int(row["order"] == row["docids"]), "hit limit": int(not row["finished"]),
            "prompts shortened": int(row["prompt_shortened"]),
            "queries shortened": int(row["query_chars_removed"] > 0), "passages": len(row["docids"]),
            "passages shortened": row["passages_shortened"], "characters removed": row["chars_removed"],
            "prompt tokens": row["prompt_tokens"], "new tokens": row["tokens"]})
        self.reason = self.reason or row["error"]

    def close(self, queries: int) -> None:
        """Write the TREC run of the queries that are finished, and report problems."""
        self.file.close()
        if self.orders:
            write_run(self.settings.output, self.orders, self.settings.tag)
        if len(self.orders) < queries:
            there = self.settings.output if self.orders else "nothing"
            print(f"stopped early: {there} holds {len(self.orders)} of {queries} queries; --resume goes on",
                  file=sys.stderr)
        if self.counts["error"]:
            print(f"{self.counts['error']} windows without an answer, the first: {self.reason}; when the "
                  "cause is mended, --resume asks again", file=sys.stderr)
