"""Open files: read plain or gzip text with clear errors; write a file whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from support.cli import InputError

UTF8 = ("utf-8", "surrogateescape")  # ids are bytes: those that are not UTF-8 survive reading and writing


def stream_at(path: str | Path) -> str | Path | int | None:
    """What to open if `path` cannot be replaced: 1 or 2 for our own standard output or error, `path` for a
    pipe, a device, a folder or links in a circle. None for a file, or if nothing is there yet.
    """
    for number in (1, 2):
        with contextlib.suppress(OSError):  # nothing is there, or the stream is closed
            if os.path.samefile(path, number):
                return number
    circle = os.path.islink(os.path.realpath(path))
    return path if circle or os.path.exists(path) and not os.path.isfile(path) else None


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wt") -> Iterator:
    """Open `path` to write text ("wt": UTF-8, "\\n" line ends) or bytes ("wb"). Names in .gz are compressed.

    A file beside it is written, then renamed; it keeps the old file's mode. Missing folders are made,
    symbolic links are followed. Pipes, devices and our own stdout are written to directly.
    """
    text = {} if mode == "wb" else {"encoding": UTF8[0], "errors": UTF8[1], "newline": "\n"}
    stream = stream_at(path)
    if stream is not None:
        print(end="", flush=True)  # first what was printed before
        with open(stream, mode, closefd=not isinstance(stream, int), **text) as file:
            yield file
        return
    opener = gzip.open if Path(path).suffix == ".gz" else open
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with opener(part, mode, **text) as file:
            yield file
        with contextlib.suppress(OSError):  # there is no old file, or its disk has no modes
            shutil.copymode(path, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


NO_TEXT = {  # the first bytes of files that we cannot read
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\3\4": "a zip archive", b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1\x15": "Parquet", b"%PDF-": "PDF", b"version https://git-lfs": "a Git LFS pointer, not the data"}


@contextlib.contextmanager
def open_bytes(path: str | Path) -> Iterator:
    """Open `path` ("-": standard input) to read bytes; gzip is unpacked, a byte order mark is skipped.
    InputError: damaged gzip, a beginning that no UTF-8 text has, a UnicodeDecodeError inside the block.
    """
    name, raw = path, None
    if path == "-":  # sys.stdin is None if it is closed
        name, raw = "standard input", io.BytesIO(sys.stdin.buffer.read() if sys.stdin else b"")
    try:
        with io.BufferedReader(raw or io.FileIO(path)) as file:
            if Path(path).suffix == ".gz" or file.peek(2).startswith(b"\x1f\x8b"):
                file = gzip.open(file)
            head = file.peek(32)
            foreign = [what for start, what in NO_TEXT.items() if head.startswith(start)]
            if foreign or b"\0" in head[:4]:  # UTF-16 may lack its mark
                raise InputError(f"{name}: looks like {[*foreign, 'UTF-16'][0]}; expected text in UTF-8")
            if head.startswith(b"\xef\xbb\xbf"):
                file.read(3)
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{name}: not a readable gzip file ({error})") from None
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise InputError(f"{name}:{line}: expected UTF-8 text, found the byte 0x{byte:02x}") from None


def read_text(path: str | Path) -> str:
    """The text of `path` ("-": standard input). InputError: see open_bytes."""
    with open_bytes(path) as file:
        return file.read().decode("utf-8")
