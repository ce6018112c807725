"""Executes the recipe of docs/rerank.md, which turns a folder of documents into candidates."""

import re
from pathlib import Path

import pytest

from support.files import read_candidates

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_recipe_turns_a_folder_and_questions_into_candidates(tmp_path, monkeypatch):
    pytest.importorskip("bm25s")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rerank.md").read_text(encoding="utf-8"), re.DOTALL)
    (recipe,) = (block for block in blocks if "bm25s" in block)
    (tmp_path / "documents" / "sub").mkdir(parents=True)
    for name, text in {
        "moat": "A moat is water around a castle.",
        "bread": "Bread is made of flour – and water.",
        "sub/violin": "A violin has four strings.",
    }.items():
        (tmp_path / "documents" / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "questions.txt").write_text(
        "what is around a castle?\nstrings of a violin\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    exec(compile(recipe, "docs/rerank.md", "exec"), {})
    lists = read_candidates("candidates.jsonl")
    assert [(query.qid, query.query) for query in lists] == [
        ("1", "what is around a castle?"),
        ("2", "strings of a violin"),
    ]
    assert [Path(query.docids[0]).stem for query in lists] == ["moat", "violin"]
    for query in lists:
        assert len(query.docids) == 3 and query.scores == sorted(query.scores, reverse=True)
        assert query.texts == [Path(docid).read_text(encoding="utf-8") for docid in query.docids]
