"""experiments/claims.py and lab.py: command lines, verdicts by hand, tiny runs, resuming, the report."""

import json
import math
import shlex
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import claims
import first_blocks
import lab
import measures
import train
from benchmarks.machine import append


# ---------------------------------------------------------------------------- verdicts


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


def test_the_number_of_seeds_that_would_decide_is_the_smallest_one():
    effects = [3.0, -1.0, 1.0]  # mean 1, sd 2: above zero once t 2 / sqrt(n) < 1, with t = 1.833 from n = 14 on
    assert lab.seeds_needed(effects, 1) == 14
    assert 1.833 * 2 / 14**0.5 < 1 < 1.833 * 2 / 13**0.5
    assert lab.seeds_needed([3.0], 1) is None and lab.seeds_needed([3.0, math.nan], 1) is None


CLAIM = dict(
    paper="P", says="s", common="", arms={"a": "", "b": ""}, figures={"x": "x"}, cost="none",
    expects={"a is ahead": claims.ahead("x", "a", "b")})


def rows_of(values):
    return [dict(seed=seed, arm=arm, figures={"x": value}) for seed, arm, value in values]


def test_effects_are_paired_by_seed_and_incomplete_seeds_left_out():
    rows = rows_of([(1, "b", 20.0), (0, "a", 3.0), (0, "b", 1.0), (1, "a", 23.0), (2, "a", 99.0)])
    (statement, effects, verdict), = lab.verdicts(CLAIM, rows)
    assert statement.text == "a is ahead" and effects == [2.0, 3.0] and verdict == "too noisy to say"
    assert "| a | 13.0 ± 14.1 |" in lab.table(CLAIM, rows) and "99" not in lab.table(CLAIM, rows)
    # 2.5 +- 6.314 * 0.7071 / sqrt(2); decided once t 0.7071 / sqrt(n) < 2.5: n = 3
    assert "**too noisy to say**, 3 seeds would decide | 2.50 ± 3.16 points | 1 |" in lab.verdict_table(CLAIM, rows)


def test_a_figure_that_is_not_a_number_is_shown_and_judged_as_noise():
    rows = rows_of([(0, "a", 3.0), (0, "b", 1.0), (1, "a", None), (1, "b", 1.0)])
    (_, effects, verdict), = lab.verdicts(CLAIM, rows)
    assert effects[0] == 2 and math.isnan(effects[1]) and verdict == "too noisy to say"
    assert "| a | n/a |" in lab.table(CLAIM, rows)


# What the papers say, as figures of the arms in their order; None: no such figure. Written from the papers, not from
# the statements' code: every effect must come out above zero, and turned around below.
AGREEING = {
    "mirl-depth": {"loss": (0.70, 0.73, 0.69, 0.695), "mean probe %": (40, 38, 41, 45),
                   "late block %": (41, 44, 40, 44), "last block %": (40, 41, 41, 46),
                   "gradient span, trained": (4, 6, 2, 3)},
    "mirl-tune": {"fine-tuned %": (50, 60, 62), "first 36 blocks %": (None, 60.4, 59)},
    "mirl-residual": {"probe %": (45, 43), "error of main 1+4": (1.0, None), "error of residual 1+4": (1.3, None),
                      "error of sum 1+4": (0.6, None), "variance of main 1+4": (0.7, None),
                      "variance of residual 1+4": (0.4, None)},
    "sam-accuracy": {"test %": (74.6, 79.9, 66.4, 77.4, 76.0, 76.9, 75.0, 67.0, 50, 60, 40, 56, 58, 58.5)},
    "sam-geometry": {"lambda": (738.8, 20.9, 1644.4, 22.5, 179.8, 150, 500, 900),
                     "gap to L_N": (6, 1, 7, 1, 2, 1, 6, 7),
                     "rise of the loss": (4.0, 0.5, 5.0, 0.4, 1.5, 1.0, 4, 5),
                     "active first %": (12, 8, 11, 6, 55, 54, 1, 1),
                     "log10 NTK condition, untrained": (3.62, 3.6, 4.16, 4.1, 3.45, 3.45, 1, 1),
                     "weight norm": (270, 350, 200, 240, 100, 101, 1, 1)},
    "sam-robust": {"clean %": (74.6, 79.9, 66.4, 77.4, 78.5, 79.3, 65, 69),
                   "corrupted %": (46.6, 56.5, 33.8, 48.8, 50.0, 52.2, 40, 46), "PGD-10 %": (0, 0, 0, 0, 0, 0, 33, 37)},
    "mixmim-fill": {"probe %": (30, 46, 43, 44)},
    "mixmim-dual": {"probe %": (30, 46, 43, 45.8)},
    "mixmim-attention": {"probe %": (30, 46, 42), "loss": (None, 0.70, 0.78)},
    "detect-init": {"box AP": (48.9, 51), "mean box AP": (35, 42), "box AP early": (20, 30), "box AP50": (60, 65)},
    "segment-init": {"mIoU": (44, 48.1, 50), "mIoU early": (25, 35, 36)},
}


