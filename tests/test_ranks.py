"""Two processes: what one process of twice the batch does, they do."""

import re

import pytest
from small_runs import (
    FLAT, FOLDER, PRETRAIN, ROOT, VIT, assert_close, judged, log, start, torchrun, weights)

import train

# 21 scenes to validate on: one rank gets 11, the other 10
FEW = f"{VIT} --data-size 84 --epochs 1 --optimizer sgd {FLAT}"
DENSE = "--img-size 48 --patch-size 8 --depth 4 --embed-dim 32 --num-heads 2 --data-size 84 --epochs 1 --lr 1e-3"
JOBS = {
    "mirl": f"--task pretrain --segments 2 {FEW}",
    "mae": f"--task pretrain --method mae {FEW}",
    "classify": f"--task classify {FEW}",
    "accum": f"--task classify {FEW} --accum 2",
    "probe": f"--task probe --style adamw {FEW}",
    "resnet": "--task classify --model resnet8 --data-size 84 --epochs 1 --optimizer sam --base-optimizer sgd "
              f"{FLAT} --eval-pgd --eval-corruptions",
    "climb": f"--task classify {FEW} --optimizer sam --base-optimizer sgd --rho 0.5",
    "contrast": f"--task contrast {FEW}",
    "detect": f"--task detect {DENSE}",
    "segment": f"--task segment --channels 16 {DENSE}",
    "default": f"--segments 2 {VIT} --data-size 512 --epochs 1 --accum 2 --blr 0.004",
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Every job of JOBS under one torchrun, two processes with batches of 8 -> the folder, and what was printed."""
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("two")
    (folder / "jobs.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
train.LOG_EVERY = 1
for name, flags in {JOBS!r}.items():
    print("job", name, flush=True)
    train.main([*flags.split(), "--batch-size", "8", "--output-dir", name])
torch.distributed.destroy_process_group()
""")
    done = torchrun(["jobs.py"], folder)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.parametrize("job", ["mirl", "mae", "classify", "accum", "probe"])
def test_one_process_and_two_agree(two_processes, tmp_path, monkeypatch, job):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    start(f"{JOBS[job]} --batch-size 16", tmp_path)
    single, double = log(tmp_path), log(two_processes[0] / job)

    # rank 0 alone writes
    assert [line.keys() for line in single] == [line.keys() for line in double]
    assert single[0]["loss"] == pytest.approx(double[0]["loss"], abs=2e-5)
    # every sample counts once
    assert single[-1]["val_loss"] == pytest.approx(double[-1]["val_loss"], abs=2e-5)
    assert single[-1].get("val_acc") == double[-1].get("val_acc")
    assert_close(weights(tmp_path), weights(two_processes[0] / job), 1e-5)


def test_micro_batches_that_climb_on_their_own_take_the_step_of_two_processes(two_processes, tmp_path):
    two = weights(two_processes[0] / "climb")
    start(f"{JOBS['climb']} --batch-size 8 --accum 2 --split-climb", tmp_path / "split")
    assert_close(weights(tmp_path / "split"), two, 1e-6)
    start(f"{JOBS['climb']} --batch-size 8 --accum 2", tmp_path / "together")
    together = weights(tmp_path / "together")
    assert max((together[name] - two[name]).abs().max() for name in two) > 1e-4  # another step


# each process has batches of its own, so the weights differ from one process's
@pytest.mark.parametrize("job", ["resnet", "detect", "segment"])
def test_two_processes_judge_the_checkpoint_they_save_exactly_as_one_does(two_processes, job):
    last = log(two_processes[0] / job)[-1]
    for name, value in judged(two_processes[0] / job, batch_size=5).items():
        if name.startswith(("corrupted_acc", "pgd_acc")):  # random numbers begin anew with each batch
            continue
        assert last[name] == pytest.approx(value, abs=1e-3)


def test_two_processes_share_a_contrastive_loss_and_robustness(two_processes):
    assert log(two_processes[0] / "contrast")[-1]["val_loss"] > 0
    last = log(two_processes[0] / "resnet")[-1]
    assert 0 <= last["pgd_acc"] <= last["val_acc"] + 1e-6
    assert 0 <= last["corrupted_acc"] <= 100


def test_two_processes_report_the_batch_and_learning_rate_of_both(two_processes):
    jobs = dict(re.findall(r"job (\w+)\n(.*?)(?=job \w+\n|\Z)", two_processes[1], re.S))
    assert re.search(r"\b16\b", jobs["mirl"]) and re.search(r"\b32\b", jobs["accum"])
    assert "0.0005" in jobs["default"]  # 0.004 * 8 * 2 * 2 / 256


def test_rank_0_alone_prints(two_processes):
    assert two_processes[1].count("done: ") == len(JOBS) - 1  # the default run ends with a summary
    assert two_processes[1].count("summary") == 1


@pytest.mark.slow
def test_torchrun_trains_and_probes_as_one_process_does(tmp_path):
    flags = f"--segments 2 {VIT} --data-size 512 --batch-size 8 --epochs 1 --accum 2 --blr 0.004"
    done = torchrun([str(ROOT / "train.py"), *flags.split()], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0.0005" in done.stdout  # 0.004 * 8 * 2 * 2 / 256
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["0001"]
    assert [line["epoch"] for line in log(tmp_path / "runs/0001") if "epoch" in line] == [1]


@pytest.mark.slow
def test_bad_input_under_torchrun_is_said_once(tmp_path):
    done = torchrun([str(ROOT / "train.py"), *f"{PRETRAIN} --img-size 36".split()], tmp_path)
    assert done.returncode != 0
    assert len(re.findall("^train.py: ", done.stderr, re.M)) == 1


@pytest.mark.slow
def test_a_broken_image_is_named_by_whichever_rank_meets_it(tmp_path):
    from test_runs import BROKEN, save_images

    images = save_images(tmp_path / "set", BROKEN, train=6, val=6)
    for seed in range(2):  # in one of these the broken image falls to rank 1
        flags = f"{FOLDER} --batch-size 6 --seed {seed} --data-path {images}"
        done = torchrun([str(ROOT / "train.py"), *flags.split()], tmp_path)
        assert done.returncode != 0 and "dog/4.png" in done.stderr
