"""Files are written completely or not at all. Also links, pipes, standard output, damaged gzip files."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import InputError
from support.streams import atomic_write, read_text

ROOT = Path(__file__).resolve().parents[1]


def write_text(path, text):
    with atomic_write(path) as file:
        file.write(text)


def test_a_damaged_gzip_file_is_one_line(tmp_path):
    whole = gzip.compress(b"one line\n" * 50)
    for content in (whole[:-9], whole[:20] + b"damage" + whole[26:], b"not compressed"):
        (tmp_path / "lists.gz").write_bytes(content)
        with pytest.raises(InputError, match="lists.gz: not a readable gzip file"):
            read_text(tmp_path / "lists.gz")


@pytest.mark.parametrize("name", ["file", "file.gz"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, name):
    write_text(tmp_path / name, "old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / name) as file:
        file.write("half of the new")
        file.flush()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == [name] and read_text(tmp_path / name) == "old"


def test_a_link_stays_and_the_file_that_it_leads_to_is_written_whole(tmp_path):
    store, here = tmp_path / "store", tmp_path / "here"
    store.mkdir()
    here.mkdir()
    (store / "old").write_text("old")
    (here / "relative").symlink_to("../store/old")
    (here / "chain.gz").symlink_to(here / "relative")
    (here / "dangling").symlink_to(tmp_path / "not yet" / "new")
    for name, target in (("relative", store / "old"), ("dangling", tmp_path / "not yet" / "new")):
        with pytest.raises(KeyboardInterrupt), atomic_write(here / name) as file:
            file.write("half")
            assert [path.parent for path in tmp_path.rglob("*.part")] == [target.parent]
            raise KeyboardInterrupt
        assert not target.exists() or target.read_text() == "old"
        write_text(here / name, "new")
        assert (here / name).is_symlink() and target.read_text() == "new" and not target.is_symlink()
    write_text(here / "chain.gz", "packed")  # the given name decides, not the link's target
    assert gzip.decompress((store / "old").read_bytes()) == b"packed" and (here / "chain.gz").is_symlink()
    assert not [*tmp_path.rglob("*.part")] and len([*tmp_path.rglob("*")]) == 8


def test_a_file_keeps_its_mode(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o640)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640 and (tmp_path / "file").read_text() == "new"


def test_what_can_hold_no_file_is_one_line_and_stays_as_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "to folder").symlink_to(tmp_path / "folder")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    for name in ("folder", "to folder", "a", "file/below"):
        with pytest.raises(OSError):
            write_text(tmp_path / name, "new")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "a").is_symlink()
    assert (tmp_path / "to folder").is_symlink() and (tmp_path / "file").read_text() == "old"


def test_a_pipe_is_written_to_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # does not wait for a writer
    for name in ("pipe", "link"):
        write_text(tmp_path / name, "straight\n")
        assert os.read(reader, 99) == b"straight\n"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("name, stream", [("/dev/fd/1", "stdout"), ("log", "stdout"), ("log", "stderr")])
def test_our_own_output_is_written_to_in_its_order_even_where_it_is_a_file(tmp_path, name, stream):
    """An entry of /dev/fd cannot be replaced by mistake, but the file `log` could be."""
    code = f"""if True:
        import sys
        from support.streams import atomic_write
        print("before", file=sys.{stream})
        with atomic_write(sys.argv[1]) as file:
            file.write("within\\n")
        print("after", file=sys.{stream})"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", code, name]
    with open(tmp_path / "log", "w") as log:
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, **{stream: log})
    assert (tmp_path / "log").read_text() == "before\nwithin\nafter\n"
    if name == "/dev/fd/1":
        piped = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
        assert piped.stdout == b"before\nwithin\nafter\n" and not piped.stderr
