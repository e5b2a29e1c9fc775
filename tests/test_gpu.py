"""On a GPU: every task trains in bf16, resumes, compiles, climbs with SAM and stays within the memory that it needs.

    pytest -m gpu tests/test_gpu.py
"""

import math

import pytest
import torch
from small_runs import DENSE, HIERARCHICAL, VIT, assert_same_bits, killed, log, start, weights

from tasks import load_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

THREE = "--data-size 24 --batch-size 8 --epochs 1 --workers 0 --device cuda"  # steps
THREE_DENSE = f"{DENSE} --data-size 12 --epochs 1 --workers 0 --device cuda"
TASKS = {
    "mae": f"--task pretrain --method mae {VIT} {THREE}",
    "mirl": f"--task pretrain --method mirl --segments 2 {VIT} {THREE}",
    "mixmim": f"--task pretrain --method mixmim {HIERARCHICAL} {THREE}",
    "classify": f"--task classify {VIT} {THREE} --mixup 0.8 --drop-path 0.1",
    "resnet": f"--task classify --model resnet8 {THREE}",
    "mixer": f"--task classify --model mixer_demo {THREE}",
    "probe": f"--task probe --style adamw {VIT} {THREE}",
    "contrast": f"--task contrast {VIT} {THREE}",
    "detect": f"--task detect {THREE_DENSE}",
    "segment": f"--task segment --channels 16 {THREE_DENSE}",
}


def flags_of(name):
    if name == "detect":
        pytest.importorskip("pycocotools")
    return TASKS[name]


@pytest.mark.parametrize("name", TASKS)
def test_three_steps_in_bf16_give_finite_weights_and_a_run_that_can_be_used(name, tmp_path):
    line = start(f"{flags_of(name)} --precision bf16", tmp_path)
    assert all(math.isfinite(value) for key, value in line.items() if key in ("train_loss", "val_loss", "val_acc"))
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    for device in ("cpu", "cuda"):
        run = load_run(tmp_path, device)
        assert len(run.predict([torch.zeros(3, 48, 48, dtype=torch.uint8)])) == 1


@pytest.mark.parametrize("name", TASKS)
def test_a_killed_run_resumes_where_it_was(name, tmp_path, monkeypatch):
    flags = f"{flags_of(name)} --epochs 2"
    start(flags, tmp_path / "whole")
    killed(monkeypatch, 2, f"{flags} --save-minutes 0", tmp_path / "cut")
    start("--resume", tmp_path / "cut")
    assert log(tmp_path / "cut")[-1]["step"] == log(tmp_path / "whole")[-1]["step"]
    for key, value in weights(tmp_path / "whole").items():  # some kernels add up in no fixed order
        torch.testing.assert_close(weights(tmp_path / "cut")[key].float(), value.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["mae", "mirl", "mixmim", "classify", "contrast", "segment"])
def test_compiled_steps_give_the_same_loss(name, tmp_path):
    flags = f"{flags_of(name)} --precision fp32"
    eager = start(flags, tmp_path / "eager")
    compiled = start(f"{flags} --compile", tmp_path / "compiled")
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-2)
    assert weights(tmp_path / "eager").keys() == weights(tmp_path / "compiled").keys()


@pytest.mark.parametrize("name", TASKS)
def test_three_steps_of_sam_give_finite_weights(name, tmp_path):
    start(f"{flags_of(name)} --optimizer sam --rho 0.05", tmp_path)
    assert log(tmp_path)[-1]["bad_steps"] == 0
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


@pytest.mark.parametrize("name", ["mae", "mirl", "mixmim", "classify"])
def test_the_cpu_and_the_gpu_train_alike(name, tmp_path):
    flags = f"{flags_of(name)} --precision fp32"
    gpu = start(flags, tmp_path / "gpu")
    cpu = start(f"{flags} --device cpu", tmp_path / "cpu")
    assert gpu["val_loss"] == pytest.approx(cpu["val_loss"], rel=2e-2)


def peak_memory(flags, folder):
    """GB of tensors at the worst moment of a run."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start(flags, folder)
    return torch.cuda.max_memory_allocated() / 1e9


@pytest.mark.parametrize("flags", ["--task pretrain --method mirl --segments 4", "--task classify"])
def test_checkpointing_lowers_the_peak_memory(flags, tmp_path):
    sizes = "--img-size 64 --patch-size 4 --depth 12 --embed-dim 192 --num-heads 3"
    shared = f"{flags} {sizes} --data-size 128 --batch-size 64 --epochs 1 --workers 0 --device cuda"
    plain = peak_memory(shared, tmp_path / "plain")
    assert peak_memory(f"{shared} --checkpointing", tmp_path / "recomputed") < 0.7 * plain


def test_a_second_run_in_one_process_needs_no_more_memory_than_the_first(tmp_path):
    peaks = [peak_memory(TASKS["classify"], tmp_path / str(i)) for i in range(3)]
    assert peaks[2] <= 1.1 * peaks[1]


def test_micro_batches_need_less_memory_than_one_batch(tmp_path):
    shared = "--task classify --img-size 64 --patch-size 4 --data-size 256 --epochs 1 --workers 0 --device cuda"
    whole = peak_memory(f"{shared} --batch-size 256", tmp_path / "whole")
    assert peak_memory(f"{shared} --batch-size 32 --accum 8", tmp_path / "micro") < 0.5 * whole


def test_loading_processes_change_nothing_on_a_gpu(tmp_path):
    flags = f"{TASKS['mae']} --precision fp32"
    start(flags, tmp_path / "none")
    start(f"{flags} --workers 2", tmp_path / "two")
    assert_same_bits(weights(tmp_path / "none"), weights(tmp_path / "two"))
