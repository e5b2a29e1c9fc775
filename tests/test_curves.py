import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import curves


@pytest.fixture
def logs(tmp_path):
    """Two runs named a, with box AP50 10 and 20, then 30 and 50; one named b without the second evaluation."""
    for name, values in (("a0", (10.0, 30.0)), ("a1", (20.0, 50.0)), ("b0", (5.0, None))):
        (tmp_path / name).mkdir()
        lines = [dict(step=3, loss=1.0, lr=0.1)]
        for k, value in enumerate(values):
            lines.append(dict(epoch=k + 1, step=4 * (k + 1), lr=0.1, train_loss=0.5, box_ap50=value))
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def test_mean_and_deviation_are_those_of_the_seeds(logs, capsys):
    pytest.importorskip("matplotlib")
    group_a, group_b = [str(logs / "a0"), str(logs / "a1")], [str(logs / "b0" / "log.jsonl")]
    curves.main(["--run", "A", *group_a, "--run", "B", *group_b, "--output", str(logs / "c.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| box_ap50 after | 4 steps | 8 steps |"
    assert lines[2] == "| A | 15.0 ± 7.1 | 40.0 ± 14.1 |" and lines[3] == "| B | 5.00 |  |"
    assert (logs / "c.png").stat().st_size > 5000


def test_one_run_is_drawn_with_loss_rate_and_accuracy(logs, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    curves.main([str(logs / "a0"), "--output", str(logs / "c.png")])
    loss, rate, percent = figures[0].axes
    assert [line.get_label() for line in loss.lines] == ["loss of a step", "train_loss"]
    assert list(rate.lines[0].get_xdata()) == [3, 4, 8]
    assert list(percent.lines[0].get_ydata()) == [10.0, 30.0]


@pytest.mark.parametrize("arguments, words", [
    (["--run", "A"], "at least one folder"),
    (["--run", "A", "nowhere"], "does not exist"),
    (["--run", "A", "a0", "--key", "miou"], "--key can be box_ap50"),
    ([], "--run NAME"),
    (["a0", "--run", "A", "a0"], "--run NAME"),
])
def test_bad_input_is_one_sentence(logs, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(logs)
    with pytest.raises(SystemExit) as stopped:
        curves.main(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
