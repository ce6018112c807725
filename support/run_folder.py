"""The folder of a training run, and its saves. A killed run can be resumed from it.

    config.json                the settings
    log.csv, samples.txt       one row per step; some whole rollouts (training_log.py)
    saves/grpo-000100/         one save: checkpoint/ (and adapter/), and state/ for --resume
    checkpoint/, adapter/      the files of the newest save; best/: those of the best save

A save gets its name once it is complete. The files of checkpoint/, adapter/ and best/ are hard links into a
save, or copies. Each is replaced in one atomic step: it is never missing, and at most one save old.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.checkpoint import write_model
from support.cli import InputError
from support.distributed import gather, rank, say, world_size
from support.lora import save_adapter
from support.prompt_file import prompt_record
from support.streams import atomic_write
from support.training_log import TrainingLog, log_files

# --resume refuses to change these settings: the result would be another run. The last three are the toy's.
FIXED = ("model seed prompts_per_step group_size reward prompt window draws order keep_draws min_ndcg "
         "sft_steps sft_lr lora_rank teacher_graded eval_queries eval_seed").split()
# These may change; a line says so.
CHANGEABLE = "lr warmup decay beta temperature max_new_tokens updates clip grad_clip weight_decay".split()
FRESH = {"step": 0, "best": -1.0, "best_step": 0}  # the state of a phase that has not begun


class RunFolder:
    """A run's folder, made ready for writing. Every rank makes one; only rank 0 writes.

    `trained_on` describes the training data. Without `settings.resume`, an earlier run is moved aside.
    InputError if another process trains there, or if the run to resume had other settings or data.
    """

    def __init__(self, settings, trained_on: dict | None = None):
        self.path, self.settings, self.writes = Path(settings.out), settings, rank() == 0
        earlier = earlier_config(settings)
        if earlier and trained_on and earlier.get("trained_on") not in (None, trained_on):
            raise InputError(f"--resume: {self.path} was trained on other data, {earlier['trained_on']}; "
                             f"these are {trained_on}")
        if self.writes:
            if settings.resume and not earlier:
                print(f"--resume: nothing has been saved in {self.path} yet: starting from the beginning")
            for name in CHANGEABLE:
                now = getattr(settings, name)
                was = earlier.get(name, now)
                if was != now:
                    print(f"--resume: --{name.replace('_', '-')} is {now} from here on, and was {was}")
            self.lock()
            if not earlier and holds_run(self.path):
                numbered = (Path(f"{self.path}.{n}") for n in itertools.count(1))
                aside = next(path for path in numbered if not path.exists())
                self.path.rename(aside)
                print(f"{self.path} held an earlier run, which is now {aside}")
                self.lock()
            with atomic_write(self.path / "config.json") as file:
                config = dataclasses.asdict(settings) | {"prompt": prompt_record(settings.prompt)}
                json.dump(config | {"trained_on": trained_on}, file, indent=2)
        gather([])  # no rank looks into the folder before it is ready

    def lock(self) -> None:
        """Make the folder and lock it. InputError if another process trains in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock_file = open(self.path / ".lock", "w")
        try:
            import fcntl

            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
        except BlockingIOError:
            raise InputError(f"{self.path}: another process is training there") from None
        except (ImportError, OSError):  # Windows; a file system without locks
            pass

    def saves(self, phase: str) -> list[Path]:
        """The saves of a phase, the newest last."""
        return sorted(self.path.glob(f"saves/{phase}-" + "[0-9]" * 6))

    def save(self, agent, optimizer, phase: str, step: int, best: float = -1.0, best_step: int = 0) -> None:
        """Write a save, show it in checkpoint/, delete the phase's oldest. Every rank must call this.

        `best` and `best_step`: the best validation so far. OSError if the save cannot be written, SystemExit
        if the weights are not finite; earlier saves stay as they are.
        """
        if not all(p.isfinite().all() for p in agent.model.parameters()):
            raise SystemExit(f"{phase}, step {step}: weights are not finite, and are not saved; lower the "
                             "learning rate and go on from the save before with --resume")
        tensors = optimizer.state()
        if not self.writes:
            return
        part, save = (self.path / "saves" / name for name in (".part", f"{phase}-{step:06d}"))
        state = {"step": step, "best": best, "best_step": best_step}
        state |= {name: path.stat().st_size for name, path in log_files(self.path).items()}
        for unfinished in (part, save):  # left by a run that was killed while it saved
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            (part / "state").mkdir(parents=True)
            write_model(agent, part / "checkpoint")
            save_adapter(agent.model, part / "adapter", self.settings.model)
            save_file(tensors, part / "state/optimizer.safetensors")
            (part / "state/state.json").write_text(json.dumps(state), encoding="utf-8")
            for file in part.glob("*/*"):  # safetensors lets only the owner read its files
                shutil.copymode(part / "state/state.json", file)
            part.rename(save)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{save} cannot be written ({error}); earlier saves are as they were: go on from "
                          "the newest with --resume") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.show(save, best_step)
        # Saves after this one could not be read. The run will write them again.
        for old in [old for old in self.saves(phase) if old <= save][:-self.settings.keep]:
            if old.name != f"{phase}-{best_step:06d}":
                shutil.rmtree(old)

    def show(self, save: Path, best_step: int) -> None:
        """Put this save's files into checkpoint/ and adapter/, and the best save's into best/."""
        shown = {"checkpoint": save / "checkpoint", "adapter": save / "adapter"}
        if best_step:
            shown["best"] = save.with_name(f"{save.name[:-6]}{best_step:06d}") / "checkpoint"
        for target, source in shown.items():
            if source.exists():
                (self.path / target).mkdir(exist_ok=True)
            for file in source.glob("*"):
                new, old = self.path / f".{file.name}.new", self.path / target / file.name
                try:
                    new.unlink(missing_ok=True)  # a killed run may leave it, as a link into a save
                    try:
                        os.link(file, new)
                    except OSError:  # a file system without hard links
                        shutil.copyfile(file, new)
                    os.replace(new, old)
                except OSError as error:  # on Windows, a file that somebody has open
                    say(f"{old} could not be replaced ({error}); the save has it: {file}", file=sys.stderr)
                finally:
                    new.unlink(missing_ok=True)  # os.replace keeps it if both names are links to one file

    def load(self, optimizer, phase: str) -> dict:
        """Read the phase's newest readable save into the optimizer. Returns its state.json, or FRESH.

        InputError if there are saves but none can be read, or if the ranks read different ones.
        """
        saves = self.saves(phase)
        states = ((save, read_save(save, optimizer)) for save in reversed(saves))  # read one by one
        save, state = next((found for found in states if found[1]), (None, FRESH))
        if save:
            say(f"--resume: going on from {save}")
            if self.writes and (phase == "grpo" or not self.saves("grpo")):  # the run's last phase
                self.show(save, state["best_step"])
        elif saves:
            raise InputError(f"--resume: none of {self.path}/saves/{phase}-* can be read")
        if len(set(gather([state["step"]]))) > 1:
            raise InputError(f"--resume: the ranks do not read the same save in {self.path}")
        return state


