"""Prompts in YAML files, in the format of rank_llm's templates for listwise rerankers.

    method: singleturn_listwise                    # a chat of one turn
    system_message: "You order passages."
    prefix: "Order {num} passages for the query {query}.\n"
    body: "[{rank}] {candidate}\n"                 # written once per passage
    suffix: "Answer as in [2] > [1]. The query again: {query}"

`multiturn_listwise` has prefix_user and prefix_assistant, body_user and body_assistant, and suffix_user. As
in rank_llm, str.format fills in the strings (so a plain brace is written twice), but not system_message.
"""

from __future__ import annotations

import functools
import hashlib
import re

import yaml

from support.cli import InputError
from support.streams import read_text

METHODS = {"singleturn_listwise": ["prefix", "body", "suffix"],
           "multiturn_listwise": ["prefix_user", "prefix_assistant", "body_user", "body_assistant",
                                  "suffix_user"]}
# rank_llm's rules for reading the answers have no effect: reward.py reads all answers by the same rules.
IGNORED = "method output_pattern output_patterns output_validation_regex output_extraction_regex".split()
# Here a query or passage could complete a chat mark or a passage number with the template's own characters.
UNSAFE = re.compile(r"[<|[]\{(?:query|candidate)\}|\{(?:query|candidate)\}[>|\]{]")


def is_file(prompt: str) -> bool:
    """Whether a prompt is a file, not the name of a built-in one."""
    return str(prompt).lower().endswith((".yaml", ".yml"))


@functools.lru_cache(maxsize=None)
def read_prompt_file(path: str) -> tuple[dict[str, str], str]:
    """(turns by multiturn_listwise's names, SHA-256). Read once per process, so that a run has one prompt.

    OSError if it cannot be read; InputError, one line with file and fields, if it is not as expected.
    """
    text = read_text(path)
    try:
        template = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2025-99-99
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if faults := find_faults(template):
        raise InputError(f"{path}: {'; '.join(faults)}")
    turns = {}
    for name in [name for name in template if name not in IGNORED]:
        turn = template[name]
        if name == "system_message":
            turn = turn.replace("{", "{{").replace("}", "}}")
        turns[name if "_" in name else f"{name}_user"] = turn
    return turns, hashlib.sha256(text.encode()).hexdigest()


def prompt_record(prompt: str) -> str:
    """What a run's files record: the prompt's name, or its file's content, so that a change is noticed."""
    return f"file with SHA-256 {read_prompt_file(prompt)[1]}" if is_file(prompt) else prompt


def placeholders(text: str) -> list[str]:
    """All that has a brace in a string for str.format: "{query}", but also "{{" and a single "}"."""
    return re.findall(r"\{\{|\}\}|\{[^{}]*\}|[{}]", text)


def find_faults(template) -> list[str]:
    """What is wrong in a template, in words that name the fields."""
    method = template.get("method") if isinstance(template, dict) else None
    if method not in [*METHODS]:
        return [f"method: expected {' or '.join(METHODS)}, found {method!r:.60}"]
    body = "body" if method == "singleturn_listwise" else "body_user"
    needed = [body]
    if "prefix_user" in template or "prefix_assistant" in template:  # both or none, as in rank_llm
        needed += ["prefix_user", "prefix_assistant"]
    faults, used = [f"missing field {name}" for name in needed if name not in template], []
    for name, text in template.items():
        if name in IGNORED:
            continue
        if name not in ["system_message", *METHODS[method]]:
            faults.append(f"unknown field {name}")
            continue
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):  # half a surrogate pair
            faults.append(f"{name}: expected a string, found {text!r:.60}")
            continue
        known = ["{rank}", "{candidate}"] if name.startswith("body") else ["{query}", "{num}"]
        found = placeholders(text)
        if name == "system_message":
            wrong = [one for one in found if one in known]
        else:
            wrong = [one for one in found if one not in ("{{", "}}", *known)]
            used += found
        faults += [f"{name}: unknown placeholder {one}" for one in wrong]
        faults += [f"{name}: {place} needs a blank: with a text in it, it may become a chat mark"
                   for place in UNSAFE.findall(text)]
        faults += [f"{name}: expected {one}" for one in known if name == body and one not in found]
    if "{query}" not in used:
        faults.append("no field has {query}")
    return faults
