import argparse
import contextlib
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import geometry
import train
from experiments import landscape
from robust import corruption_accuracy, mean_accuracy, pgd
from shapes import Shapes

TINY = "--task classify --data shapes --data-size 64 --epochs 1 --batch-size 16 --patch-size 8 --embed-dim 32 --depth 2"
QUICK = "--images 48 --micro-batch 24 --surface-steps 5 --surface-radius 6 --iters 12 --draws 2 --device cpu --corruption-images"
CLOCK = ("img_s", "flags", "checkpoint")  # what two calls may differ in


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of AdamW, one of SAM, one Mixer."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"adamw0": "--num-heads 2", "adamw1": "--num-heads 2 --seed 1 --workers 0", "sam": "--num-heads 2 --optimizer sam --rho 0.1",
                        "mixer": "--model mixer_demo"}.items():
        train.main([*TINY.split(), *flags.split(), "--output-dir", str(folder / name)])
    return folder


def start(folder, names, flags):
    """Run the script in this process -> what it printed, the JSON lines by run."""
    records, printed = folder / "figures.jsonl", io.StringIO()
    records.unlink(missing_ok=True)
    with contextlib.redirect_stdout(printed):
        landscape.main([*(str(folder / name) for name in names), *flags.split(), "--json", str(records), "--output", str(folder / "picture.png")])
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    return printed.getvalue(), {Path(line["checkpoint"]).parent.name: line for line in lines}


@pytest.fixture(scope="module")
def compared(runs):
    return start(runs, ["adamw0", "sam", "adamw1/checkpoint.pt", "mixer"], f"{QUICK} 8 --attack-images 8")


def rows_of(text):
    """{label: {header: cell}} of the table that was printed."""
    header, *lines = [re.split(r"  +", line.strip()) for line in text.split("\n\n")[0].splitlines()]
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in lines}


def network(folder, name):
    saved = torch.load(folder / name / "checkpoint.pt", weights_only=True)
    model = train.build_model(argparse.Namespace(**saved["args"]), 10)
    model.load_state_dict(saved["model"])
    return model.eval()


def pictures(size, part, count):
    """The first of the fixed shuffle, normalized by hand."""
    source, chosen = Shapes(size, 32, train=part), torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count]
    mean, std = (torch.tensor(scale).view(3, 1, 1) for scale in (Shapes.mean, Shapes.std))
    return (source.images[chosen].float() / 255 - mean) / std, source.labels[chosen]


# ---------------------------------------------------------------------------- figures


@pytest.mark.parametrize("name", ["sam", "mixer"])
def test_the_figures_are_those_of_geometry_called_directly(runs, compared, name):
    model, (x, y), found = network(runs, name), pictures(64, True, 48), compared[1][name]
    loss_fn = lambda: F.cross_entropy(model(x), y)
    flat = geometry.average_flatness(model, loss_fn, sigma=0.01, draws=2)
    active = list(geometry.active_neurons(model, x).values())
    expected = dict(params=sum(p.numel() for p in model.parameters()), train_loss=flat.clean, L_N=flat.perturbed, weight_norm=geometry.weight_norm(model),
                    lambda_max=geometry.hessian_max_eigenvalue(model, loss_fn, iters=12, tol=1e-2),
                    active_first=100 * active[0], active_mean=100 * sum(active) / len(active))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-3)
    assert found["gap"] == pytest.approx(flat.gap, abs=1e-5) and list(found["active"].values()) == pytest.approx(active, rel=1e-3)
    surface = geometry.loss_surface(model, lambda: F.cross_entropy(model(x[:24]), y[:24]), radius=6.0, steps=5)
    radius = geometry.doubling_radius(surface)
    assert found["doubling_radius"] == (None if name == "mixer" else pytest.approx(radius, rel=1e-3)) and math.isinf(radius) == (name == "mixer")


@pytest.mark.parametrize("name", ["adamw0", "mixer"])
def test_the_accuracies_are_those_of_the_test_images(runs, compared, name):
    model, found = network(runs, name), compared[1][name]
    scale = dict(mean=Shapes.mean, std=Shapes.std)

    def right(x, y):
        with torch.no_grad():
            return 100 * (model(x).argmax(dim=1) == y).float().mean().item()

    x, y = pictures(16, False, 8)
    attacked = pgd(model, x, y, 2 / 255, **scale, generator=torch.Generator().manual_seed(0))
    assert found["test_acc"] == right(*pictures(16, False, 16))
    assert found["attacked_acc"] == right(attacked, y)
    assert found["corrupted_acc"] == pytest.approx(100 * mean_accuracy(corruption_accuracy(model, x, y, **scale)))