def turned(key, value):
    """A figure as if the opposite had come out. Ratios stay above zero, differences change sign and grow."""
    return 1 / value if key.startswith(("lambda", "error", "variance")) else -100 * value


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_statements_have_the_papers_sign(name):
    figures, opposite = {}, {}
    for k, arm in enumerate(claims.CLAIMS[name]["arms"]):
        row = {key: values[k] for key, values in AGREEING[name].items() if values[k] is not None}
        figures[arm], opposite[arm] = row, {key: turned(key, value) for key, value in row.items()}
    for text, (effect, unit, worth) in claims.CLAIMS[name]["expects"].items():
        assert effect(figures) > 0 > effect(opposite), text
        assert worth > 0 and unit


# ---------------------------------------------------------------------------- command lines


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_every_command_of_a_claim_is_one_that_train_py_takes(name, monkeypatch):
    if name == "detect-init":
        pytest.importorskip("pycocotools")
    claim = claims.CLAIMS[name]
    for overrides in ("", lab.TINY):
        bench = lab.Lab("runs", "cifar10", "DATA", 3, overrides=overrides)
        for arm in claim["arms"]:
            for _, (script, *words) in bench.plan(claim, arm):
                if script == "train.py" and "--init" not in words:
                    args = train.parse(words)
                    assert args.seed % 1000 == 3 and args.output_dir.startswith("runs/")
    assert claim["cost"] and claim["protocol"]


def test_later_flags_replace_earlier_ones_and_overrides_only_those_that_exist():
    bench = lab.Lab("runs", seed=4, overrides="--epochs 1 --depth 2")
    words = bench.words("--task classify --epochs 20 --lr 1", "--lr 2 --single")
    assert " ".join(words).startswith("train.py --task classify --epochs 1 --lr 2 --single --data shapes ")
    assert "--depth" not in words and words[words.index("--seed") + 1] == "4"
    tripled = lab.Lab("runs").words("--task classify --epochs 20", times=3)
    assert tripled[tripled.index("--epochs") + 1] == "60"


def test_probes_have_seeds_of_their_own_and_start_from_the_arms_run():
    plan = lab.Lab("runs", "cifar10", "/data", 3).plan(claims.CLAIMS["mixmim-fill"], "mix")
    (_, main), *probes = plan
    assert [name for name, _ in plan] == ["", "probe", "probe", "probe"]
    assert [words[words.index("--seed") + 1] for _, words in probes] == ["3", "1003", "2003"]
    assert {words[words.index("--init") + 1] for _, words in probes} == {f"{main[-1]}/checkpoint.pt"}
    assert "/data" not in str(plan)  # commands name DATA, not a path of this machine


