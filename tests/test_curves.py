import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import curves


@pytest.fixture
def runs(tmp_path):
    """Two runs named a, with box AP50 10 and 20, then 30 and 50; one named b without the second evaluation."""
    for name, values in (("a0", (10.0, 30.0)), ("a1", (20.0, 50.0)), ("b0", (5.0, None))):
        (tmp_path / name).mkdir()
        lines = [dict(step=3, loss=1.0)] + [dict(epoch=k + 1, step=4 * (k + 1), box_ap50=value) for k, value in enumerate(values)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def test_mean_and_deviation_are_those_of_the_seeds(runs, capsys):
    pytest.importorskip("matplotlib")
    curves.main(["--run", "A", str(runs / "a0"), str(runs / "a1"), "--run", "B", str(runs / "b0" / "log.jsonl"), "--output", str(runs / "c.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| box_ap50 after | 4 steps | 8 steps |"
    assert lines[2] == "| A | 15.0 ± 7.1 | 40.0 ± 14.1 |" and lines[3] == "| B | 5.0 |  |"
    assert (runs / "c.png").stat().st_size > 5000


@pytest.mark.parametrize("arguments, words", [
    (["--run", "A"], "at least one folder"), (["--run", "A", "nowhere"], "does not exist"), (["--run", "A", "a0", "--key", "miou"], "--key can be box_ap50")])
def test_bad_input_is_one_sentence(runs, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as stopped:
        curves.main(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
