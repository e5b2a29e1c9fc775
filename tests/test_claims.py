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
    _, again = lab.measure(name, claims.CLAIMS[name], lab.Lab(folder / "runs", tiny=True), folder / f"{name}.jsonl")  # all is there: nothing is done again
    assert again == rows and (folder / f"{name}.jsonl").read_bytes() == before


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
    (["mirl-depth", "--budget", "nan"], "--budget"), (["list", "mirl-depth"], "'list' stands alone"), (["report", "--results", "nowhere"], "--results nowhere"),
    (["report", "--write", "README.txt"], "README.txt")])
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


def test_training_done_before_counts_once(tmp_path):
    def arm(one, **reused):
        one.reused.update(reused)
        one.commands += [f"python train.py --output-dir {name}" for name in reused]
        return {"y": 1}

    def make(one):
        return lab.Claim("", "", {"a": lambda: arm(one, x=60.0), "b": lambda: arm(one, x=60.0, z=5.0)}, [])

    file = tmp_path / "c.jsonl"
    _, rows = lab.measure("c", make, lab.Lab(tmp_path / "runs", say=lambda _: None), file)
    assert [row["trained_before"] for row in rows] == [60.0, 5.0] and all(row["torch"] and row["processor"] for row in rows)
    file.write_text(file.read_text().splitlines(keepends=True)[0])  # stopped in between: the same on another day
    assert [row["trained_before"] for row in lab.measure("c", make, lab.Lab(tmp_path / "runs", say=lambda _: None), file)[1]] == [60.0, 5.0]


def test_images_of_generated_scenes_are_judged_by_as_many_as_asked_for():
    usual = lab.Lab("runs").images(250, val=4000)
    assert usual == dict(data="shapes", data_size=16000, train_images=250)  # train.py: a quarter of 16,000