def test_two_seeds_are_one_row_and_the_others_rows_of_their_own(compared):
    rows = rows_of(compared[0])
    assert {label: row["seeds"] for label, row in rows.items()} == {"vit_demo adamw": "2", "vit_demo sam rho 0.1": "1", "mixer_demo adamw": "1"}
    assert [line["row"] for line in compared[1].values()] == ["vit_demo adamw", "vit_demo sam rho 0.1", "vit_demo adamw", "mixer_demo adamw"]
    assert [line["train_seed"] for line in compared[1].values()] == [0, 0, 1, 0]


def test_the_table_holds_mean_and_sample_deviation_of_the_json_lines(compared):
    rows, lines = rows_of(compared[0]), compared[1]
    a, b = (lines[name]["lambda_max"] for name in ("adamw0", "adamw1"))
    assert a != b and rows["vit_demo adamw"]["lambda"] == f"{(a + b) / 2:.3g} ± {abs(a - b) / 2**0.5:.2g}"
    a, b = (lines[name]["test_acc"] for name in ("adamw0", "adamw1"))
    assert rows["vit_demo adamw"]["test %"] == f"{(a + b) / 2:.1f} ± {statistics.stdev([a, b]):.1f}"
    assert rows["mixer_demo adamw"]["train loss"] == f"{lines['mixer']['train_loss']:.3g}"
    assert rows["mixer_demo adamw"]["params"] == f"{lines['mixer']['params']:,}"
    assert "On 48 training images" in compared[0] and "On 24 of them" in compared[0] and "On 16 test images" in compared[0]


def test_the_figures_do_not_depend_on_the_order_and_company_of_the_checkpoints(runs, compared):
    printed, lines = start(runs, ["sam", "adamw1"], f"{QUICK} 8 --attack-images 8 --markdown")
    for name, line in lines.items():
        assert {key: value for key, value in line.items() if key not in CLOCK} == {key: value for key, value in compared[1][name].items() if key not in CLOCK}
    table = printed.split("\n\n")[0].splitlines()
    assert len(table) == 4 and re.fullmatch(r"\| -+ \|( -+: \|)+", table[1])
    assert len({line.count("|") for line in table}) == 1 and table[2].startswith("| vit_demo sam rho 0.1 |")


def test_the_picture_is_a_png(runs, compared):
    assert (runs / "picture.png").read_bytes().startswith(b"\x89PNG") and compared[0].endswith(f"saved {runs / 'picture.png'}\n")


