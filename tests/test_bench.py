"""benchmarks/bench.py and machine.py: rows, the table by hand, measurements of a tiny step, stopping and continuing."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import bench, machine, peers

SPEC = dict(job="vit", precision="fp32", mode="eager", device="cpu", batch=4, key="a key", rounds=3)
WHERE = dict(processor="a machine", threads=1, torch="2.15.0", commit="abc")


def measured(seconds, macs=10e9, peak_mb=1234.4):
    return dict(seconds=seconds, macs=macs, peak_mb=peak_mb)


def test_a_row_says_on_what_and_by_which_code_it_was_obtained(monkeypatch):
    where = machine.machine("cpu")
    assert where["torch"] == torch.__version__ and where["threads"] == torch.get_num_threads()
    assert len(where["processor"]) > 2
    monkeypatch.setenv("PATH", "")  # a machine without git
    assert "commit" not in machine.machine("cpu")


def test_a_line_that_a_kill_cut_short_does_not_count_and_is_replaced(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": 2')
    assert machine.read_rows(file, ["a"]) == [{"a": 1}]
    machine.append(file, {"a": 3})
    assert machine.read_rows(file, ["a"]) == [{"a": 1}, {"a": 3}]
    with pytest.raises(ValueError, match="line 1"):
        machine.read_rows(file, ["b"])


@pytest.mark.parametrize("values, text", [
    ([1.0, 3.0], "2.00 ± 1.41"), ([1234.5], "1,234"), ([0.5, None], "n/a"), ([], "n/a"), ([0.0], "0"),
    ([math.nan], "n/a")])
def test_mean_and_deviation_have_three_digits_of_the_larger(values, text):
    assert machine.spread(values) == text


def test_multiply_adds_are_those_of_a_linear_layer():
    assert machine.multiply_adds(torch.nn.Linear(10, 7), torch.zeros(4, 10)) == 70


def test_the_table_takes_the_median_of_the_ratios_of_each_round():
    ours = measured([1.0, 2.0, 4.0])
    peer = measured([2.0, 3.0, 2.0], peak_mb=7)  # ratios 2, 1.5, 0.5
    matmul = measured([1.0, 1.0, 1.0], macs=240e9)
    row = {**SPEC, **WHERE, "sides": ["ours", "peer"], "beside": "timm 1", "ours": ours, "peer": peer, "matmul": matmul}
    # 4 images x 3 x 10 G multiply-adds in 2 s are 60 G per second, of 240 a quarter
    title, _, _, _, line = bench.table([row]).splitlines()
    assert line == "| vit | fp32 | eager | 4 | 2 | 10 | 25% | 1,234 | timm 1 | 1.50 | 7 |"
    assert title == "a machine, one thread; torch 2.15.0, median of 3 rounds, commit abc:"


def test_each_machine_has_a_table_of_its_own_and_a_row_without_a_peer_has_empty_cells():
    row = {**SPEC, **WHERE, "sides": ["ours"], "beside": "", "ours": measured([1.0]), "matmul": measured([1.0])}
    text = bench.table([row, {**row, "gpu": "a GPU"}, row])
    assert [line[:9] for line in text.splitlines() if line.endswith(":")] == ["a machine", "a GPU; to"]
    assert all(line.count("|") == 12 for line in text.splitlines() if line.startswith("|"))


def test_a_job_that_failed_is_a_line_with_the_reason():
    line = bench.table([{**SPEC, **WHERE, "sides": ["ours"], "failed": "exit code -9"}]).splitlines()[-1]
    assert line.startswith("| vit | fp32 | eager | 4 | exit code -9 |") and line.count("|") == 12


@pytest.fixture
def tiny(monkeypatch):
    """A model of one layer instead of a ViT-B."""
    def model():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))

    monkeypatch.setattr(bench, "MATMUL", {"cpu": 64})
    monkeypatch.setitem(peers.JOBS, "vit", peers.Job(model, peers.with_labels, 2, 2, 8, "torch", model))


def test_time_memory_and_work_of_a_tiny_step(tiny):
    result = bench.measure({**SPEC, "sides": ["ours", "peer"]})
    assert [len(result[side]["seconds"]) for side in ("matmul", "ours", "peer")] == [3, 3, 3]
    assert result["ours"]["macs"] == 1920 and result["ours"]["peak_mb"] >= 0


def test_a_step_that_needs_64_mb_is_measured_at_that():
    grown = bench.peak_megabytes(lambda: torch.ones(2**24), "cpu")
    assert 60 < grown < 90


def test_the_same_command_continues_where_the_budget_ended(tiny, tmp_path, monkeypatch, capsys):
    results = [bench.measure({**SPEC, "sides": ["ours", "peer"]}), None]
    monkeypatch.setattr(bench, "in_new_process", lambda spec, limit: results.pop(0))
    file, page = tmp_path / "x.jsonl", tmp_path / "page.md"
    command = ["--only", "vit", "mixer", "--modes", "eager", "--precisions", "fp32", "--json", str(file)]
    bench.main(command)
    assert "spent at mixer" in capsys.readouterr().out
    assert [row["job"] for row in machine.read_rows(file, ["key"])] == ["vit"]

    # only what is missing is measured again; the table goes into a page
    page.write_text(f"a\n{bench.MARKS[0]}\n{bench.MARKS[1]}\nb\n")
    results.append(dict(failed="exit code 1"))
    bench.main([*command, "--write", str(page)])
    assert [row["job"] for row in machine.read_rows(file, ["key"])] == ["vit", "mixer"]
    assert "| mixer | fp32 | eager | 2 | exit code 1 |" in page.read_text() and page.read_text().startswith("a\n")


@pytest.mark.slow  # starts a process
def test_a_job_that_cannot_run_does_not_end_the_session():
    result = bench.in_new_process({**SPEC, "sides": ["ours"], "device": "no such device"}, 600)
    assert result["failed"].startswith("exit code 1 ")


@pytest.mark.parametrize("arguments, words", [
    (["--rounds", "0"], "--rounds"), (["--only", "bert"], "bert"), (["--json", "other.jsonl"], "other.jsonl line 1")])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("other.jsonl").write_text(json.dumps({"loss": 1}) + "\n")
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("bench.py: ") and error.count("\n") == 1 and words in error


def test_the_committed_measurements_are_lines_of_json():
    for file in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        assert machine.read_rows(file, ["device"])
