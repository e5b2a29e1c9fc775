"""experiments/claims.py: every claim in its tiny form, the verdicts' rule by hand, resuming."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

import claims
import lab


@pytest.mark.parametrize("effects, worth, verdict", [
    ([3.0, 3.2, 2.8], 1, "agrees"),            # interval 3 +- 2.92 * 0.2 / sqrt(3) = 2.66 .. 3.34
    ([-3.0, -3.2, -2.8], 1, "opposite"),
    ([0.1, -0.1, 0.0], 1, "not seen"),         # within +-0.17
    ([0.2, 0.21, 0.19], 1, "not seen"),        # surely above zero, but too small to matter
    ([-4.0, 0.0, -2.0], 1.5, "not seen"),      # -5.37 .. 1.37: no effect of 1.5 in the paper's direction
    ([3.0, -1.0, 1.0], 1, "too noisy to say"),
    ([3.0], 1, "too noisy to say"),
    ([3.0, math.nan, 3.0], 1, "too noisy to say")])
def test_a_verdict_follows_from_the_interval_of_the_paired_effects(effects, worth, verdict):
    assert lab.judge(effects, worth) == verdict


def test_students_t_is_that_of_the_tables():
    """Two seeds have one degree of freedom: mean 10, sd sqrt(2), interval 10 +- 6.314; three: +- 2.920 sd / sqrt(3)."""
    assert lab.judge([9.0, 11.0], 1) == "agrees"  # 3.69 .. 16.3
    assert lab.judge([4.0, 6.0], 1) == "too noisy to say"  # 5 +- 6.314
    assert lab.judge([6.9, 10.0, 13.1], 1) == "agrees"  # 10 +- 2.92 * 3.1 / 1.732 = 5.23
    assert lab.judge([4.0, 10.0, 16.0], 1) == "too noisy to say"  # +- 10.1


def test_effects_are_paired_by_seed_and_incomplete_seeds_left_out():
    claim = lab.Claim("", "", {"a": None, "b": None}, [lab.Statement("a is ahead", lambda f: f["a"]["x"] - f["b"]["x"])])
    rows = [dict(seed=seed, arm=arm, figures={"x": value}) for seed, arm, value in
            [(1, "b", 20.0), (0, "a", 3.0), (0, "b", 1.0), (1, "a", 23.0), (2, "a", 99.0)]]
    (_, effects, verdict), = lab.verdicts(claim, rows)
    assert effects == [2.0, 3.0] and verdict == "too noisy to say"
    assert "| a | 13 ± 14 |" in lab.table(rows) and "99" not in lab.table(rows)


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_each_claim_runs_in_its_tiny_form(name, tmp_path, capsys):
    if name.startswith("detect"):
        pytest.importorskip("pycocotools")
    claims.main([name, "--tiny", "--seeds", "1", "--output-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    claim = claims.CLAIMS[name](lab.Lab(tmp_path / "runs", tiny=True))
    assert [row["arm"] for row in rows] == list(claim.arms)
    figures = {row["arm"]: row["figures"] for row in rows}
    for statement in claim.statements:
        assert isinstance(statement.effect(figures), (int, float)) and statement.text in printed
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert str(tmp_path) not in json.dumps(rows), "a path of this machine"
    before = (tmp_path / f"{name}.jsonl").read_bytes()
    claims.main([name, "--tiny", "--seeds", "1", "--output-dir", str(tmp_path)])  # all is there: nothing is measured again
    assert (tmp_path / f"{name}.jsonl").read_bytes() == before
