"""benchmarks/bench.py and machine.py: rows, the table by hand, a tiny measurement."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import bench, machine

SPEC = dict(job="vit", precision="fp32", compiled=False, batch=4, device="cpu", rounds=3, tiny=True, package="timm 1")
WHERE = dict(processor="a machine", threads=1, torch="2.15.0", commit="abc")


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
    ours = dict(seconds=[1.0, 2.0, 4.0], macs=10e9, params=1, peak_mb=1234.4)
    peer = dict(seconds=[2.0, 3.0, 2.0], macs=20e9, params=1, failed="does not fit")  # ratios 2, 1.5, 0.5
    row = {**SPEC, **WHERE, "ours": ours, "peer": peer, "matmul_s": [1.0, 1.0, 1.0], "matmul_flops": 480e9}
    line = bench.table([row]).splitlines()[2]
    # 4 images x 2 x 3 x 10 G multiply-adds in 2 s are 120 GFLOP/s, of 480 a quarter
    assert line == ("| vit | cpu, 1 thread, fp32 | 4 | 2 | 10 | 25% | 1,234 | timm 1 | "
                    "1.50 (0.50 to 2.00), other work: 20 G | does not fit |")


def test_a_job_that_failed_is_a_line_with_the_reason():
    line = bench.table([{**SPEC, **WHERE, "ours": None, "failed": "does not fit"}]).splitlines()[2]
    assert line.startswith("| vit | cpu, 1 thread, fp32 | 4 | does not fit |") and line.count("|") == 11


def test_time_and_memory_of_a_tiny_step_in_this_process():
    spec = {**SPEC, "batch": 1, "rounds": 2}
    result = bench.measure_time({**spec, "sides": ["ours"]})
    assert len(result["ours"]["seconds"]) == len(result["matmul_s"]) == 2 and result["ours"]["macs"] > 0
    assert bench.measure_memory({**spec, "side": "ours"})["peak_mb"] >= 0


@pytest.mark.slow  # starts processes
def test_one_command_measures_writes_and_shows(tmp_path, capsys):
    file, page = tmp_path / "x.jsonl", tmp_path / "page.md"
    bench.main(["mae", "--tiny", "--rounds", "1", "--batch-size", "1", "--device", "cpu", "--json", str(file)])
    row, = machine.read_rows(file, ["ours"])
    assert row["ours"]["peak_mb"] >= 0 and row["torch"] == torch.__version__
    page.write_text(f"a\n{bench.MARKS[0]}\n{bench.MARKS[1]}\nb\n")
    bench.main(["--table", str(file), "--write", str(page)])
    assert "| mae | cpu" in page.read_text() and page.read_text().startswith("a\n")


@pytest.mark.slow  # starts processes
def test_a_job_that_cannot_run_does_not_end_the_session():
    assert "failed" in bench.in_new_process({**SPEC, "sides": ["ours"], "device": "no such device"})


@pytest.mark.parametrize("arguments, words", [
    (["vit", "--rounds", "0"], "--rounds 0"), (["bert"], "bert"), (["--table", "nowhere.jsonl"], "--table"),
    (["--table", "other.jsonl"], "other.jsonl line 1")])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("other.jsonl").write_text(json.dumps({"loss": 1}) + "\n")
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("bench.py: ") and error.count("\n") == 1 and words in error


def test_the_committed_measurements_of_earlier_programs_are_lines_of_json():
    for file in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        assert machine.read_rows(file, ["bench", "device"])
