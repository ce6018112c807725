"""No file uses syntax or library calls newer than Python 3.10, which transformers 5 still supports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for folder in (".", "support", "tests", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
# Additions to the standard library in Python 3.11 to 3.13 that code like ours might use.
LATER_MODULES = {"tomllib"}
LATER_NAMES = {"batched", "chdir", "file_digest", "StrEnum", "ReprEnum", "ExceptionGroup", "BaseExceptionGroup",
               "TaskGroup", "Self", "Never", "LiteralString", "NotRequired", "assert_never", "override", "add_note",
               "exp2", "cbrt", "sumprod", "fma", "walk_up", "UTC", "Buffer", "from_uri", "full_match",
               "EnumType"}
LATER_KEYWORDS = {"rmtree": {"onexc"}, "walk": {"walk_up"}, "fmean": {"weights"}, "glob": {"case_sensitive"},
                  "copytree": {"follow_symlinks"}, "exists": {"follow_symlinks"}, "is_file": {"follow_symlinks"},
                  "is_dir": {"follow_symlinks"}}


def later_than_3_10(source: str) -> list[str]:
    """Names in this source that Python 3.10 lacks, by the lists above. SyntaxError if it lacks the syntax."""
    found = []
    for node in ast.walk(ast.parse(source, feature_version=(3, 10))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in LATER_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if {node.module, alias.name} & (LATER_MODULES | LATER_NAMES)]
        elif isinstance(node, ast.Attribute) and node.attr in LATER_NAMES:
            if not (node.attr == "chdir" and isinstance(node.value, ast.Name) and node.value.id != "contextlib"):
                found.append(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, keywords = node.func.attr, {keyword.arg for keyword in node.keywords}
            found += [f"{name}({late}=)" for late in LATER_KEYWORDS.get(name, set()) & keywords]
            order_given = len(node.args) > 1 or "byteorder" in keywords
            if name in ("from_bytes", "to_bytes") and not order_given:
                found.append(f"{name} without a byte order")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_uses_nothing_that_came_after_python_3_10(path):
    assert not later_than_3_10(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("source", [
    "int.from_bytes(b'a')", "import tomllib", "from typing import Self", "import datetime; datetime.UTC",
    "import hashlib; hashlib.file_digest(f, 'md5')", "import contextlib; contextlib.chdir('x')",
    "import shutil; shutil.rmtree('x', onexc=print)"])
def test_later_calls_are_noticed(source):
    assert later_than_3_10(source)


@pytest.mark.parametrize("source", ["try: pass\nexcept* ValueError: pass", "type X = int", "def f[T](x: T): pass"])
def test_later_syntax_is_noticed(source):
    with pytest.raises(SyntaxError):
        later_than_3_10(source)
