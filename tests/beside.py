"""Run slow commands in the background of the tests: most tests use one core, and a machine has more.

    @pytest.mark.beside(command=command)
    def test_it(beside): ...

`command(folder, **parameters)` prepares files in an empty folder and returns the arguments of a process. It
gets those of the test's parameters that it names. While other tests run, one such process runs. Tests with
this mark come last, and two processes run while they wait. Tests with the same command and parameters share
one run. All tests with this mark are also marked `slow`, so `pytest -m "not slow"` starts no process.
"""

import inspect
import os
import signal
import subprocess
from pathlib import Path
from time import sleep  # a test may replace time.sleep

import torch

ROOT = Path(__file__).resolve().parents[1]
# Copied before any test changes it.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Job:
    """One background process. Read `returncode`, `stdout` and `stderr` after it has ended."""

    def __init__(self, command, parameters: dict, folder: Path):
        self.command, self.parameters, self.folder = command, parameters, folder
        self.process = self.fault = None

    def start(self) -> None:
        """Prepare and start the process. `Beside.result` raises an exception of this in the job's test."""
        self.folder.mkdir()
        with open(f"{self.folder}.out", "wb") as out, open(f"{self.folder}.err", "wb") as err:
            try:
                with torch.random.fork_rng(devices=[]):
                    arguments = self.command(self.folder, **self.parameters)
                self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                                cwd=ROOT, env=ENVIRONMENT, start_new_session=True)
            except Exception as fault:
                self.fault = fault

    @property
    def state(self) -> str:
        if self.process is None:
            return "ended" if self.fault else "waiting"
        return "running" if self.process.poll() is None else "ended"

    @property
    def returncode(self) -> int:
        return self.process.returncode

    @property
    def stdout(self) -> str:
        return Path(f"{self.folder}.out").read_text()

    @property
    def stderr(self) -> str:
        return Path(f"{self.folder}.err").read_text()


class Beside:
    """All jobs of a session, in the order of their tests."""

    def __init__(self):
        self.jobs = {}

    def add(self, item, folder: Path) -> None:
        """Give a test with the mark `beside` its job. Tests with equal command and parameters share one."""
        command = item.get_closest_marker("beside").kwargs["command"]
        names = [*inspect.signature(command).parameters][1:]
        parameters = {name: item.callspec.params[name] for name in names}
        key = command, *parameters.values()
        item.job = self.jobs.setdefault(key, Job(command, parameters, folder / str(len(self.jobs))))

    def advance(self, most: int) -> None:
        """Start waiting jobs until `most` are running."""
        states = [job.state for job in self.jobs.values()]
        room = most - states.count("running")
        for job in [job for job in self.jobs.values() if job.state == "waiting"][:max(0, room)]:
            job.start()

    def result(self, job: Job) -> Job:
        """Wait until the job has ended and return it. Two jobs run in the meantime."""
        while job.state != "ended":
            self.advance(2)
            sleep(0.05)
        if job.fault:
            raise job.fault
        return job

    def stop(self) -> None:
        """Kill the jobs that still run, and their child processes."""
        for job in self.jobs.values():
            if job.state == "running":
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
