"""Report: why a passage rose. One HTML page from the JSONL that rearank.py writes beside a run.

    python report.py reranked.trec.jsonl                     writes reranked.html
    python report.py reranked.trec.jsonl --qrels QRELS       with labels, and NDCG@10 before and after

It lists the queries; of one query it shows both orders, of one passage its way through the windows and what
the reasoning said of it. A prompt numbers its passages from 1: [3] is another one in each window. Ranks are
of the whole list, replayed. NDCG@10 is eval.py's: unjudged is irrelevant there, so the page counts those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

from eval import evaluate
from reward import sentences
from support.cli import InputError, command_line, run_main, setting
from support.files import read_qrels, trec_id
from support.streams import atomic_write, open_bytes

# What rearank.py writes: a line for each query, then one for each of its windows, as they were answered.
QUERY = {"qid": str, "query": str, "docids": list, "texts": list, "order": list}
WINDOW = {"qid": str, "docids": list, "status": str, "order": list, "reasoning": str, "response": str,
          "tokens": int, "finished": bool, "prompt_shortened": bool}


def load(line: bytes) -> dict:
    """The JSON object in a line; an empty one where there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(line), dict):  # half a surrogate pair fits into no file
            return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return {}


def fits(row: dict, form: dict[str, type]) -> bool:
    """Whether `row` has the fields of `form` (lists: of strings), and its order is one of its docids."""
    return (all(isinstance(row.get(name), kind) for name, kind in form.items())
            and all(isinstance(item, str) for name in form if form[name] is list for item in row[name])
            and len({*row["docids"]}) == len(row["docids"]) and sorted(row["docids"]) == sorted(row["order"]))


def read_queries(path: str | Path) -> list[dict]:
    """The queries' lines, each with its "windows". InputError names the first line that does not fit."""
    queries: dict[str, dict] = {}
    with open_bytes(path) as file:
        lines = file.read().split(b"\n")
    for n, line in enumerate(lines, 1):
        row = load(line)
        query = queries.get(str(row.get("qid")))
        if not query and fits(row, QUERY) and len(row["texts"]) == len(row["docids"]):
            queries[row["qid"]] = row | {"windows": []}
        elif query and fits(row, WINDOW) and row["docids"] and {*row["docids"]} <= {*query["docids"]}:
            query["windows"].append(row)
        elif line and not row and queries and n == len(lines):  # a killed run leaves half a line at the end
            print(f"{path}:{n}: cut off (was the run stopped?), left out", file=sys.stderr)
        elif line or not queries and n == len(lines):
            form, what = (WINDOW, f"a window of {row['qid']}") if query else (QUERY, "a query first")
            raise InputError(f"{path}:{n}: expected {what}, as rearank.py writes it ({', '.join(form)}), "
                             f"found {line.decode(errors='replace')!r:.60}")
    return [*queries.values()]


def replay(docids: list[str], windows: list[dict]) -> tuple[dict[str, list[tuple[int, int, int]]], list[str]]:
    """({docid: its path, [(window, rank before, rank after), ...]}, the order at the end); all from 1.
    The documents of a window trade the places they hold in the list: its best gets the highest of them.

    >>> replay(["a", "b", "c"], [{"order": ["c", "b"]}, {"order": ["c", "a"]}])
    ({'a': [(2, 1, 2)], 'b': [(1, 2, 3)], 'c': [(1, 3, 2), (2, 2, 1)]}, ['c', 'a', 'b'])
    """
    ranks, paths = {docid: rank for rank, docid in enumerate(docids, 1)}, {docid: [] for docid in docids}
    for number, window in enumerate(windows, 1):
        for docid, rank in zip(window["order"], sorted(ranks[docid] for docid in window["order"])):
            paths[docid].append((number, ranks[docid], rank))
            ranks[docid] = rank
    return paths, sorted(ranks, key=ranks.get)