def test_without_matplotlib_a_sentence_says_what_to_install_and_zero_images_leave_their_columns_out(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    printed, lines = start(tmp_path, [runs / "mixer"], f"{QUICK} 0")
    assert "pip install matplotlib" in printed.splitlines()[-1] and not (tmp_path / "picture.png").exists()
    assert not {"corrupt %", "attacked %"} & set(rows_of(printed)["mixer_demo adamw"]) and "corrupted_acc" not in lines["mixer"]


@pytest.mark.parametrize("key, values, text", [
    ("lambda_max", [3.0], "3"), ("lambda_max", [1.0, 3.0], "2 ± 1.4"), ("params", [1000, 1000], "1,000"), ("L_N", [1.0, math.inf], "inf"),
    ("doubling_radius", [0.25, 0.5], "0.375 ± 0.177"), ("doubling_radius", [math.inf, 0.3], "> 0.400"), ("doubling_radius", [math.nan], "nan")])
def test_a_cell_is_the_hand_computed_one(key, values, text):
    assert landscape.cell(key, values, reach=0.5) == text


# ---------------------------------------------------------------------------- rows


def flags_of(*words):
    return train.resolve(train.parse(["--task", "classify", *" ".join(words).split()]))


def test_a_label_names_what_differs_and_no_sizes_that_the_preset_tells():
    runs = [flags_of("--seed 3"), flags_of("--model mixer_demo"), flags_of("--optimizer sam --rho 0.2 --data-path elsewhere"), flags_of("--mixup 0.5"),
            flags_of("--seed 4 --workers 2"), flags_of("--depth 3 --num-heads 1")]
    assert landscape.group("abcdef", runs) == {
        "vit_demo adamw depth=12 num_heads=3 mixup=0.0": [0, 4], "mixer_demo adamw": [1],
        "vit_demo sam rho 0.2 depth=12 num_heads=3 mixup=0.0": [2], "vit_demo adamw depth=12 num_heads=3 mixup=0.5": [3],
        "vit_demo adamw depth=3 num_heads=1 mixup=0.0": [5]}
    assert list(landscape.group("ab", [runs[0], runs[4]])) == ["vit_demo adamw"]


def test_a_file_that_lacks_newer_flags_is_in_the_row_of_those_that_have_their_defaults(runs, tmp_path):
    saved = torch.load(runs / "adamw1" / "checkpoint.pt", weights_only=True)
    for key in ("ema", "mixup", "num_classes"):
        del saved["args"][key]
    torch.save(saved, tmp_path / "old.pt")
    paths = [runs / "adamw0" / "checkpoint.pt", tmp_path / "old.pt"]
    assert landscape.group(paths, [landscape.read_run(path)[0] for path in paths]) == {"vit_demo adamw": [0, 1]}


def test_what_is_looked_at_was_in_the_training_set_of_every_run():
    runs = [flags_of("--data-size 64", size) for size in ("", "--train-images 40", "--train-images 24 --stats")]
    for run in runs:
        run.num_classes = 10
    flags = landscape.parse(["x", "--images", "24", "--corruption-images", "8"])
    chosen, scales = landscape.open_data("abc", runs, flags)
    assert set(chosen["train"][1]) == set(landscape.first_of_shuffle(64, 24)) <= set(landscape.first_of_shuffle(64, 40))
    assert scales[False] == (Shapes.mean, Shapes.std) and scales[True] != scales[False]
    flags.images = 25
    with pytest.raises(ValueError, match="--images 25 is more than the 24 .* try --images 24"):
        landscape.open_data("abc", runs, flags)


# ---------------------------------------------------------------------------- what is refused


def changed(runs, path, **args):
    saved = torch.load(runs / "adamw0" / "checkpoint.pt", weights_only=True)
    saved["args"].update(args)
    torch.save(saved, path)
    return path


def refused(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        landscape.main([*QUICK.split(), "8", *map(str, words)])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("landscape.py: ") and err.endswith("; see --help\n") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("args, named", [
    (dict(task="pretrain"), "is of --task pretrain"), (dict(probe=True), "linear probe"), (dict(loss="supcon"), "supcon"),
    (dict(data="cifar10"), "64 shapes, 32x32 px, 10 classes"), (dict(data_size=128), "128 shapes"), (dict(img_size=[64, 64]), "64x64 px"),
    (dict(seed=0), "same seed"), (dict(depth=3), "depth=3.pt: the weights do not fit")])
def test_a_run_that_cannot_be_compared_is_refused_in_one_sentence(runs, tmp_path, capsys, args, named):
    other = changed(runs, tmp_path / f"{'_'.join(f'{key}={value}' for key, value in args.items())}.pt", **args)
    err = refused(capsys, *([] if "depth" in args else [runs / "adamw0"]), other, "--output", tmp_path / "picture.png")
    assert named in err and not (tmp_path / "picture.png").exists()


def test_other_data_paths_are_refused_until_one_is_named(runs, tmp_path, capsys):
    files = [changed(runs, tmp_path / f"{place}.pt", data="folder", data_path=place, seed=seed) for seed, place in enumerate(("here", "there"))]
    assert "here, there; name one place by --data-path" in refused(capsys, *files)
    assert "has no folder train/" in refused(capsys, *files, "--data-path", tmp_path)


@pytest.mark.parametrize("words, named", [
    ("nowhere.pt", "nowhere.pt does not exist"), ("{runs}", "checkpoint.pt does not exist"), ("{tmp}/foreign.pt", "was not written by train.py"),
    ("{runs}/sam --images 65", "try --images 64"), ("{runs}/sam --attack-images 17", "try --attack-images 16"), ("{runs}/sam --surface-steps 4", "such as 5"),
    ("{runs}/sam --draws 0", "--draws 0 must be at least 1"), ("{runs}/sam --sigma nan", "--sigma nan"), ("--seed 1", "checkpoints"),
    ("{runs}/sam --output {tmp}/none/x.png", "folder that does not exist"), ("{runs}/sam --json {runs}/sam/checkpoint.pt", "one of the checkpoints"),
    ("{runs}/sam --output {runs}/sam/checkpoint.pt", "one of the checkpoints")])
def test_bad_inputs_end_with_one_line_and_nothing_is_written(runs, tmp_path, capsys, words, named):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "foreign.pt")
    before = (runs / "sam" / "checkpoint.pt").read_bytes()
    assert named in refused(capsys, *words.format(runs=runs, tmp=tmp_path).split())
    assert (runs / "sam" / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow  # a process that imports all
def test_the_script_finds_its_repository_from_any_working_directory(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, landscape.__file__, "lost.pt"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and done.stderr == ("landscape.py: lost.pt does not exist; check the path, nothing is downloaded; "
                                                                          "see --help\n")
    assert not list(tmp_path.iterdir())
