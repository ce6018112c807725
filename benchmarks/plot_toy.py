"""Draw the README's curve from logs of toy runs: the rollouts' share of the possible gain in NDCG@10.

    python benchmarks/plot_toy.py runs/toy [RUN_FOLDER ...] --output benchmarks/toy_curve.png

The share of a step is (rollouts - given order) / (best order - given order), where each term is the mean
NDCG@10 over the step's windows. A RUN_FOLDER is the --out of `python grpo.py`. Runs with --reward random are
grey.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.cli import InputError, command_line, run_main, setting


@dataclasses.dataclass
class Settings:
    """Settings of the plot."""

    runs: list[str] = setting(list, "Run folders.", positional=True, nargs="+")
    output: str = setting("toy_curve.png", "The picture to write.")


def read_log(folder: str) -> dict[str, list[float]]:
    """{column: one value per step} of a run's log.csv. InputError if there is no log."""
    path = Path(folder) / "log.csv"
    if not path.exists():
        raise InputError(f"{path}: no such log; expected a run folder of grpo.py")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in ("step", "ndcg", "ndcg_init", "ndcg_best")}


def smooth(values: list[float], width: int = 5) -> list[float]:
    """The mean of the last `width` values at each step, since the 32 windows of a step are a small sample."""
    windows = [values[max(0, i - width + 1):i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def main(argv: list[str] | None = None) -> int:
    """Draw and write the picture."""
    settings = command_line(Settings, argv, __doc__)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.4))
    named = set()  # one legend entry per kind of run
    for folder in settings.runs:
        log = read_log(folder)
        reward = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["reward"]
        control = reward == "random"
        colour, label = ("tab:grey", "random rewards") if control else ("tab:blue", "the paper's reward")
        rollouts, given, best = (smooth(log[column]) for column in ("ndcg", "ndcg_init", "ndcg_best"))
        share = [(now - before) / (most - before) for now, before, most in zip(rollouts, given, best)]
        axes.plot(log["step"], share, color=colour, label=None if label in named else label)
        named.add(label)
    for height, text in ((1, "best order of each window"), (0, "order as given")):
        axes.axhline(height, color="black", linewidth=0.8, linestyle=":")
        axes.annotate(text, (1, height), xytext=(0, 3), textcoords="offset points", fontsize=8)
    axes.set(xlabel="GRPO step", ylabel="share of the possible gain\nin NDCG@10", ylim=(None, 1.12))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.06), fontsize=9)
    figure.tight_layout()
    figure.savefig(settings.output, dpi=120)
    print(f"written to {settings.output}")
    return 0


if __name__ == "__main__":
    run_main(main)