def ndcg_at_10(queries: list[dict], qrels: dict[str, dict[str, int]], field: str) -> dict[str, float]:
    """{qid: NDCG@10} of the judged queries, before ("docids") or after ("order")."""
    run = {q["qid"]: {trec_id(docid): -float(rank) for rank, docid in enumerate(q[field])} for q in queries}
    return {qid: row["ndcg_cut_10"] for qid, row in evaluate(qrels, run, ["ndcg_cut.10"]).items()}


def describe(query: dict, judged: dict[str, int] | None, text_chars: int = 5000) -> dict:
    """What the page shows of a query. Passages are numbers there: places in the first-stage order, from 0.
    Texts are cut: prompts show 400 characters, BRIGHT has some of a million.
    """
    docids, order, windows = query["docids"], query["order"], []
    number, (paths, end) = {docid: n for n, docid in enumerate(docids)}, replay(docids, query["windows"])
    labels = {docid: (judged or {}).get(trec_id(docid)) for docid in docids}
    if any("part" in row for row in query["windows"]):  # top-down: only begin and end of a path are known
        paths = {docid: [(0, n + 1, order.index(docid) + 1)] for docid, n in number.items()}
        end = order
    for n, row in enumerate(query["windows"], 1):
        head, _, tail = row["response"].partition(row["reasoning"] or "\0")
        ranks = [before for docid in row["order"] for w, before, _ in paths[docid] if w in (0, n)]
        status = row["status"]
        if not row["finished"]:
            status += ", hit limit"
        if row["prompt_shortened"]:
            status += ", prompt shortened"
        windows.append({"number": n, "status": status, "ranks": f"{min(ranks)}–{max(ranks)}",
                        "shown": [number[docid] for docid in row["docids"]],
                        "text": [(head, []), *sentences(row["reasoning"]), (tail, [])]})
    counts = Counter(row["status"] for row in query["windows"])
    return {"qid": query["qid"], "query": query["query"], "docids": docids,
            "texts": [text[:text_chars] + " […]" * (len(text) > text_chars) for text in query["texts"]],
            "labels": judged and [*labels.values()], "order": [number[docid] for docid in order],
            "unjudged": [sum(labels[docid] is None for docid in top[:10]) for top in (docids, order)],
            "statuses": ", ".join(f"{count} {status}" for status, count in counts.most_common()),
            "paths": [*paths.values()], "windows": windows, "whole": end == order}


def page(queries: list[dict], qrels: dict[str, dict[str, int]], title: str) -> str:
    """The page. Its data are JSON in a script element, without the "<" that could end it."""
    sides = [ndcg_at_10(queries, qrels, field) for field in ("docids", "order")]
    rows = [describe(query, qrels.get(query["qid"])) | {"ndcg": [ndcg.get(query["qid"]) for ndcg in sides]}
            for query in queries]
    return PAGE.replace("{DATA}", json.dumps({"title": title, "queries": rows}).replace("<", "\\u003c"))


@dataclasses.dataclass
class ReportSettings:
    """Settings of `python report.py`."""

    trace: str = setting("", "The JSONL that rearank.py wrote (.gz too); - is standard input.",
                         positional=True, metavar="JSONL")
    qrels: str = setting("", "TREC judgements, for labels and NDCG@10.")
    output: str = setting("", "The page (default: the input's name, .html for .trec.jsonl or .jsonl).")


def main(argv: list[str] | None = None) -> None:
    """Write the page as the command line says."""
    settings = command_line(ReportSettings, argv, __doc__, "report.py")
    name = "report" if settings.trace == "-" else settings.trace
    output = settings.output or re.sub(r"(\.trec)?(\.jsonl)?(\.gz)?$", "", name) + ".html"
    if os.path.realpath(output) in (os.path.realpath(settings.trace), os.path.realpath(settings.qrels)):
        raise InputError(f"--output {output}: would overwrite the input; expected another name")
    queries, qrels = read_queries(settings.trace), read_qrels(settings.qrels) if settings.qrels else {}
    if qrels and not qrels.keys() & {query["qid"] for query in queries}:
        raise InputError(f"{settings.trace}: no query in common with {settings.qrels}")
    with atomic_write(output) as file:
        file.write(page(queries, qrels, Path(name).name))
    print(f"{output}: {len(queries)} queries")


