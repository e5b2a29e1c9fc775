"""What a run leaves behind, and how it survives kills, signals, full disks and losses that are not finite."""

import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from small_runs import (
    CLASSIFY,
    CONTRAST,
    DETECT,
    FLAT,
    FOLDER,
    MIXMIM,
    PRETRAIN,
    SEGMENT,
    TINY,
    VIT,
    assert_same_bits,
    assert_same_run,
    built,
    checkpoint,
    command,
    environment,
    epochs,
    inventory,
    judged,
    killed,
    log,
    on_each_loss,
    percents,
    position,
    refused,
    shell,
    start,
    weights,
)
from torchvision.transforms.functional import to_pil_image

import train
from data import first_of_shuffle
from shapes import Shapes
from tasks import load_run

DEFAULT = f"--segments 2 {VIT} --data-size 256 --batch-size 32 --epochs 2"  # no --task: pre-train, then probe
MIXES = "--drop-path 0.3 --mixup 0.8 --cutmix 1.0 --label-smoothing 0.1"
MIXED = f"{CLASSIFY} {MIXES} --ema 0.9 --layer-decay 0.8 --clip-grad 1"
SAM = f"{CLASSIFY} --optimizer sam --rho 0.1 --drop-path 0.3 --clip-grad 1"
CONTINUED = ("--resume --output-dir {}").format


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The run without --task, small, in a fresh working directory."""
    folder, before = tmp_path_factory.mktemp("default"), os.getcwd()
    os.chdir(folder)
    try:
        start(DEFAULT)
    finally:
        os.chdir(before)
    return folder / "runs" / "0001"


# ---------------------------------------------------------------------------- a run and what it leaves behind


def test_a_run_without_a_task_pretrains_and_probes(default_run):
    names = {path.name for path in default_run.iterdir()}
    assert {"args.json", "log.jsonl", "checkpoint.pt", "reconstruction.png", "probe", "probe_random"} <= names
    assert [line["epoch"] for line in epochs(default_run)] == [1, 2]
    for probe in ("probe", "probe_random"):
        assert 0 <= epochs(default_run / probe)[-1]["val_acc"] <= 100


def test_a_run_leaves_its_flags_a_log_a_checkpoint_and_a_picture(default_run):
    args = json.loads((default_run / "args.json").read_text())
    assert args["embed_dim"] == 32 and args["seed"] == 0

    line = epochs(default_run)[-1]
    assert all(math.isfinite(line[key]) for key in ("train_loss", "val_loss", "baseline", "lr"))

    saved = checkpoint(default_run)
    for name, value in saved["model"].items():
        assert isinstance(name, str) and torch.is_tensor(value)
    assert {"optimizer", "args", "classes", "mean", "std"} <= saved.keys() and type(saved["args"]) is dict
    assert (default_run / "reconstruction.png").read_bytes()[:4] == b"\x89PNG"


def test_the_default_run_ends_with_a_summary_and_numbers_its_folders(default_run, monkeypatch, capsys):
    monkeypatch.chdir(default_run.parents[1])
    start(f"--segments 2 {VIT} --data-size 256 --batch-size 64 --epochs 1")
    folder = Path("runs/0002")  # 0001 is taken
    out = capsys.readouterr().out

    accuracy = [log(folder / name)[-1]["val_acc"] for name in ("probe", "probe_random")]
    assert percents(out)[-2:] == pytest.approx(accuracy, abs=0.051)
    last = epochs(folder)[-1]
    losses = [float(number) for number in re.findall(r"\d+\.\d{3}\b", out)]
    assert losses[-2:] == pytest.approx([last["val_loss"], last["baseline"]], abs=6e-4)
    assert str(folder / "reconstruction.png") in out


@pytest.mark.slow
def test_a_set_smaller_than_the_probes_batch_is_probed_too(tmp_path):
    start(f"--segments 2 {TINY}", tmp_path)
    assert "val_acc" in log(tmp_path / "probe")[-1]


@pytest.mark.slow
def test_python_train_py_works_on_a_fresh_clone_in_about_a_minute(tmp_path):
    begin = time.monotonic()
    done = shell("", tmp_path)
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    last = epochs(tmp_path / "runs/0001")[-1]
    probe, random = percents(done.stdout)[-2:]
    assert last["val_loss"] < last["baseline"] and probe > random + 2
    assert seconds < 200  # 100 s on two free cores


def test_a_run_says_device_precision_size_batch_and_learning_rate(tmp_path, capsys):
    start(f"{PRETRAIN} --blr 0.004 --accum 4", tmp_path)
    out = capsys.readouterr().out
    learning = sum(param.numel() for param in built(PRETRAIN).model.parameters() if param.requires_grad)
    assert "cpu" in out and "fp32" in out and f"{learning:,}" in out
    assert re.search(r"\b32\b", out) and "0.0005" in out  # 8 x 4 images a step, 0.004 * 32 / 256


def test_a_run_returns_the_last_line_of_its_log(tmp_path):
    line = start(f"{CLASSIFY} --epochs 1", tmp_path)
    logged = log(tmp_path)[-1]
    for key in ("epoch", "train_loss", "val_loss", "val_acc"):
        assert line[key] == pytest.approx(logged[key], rel=1e-5)


def test_bfloat16_on_a_cpu_trains_like_float32(tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        line = start(f"{PRETRAIN} --epochs 1 --precision {precision}", tmp_path / precision)
        losses.append(line["train_loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [PRETRAIN, CLASSIFY, MIXMIM])
def test_compiled_training_gives_the_same_loss(tmp_path, flags):
    eager = start(f"{flags} --epochs 1", tmp_path / "eager")
    compiled = start(f"{flags} --epochs 1 --compile", tmp_path / "compiled")
    assert eager["train_loss"] == pytest.approx(compiled["train_loss"], abs=1e-4)
    assert weights(tmp_path / "eager").keys() == weights(tmp_path / "compiled").keys()


def test_evaluation_may_be_rarer_than_epochs(tmp_path):
    start(f"{CLASSIFY} --epochs 5 --eval-every 2", tmp_path)
    assert [line["epoch"] for line in log(tmp_path) if "val_acc" in line] == [2, 4, 5]


def test_evaluation_may_be_on_part_of_the_validation_set(tmp_path):
    part = start(f"{CLASSIFY} --epochs 1 --val-images 5", tmp_path / "part")
    whole = start(f"{CLASSIFY} --epochs 1", tmp_path / "whole")
    assert part["val_acc"] in [20.0 * k for k in range(6)] and part["val_loss"] != whole["val_loss"]
    assert_same_bits(weights(tmp_path / "part"), weights(tmp_path / "whole"))

    assert judged(tmp_path / "part", 3)["val_loss"] == pytest.approx(part["val_loss"], abs=1e-4)
    assert built(f"{CLASSIFY} --val-images 5").data.val.indices == first_of_shuffle(16, 5)


# ---------------------------------------------------------------------------- interrupted and resumed

# 8 steps an epoch and a save after each: saves 1 to 8 are steps, 9 is the end of epoch 1, 18 the end of the run.
KILLS = [(3, True), (9, False), (18, False)]
KILLS += [pytest.param(*kill, marks=pytest.mark.slow) for kill in [(8, True), (9, True), (13, True), (17, True)]]


@pytest.mark.parametrize("number, after", KILLS)
@pytest.mark.parametrize("flags", [PRETRAIN, MIXED], ids=["pretrain", "mixed"])
def test_a_run_killed_anywhere_and_resumed_ends_with_the_same_bits(
    tmp_path, finished, monkeypatch, flags, number, after
):
    killed(monkeypatch, number, f"{flags} --save-minutes 0", tmp_path, after)
    start("--resume", tmp_path)
    whole = finished(flags)
    assert_same_run(tmp_path, whole)
    if flags is MIXED:
        assert_same_bits(checkpoint(tmp_path)["ema"], checkpoint(whole)["ema"])


# with --accum 3 an epoch has 3 steps, so save 4 is the end of epoch 1
@pytest.mark.parametrize(
    "flags, number, workers",
    [
        (f"{MIXED} --accum 3", 2, 0),
        (f"{SAM} --base-optimizer sgd", 5, 2),
        pytest.param(f"{SAM} --accum 3", 3, 0, marks=pytest.mark.slow),
        pytest.param(f"{MIXMIM} --accum 3", 3, 2, marks=pytest.mark.slow),
        pytest.param(f"--task pretrain --method mae {TINY} --accum 3", 5, 2, marks=pytest.mark.slow),
        pytest.param(MIXED, 5, 2, marks=pytest.mark.slow),
    ],
)
def test_accumulation_and_workers_resume_to_the_same_bits(tmp_path, finished, monkeypatch, flags, number, workers):
    killed(monkeypatch, number, f"{flags} --save-minutes 0 --workers {workers}", tmp_path)
    start(f"--resume --workers {2 - workers}", tmp_path)  # another number of workers is fine
    assert_same_run(tmp_path, finished(flags))


@pytest.mark.slow  # three processes with workers; kills at any save are tested above, in this process
def test_kill_9_with_workers_and_resume_gives_the_same_bits(tmp_path):
    # start, and wait for the first epoch
    flags = f"{PRETRAIN} --epochs 8"
    words = command(f"{flags} --save-minutes 0 --workers 2 --output-dir {tmp_path / 'cut'}")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = subprocess.Popen(words, cwd=tmp_path, env=environment(), start_new_session=True, **quiet)
    written = tmp_path / "cut" / "log.jsonl"
    limit = time.monotonic() + 60
    while run.poll() is None and time.monotonic() < limit:
        if written.exists() and '"epoch"' in written.read_text():
            break
        time.sleep(0.01)
    assert run.poll() is None, "the run ended before it could be killed"

    # kill
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert 1 <= position(tmp_path / "cut")[1] < 64

    # the run's own flags may be repeated
    start(f"--resume --workers 0 {flags}", tmp_path / "cut")
    start(flags, tmp_path / "whole")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_loses_nothing(tmp_path, finished, monkeypatch, capsys, number, code):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        on_each_loss(patch, lambda n, model, loss: os.kill(os.getpid(), number) if n == 11 else None)
        start(PRETRAIN, tmp_path)
    assert end.value.code == code
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert position(tmp_path)[1] == 11
    assert CONTINUED(tmp_path) in capsys.readouterr().out

    start("--resume", tmp_path)
    assert_same_run(tmp_path, finished(PRETRAIN))


@pytest.mark.slow
def test_sigterm_to_a_subprocess_saves_and_exits_143(tmp_path):
    flags = f"{PRETRAIN} --epochs 50 --output-dir {tmp_path / 'run'} --workers 2"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen(command(flags), cwd=tmp_path, env=environment(), **pipes)
    while not (tmp_path / "run" / "checkpoint.pt").exists() and run.poll() is None:
        time.sleep(0.01)
    run.terminate()
    out, err = run.communicate(timeout=60)
    assert run.returncode == 143 and err == "" and CONTINUED(tmp_path / "run") in out


@pytest.mark.slow
def test_a_default_run_killed_while_it_pretrains_goes_on_to_its_probes(tmp_path, default_run, monkeypatch):
    killed(monkeypatch, 1, DEFAULT, tmp_path)
    assert not (tmp_path / "probe").exists()
    start("--resume", tmp_path)
    for part in ("", "probe", "probe_random"):
        assert_same_run(tmp_path / part, default_run / part)


def test_a_default_run_killed_in_its_probe_is_resumed_there(tmp_path, default_run, monkeypatch):
    killed(monkeypatch, 3, DEFAULT, tmp_path, after=False)  # 2 epochs of pre-training, then the probe
    before = (tmp_path / "checkpoint.pt").read_bytes()
    start("--resume", tmp_path)
    assert before == (tmp_path / "checkpoint.pt").read_bytes()
    for part in ("", "probe", "probe_random"):
        assert_same_run(tmp_path / part, default_run / part)


def test_a_stopped_default_run_names_the_folder_that_resumes_all_of_it(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        on_each_loss(patch, lambda n, model, loss: os.kill(os.getpid(), signal.SIGTERM) if n == 10 else None)
        start(DEFAULT, tmp_path)
    assert CONTINUED(tmp_path) in capsys.readouterr().out


def test_a_complete_run_resumes_to_nothing(tmp_path, capsys):
    start(PRETRAIN, tmp_path)
    before = inventory(tmp_path)
    capsys.readouterr()
    start("--resume", tmp_path)
    assert "complete" in capsys.readouterr().out
    assert before == inventory(tmp_path)


def test_resume_in_an_empty_folder_starts_afresh(tmp_path, pretrained):
    start(f"{PRETRAIN} --resume", tmp_path)
    assert_same_run(tmp_path, pretrained)


@pytest.mark.parametrize("flags", [pytest.param(PRETRAIN, marks=pytest.mark.slow), MIXED], ids=["pretrain", "mixed"])
def test_the_number_of_workers_changes_nothing(tmp_path, finished, flags):
    start(f"{flags} --workers 2", tmp_path)
    assert_same_run(tmp_path, finished(flags))


def test_another_seed_gives_other_weights(tmp_path, pretrained):
    start(f"{PRETRAIN} --seed 1 --epochs 1", tmp_path)
    name = "encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(weights(pretrained)[name], weights(tmp_path)[name])


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, finished, monkeypatch):
    save = torch.save
    count = 0

    def save_once(state, file, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 1:
            return save(state, file, *args, **kwargs)
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(torch, "save", save_once)
        start(PRETRAIN, tmp_path)
    message = str(end.value.code)  # a text means exit code 1
    assert "No space left on device" in message and "checkpoint.pt" in message and "\n" not in message
    assert position(tmp_path)[0] == 1
    assert not list(tmp_path.glob("*.tmp*"))

    start("--resume", tmp_path)
    assert_same_run(tmp_path, finished(PRETRAIN))


@pytest.mark.parametrize(
    "flags",
    [
        "--depth 4",
        "--lr 0.1",
        "--seed 3",
        "--epochs 5",
        "--img-size 64",
        "--method mae",
        "--task classify",
        "--accum 2",
        "--data-size 128",
        "--mask-ratio 0.5",
    ],
)
def test_resuming_with_another_flag_is_an_error_that_names_it(pretrained, capsys, flags):
    before = inventory(pretrained)
    assert flags.split()[0] in refused(f"--resume {flags}", capsys, pretrained)
    assert before == inventory(pretrained)


def test_a_run_resumes_without_the_file_it_was_initialized_from(tmp_path, pretrained, monkeypatch):
    file = tmp_path / "start.pt"
    file.write_bytes((pretrained / "checkpoint.pt").read_bytes())
    flags = f"{CLASSIFY} --init {file}"
    start(flags, tmp_path / "whole")
    killed(monkeypatch, 1, flags, tmp_path / "run")
    file.unlink()
    start("--resume", tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_on_images_may_have_moved_when_it_is_resumed(tmp_path, monkeypatch):
    images = save_images(tmp_path / "set", train=6, val=4)
    start(f"{FOLDER} --data-path {images}", tmp_path / "whole")
    killed(monkeypatch, 1, f"{FOLDER} --data-path {images}", tmp_path / "run")
    images.rename(tmp_path / "moved")
    start(f"--resume --data-path {tmp_path / 'moved'}", tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# ---------------------------------------------------------------------------- losses that are not finite


def test_a_non_finite_loss_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    before = {}

    def act(number, model, loss):
        before[number] = {name: value.clone() for name, value in model.state_dict().items()}
        if number in (3, 4):
            return loss * math.nan
        if number == 11:
            return loss * math.inf
        return None

    on_each_loss(monkeypatch, act)
    start(PRETRAIN, tmp_path)
    for number in range(2, 16):  # before[n]: the weights of loss n
        moved = any(not torch.equal(before[number][name], before[number + 1][name]) for name in before[number])
        assert moved == (number not in (3, 4, 11))

    assert [line["bad_steps"] for line in epochs(tmp_path)] == [2, 3]
    assert all(math.isfinite(line["train_loss"]) for line in epochs(tmp_path))
    assert re.search(r"step 3\b", capsys.readouterr().out)
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_non_finite_losses_in_a_row_stop_the_run_with_step_and_learning_rate(tmp_path, monkeypatch):
    on_each_loss(monkeypatch, lambda number, model, loss: loss * math.nan if number > 8 else None)
    with pytest.raises(SystemExit) as end:
        start(f"{PRETRAIN} {FLAT}", tmp_path)
    message = str(end.value.code)
    assert f"step {8 + train.MAX_BAD_STEPS}" in message and "0.05" in message and "\n" not in message
    assert position(tmp_path)[0] == 1  # what was good is kept


# ---------------------------------------------------------------------------- folders of images


def save_images(folder, broken=None, **parts):
    """parts: images per class of each part; cats and dogs of two sizes, so that nothing is decoded before training."""
    images = Shapes(12).images
    for part, count in parts.items():
        for kind in ("cat", "dog"):
            (folder / part / kind).mkdir(parents=True)
            for n in range(count):
                image = images[n + 6 * (kind == "dog")]
                to_pil_image(image[:, :, :28] if n % 2 else image).save(folder / part / kind / f"{n}.png")
    if broken:
        path = folder / broken
        path.write_bytes(path.read_bytes()[:60])
    return folder


BROKEN = "train/dog/4.png"


# torch takes 10 s to clear away workers of which one has failed, unless the process ends
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_broken_image_stops_the_run_with_its_path(tmp_path, monkeypatch, capsys, workers):
    monkeypatch.chdir(tmp_path)
    images = save_images(tmp_path / "set", BROKEN, train=6, val=6)
    error = refused(f"{FOLDER} --data-path {images} --workers {workers}", capsys, before_training=False)
    assert str(images / BROKEN) in error and "--skip-bad" in error


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_skipped_and_counted_on_request(tmp_path, workers):
    images = save_images(tmp_path / "set", BROKEN, train=6, val=6)
    start(f"{FOLDER} --data-path {images} --skip-bad --workers {workers}", tmp_path / "run")
    assert log(tmp_path / "run")[-1]["skipped_images"] == 1


def test_unlabeled_images_without_a_validation_set_can_be_pretrained_on(tmp_path):
    images = save_images(tmp_path / "set", train=6)
    start(f"{FOLDER} --task pretrain --segments 2 --data-path {images}", tmp_path / "run")
    assert math.isfinite(log(tmp_path / "run")[-1]["train_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_from_the_shell_a_broken_image_ends_the_run_at_once_with_one_line(tmp_path, workers):
    images = save_images(tmp_path / "set", BROKEN, train=6, val=6)
    begin = time.monotonic()
    done = shell(f"{FOLDER} --data-path {images} --workers {workers}", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "4.png" in done.stderr, done.stderr
    assert time.monotonic() - begin < 12  # most of it starting torch


# ---------------------------------------------------------------------------- runs used again


@pytest.mark.parametrize(
    "flags",
    [
        PRETRAIN,
        MIXMIM,
        CLASSIFY,
        f"--task probe {VIT} --data-size 64",
        CONTRAST,
        SEGMENT,
        DETECT,
    ],
    ids=["mirl", "mixmim", "classify", "probe", "contrast", "segment", "detect"],
)
def test_a_finished_run_is_rebuilt_without_its_data_and_describes_images(finished, flags):
    if "detect" in flags:
        pytest.importorskip("pycocotools")
    folder = finished(flags)
    run = load_run(folder)
    assert not run.model.training
    assert_same_bits(dict(run.model.state_dict()), weights(folder))

    # one dict of JSON types per image, of any size
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((32, 32), (60, 41), (33, 90))]
    predictions = run.predict(images)
    assert len(predictions) == 3
    for image, prediction in zip(images, predictions):
        assert type(prediction) is dict and json.dumps(prediction)
        assert min(run.draw(image, prediction).size) > 0


def test_a_run_is_loaded_by_its_folder_or_its_checkpoint(pretrained):
    by_folder, by_file = load_run(pretrained), load_run(pretrained / "checkpoint.pt")
    assert_same_bits(dict(by_folder.model.state_dict()), dict(by_file.model.state_dict()))


def test_a_file_that_no_run_wrote_is_refused(tmp_path):
    torch.save({"model": {"fc.weight": torch.zeros(3, 3)}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt"):
        load_run(tmp_path)
