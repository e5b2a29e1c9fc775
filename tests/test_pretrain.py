"""Pre-training by MAE, MIRL and MixMIM: what it learns, its ablations, its pictures."""

import math

import pytest
import torch
from small_runs import (
    HIERARCHICAL,
    MIXMIM,
    PRETRAIN,
    STILL,
    TINY,
    VIT,
    built,
    epochs,
    log,
    on_each_loss,
    start,
    weights,
)
from torch.utils.data import default_collate

from tasks import load_run

MAE = f"--task pretrain --method mae {TINY}"
PLAIN_MIXMIM = f"--task pretrain --method mixmim --model vit_demo {TINY}"
ABLATIONS = [
    "--fill mask",
    "--single",
    "--open-attention",
    "--mask-per-cycle",
    "--raw-pixels",
    "--shift --checkpointing",
]


def test_the_first_epoch_already_beats_the_patch_mean(tmp_path):
    sizes = "--embed-dim 64 --depth 4 --num-heads 2 --patch-size 4 --segments 2"
    line = start(f"--task pretrain {sizes} --data-size 2048 --batch-size 32 --epochs 1 --lr 2e-3", tmp_path)
    assert line["val_loss"] < line["baseline"] - 0.05


METHODS = {"mae": MAE, "mirl": PRETRAIN, "mixmim": MIXMIM, "plain mixmim": PLAIN_MIXMIM}


@pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS)
def test_every_method_logs_finite_losses_and_leaves_its_picture(finished, flags):
    folder = finished(flags)
    assert len(epochs(folder)) == 2
    for line in epochs(folder):
        assert all(math.isfinite(line[key]) for key in ("train_loss", "val_loss", "baseline"))
    assert (folder / "reconstruction.png").stat().st_size > 1000


@pytest.mark.parametrize("flags", ABLATIONS)
def test_every_form_of_mixmim_trains_and_draws_its_picture(tmp_path, flags):
    start(f"{MIXMIM} --epochs 1 {flags}", tmp_path)
    assert math.isfinite(log(tmp_path)[-1]["val_loss"])
    assert (tmp_path / "reconstruction.png").exists()


@pytest.mark.parametrize(
    "flags",
    [
        MAE,
        PRETRAIN,
        f"{PRETRAIN} --checkpointing",
        f"{PRETRAIN} --no-pairing",
        PLAIN_MIXMIM,
        MIXMIM,
        *(f"{MIXMIM} {more}" for more in ABLATIONS),
    ],
)
def test_every_trainable_tensor_gets_a_gradient(flags):
    run = built(flags)
    tokens = (32 // run.args.stride) ** 2
    batch = torch.randn(4, 3, 32, 32), torch.arange(4), torch.rand(4, tokens)
    run.task.loss(run.model, batch, run.args, run.data).backward()
    for name, param in run.model.named_parameters():
        assert (param.grad is not None) == param.requires_grad, name


def test_mirl_without_pairing_is_another_loss_on_the_same_tensors(finished):
    # before the first step, weights and masks are the same
    paired, deep = (built(f"{PRETRAIN} {flag}") for flag in ("", "--no-pairing"))
    assert paired.model.state_dict().keys() == deep.model.state_dict().keys()
    batch = default_collate([paired.data.train[0, i] for i in range(8)])
    losses = [run.task.loss(run.model, batch, run.args, run.data).item() for run in (paired, deep)]
    assert losses[0] != losses[1]

    # trained, it is rebuilt as it was
    run = load_run(finished(f"{PRETRAIN} --no-pairing --epochs 1"))
    assert not run.model.pairing


def test_the_mask_ratio_is_the_one_of_the_flags(tmp_path, monkeypatch):
    ratios = []

    def act(number, model, loss):
        model.register_forward_hook(lambda module, inputs, out: ratios.append(out.mask.mean().item()))

    on_each_loss(monkeypatch, act)
    start(f"{MAE} --epochs 1 --mask-ratio 0.5", tmp_path)
    assert ratios and set(ratios) == {0.5}


def test_the_validation_loss_is_that_of_fixed_masks(finished, tmp_path):
    """Weights that do not move are judged alike in every epoch."""
    start(f"{MAE} {STILL}", tmp_path)
    first, last = epochs(tmp_path)
    assert first["val_loss"] == last["val_loss"] and first["baseline"] == last["baseline"]


def test_the_last_image_of_a_validation_set_is_not_left_without_a_partner(tmp_path):
    start(f"{MIXMIM} --epochs 1 --batch-size 5", tmp_path)  # 16 validation images: 5, 5, 6
    assert math.isfinite(log(tmp_path)[-1]["val_loss"])


@pytest.mark.slow
def test_mixmim_without_a_task_pretrains_and_probes_also_its_ablations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(f"--method mixmim --model mixmim_demo {HIERARCHICAL} --fill mask --data-size 64 --batch-size 8 --epochs 1")
    folder = tmp_path / "runs" / "0001"
    assert "val_acc" in log(folder / "probe")[-1] and "val_acc" in log(folder / "probe_random")[-1]


def test_a_vit_that_mixmim_trains_has_no_class_token(finished):
    assert "encoder.cls_token" not in weights(finished(PLAIN_MIXMIM))
    assert "encoder.cls_token" in weights(finished(MAE))


def test_rectangular_images_are_pretrained_on(tmp_path):
    start(f"--task pretrain --method mae {VIT} --img-size 32 48 --data-size 16 --batch-size 8 --epochs 1", tmp_path)
    assert weights(tmp_path)["encoder.pos_embed"].shape == (1, 1 + 4 * 6, 32)
