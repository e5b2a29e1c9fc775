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
    assert "| a | 13.0 ± 14.1 |" in lab.table(claim, rows) and "99" not in lab.table(claim, rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all claims: runs that several of them need are trained once."""
    return tmp_path_factory.mktemp("claims")


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_each_claim_runs_in_its_tiny_form(name, folder, capsys):
    if name.startswith("detect"):
        pytest.importorskip("pycocotools")
    claims.main([name, "--tiny", "--seeds", "1", "--output-dir", str(folder)])
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    claim = claims.CLAIMS[name](lab.Lab(folder / "runs", tiny=True))
    assert [row["arm"] for row in rows] == list(claim.arms)
    figures = {row["arm"]: row["figures"] for row in rows}
    for statement in claim.statements:
        assert isinstance(statement.effect(figures), (int, float)) and statement.text in printed
    assert (folder / f"{name}.png").stat().st_size > 5000
    assert str(folder) not in json.dumps(rows), "a path of this machine"
    before = (folder / f"{name}.jsonl").read_bytes()
    claims.main([name, "--tiny", "--seeds", "1", "--output-dir", str(folder)])  # all is there: nothing is measured again
    assert (folder / f"{name}.jsonl").read_bytes() == before


def test_a_claim_killed_in_the_middle_of_a_line_or_a_run_goes_on(tmp_path, capsys):
    flags = ["mirl-residual", "--tiny", "--seeds", "1", "--output-dir", str(tmp_path / "out")]
    claims.main(flags)
    file = tmp_path / "out" / "mirl-residual.jsonl"
    whole = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(file.read_text()[:-20])  # the second arm's line was being written
    for state in (tmp_path / "out" / "runs").glob("pretrain*/checkpoint.pt"):
        state.unlink()  # and the runs had not come to an end
    claims.main(flags)
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["arm"] for row in again] == [row["arm"] for row in whole]
    assert again[0] == whole[0] and again[1]["figures"] == whole[1]["figures"] and again[1]["commands"] == whole[1]["commands"]


def test_commands_name_data_and_earlier_runs_instead_of_paths(tmp_path, monkeypatch):
    bench = lab.Lab(tmp_path / "data", data="data", seed=3)
    monkeypatch.setattr(lab.train, "main", lambda argv: seen.append(argv))
    monkeypatch.setattr(lab, "finished", lambda folder: False)
    monkeypatch.setattr(lab, "files_in", lambda data: {"train": 50, "val": 0, "test": 2500})
    seen = []
    with pytest.raises(FileNotFoundError):  # nothing was trained
        bench.train(task="classify", probe=True, img_size=[32, 48], label_smoothing=None, **bench.images(100), init=tmp_path / "data" / "x" / "checkpoint.pt")
    assert seen[0][:6] == ["--seed", "3", "--eval-every", "10000", "--task", "classify"] and str(tmp_path / "data" / "x" / "checkpoint.pt") in seen[0]
    told = bench.commands[0]
    assert "--probe --img-size 32 48 --data folder --data-path DATA --train-images 50 --val-images 2000 --init runs/x/checkpoint.pt" in told
    assert str(tmp_path) not in told and "label" not in told


@pytest.mark.parametrize("flags, said", [
    (["mirl-dept"], "mirl-depth"), (["mirl-depth", "--seeds", "0"], "--seeds 0"), (["mirl-depth", "--data", "nowhere"], "--data nowhere"),
    (["mirl-depth", "--budget", "nan"], "--budget"), (["list", "mirl-depth"], "'list' stands alone"), (["report", "--results", "nowhere"], "--results nowhere"), (["report", "--write", "README.txt"], "README.txt")])
def test_bad_input_is_one_sentence(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        claims.main(flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_figure_that_is_no_number_is_stored_as_none_and_judged_as_noise(tmp_path):
    def make(one):
        return lab.Claim("", "", {"a": lambda: {"x": math.nan if one.seed == 1 else 2.0, "curve x": [(0, 1.0), (1, math.inf)]}, "b": lambda: {"x": 1.0}},
                         [lab.Statement("a is ahead", lambda f: f["a"]["x"] - f["b"]["x"])])
    rows = [row for seed in range(3) for row in lab.measure("c", make, lab.Lab(tmp_path / "runs", seed=seed, say=lambda _: None), tmp_path / "c.jsonl")[1]]
    claim = make(lab.Lab(tmp_path))
    assert [row["figures"]["x"] for row in rows if row["arm"] == "a"] == [2.0, None, 2.0] and rows[0]["figures"]["curve x"] is None
    (_, effects, verdict), = lab.verdicts(claim, rows)
    assert effects[0] == 1 and math.isnan(effects[1]) and verdict == "too noisy to say"
    assert "| a | n/a |" in lab.table(claim, rows) and "n/a" in lab.told(claim, rows)
    lab.draw(tmp_path / "c.png", "c", claim, rows)


def test_images_of_generated_scenes_are_judged_by_as_many_as_asked_for():
    usual = lab.Lab("runs").images(250, val=4000)
    assert usual == dict(data="shapes", data_size=16000, train_images=250)  # train.py: a quarter of 16,000


# what the papers say, as figures: every effect must come out above zero, and turned around below
AGREEING = {
    "mirl-depth": {"random, 12 blocks": {"probe %": 30}, "random, 24 blocks": {"probe %": 30}, "MAE, 12 blocks": {"probe %": 40}, "MAE, 24 blocks": {"probe %": 38},
                   "MIRL, 12 blocks": {"probe %": 41}, "MIRL, 24 blocks": {"probe %": 45}},
    "mirl-residual": {"MIRL": {"probe %": 45, "error of main 1+4": 1.0, "error of residual 1+4": 1.3, "error of sum 1+4": 0.6, "variance of main 1+4": 0.7,
                               "variance of residual 1+4": 0.4}, "plain deep supervision": {"probe %": 43}},
    "mixmim-fill": {"random": {"probe %": 30}, "mix": {"probe %": 46}, "mask symbol": {"probe %": 43}, "mask symbol, equal time": {"probe %": 44}},
    "detect-init": {"random": {"box AP50": 60, "AP50 early": 40}, "supervised": {"box AP50": 59}, "supervised contrastive (for MoCo v3)": {"box AP50": 59},
                    "mask symbol (for BEiT)": {"box AP50": 64}, "MAE": {"box AP50": 65, "AP50 early": 50}, "MIRL": {"box AP50": 66}, "MixMIM": {"box AP50": 66}},
    "sam-accuracy": {f"{net}{how}, {images} images": {"test %": value} for images, values in {
        "250": {"ViT": (20, 27), "Mixer": (20, 29), "ResNet": (30, 30.1)}, "1,000": {"ViT": (40, 45), "Mixer": (35, 41), "ResNet": (43, 43.2)}}.items()
        for net, pair in values.items() for how, value in zip(("", " + SAM"), pair)} | {
        f"{net} for twice the epochs, 1,000 images": {"test %": value} for net, value in (("ViT", 41), ("Mixer", 36), ("ResNet", 43.1))},
}


@pytest.mark.parametrize("name", AGREEING)
def test_statements_have_the_papers_sign(name):
    for statement in claims.CLAIMS[name](lab.Lab("runs", data="DATA")).statements:
        assert statement.effect(AGREEING[name]) > 0, statement.text
        worse = {arm: {key: -value if "error" not in key and "variance" not in key else 1 / value for key, value in figures.items()} for arm, figures in AGREEING[name].items()}
        assert statement.effect(worse) < 0, statement.text


def test_a_file_that_holds_something_else_is_not_touched(tmp_path, capsys):
    (tmp_path / "mirl-residual.jsonl").write_text('{"loss": 1.0}\n')
    with pytest.raises(SystemExit):
        claims.main(["mirl-residual", "--tiny", "--output-dir", str(tmp_path)])
    assert "line 1" in capsys.readouterr().err and (tmp_path / "mirl-residual.jsonl").read_text() == '{"loss": 1.0}\n'


def test_the_readme_holds_what_the_report_says():
    text = (Path(claims.__file__).resolve().parents[1] / "README.md").read_text()
    begin, end = claims.MARKS
    assert text.split(begin)[1].split(end)[0].strip() == claims.report(claims.RESULTS)


def test_a_report_goes_between_the_marks_and_nowhere_else(tmp_path, capsys):
    claim = claims.CLAIMS["mirl-residual"](lab.Lab("runs"))
    keys = ("error of main 1+4", "error of residual 1+4", "error of sum 1+4", "variance of main 1+4", "variance of residual 1+4")
    for seed in range(3):
        for arm in claim.arms:
            figures = {"probe %": 40.0 + (2 if arm == "MIRL" else 0), **dict.fromkeys(keys, 1.0)}
            lab.append(tmp_path / "mirl-residual.jsonl", dict(claim="mirl-residual", arm=arm, seed=seed, figures=figures, data="cifar10", budget=20, tiny=False, seconds=60.0,
                                                              processor="a machine", threads=1, torch="2.15.0+cpu"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{claims.MARKS[0]}\nold\n{claims.MARKS[1]}\nafter\n")
    claims.main(["report", "--results", str(tmp_path), "--write", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = next(line for line in text.splitlines() if "mirl-residual" in line)
    assert "--data DATA --seeds 3 --budget 20`" in row and "6 min" in row and "agrees: pairing is ahead of plain deep supervision, 2.00 ± 0.00 points" in row