def test_a_smaller_depth_starts_from_the_first_blocks(tmp_path):
    claim = dict(common="--task pretrain --method mae --patch-size 8 --embed-dim 16 --num-heads 1 --depth 4 "
                        "--epochs 1 "
                        "--batch-size 8 --data shapes --data-size 16",
                 arms={"a": ""}, figures={"loss": "val_loss", "half": "half.val_acc"},
                 then={"half": "--task classify --patch-size 8 --embed-dim 16 --num-heads 1 --depth 2 --epochs 1 "
                               "--batch-size 8 --data shapes --data-size 16"})
    bench = lab.Lab(tmp_path, say=lambda text: None)
    (_, main), (_, cut), (_, tuned) = bench.plan(claim, "a")
    assert cut[0] == "experiments/first_blocks.py" and tuned[tuned.index("--init") + 1].endswith("first2.pt")
    assert set(bench.arm(claim, "a")) == {"loss", "half"}
    saved = torch.load(bench.place(first_blocks.output(f"{main[-1]}/checkpoint.pt", 2)), weights_only=True)
    assert saved["args"]["depth"] == 2
    assert {name.split(".")[2] for name in saved["model"] if name.startswith("encoder.blocks.")} == {"0", "1"}


# ---------------------------------------------------------------------------- runs