# What the papers say, as tables: arms, and a row per figure; None: no such figure. Written from the papers, not from the statements' code: every effect
# must come out above zero, and turned around below. Many numbers are the papers' (of ViT-B/16, Mixer-B/16 and ResNets, of ViT-L detectors), some of
# these from memory; the others have the direction that the papers give, and sizes of ours.
NETS = ("ResNet", "ResNet + SAM", "ViT", "ViT + SAM", "Mixer", "Mixer + SAM")
AGREEING = {
    "mirl-depth": (("random, 12 blocks", "random, 24 blocks", "MAE, 12 blocks", "MAE, 24 blocks", "MIRL, 12 blocks", "MIRL, 24 blocks"), {
        "probe %": (30, 30, 40, 38, 41, 45)}),
    "mirl-residual": (("MIRL", "plain deep supervision"), {
        "probe %": (45, 43), "error of main 1+4": (1.0, None), "error of residual 1+4": (1.3, None), "error of sum 1+4": (0.6, None),
        "variance of main 1+4": (0.7, None), "variance of residual 1+4": (0.4, None)}),
    "mirl-truncate": (("random", "MAE", "MIRL"), {  # "negative optimization in deeper layers": anew they are no worse, if anything better
        "0 anew %": (50, 60, 62), "2 anew %": (None, 60.4, 61), "4 anew %": (None, 60.2, 59), "8 anew %": (None, 58, 54)}),
    "mirl-layers": (("random", "MAE", "MIRL"), {
        "best block": (3, 15, 24), "best %": (38, 47, 49), "block 18 %": (35, 46, 47), "block 24 %": (34, 43, 49),
        "gradient span, untrained": (None, 6, 3), "gradient span, trained": (None, 5, 2)}),
    "mirl-shape": (("random, 24 x 64", "random, 8 x 112", "MAE, 24 x 64", "MAE, 8 x 112", "MIRL, 24 x 64", "MIRL, 8 x 112"), {
        "fine-tuned %": (48, 50, 53, 54, 58, 55)}),
    "mirl-time": (("MIRL, 1-block decoders", "MAE, 8-block decoder", "MAE, 1-block decoder"), {
        "curve by minutes of pre-training": ([(0, 35), (5, 44), (10, 47)], [(0, 35), (8, 41), (16, 44)], [(0, 35), (3, 40), (6, 42)]),
        "curve by 10^12 multiply-adds": ([(0, 35), (2, 44), (4, 47)], [(0, 35), (3, 41), (6, 44)], [(0, 35), (1, 38), (2, 40)])}),
    "sam-accuracy": ((*(f"{net}, {images} images" for images in ("250", "1,000") for net in NETS),
                      *(f"{net} for twice the epochs, 1,000 images" for net in ("ResNet", "ViT", "Mixer"))), {
        "test %": (58.0, 58.5, 50.0, 60.0, 40.0, 56.0, 76.0, 76.9, 74.6, 79.9, 66.4, 77.4, 76.2, 75.0, 67.0)}),
    "sam-geometry": (NETS, {
        "lambda": (179.8, 150, 738.8, 20.9, 1644.4, 22.5), "log10 NTK condition, untrained": (3.45, 3.45, 3.62, 3.6, 4.16, 4.1),
        "gap to L_N": (1.53, 1.2, 6.01, 0.14, 7.33, 0.04), "rise of the loss": (1.5, 1.0, 4.0, 0.5, 5.0, 0.4), "weight norm": (100, 101, 270, 350, 200, 240),
        "active first %": (55, 54, 12, 8, 11, 6), "lambda of embedding": (None, None, 300, 7, 1000, 8), "lambda of last block": (None, None, 50, 3, 80, 2)}),
    "sam-attention": (("ViT", "ViT + SAM"), {"attention on the object %": (25, 40), "overlap (IoU) %": (20, 35)}),
    "sam-robust": ((*NETS, *(f"{net}, adversarial" for net in NETS[2:])), {
        "clean %": (78.5, 79.3, 74.6, 79.9, 66.4, 77.4, 65, 69, 55, 63), "corrupted %": (50.0, 52.2, 46.6, 56.5, 33.8, 48.8, 40, 46, 30, 38),
        "lost to corruption %": (36.3, 34.2, 37.5, 29.3, 49.1, 37.0, 38, 33, 45, 40), "PGD-10 %": (0, 0, 0, 0, 0, 0, 33, 37, 28, 34)}),
    "sam-supcon": (("random", "ViT", "ViT + SAM"), {"probe %": (20, 77.4, 80.0)}),
    "sam-transfer": (("ViT from scratch", "Mixer from scratch", *NETS[2:]), {"fine-tuned test %": (80, 75, 91.5, 93.2, 86.1, 91.7)}),
    "sam-rho": (("ResNet", "ViT", "Mixer"), {
        "best rho": (0.02, 0.1, 0.2), "test % without SAM": (76.0, 74.6, 66.4), "test % at 0.4": (70, 66, 64),
        "train loss without SAM": (0.86, 0.65, 0.45), "train loss at 0.4": (1.6, 1.7, 1.3)}),
    "sam-augment": ((*(f"{net}{how}" for net in ("ViT", "Mixer") for how in ("", " + SAM", ", augmented", " + SAM, augmented")),), {
        "test %": (74.6, 79.9, 79.6, 81.5, 66.4, 77.4, 76.4, 78.1), "lambda": (738.8, 20.9, 1659.3, 20, 1644.4, 22.5, 1200, 20),
        "L_N": (6.66, 0.96, 2.5, 0.9, 7.78, 1.01, 2.5, 1.0)}),
    "mixmim-fill": (("random", "mix", "mask symbol", "mask symbol, equal time"), {"probe %": (30, 46, 43, 44)}),
    "mixmim-dual": (("random", "both", "one", "one, twice the steps"), {"probe %": (30, 46, 43, 45.8), "loss": (None, 0.70, 0.74, 0.71)}),
    "mixmim-attention": (("random", "own image only", "both images"), {"probe %": (30, 46, 42), "loss": (None, 0.70, 0.78)}),
    "mixmim-ratio": (("random", "a quarter", "half", "three quarters"), {"probe %": (30, 43, 46, 44)}),
    "mixmim-gap": (("mix", "mask symbol"), {"gap, % of the variance": (8, 30), "gap at visible places": (8, 20), "probe %": (46, 43)}),
    "mixmim-encoders": (("hierarchical", "shifted windows", "plain ViT"), {"gain": (10, 11, 8), "probe %": (46, 46, 42)}),
    "mixmim-transfer": (("random", "mask symbol", "MixMIM", "random, ViT", "MAE, ViT"), {"fine-tuned %": (76, 83.5, 85.1, 78, 83.6)}),
    "detect-init": (("random", "supervised", "supervised contrastive (for MoCo v3)", "mask symbol (for BEiT)", "MAE", "MIRL", "MixMIM"), {
        "box AP50": (50.7, 49.3, 49.3, 53.3, 53.3, 54, 54), "AP50 early": (35, 45, 45, 47, 48, 48, 48)}),
    "detect-scale": ((*(f"{name}, {width} channels" for width in (64, 96, 128) for name in ("random", "MAE")),), {
        "box AP50": (48.9, 50.3, 50, 52, 50.7, 53.3), "AP50 early": (35, 42, 35, 43, 35, 45)}),
    "detect-window": (("windows only", "hybrid", "all global"), {
        "box AP50": (50.7, 53.3, 53.2), "MB at 768 px": (2000, 3000, 6000), "seconds at 768 px": (25, 40, 80)}),
    "segment-init": (("random", "MAE", "MIRL", "mask symbol", "MixMIM"), {"mIoU": (44, 48.1, 50, 47.1, 50.3), "mIoU early": (25, 35, 36, 34, 36)}),
}
RATIOS = ("error", "variance", "lambda", "loss", "gap", "rho", "norm", "MB", "seconds")  # always above zero, and some statements divide them


