"""The command line of every script: one settings dataclass per command, errors as one line.

    @dataclasses.dataclass
    class MySettings:
        steps: int = setting(160, "GRPO steps.", minimum=0, group="algorithm")

    settings = command_line(MySettings)          # reads --steps; settings.given == {"steps"} if it was typed
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


class InputError(ValueError):
    """Something from outside (a file, an option, a server) is not as expected. One line: where, what, why."""


def setting(default, help: str, **argparse_options):
    """A field of a settings dataclass: its default value, its help text, and options for argparse.

    Beside argparse's own options: `flags=("-m",)` gives short names, `positional=True` makes it positional,
    `minimum` refuses smaller numbers, `group` begins a new heading in --help, for this and later fields.
    """
    make = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**make, metadata={"help": help, **argparse_options})


def command_line(settings: type, argv: list[str] | None = None, description: str | None = None,
                 prog: str | None = None, defaults: dict | None = None):
    """Read `argv` (default: sys.argv[1:]) into an instance of the dataclass `settings`.

    Field a_b becomes the option --a-b, a boolean also --no-a-b. `defaults` replaces defaults of the class.
    The instance gets an attribute `given`, the set of fields that were typed. A bad option ends the program
    with one line and status 2.
    """
    # No usage text: an error is one line, and --help shows every option.
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False,
                                     usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group, minimum = parser, {}
    default_of = vars(settings()) | (defaults or {})
    for field in dataclasses.fields(settings):
        options, default = dict(field.metadata), default_of[field.name]
        name = field.name if options.pop("positional", False) else "--" + field.name.replace("_", "-")
        names = [*options.pop("flags", ()), name]
        minimum[field.name] = options.pop("minimum", None)
        if "group" in options:
            group = parser.add_argument_group(options.pop("group"))
        if isinstance(default, bool) or field.type == "bool | None":
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, (int, float)):
            options["type"] = type(default)
        if default not in ("", [], None) and default is not False:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            options["help"] += f" (default: {shown})"
        options["help"] = options["help"].replace("%", "%%")
        # SUPPRESS: an option that was not typed does not appear among the parsed values.
        group.add_argument(*names, default=argparse.SUPPRESS, **options)
    if int(os.environ.get("RANK", "0")) > 0:  # started by torchrun: the first process prints the error
        parser.exit = lambda status=0, message=None: sys.exit(status)
    typed = vars(parser.parse_intermixed_args(argv))  # options may stand between positional arguments
    for name, bound in minimum.items():
        if bound is not None and name in typed and not typed[name] >= bound:  # NaN is not either
            option = "--" + name.replace("_", "-")
            parser.error(f"argument {option}: expected at least {bound}, found {typed[name]}")
    result = settings(**default_of | typed)
    result.given = set(typed)
    return result


def refuse(settings, names: Iterable[str], reason: str) -> None:
    """InputError for the first of these options that was typed, which has no effect here for this reason."""
    for name in names:
        if name in settings.given:
            raise InputError(f"--{name.replace('_', '-')} {reason}")


def run_main(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its status: 2 for bad input, 130 for Ctrl-C, 1 for a closed pipe."""
    # A job that is told to stop (SIGTERM) saves as it does on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a character that the console lacks ends no run
    status = 0
    try:
        status = main() or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # One of several ranks. Python's teardown can abort it while gloo's threads still hold objects
        # (pytorch pull request 179291), so leave without one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
