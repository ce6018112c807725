"""Faults in the files of a model folder: missing, damaged, or of another kind."""

import re

import pytest
from conftest import change
from safetensors.torch import load_file

from model import load_agent


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4000000000\n"


@pytest.mark.parametrize("file, content, cause", [
    ("model.safetensors", LFS, "Git LFS pointer.*git lfs pull"),
    ("tokenizer.json", LFS, "Git LFS pointer.*git lfs pull"),
    ("config.json", LFS, "Git LFS pointer.*git lfs pull"),
    ("model.safetensors", b"\n<!DOCTYPE html><html><title>503</title></html>", "web page"),
    ("tokenizer.json", b"<html>404</html>", "web page"),
    ("model.safetensors", b"", "empty"),
    ("tokenizer_config.json", b"", "empty"),
    ("chat_template.jinja", b"", "empty"),
    ("model.safetensors", b"Repository not found", "cannot be read.*header"),
    ("config.json", b'{"model_type": "qwen2", "hid', "not JSON.*not whole"),
    ("config.json", '{"model_type": "qwen2"}'.encode("utf-16"), "not JSON in UTF-8"),
    ("config.json", b"[" * 100_000, "not JSON"),  # deeper than Python's recursion limit
    ("config.json", b"[1, 2]", r"holds \[1, 2\], not a JSON object"),
    ("tokenizer.json", b"\xff\x80" * 20, "not JSON in UTF-8"),
    ("tokenizer_config.json", b"null", "holds null"),
    ("generation_config.json", b"[]", "not a JSON object"),
    ("added_tokens.json", b'"x"', "not a JSON object")])
def test_a_file_with_a_content_of_another_kind_is_named(saved, refusal, file, content, cause):
    (saved / file).write_bytes(content)
    assert re.match(rf"{re.escape(file)} .*{cause}", refusal(saved))


def test_a_file_that_is_absent_is_named_with_those_that_are_there(saved, refusal):
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        (saved / file).rename(saved / "aside")
        assert re.match(rf"there is no {file} in this folder, only aside, .*\.json", refusal(saved))
        (saved / file).symlink_to("/nowhere")  # as in a partly deleted cache of the hub
        assert file not in refusal(saved).partition("only ")[2].split(", ")
        (saved / "aside").rename(saved / file)
    inside = saved.parent / "run" / "checkpoint"
    inside.mkdir(parents=True)
    (inside / "config.json").touch()
    assert refusal(inside.parent).endswith(f"this is the folder of a run of grpo.py; pass {inside}")


def test_a_shard_that_is_absent_or_a_pointer_is_named(saved, refusal):
    names = load_file(saved / "model.safetensors")
    change(saved / "model.safetensors.index.json", metadata={},
           weight_map=dict.fromkeys(names, "model-00001-of-00001.safetensors"))
    load_agent(str(saved), "cpu")  # the index is not read if model.safetensors exists
    (saved / "model.safetensors").rename(saved / "aside")
    assert refusal(saved).startswith("model-00001-of-00001.safetensors cannot be read")
    (saved / "model-00001-of-00001.safetensors").write_bytes(LFS)
    assert refusal(saved).startswith("model-00001-of-00001.safetensors is a Git LFS pointer")
    (saved / "aside").rename(saved / "model-00001-of-00001.safetensors")
    load_agent(str(saved), "cpu")
    for content in ("{}", '{"weight_map": ["model-00001-of-00001.safetensors"]}'):
        (saved / "model.safetensors.index.json").write_text(content)
        assert refusal(saved).startswith("model.safetensors.index.json ")