# In its script html`...` escapes each string that is put into it: what the data hold stays text.
PAGE = r"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Report</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline'">
<style>
  :root { color-scheme: light dark; font: 14px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
    --soft: light-dark(#e8e8e4, #33373e); --rule: light-dark(#d2d2cd, #44484f); }
  .l1 { --label: #56b4e9; }  .l2 { --label: #009e73; }  .l3 { --label: #0072b2; }  /* Okabe and Ito's */
  body { margin: 0 20px 40px; overflow-wrap: break-word; }  .list .query, .query .list { display: none; }
  header { display: flex; gap: 16px; padding: 8px 0; align-items: center; background: Canvas;
    position: sticky; top: 0; z-index: 1; border-bottom: 1px solid var(--rule); }
  a { color: inherit; }  .faint { color: light-dark(#5f5f5a, #a3a39d); }  header .faint { flex: 1; }
  h1, h2 { font-size: 18px; margin: 8px 0; }  h3 { font-size: 14px; margin: 12px 0 0; }  p { margin: 4px 0; }
  table { border-collapse: collapse; width: 100%; }  th button { all: unset; cursor: pointer; }
  th, td { padding: 3px 16px 3px 4px; border-bottom: 1px solid var(--rule); text-align: left; }
  .at, tr:focus-within { background: var(--soft); }  .row, td a { scroll-margin: 60px 0 45vh; }
  #orders { display: grid; grid-template-columns: 1fr 100px 1fr minmax(380px, 32%); align-items: start; }
  .row { display: flex; gap: 8px; height: 22px; text-decoration: none; white-space: nowrap; }
  .row * { flex: none; min-width: 2em; overflow: hidden; text-overflow: ellipsis; }  .row .faint { flex: 1; }
  #orders > * { min-width: 0; }  .row .docid { width: 5em; }  .tenth { box-shadow: 0 1px CanvasText; }
  .chip { border: 1px solid var(--rule); box-shadow: inset 9px 0 var(--label, #0000); padding: 0 3px 0 13px; }
  path { fill: none; stroke: var(--label, var(--rule)); stroke-width: 2; }  path.at { stroke: CanvasText; }
  #panel { position: sticky; top: 52px; max-height: calc(100vh - 70px); overflow: auto; padding-left: 24px; }
  .text { max-height: 20em; overflow: auto; white-space: pre-wrap; }  summary { margin-top: 12px; }
  blockquote { margin: 4px 0; padding-left: 10px; border-left: 3px solid var(--rule); }
  @media (max-width: 1200px) { #orders { grid-template-columns: 1fr 100px 1fr; } #panel { grid-column: 1 / -1;
    inset: auto 0 0; max-height: 42vh; padding: 0; background: Canvas; border-top: 2px solid; } }
</style><body><header><a href="#" class="query">All queries</a>
  <span class="faint">j k: query; ↑ ↓: passage; Enter: open; /: search; Esc: back</span>
  <label class="query"><input id="tops" type="checkbox"> top 10s only</label>
  <input id="search" type="search" placeholder="Search"><button id="theme">Dark / light</button></header>
<main class="list"><h1 id="title"></h1><p id="means"></p><table id="rows"></table></main>
<main class="query"><div id="about"></div><div id="orders"></div></main>
<script type="application/json" id="data">{DATA}</script><script>
const $ = id => document.getElementById(id), all = what => [...document.querySelectorAll(what)];
const html = (raw, ...values) => ({html: String.raw({raw}, ...values.map(value => [value].flat(3).map(
  part => part?.html ?? String(part ?? "").replace(/[&<>"']/g, it => `&#${it.charCodeAt()};`)).join("")))});
const show = (id, {html}) => $(id).innerHTML = html;
const {title, queries} = JSON.parse($("data").textContent), judged = queries.filter(q => q.labels);
let shown = queries, by = 0, falling = false, q, i;  // q: the open query, i: the passage picked there
const link = (q, i) => "#" + new URLSearchParams({q: q.qid, ...(i >= 0 && {d: q.docids[i]})});
const moved = (gain, digits) => gain ? (gain > 0 ? "▲" : "▼") + Math.abs(gain).toFixed(digits) : "=";
const change = ([a, b]) => a == null ? "–" : `${a.toFixed(4)} → ${b.toFixed(4)} ${moved(b - a, 4)}`;
const total = (key, side) => judged.reduce((sum, q) => sum + q[key][side], 0);
const tone = i => q.labels?.[i] == null ? "" : "l" + Math.max(0, Math.min(3, q.labels[i]));
const chip = i => q.labels ? html`<span class="chip ${tone(i)}">${q.labels[i] ?? "?"}</span>` : "";
const columns = [  // heading, what it sorts by, what it shows
  ["query", q => queries.indexOf(q), q => html`<a href="${link(q)}">${q.query || "–"}</a>`],
  ["id", q => q.qid, q => q.qid],
  ["NDCG@10", q => q.ndcg[1] - q.ndcg[0], q => change(q.ndcg)],
  ["unjudged in the top 10", q => q.unjudged[1], q => q.labels ? q.unjudged.join(" → ") : "–"],
  ["windows", q => q.statuses, q => q.statuses]];

function drawList() {
  const key = columns[by][1], sought = $("search").value.toLowerCase();
  shown = queries.filter(q => `${q.qid} ${q.query}`.toLowerCase().includes(sought))
    .sort((a, b) => (falling ? -1 : 1) * ((key(a) > key(b)) - (key(a) < key(b))));
  show("rows", html`<tr>${columns.map(([name], n) =>
      html`<th><button value="${n}">${name} ${n !== by ? "" : falling ? "↓" : "↑"}</button></th>`)}</tr>
    ${shown.map(q => html`<tr>${columns.map(column => html`<td>${column[2](q)}</td>`)}</tr>`)}`);
}

function drawQuery() {  // both orders, and a line for each passage
  const sought = $("search").value.toLowerCase(), rank = i => q.order.indexOf(i) + 1, y = k => 22 * k + 44;
  const fits = i => `${q.docids[i]} ${q.texts[i]}`.toLowerCase().includes(sought)
    && (!$("tops").checked || i < 10 || rank(i) <= 10);
  const before = [...q.docids.keys()].filter(fits), after = q.order.filter(fits);
  const rows = (name, list, rank, move) => html`<div><h3>${name}</h3>${list.map(i => html`
    <a class="row ${rank(i) === 10 ? "tenth" : ""}" data-i="${i}" href="${link(q, i)}">
      <span>${rank(i)}</span>${move(i)}${chip(i)}<span class="docid">${q.docids[i]}</span>
      <span class="faint">${q.texts[i].slice(0, 200)}</span></a>`)}</div>`;
  const lines = after.map((i, k) => html`<path data-i="${i}" class="${tone(i)}"
    d="M4 ${y(before.indexOf(i))} C50 ${y(before.indexOf(i))} 50 ${y(k)} 96 ${y(k)}"/>`);
  show("about", html`<h1>${q.query}</h1><p>${columns.slice(1).map(([name, , cell]) => `${name} ${cell(q)}; `)}
    ${q.labels && "boxes: label, ? unjudged; "}${q.whole ? "" : "windows are missing from the file"}</p>`);
  show("orders", html`${rows("First stage", before, i => i + 1, () => "")}
    <svg width="100" height="${y(after.length)}">${lines}</svg>
    ${rows("Reranked", after, rank, i => html`<span>${moved(i + 1 - rank(i))}</span>`)}
    <aside id="panel"></aside>`);
  drawPassage();
}

function drawPassage() {  // the one that is picked
  all("[data-i]").forEach(node => node.classList.toggle("at", +node.dataset.i === i));
  all("path.at").forEach(path => path.parentNode.append(path));  // drawn last: over the others
  if (i != null) show("panel", html`<h2>${chip(i)} ${q.docids[i]}</h2>
    <p>Rank ${[i + 1, ...q.paths[i].map(step => step[2])].join(" → ")}${
      q.labels && `; label: ${q.labels[i] ?? "none, counts as irrelevant"}`}</p>
    <div class="text">${q.texts[i]}</div>
    ${q.windows.toSorted((a, b) => b.shown.includes(i) - a.shown.includes(i)).map(drawWindow)}`);
}

function drawWindow({number, shown, ranks, status, text}) {  // the passage in it, and what was said of it
  const n = shown.indexOf(i) + 1, [, from, to] = q.paths[i].find(([w]) => !w || w === number) ?? [];
  const says = part => n && part[1].includes(n);
  const linked = ([text, numbers]) => text.split(/(?<=\[[^\[\]]*)(\d+)(?=[^\[\]]*\])/).map(part =>
    !numbers.includes(+part) || !(part - 1 in shown) ? part
      : html`<a href="${link(q, shown[part - 1])}" title="${q.texts[shown[part - 1]]}">${part}</a>`);
  return html`<details><summary class="${n ? "" : "faint"}">Window ${number} (ranks ${ranks}) ${status}:
      ${n ? html`<b>[${n}]${text.some(says) ? "" : ", not named"}, rank ${from} → ${to}</b>` : "without it"}
    </summary><div class="text">${text.map(part =>
      html`<span class="${says(part) ? "at" : ""}">${linked(part)}</span>`)}</div></details>
    ${text.filter(says).map(part => html`<blockquote>${linked(part)}</blockquote>`)}`;
}
onhashchange = () => {
  const wanted = new URLSearchParams(location.hash.slice(1)), was = q;
  q = queries.find(({qid}) => qid === wanted.get("q"));
  document.body.className = q ? "query" : "list";
  if (q) i = [q.docids.indexOf(wanted.get("d")), q.order[0]].find(i => i !== -1);
  if (q && q === was) return drawPassage();
  $("search").value = ""; scrollTo(0, 0);
  q ? drawQuery() : drawList();
  all(q ? "svg + div .at" : "td a")[q ? 0 : Math.max(0, shown.indexOf(was))]?.focus();
};
onkeydown = event => {
  const {key, target} = event, typing = target.id === "search", letter = key.length === 1;
  const step = {j: 1, ArrowDown: 1, k: -1, ArrowUp: -1}[key];
  if (event.ctrlKey || event.metaKey || event.altKey || typing && letter) return;
  if (key === "/") $("search").focus();
  else if (key === "Escape") typing ? target.blur() : location.hash = "";
  else if (typing && key === "Enter") all(q ? "svg + div a" : "td a")[0]?.click();
  else if (step) {
    const links = all(q && !letter ? "svg + div a" : "td a");
    const here = links.findIndex(a => q ? a.hash === link(q, letter ? -1 : i) : a === target);
    const next = links[Math.max(0, here + step)];
    next?.focus(), q && next?.click();
  } else return;
  event.preventDefault();
};
const dark = matchMedia("(prefers-color-scheme: dark)").matches, look = document.documentElement.style;
$("theme").onclick = () => look.colorScheme = look.colorScheme ? "" : dark ? "light" : "dark";
$("search").oninput = $("tops").onchange = () => q ? drawQuery() : drawList();
$("rows").onclick = ({target: {value: n}}) => n && ([by, falling] = [+n, by === +n && !falling], drawList());
$("title").textContent = document.title = title;
const [ndcg, unjudged] = ["ndcg", "unjudged"].map(key => [total(key, 0), total(key, 1)]), n = judged.length;
$("means").textContent = `${queries.length} queries, ${n} judged` + (!n ? "" : `: mean NDCG@10 ${
  change(ndcg.map(sum => sum / n))}; unjudged (so irrelevant) in the top 10: ${unjudged.join(" → ")}`);
drawList(), onhashchange();</script>
"""

if __name__ == "__main__":
    run_main(main)
