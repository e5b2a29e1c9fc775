import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import bench
import machine

SPEC = dict(bench="attention", device="cpu", window=4, timed=0, model="vit_demo", size=64, blocks="hybrid", bias=True, fused=False, checkpointing=False)


def test_a_figure_says_on_what_and_by_which_code_it_was_obtained(monkeypatch):
    where = machine.machine("cpu")
    assert where["torch"] == torch.__version__ and where["threads"] == torch.get_num_threads() and len(where["processor"]) > 2
    monkeypatch.setenv("PATH", "")  # a machine without git
    assert "commit" not in machine.machine("cpu")


@pytest.mark.slow  # starts processes
def test_a_variant_is_measured_in_a_process_of_its_own():
    few, many = (bench.in_new_process({**SPEC, "blocks": "all global", "size": size}) for size in (64, 128))
    assert few["seconds"] > 0 and few["params"] > 1e6 and few["params"] < many["params"]  # the bias of a larger map
    tokens = (128 // 4) ** 2
    assert many["peak_mb"] - few["peak_mb"] > 12 * 3 * tokens**2 * 4 / 2**20  # a matrix of attention for each of 12 blocks and 3 heads


def test_the_table_takes_medians_over_rounds_and_ratios_to_the_hybrid(capsys):
    rows = [{**SPEC, "blocks": blocks, "seconds": seconds * k, "peak_mb": 100.0 * k} for k, blocks in enumerate(bench.BLOCKS, start=1) for seconds in (1, 2, 9)]
    lines = bench.table(rows).splitlines()
    assert lines[0].startswith("| px | bias | attention | recompute | windows only, MB | hybrid, MB | all global, MB | global / hybrid |")
    assert lines[2] == "| 64 | yes | explicit | no | 100 | 200 | 300 | 1.50 | 2.0 | 4.0 | 6.0 | 1.50 |"
    rows[-1] = {**SPEC, "blocks": "all global", "out_of_memory": True}
    assert "| 100 | 200 | does not fit |  |" in bench.table(rows)
    assert bench.table(rows[:6]).splitlines()[2] == "| 64 | yes | explicit | no | 100 | 200 |  |  | 2.0 | 4.0 |  |  |"  # not measured


def test_a_detector_that_does_not_fit_is_said_so_and_mixed_files_are_refused():
    row = dict(bench="detection", device="cpu", window=14, size=512, detector="A", bias=True, training=True, out_of_memory=True)
    fits = {**row, "training": False, "out_of_memory": False, "seconds": 1.5, "peak_mb": 9.0, "params": 7}
    assert bench.table([row, fits]).splitlines()[2] == "| A | 512 | yes | does not fit | does not fit | does not fit | 1.50 |"
    with pytest.raises(SystemExit, match="several benches"):
        bench.table([row, SPEC])


def test_the_exponent_of_an_exact_power_law_is_found():
    assert bench.exponent({x: 0.3 * x**1.7 for x in (2, 4, 16, 100)}) == pytest.approx(1.7)
    assert bench.exponent({2: 5.0, 8: 5.0}) == pytest.approx(0)
    assert bench.exponent({1: 1.0, 2: 2.0, 4: None, 8: 0.0}) == pytest.approx(1)  # what did not fit or not grow has no logarithm
    assert math.isnan(bench.exponent({4: 1.0}))


SCALING = dict(bench="scaling", device="cpu", threads=1, embed_dim=64, timed=1, objective="vit", **bench.BASE)


def test_the_scaling_table_has_a_row_per_axis_with_medians_and_exponents(tmp_path):
    rows = [{**SCALING, "axis": "depth", "depth": depth, "seconds": depth**2 * noise, "peak_mb": 10.0 * depth} for depth in (4, 2) for noise in (1, 1, 9)]
    rows += [{**SCALING, "axis": "processes", "processes": n, "seconds": 0.5, "peak_mb": 10.0} for n in (1, 2)]
    head, _, depth, processes = bench.table(rows).splitlines()
    assert head == "| objective | width | axis | points | seconds | exponent | MB | exponent | images/s | exponent |"
    assert depth == "| vit | 64 | depth | 2, 4 | 4, 16 | 2.00 | 20, 40 | 1.00 | 2, 0.5 | -2.00 |"
    assert processes == "| vit | 64 | processes | 1, 2 | 0.5, 0.5 | 0.00 | 10, 10 | 0.00 | 16, 32 | 1.00 |"
    rows[0] = {**rows[0], "depth": 8, "out_of_memory": True}
    del rows[0]["seconds"], rows[0]["peak_mb"]
    assert "| depth | 2, 4, 8 | 4, 80, does not fit |" in bench.table(rows)
    pytest.importorskip("matplotlib")
    bench.draw(tmp_path / "scaling.png", rows)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # starts torchrun
def test_a_scaling_step_grows_with_its_axis_and_runs_in_two_processes():
    specs = bench.variants(argparse.Namespace(bench="scaling", device="cpu", timed=1, axes=["depth", "tokens"], objectives=["mae"], embed_dim=64))
    assert [(s["axis"], s["depth"], s["tokens"]) for s in specs] == [*(("depth", d, 64) for d in (2, 4, 8, 16)), *(("tokens", 4, n) for n in (16, 64, 144, 256))]
    few, many = (sum(p.numel() for p in bench.scaling_step(spec, torch.device("cpu"))[0].encoder.blocks.parameters()) for spec in specs[:2])
    assert many == 2 * few
    measured = bench.in_new_process({**SCALING, "axis": "processes", "processes": 2, "depth": 1, "tokens": 4, "batch": 1})
    assert measured["seconds"] > 0 and measured["processes"] == 2


@pytest.mark.parametrize("arguments, says", [
    (["scaling", "--embed-dim", "100"], "--embed-dim 100 must be a multiple of 64"),
    (["scaling", "--rounds", "0"], "--rounds 0 must be at least 1"),
    (["scaling", "--json", "no/such/folder/x.jsonl"], "no/such/folder"),
    (["table", "nowhere.jsonl"], "nowhere.jsonl"),
    (["table", "notes.jsonl"], "notes.jsonl holds no measurements"),
    (["table", "attention.jsonl", "--plot", "x.png"], "only scaling has a figure"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.jsonl").write_text("not json\n")
    Path("attention.jsonl").write_text(json.dumps({**SPEC, "seconds": 1, "peak_mb": 2}) + "\n")
    with pytest.raises(SystemExit) as stop:
        bench.main([*arguments, *(["--device", "cpu"] if arguments[0] == "scaling" else [])])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("bench.py: ") and error.endswith("; see --help\n") and error.count("\n") == 1 and says in error
