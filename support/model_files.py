"""The files of a model folder: which are absent, damaged, or stand in for the real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from support.cli import InputError

# Files read beside config.json. Of the weights and of the vocabulary, transformers reads the first found.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
           "pytorch_model.bin.index.json")
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja",
            "special_tokens_map.json", "added_tokens.json")


def present(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that is in the folder. InputError, with the files found, if none is."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(path.name for path in folder.iterdir() if path.exists())[:8]) or "nothing"
    raise InputError(f"there is no {names[0]} in this folder, only {there}")


def check_content(path: Path) -> None:
    """InputError, with the file's name, if the content is damaged or of another kind."""
    fault = ""
    try:
        with open(path, "rb") as file:
            head = file.read(200).strip().lower()
        if not head:
            fault = "is empty"
        elif head.startswith(b"version https://git-lfs"):
            fault = "is a Git LFS pointer, not the file itself"
        elif head.startswith((b"<!doctype", b"<html")):
            fault = "is a web page, not the file itself"
        elif path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # reads the header and compares it with the file's size
                pass
    except (OSError, SafetensorError) as error:
        fault = f"cannot be read ({error})"
    if fault:
        raise InputError(f"{path.name} {fault}; fetch it again (`hf download` or `git lfs pull`)")


def read_json(path: Path) -> dict:
    """The object in a JSON file. InputError, with the file's name, if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is not JSON in UTF-8, or not whole ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path.name} holds {json.dumps(content)[:50]}, not a JSON object")
    return content