def read_save(save: Path, optimizer) -> dict | None:
    """Read a save into the optimizer. Returns its state.json; None, and a warning, if it cannot be read."""
    try:
        state = json.loads((save / "state/state.json").read_text(encoding="utf-8"))
        if missing := FRESH.keys() - state.keys():
            raise ValueError(f"state.json lacks {missing}")
        for part in save.glob("checkpoint/*.safetensors"):
            with safe_open(part, "pt"):  # fails unless the file is whole
                pass
        with safe_open(save / "state/optimizer.safetensors", "pt") as file:
            optimizer.load_state((name, file.get_tensor(name)) for name in file.keys())
        return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        say(f"--resume: {save} cannot be read ({error})", file=sys.stderr)
        return None


class Phase:
    """One phase of a run ("sft", "grpo"), as a `with` block that resumes it, and saves it at Ctrl-C too.

        with Phase(folder, "grpo", agent, optimizer) as phase:
            for step in range(phase.step + 1, settings.steps + 1):
                ...                                  # one update
                phase.log(row, rollouts)             # or phase.complete(step)
                phase.save_if_due()                  # nothing is saved if `folder` is None
    """

    def __init__(self, folder: RunFolder | None, name: str, agent, optimizer):
        self.folder, self.name, self.agent, self.optimizer = folder, name, agent, optimizer
        state = folder.load(optimizer, name) if folder else FRESH
        self.best, self.best_step = state["best"], state["best_step"]
        self.saved = state["step"] or -1  # a phase of no steps is saved too
        self.complete(state["step"])
        if name == "grpo":
            self.training_log = TrainingLog(folder.path, folder.settings, lengths=state)

    def __enter__(self) -> Phase:
        return self

    def complete(self, step: int) -> None:
        """Mark this step as the one to save: weights and log now both belong to it."""
        self.step, self.updates = step, self.optimizer.updates

    def log(self, row: dict[str, float], rollouts) -> None:
        """Log a step, which completes it. SystemExit after three skipped updates in a row."""
        self.training_log.add(row, rollouts)
        if row.get("eval_ndcg", -1.0) > self.best:  # the first of equals
            self.best, self.best_step = row["eval_ndcg"], row["step"]
        self.complete(row["step"])
        if [row["skipped"] for row in self.training_log.rows[-3:]] == [1, 1, 1]:
            raise SystemExit(f"step {self.step}: the third update in a row that is not finite; lower --lr, "
                             "or look at the rollouts in the run folder's skipped.txt")

    def save_if_due(self) -> None:
        """Save every --save-every steps, and at the best validation so far. (The last step: `__exit__`.)"""
        due = self.step == self.best_step
        if self.folder and (due or self.step % self.folder.settings.save_every == 0):
            self.save()

    def save(self) -> None:
        """Save the last complete step."""
        self.folder.save(self.agent, self.optimizer, self.name, self.step, self.best, self.best_step)
        self.saved = self.step

    def __exit__(self, kind, error, traceback) -> None:
        self.optimizer.remove_hooks()
        if not self.folder or self.saved >= self.step:
            return
        if error is None:
            self.save()
        # In the middle of an update, some weights are new and others old. When one of several ranks
        # stops, they cannot agree to save. After an OSError the disk may be full.
        elif self.updates == self.optimizer.updates and world_size() == 1 and not isinstance(error, OSError):
            self.save()
            say(f"step {self.step} is saved; go on with --resume", file=sys.stderr)


def holds_run(path: Path) -> bool:
    """Whether this folder holds the log or the saves of a run."""
    begun = (path / "log.csv").exists() or (path / "saves").exists()
    return begun and (path / "config.json").exists()


def earlier_config(settings) -> dict:
    """config.json of the run to resume, {} if there is none. InputError if a FIXED setting differs."""
    path = Path(settings.out)
    if not settings.resume or not any(path.glob("saves/*-[0-9]*")):
        return {}
    try:
        earlier = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--resume: {path}/config.json cannot be read ({error})") from None
    if "group_size" not in earlier or (path / "latest").is_symlink():
        raise InputError(f"--resume: {path} was begun by an earlier version of this code; begin a new run "
                         "with another --out")
    now = vars(settings) | {"prompt": prompt_record(settings.prompt)}
    for name in FIXED:
        if earlier.get(name) != now.get(name):
            option = f"--{name.replace('_', '-')} {earlier.get(name)!r}"
            if name == "prompt":
                option += f"; {settings.prompt} is another"
            raise InputError(f"--resume: {path} was begun with {option}")
    return earlier
