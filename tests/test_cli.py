"""The command line: settings from a dataclass, groups in --help, errors as one line."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import InputError, command_line, refuse, setting

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Settings:
    name: str = setting("", "A name.", positional=True, nargs="?")
    words: list[str] = setting(list, "Words.", nargs="+", flags=("-w",))
    model: str = setting("", "A model.", group="input and output")
    resume: bool = setting(False, "Go on.")
    offload: bool | None = setting(None, "100 % of it, or none.")
    max_rows: int = setting(8, "Rows.", minimum=1, group="memory")
    lr: float = setting(0.5, "Rate.", minimum=0)


def test_options_are_read_into_the_fields_and_given_names_those_that_were_typed():
    settings = command_line(Settings, "x -w a b --max-rows 3 --no-offload --lr 0.5".split())
    assert settings == Settings("x", ["a", "b"], "", False, False, 3, 0.5)
    assert settings.given == {"name", "words", "max_rows", "offload", "lr"}  # lr was typed, with its default
    assert command_line(Settings, []).given == set() and command_line(Settings, []) == Settings()
    assert command_line(Settings, ["--resume"]).resume is True
    assert command_line(Settings, ["--offload"]).offload is True


def test_defaults_can_be_replaced_and_are_not_given(capsys):
    settings = command_line(Settings, ["--resume"], defaults={"max_rows": 5, "resume": True})
    assert (settings.max_rows, settings.resume, settings.given) == (5, True, {"resume"})
    assert not command_line(Settings, ["--no-resume"], defaults={"resume": True}).resume
    with pytest.raises(SystemExit):
        command_line(Settings, ["--help"], defaults={"max_rows": 5})
    assert "Rows. (default: 5)" in capsys.readouterr().out


def test_lists_are_not_shared_between_two_command_lines():
    command_line(Settings, []).words.append("x")
    assert command_line(Settings, []).words == []


def test_positional_arguments_may_stand_after_options():
    assert command_line(Settings, ["--resume", "x"]).name == "x"


@pytest.mark.parametrize("typed, said", [
    ("--max-rows 0", "argument --max-rows: expected at least 1, found 0"),
    ("--lr -0.1", "argument --lr: expected at least 0, found -0.1"),
    ("--lr nan", "argument --lr: expected at least 0, found nan"),
    ("--max-rows x", "argument --max-rows: invalid int value: 'x'"),
    ("--max-row=3", "unrecognized arguments: --max-row=3"),  # no abbreviations
    ("--model", "argument --model: expected one argument")])
def test_a_bad_option_is_one_line_with_status_2(capsys, typed, said):
    with pytest.raises(SystemExit) as end:
        command_line(Settings, typed.split(), prog="prog.py")
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == f"prog.py: error: {said}\n" and not printed.out


def test_the_least_value_itself_is_allowed():
    assert command_line(Settings, ["--max-rows", "1", "--lr", "0"]).max_rows == 1


def test_only_the_first_rank_prints_a_bad_option_and_all_end(capsys, monkeypatch):
    for rank, lines in ("0", 1), ("1", 0):
        monkeypatch.setenv("RANK", rank)
        for typed in ("--max-rows 0", "--unknown"):
            with pytest.raises(SystemExit) as end:
                command_line(Settings, typed.split())
            assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == lines


def test_an_option_without_effect_is_named_if_it_was_typed():
    settings = command_line(Settings, ["--max-rows", "8"])
    refuse(settings, ["model", "lr"], "has no effect")
    with pytest.raises(InputError, match="^--max-rows has no effect$"):
        refuse(settings, ["model", "max_rows"], "has no effect")


def headings(capsys, command_help) -> list[str]:
    with pytest.raises(SystemExit) as end:
        command_help()
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]


def test_help_has_the_groups_in_the_fields_order_and_no_empty_one(capsys):
    found = headings(capsys, lambda: command_line(Settings, ["--help"]))
    assert [name for name in found if name not in ("positional arguments", "options")] == [
        "input and output", "memory"]


@pytest.mark.parametrize("command", ["grpo", "rearank"])
def test_help_shows_what_everybody_needs_first(capsys, command):
    found = headings(capsys, lambda: importlib.import_module(command).main(["--help"]))
    found = [name for name in found if name != "options"]  # the group of --help itself
    assert found[:2] == ["input and output", "model"] and len(found) > 3
    late = [name for name in found if name in ("memory", "run", "toy run", "server", "device",
                                             "for other programs")]
    assert found[-len(late):] == late and len(late) >= 2


@pytest.mark.parametrize("command", ["grpo", "rearank", "eval", "data", "report"])
def test_every_option_of_a_command_has_a_help_text(capsys, command):
    module = importlib.import_module(command)
    name = {"grpo": "Train", "rearank": "Rerank"}.get(command, command.capitalize()) + "Settings"
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(getattr(module, name)):
        assert " ".join(field.metadata["help"].split())[:30] in shown, field.name


FAULTS = {"input": "raise InputError('file:3: expected a number')", "system": "open('/missing/file')",
          "stop": "raise KeyboardInterrupt", "status": "return 1", "fine": "pass"}


@pytest.mark.parametrize("fault, status, said", [
    ("input", 2, "prog.py: file:3: expected a number\n"),
    ("system", 2, "prog.py: [Errno 2] No such file or directory: '/missing/file'\n"),
    ("stop", 130, "interrupted\n"), ("status", 1, ""), ("fine", 0, "")])
def test_a_fault_ends_a_command_with_its_status_and_one_line(fault, status, said):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = '/some/where/prog.py'\n"
            "from support.cli import InputError, run_main\n"
            f"def main():\n    {FAULTS[fault]}\nrun_main(main)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, said)


def test_a_closed_pipe_ends_a_command_without_a_word():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom support.cli import run_main\n"
            "def main():\n    for i in range(100_000):\n        print(i)\nrun_main(main)")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe) as done:
        done.stdout.readline()
        done.stdout.close()
        assert done.stderr.read() == b"" and done.wait() == 1


def test_characters_that_the_console_lacks_end_no_run():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom support.cli import run_main\n"
            "run_main(lambda: print('a \\u2192 b'))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={"PYTHONIOENCODING": "ascii", "PATH": ""})
    assert (done.returncode, done.stdout) == (0, "a ? b\n")