def only(name, *arms):
    """A claim with some of its arms, one probe, and the statements on them."""
    claim = claims.CLAIMS[name]
    return claim | dict(arms={arm: claim["arms"][arm] for arm in arms}, probes=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("claims")


def start(folder, *more):
    folders = ["--output-dir", str(folder), "--runs", str(folder / "runs")]
    claims.main(["mirl-residual", "--tiny", "--seeds", "1", *folders, *more])
    return [json.loads(line) for line in (folder / "mirl-residual.jsonl").read_text().splitlines()]


def test_a_claim_runs_and_the_second_time_nothing_is_measured_again(folder, capsys):
    rows = start(folder)
    printed = capsys.readouterr().out
    assert [row["arm"] for row in rows] == list(claims.CLAIMS["mirl-residual"]["arms"])
    assert "pairing is ahead of plain deep supervision" in printed and str(folder) not in json.dumps(rows)
    assert rows[0]["figures"].keys() >= {"probe %", "error of sum 1+2", "variance of main 1+2"}
    assert (folder / "mirl-residual.png").stat().st_size > 5000
    assert start(folder) == rows


def test_a_command_of_a_row_pasted_by_hand_repeats_its_run(folder, tmp_path, monkeypatch, capsys):
    rows = start(folder)
    monkeypatch.chdir(tmp_path)
    for command in rows[0]["commands"]:
        python, script, *words = shlex.split(command)
        assert (python, script) == ("python", "train.py")
        train.main(words)
    for command in rows[0]["commands"]:
        name = command.split()[-1]
        again = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        before = torch.load(folder / name / "checkpoint.pt", weights_only=True)["model"]
        assert all(torch.equal(again[key], before[key]) for key in before | again)
    pasted = lab.Run(tmp_path / rows[0]["commands"][-1].split()[-1])
    assert pasted.value("val_acc") == rows[0]["figures"]["probe %"]


def test_a_claim_killed_in_the_middle_of_a_line_or_a_run_goes_on(folder, capsys):
    before = start(folder)
    file = folder / "mirl-residual.jsonl"
    file.write_text(file.read_text()[:-20])  # the second arm's line was being written
    for state in (folder / "runs").glob("pretrain*/checkpoint.pt"):
        state.unlink()  # and the runs had not come to an end
    again = start(folder)
    assert again[0] == before[0]
    assert again[1]["figures"] == before[1]["figures"] and again[1]["commands"] == before[1]["commands"]


def test_measures_of_depth_and_sharpness_are_numbers(tmp_path, monkeypatch):
    bench = lab.Lab(tmp_path, seed=1, overrides=lab.TINY, say=lambda text: None)
    figures = bench.arm(only("mirl-depth", "MIRL, 12 blocks"), "MIRL, 12 blocks")
    assert [block for block, _ in figures["curve probe % over blocks"]] == [1, 2, 3, 4]
    assert 0 <= figures["mean probe %"] <= 100
    assert len(figures["curve log2 gradient norm, trained, over blocks"]) == 4
    figures = bench.arm(only("sam-geometry", "ViT + SAM"), "ViT + SAM")
    assert figures["lambda"] > 0 and figures["weight norm"] > 0 and figures["log10 NTK condition, untrained"] > 0


def test_a_linear_classifier_separates_what_can_be_separated():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 2] > 0).long()
    assert measures.linear_accuracy(x[:150], labels[:150], x[150:], labels[150:]) > 94
    shuffled = labels[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    assert measures.linear_accuracy(x[:150], shuffled[:150], x[150:], shuffled[150:]) < 75


def test_training_done_before_counts_once(tmp_path, monkeypatch):
    def arm(one, claim, name):
        one.trained_before = {"runs/x": 60.0} if name == "a" else {"runs/x": 60.0, "runs/z": 5.0}
        return {"x": 1.0}

    monkeypatch.setattr(lab.Lab, "arm", arm)
    words = dict(a=["train.py", "runs/x"], b=["train.py", "runs/z"])
    monkeypatch.setattr(lab.Lab, "plan", lambda self, claim, name: [("", words[name])])
    bench = lab.Lab(tmp_path / "runs", say=lambda text: None)
    rows = lab.measure("c", CLAIM, bench, tmp_path / "c.jsonl")
    assert [row["trained_before"] for row in rows] == [60.0, 5.0]


# ---------------------------------------------------------------------------- the program


@pytest.mark.parametrize("flags, words", [
    (["mirl-dept"], "mirl-depth"), (["mirl-depth", "--seeds", "0"], "--seeds: 0"),
    (["mirl-depth", "--times", "nan"], "--times"),
    (["mirl-depth", "--data", "cifar10"], "--data-path"), (["report", "--results", "nowhere"], "--results nowhere"),
    (["report", "--write", "README.txt"], "README.txt")])
def test_bad_input_is_one_sentence(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        claims.main(flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_file_that_holds_something_else_is_not_touched(tmp_path, capsys):
    (tmp_path / "mirl-residual.jsonl").write_text('{"loss": 1.0}\n')
    with pytest.raises(SystemExit):
        start(tmp_path)
    assert "line 1" in capsys.readouterr().err
    assert (tmp_path / "mirl-residual.jsonl").read_text() == '{"loss": 1.0}\n'


def test_the_page_holds_what_the_committed_results_say():
    begin, end = claims.MARKS
    between = (ROOT / "docs" / "results.md").read_text().split(begin)[1].split(end)[0]
    assert between.strip() == claims.report(claims.RESULTS)


def test_a_report_goes_between_the_marks_and_knows_the_present_protocol(tmp_path, capsys):
    for seed in range(3):
        for arm in ("random", "MAE"):
            plan = lab.Lab("runs", "shapes", seed=seed, times=2).plan(claims.CLAIMS["detect-init"], arm)
            figures = dict.fromkeys(("box AP", "mean box AP", "box AP early", "box AP50"), 40.0 + 2 * (arm == "MAE"))
            append(tmp_path / "detect-init.jsonl", dict(
                claim="detect-init", arm=arm, seed=seed, figures=figures, data="shapes", times=2.0, overrides="",
                commands=[lab.command(words) for _, words in plan], seconds=2.0, trained_before=58.0,
                processor="a machine", threads=1, torch="2.15.0+cpu", commit="abc"))
    other = json.loads((tmp_path / "detect-init.jsonl").read_text().splitlines()[0])
    append(tmp_path / "detect-init.jsonl", other | dict(seed=9, commands=["python train.py"]))  # an older protocol
    append(tmp_path / "detect-init.jsonl", other | dict(seed=100))  # a pilot
    page = tmp_path / "page.md"
    page.write_text(f"before\n{claims.MARKS[0]}\nold\n{claims.MARKS[1]}\nafter\n")
    claims.main(["report", "--results", str(tmp_path), "--write", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "claims.py detect-init --times 2 --first-seed 0 --seeds 3`: 3 seeds, 6 minutes, a machine" in text
    assert "commit abc. 512 scenes" in text
    assert "| MAE is ahead of random start in box AP | **agrees** | 2.00 ± 0.00 points of AP | 1 |" in text
    assert "| MAE is ahead of random start in box AP, 2 times as long | **agrees** | 2.00 ± 0.00" in text
    assert "seed: SAM improves" in text.split(": exercises")[1]  # not run
