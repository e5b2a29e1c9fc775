import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import peers

SPEC = dict(bench="peers", peer="vit", package="timm 1", precision="fp32", compiled=False, batch=4, rounds=3, device="cpu", tiny=False, threads=1)


def test_the_table_takes_the_median_of_the_ratios_of_each_round():
    facts = dict(kind="time", ours_macs=10e9, peer_macs=20e9, matmul_flops=480e9)
    rows = [{**SPEC, **facts, "ours_s": ours, "peer_s": peer} for ours, peer in ((1, 2), (2, 3), (4, 2))]  # ratios 2, 1.5, 0.5; medians 2 and 2
    rows += [{**SPEC, "kind": "memory", "side": "ours", "peak_mb": 1234.4}, {**SPEC, "kind": "memory", "side": "peer", "out_of_memory": True}]
    lines = peers.table(rows).splitlines()
    assert len(lines) == 3
    # 4 images x 2 x 3 x 10 GMAC in 2 s are 120 GFLOP/s, of 480 a quarter
    assert lines[2] == ("| vit | timm 1 | cpu, fp32 | 4 | 2 | 2 | 1.50 (0.50 to 2.00) | 10 / 20 | 20 / 40 | 25% / 50% | 1,234 / does not fit |")


def test_sams_own_part_is_counted_in_updates_of_the_same_round():
    times = dict(kind="time", ours_macs=1, peer_macs=1, matmul_flops=1)
    rows = [{**SPEC, **times, "peer": "sam", "ours_s": 4.0, "peer_s": 8.0, "ours_own_s": 3 * a, "peer_own_s": 6 * a, "adamw_s": a * k}
            for a, k in ((1, 2), (5, 1), (9, 3))]
    line = peers.table(rows).splitlines()[-1]
    assert line == "| timm 1 | cpu, fp32 | 4 | 1.50 (1.00 to 3.00) | 3.00 (2.00 to 6.00) | 1 | 0.5 | 2.00 (2.00 to 2.00) |  /  |"


def test_what_counts_as_sams_own_part_climbs_and_comes_back_without_an_update():
    spec = {**SPEC, "tiny": True, "peer": "sam"}
    model, step, own_part, update = peers.sam_steps(spec, "ours", torch.device("cpu"))
    step()
    before = [p.clone() for p in model.parameters()]
    own_part()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    update()
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["vit", "swin", "mae"])
def test_peers_do_the_same_work(name):
    pytest.importorskip(peers.PACKAGES[name])
    spec = {**SPEC, "peer": name, "tiny": True, "batch": 2}
    models = [peers.image_step(spec, side, torch.device("cpu"))[0] for side in ("ours", "peer")]
    ours, theirs = (peers.multiply_adds(model, spec, torch.device("cpu")) for model in models)
    assert ours == theirs
    if name == "vit":  # 17 tokens of 32, 16 of them embedded from 192 pixels; two blocks; 1000 classes
        assert ours == 16 * 192 * 32 + 2 * (17 * 12 * 32 * 32 + 2 * 17 * 17 * 32) + 32 * 1000


@pytest.mark.slow  # starts processes
def test_a_comparison_writes_rounds_and_memory_and_skips_a_peer_that_is_not_installed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    monkeypatch.setitem(peers.PACKAGES, "mae", "no-such-package-anywhere")
    monkeypatch.setattr(peers, "in_new_process", lambda spec, script: peers.peak(spec))  # test_bench.py has that; here it would only take time
    peers.main(["compare", "--tiny", "--only", "mae", "vit", "--rounds", "2", "--batch-size", "2", "--device", "cpu", "--json", str(tmp_path / "x.jsonl")])
    assert "mae is skipped: pip install no-such-package-anywhere" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [(row["kind"], row.get("round", row.get("side"))) for row in rows] == [("time", 0), ("time", 1), ("memory", "ours"), ("memory", "peer")]
    assert all(row["ours_params"] == row["peer_params"] for row in rows[:2]) and all(row["peak_mb"] >= 0 for row in rows[2:])
    peers.main(["table", str(tmp_path / "x.jsonl")])
    assert capsys.readouterr().out.splitlines()[2].startswith("| vit | timm ")


@pytest.mark.parametrize("arguments, says", [
    (["compare", "--rounds", "0"], "--rounds 0 must be at least 1"),
    (["compare", "--batch-size", "-2"], "--batch-size -2 must be at least 1"),
    (["compare", "--json", "no/such/folder/x.jsonl"], "no/such/folder"),
    (["table", "other.jsonl"], "give the file of its --json"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("other.jsonl").write_text('{"bench": "scaling"}\n')
    with pytest.raises(SystemExit) as stop:
        peers.main([*arguments, *(["--device", "cpu"] if arguments[0] == "compare" else [])])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("peers.py: ") and error.endswith("; see --help\n") and error.count("\n") == 1 and says in error
