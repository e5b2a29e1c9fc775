import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import bench

SPEC = dict(bench="attention", device="cpu", window=4, timed=0, model="vit_demo", size=64, blocks="hybrid", bias=True, fused=False, checkpointing=False)


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
