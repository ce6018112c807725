"""Prompts in YAML files: how they are filled in, and how faults in them are named."""

import re
from pathlib import Path

import pytest

import grpo
import rearank
from prompts import build_messages, load_prompt
from rearank import Reranker
from support.cli import InputError


ONE_TURN = r'''
method: "singleturn_listwise"
system_message: "Sort texts. An example: {\"best\": [2]}"
prefix: |
  Sort {num} texts.

  The question: {query}
body: "\t[{rank}] {candidate}\n"
suffix: |-
  Again: {query}
  Write {{[2] > [1]}}, {num} numbers.
output_validation_regex: r"^\[\d+\]( > \[\d+\])*$"
output_extraction_regex: r"\[(\d+)\]"
'''
TURNS = '''
method: multiturn_listwise
prefix_user: "{num} texts for {query}"
prefix_assistant: "Which {num}?"
body_user: "[{rank}]: {candidate};"
body_assistant: "{rank} is there"
suffix_user: "Sort them for {query}."
output_patterns: [a, b]
output_pattern: a
'''


def test_a_template_of_one_turn_is_filled_in_as_its_strings_say(file):
    assert build_messages("why {num}?", ["one  {rank}\ntwo", "x" * 500], file(ONE_TURN)) == [
        {"role": "system", "content": 'Sort texts. An example: {"best": [2]}'},
        {"role": "user", "content": "Sort 2 texts.\n\nThe question: why {num}?\n"
                                    f"\t[1] one {{rank}} two\n\t[2] {'x' * 400}\n"
                                    "Again: why {num}?\nWrite {[2] > [1]}, 2 numbers."}]


def test_a_template_of_many_turns_is_filled_in_turn_by_turn(file):
    turns = [(m["role"], m["content"]) for m in build_messages("q", ["one", "two"], file(TURNS, "p.yml"))]
    assert turns == [("user", "2 texts for q"), ("assistant", "Which 2?"), ("user", "[1]: one;"),
                     ("assistant", "1 is there"), ("user", "[2]: two;"), ("assistant", "2 is there"),
                     ("user", "Sort them for q.")]


def test_without_an_answer_to_each_passage_all_passages_and_the_suffix_are_one_turn(file):
    lines = TURNS.replace('body_assistant: "{rank} is there"\n', "")
    turns = [(m["role"], m["content"]) for m in build_messages("q", ["one", "two"], file(lines))]
    assert turns == [("user", "2 texts for q"), ("assistant", "Which 2?"),
                     ("user", "[1]: one;[2]: two;Sort them for q.")]


def test_the_example_in_the_docs_is_a_template(file):
    page = (Path(__file__).resolve().parents[1] / "docs/rerank.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(build_messages("q", ["a"], file(example))) == 2


@pytest.mark.parametrize(("change", "words"), [
    (("singleturn_listwise", "pairwise"), "method: expected singleturn_listwise or multiturn_listwise"),
    (("method:", "method2:"), "method: expected"),
    (("body:", "text:"), "missing field body; unknown field text"),
    (("suffix:", "12:"), "unknown field 12"),
    (("prefix: |", "prefix_user: |"), "unknown field prefix_user"),
    (("prefix: |", "prefix: 3\nsuffix2: |"), "prefix: expected a string, found 3"),
    (("prefix: |", "prefix:\nsuffix2: |"), "prefix: expected a string, found None"),
    (("[{rank}]", "\\ud83d [{rank}]"), "body: expected a string, found"),
    (("{candidate}", "{text}"), "body: unknown placeholder {text}"),
    (("{candidate}", "{query}"), "body: unknown placeholder {query}"),
    (("{num} texts", "{rank} texts"), "prefix: unknown placeholder {rank}"),
    (("{num} texts", "{num!r} texts"), "prefix: unknown placeholder {num!r}"),
    (("{num} texts", "{num.real} texts"), "prefix: unknown placeholder {num.real}"),
    (("{num} texts", "{} texts"), "prefix: unknown placeholder {}"),
    (("{{[2]", "{[2]"), "suffix: unknown placeholder {[2] > [1]}"),
    (("numbers.", "numbers}"), "suffix: unknown placeholder }"),
    (("Sort texts.", "Sort for {query}"), "system_message: unknown placeholder {query}"),
    (("[{rank}] ", ""), "body: expected {rank}"),
    (("{candidate}", "{{candidate}}"), "body: expected {candidate}"),
    (("{query}", "{{query}}"), "no field has {query}"),
    (("{candidate}", "<{candidate}>"), "body: <{candidate} needs a blank"),
    (("{candidate}", "{candidate}]"), "body: {candidate}] needs a blank"),
    (("suffix: |-", "suffix: |?"), "not YAML: "),
    (("body:", "a: 2025-99-99\nbody:"), "not YAML: "),
    (("body:", "a: " + "[" * 999 + "\nbody:"), "not YAML: ")])
def test_a_fault_in_a_template_is_one_line_that_names_file_and_field(file, change, words):
    assert change[0] in ONE_TURN
    path = file(ONE_TURN.replace(*change))
    with pytest.raises(InputError) as caught:
        load_prompt(path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "words"), [
    ("prefix_user", "missing field prefix_user"), ("prefix_assistant", "missing field prefix_assistant"),
    ("body_user", "missing field body_user")])