def turned(key, value):
    """A figure as if the opposite had come out. Differences change sign, and grow until a point or two of room is used up."""
    if isinstance(value, list):
        return [(x, turned(key, y)) for x, y in value]
    return 1 / value if any(word in key for word in RATIOS) else -100 * value


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_statements_have_the_papers_sign(name):
    assert AGREEING.keys() == claims.CLAIMS.keys()
    claim, (arms, rows) = claims.CLAIMS[name](lab.Lab("runs", data="DATA")), AGREEING[name]
    assert set(arms) == set(claim.arms) and {len(values) for values in rows.values()} == {len(arms)}
    figures = {arm: {key: values[k] for key, values in rows.items() if values[k] is not None} for k, arm in enumerate(arms)}
    opposite = {arm: {key: turned(key, value) for key, value in row.items()} for arm, row in figures.items()}
    for statement in claim.statements:
        assert statement.effect(figures) > 0, statement.text
        assert statement.effect(opposite) < 0, statement.text


def test_equal_time_is_a_whole_number_of_images(monkeypatch):
    """A step of mixing takes 1.327 times as long: the symbol may see 13,500 images (train.py would not take 13500.0)."""
    asked = []

    def train(self, **flags):
        asked.append(flags)
        return lab.Run(Path("run"), {"val_acc": 40.0, "val_loss": 0.7}, 1000.0)

    monkeypatch.setattr(lab.Lab, "train", train)
    monkeypatch.setattr(claims.claims_mixmim, "step_ratio", lambda *_: 1.327)
    claims.CLAIMS["mixmim-fill"](lab.Lab("runs")).arms["mask symbol, equal time"]()
    assert "--train-images 13500 " in " ".join(lab.as_argv(asked[2]))


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
            lab.append(tmp_path / "mirl-residual.jsonl", dict(
                claim="mirl-residual", arm=arm, seed=seed, figures=figures, data="cifar10", budget=20, tiny=False, commands=[], seconds=2.0, trained_before=58.0,
                processor="a machine", threads=1, torch="2.15.0+cpu"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{claims.MARKS[0]}\nold\n{claims.MARKS[1]}\nafter\n")
    claims.main(["report", "--results", str(tmp_path), "--write", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = next(line for line in text.splitlines() if "mirl-residual" in line)
    assert "Not run in full: mirl-depth, mirl-truncate" in text
    assert "--data DATA --seeds 3 --budget 20`" in row and "6 min" in row
    assert "**agrees**: pairing is ahead of plain deep supervision, 2.00 ± 0.00 points" in row
    assert "probe %: MIRL 42.0 ± 0.0; plain deep supervision 40.0 ± 0.0<br>" in row
