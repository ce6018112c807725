"""benchmarks/ablations.py: the verdicts of its table."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import ablations


@pytest.mark.parametrize("seeds, name, verdict", [
    ((0.4, 0.3), "direct SFT", "reproduced"),
    ((0.6, 0.7), "direct SFT", "the opposite"),
    ((0.2, 0.6), "direct SFT", "no difference seen"),  # the seeds disagree
    ((0.6, 0.7), "two passes", "not reproduced"),
    ((0.5, 0.5), "two passes", "no difference seen"),  # as in the paper, but not proof of equality
    ((0.1, -0.2), "length against quality", "no difference seen"),
    ((0.4, 0.3), "reward: absolute", "not a test of it"),
    ((0.6, 0.7), "400 queries, one draw each", "no row in the paper")])
def test_a_row_claims_no_more_than_its_interval_and_its_seeds_show(seeds, name, verdict):
    values = {row: [[0.5] * 9] * 2 for row in [*ablations.PAPER, "full", "one pass"]}
    values[name] = [[seed] * 9 for seed in seeds]
    [row] = [row for row in ablations.table(values) if row["experiment"] == name]
    assert row["verdict"] == verdict