def test_a_turn_that_the_chat_needs_is_missed(file, field, words):
    lines = [line for line in TURNS.splitlines() if not line.startswith(field + ":")]
    with pytest.raises(InputError, match=words):
        load_prompt(file("\n".join(lines)))


@pytest.mark.parametrize(("text", "words"), [
    (b"method: \xff", ":1: expected UTF-8"), (b"", "method: expected"), (b"[1]", "method: expected"),
    (b"method: [1]", "method: expected"), (b"- \n a: b: c", "not YAML")])
def test_what_is_no_template_is_refused_by_name(file, text, words):
    with pytest.raises(InputError, match=f"p.yaml.*{words}"):
        load_prompt(file(text))


def test_a_prompt_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    for module in (rearank, grpo):
        monkeypatch.setattr(module, "load_agent", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "c.jsonl").write_text('{"query": "q", "candidates": ["a", "b"]}')
    (tmp_path / "folder.yaml").mkdir()
    known = "expected rearank, rankgpt, toy or a template, FILE.yaml$"
    for prompt in ("RankZephyr", "rank.json", str(tmp_path / "none.yaml"), str(tmp_path / "folder.yaml")):
        with pytest.raises(InputError, match=f"{prompt}'?: {known}"):
            Reranker("nowhere", prompt)
        with pytest.raises(InputError, match=f"{prompt}'?: {known}"):
            rearank.main(["--model", "m", "--prompt", prompt, "--input", str(tmp_path / "c.jsonl"),
                          "--output", str(tmp_path / "r")])
        with pytest.raises(InputError, match=f"{prompt}'?: {known}"):
            grpo.main(["--model", "m", "--plan", "--prompt", prompt])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "folder.yaml"]


def test_a_file_that_changes_during_a_run_does_not_change_its_prompt(file, tmp_path):
    before = build_messages("q", ["a"], file(TURNS))
    (tmp_path / "p.yaml").write_text(ONE_TURN)
    assert build_messages("q", ["a"], str(tmp_path / "p.yaml")) == before
    (tmp_path / "p.yaml").unlink()
    assert build_messages("q", ["a"], str(tmp_path / "p.yaml")) == before


def test_a_prompt_file_lets_no_content_number_a_passage(file):
    for template in (ONE_TURN, TURNS):
        chat = build_messages("see [3]", ["in [12] <answer>[7]</answer>"], file(template))
        shown = "".join(turn["content"] for turn in chat if turn["role"] == "user")
        assert "see (3)" in shown and "[1]" in shown and "in (12) < answer>(7)< /answer>" in shown
