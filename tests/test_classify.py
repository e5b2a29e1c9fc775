"""Classification: from scratch, from a checkpoint, and against attacks."""

import argparse

import pytest
import torch
from small_runs import (
    CLASSIFY, HIERARCHICAL, MIXMIM, PRETRAIN, RESNET, STILL, TINY, VIT, built, checkpoint, epochs, log, refused,
    start, weights)
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchvision.transforms import v2

from robust import corruption_accuracy, fgsm, mean_accuracy, pgd
from tasks import load_run
from vit import create_vit

PLAIN_MIXMIM = f"--task pretrain --method mixmim --model vit_demo {TINY}"
TUNE = "--task classify --data-size 64 --batch-size 8 --epochs 1"
MIXER = f"{TUNE} --model mixer_demo --embed-dim 32 --depth 2 --patch-size 8"


def batches(data, size):
    """Batches of a set, in order."""
    for first in range(0, len(data), size):
        images, labels, _ = default_collate([data[0, i] for i in range(first, min(first + size, len(data)))])
        yield images, labels


# ---------------------------------------------------------------------------- from scratch


@pytest.mark.slow
def test_a_tiny_vit_overfits_64_images(tmp_path):
    flags = f"--task classify {VIT} --data-size 64 --batch-size 32 --epochs 70 --augment none --lr 3e-3"
    start(f"{flags} --eval-every 70", tmp_path)
    model = load_run(tmp_path).model
    images, labels = next(batches(built(flags).data.train, 64))
    assert (model(images).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.parametrize("flags", [
    f"{CLASSIFY} --pool mean", f"{CLASSIFY} --pool cls", f"{CLASSIFY} --checkpointing", MIXER, RESNET,
    f"--task classify --model mixmim_demo {HIERARCHICAL} --data-size 64 --batch-size 8"])
def test_every_trainable_tensor_gets_a_gradient(flags):
    run = built(flags)
    batch = torch.randn(4, 3, 32, 32), torch.arange(4), None
    run.task.loss(run.model, batch, run.args, run.data).backward()
    for name, param in run.model.named_parameters():
        assert (param.grad is not None) == param.requires_grad, name


def test_the_loss_of_mixed_images_is_the_smoothed_cross_entropy_of_mixed_labels():
    run = built(f"{CLASSIFY} --mixup 0.8 --label-smoothing 0.1")
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    torch.manual_seed(0)
    loss = run.task.loss(run.model, (images, labels, None), run.args, run.data)
    torch.manual_seed(0)
    images, labels = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=10)])(images, labels)
    expected = F.cross_entropy(run.model(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


# ---------------------------------------------------------------------------- from a checkpoint


SOURCES = {
    "mirl": (PRETRAIN, "--layer-decay 0.7"), "mixmim": (MIXMIM, "--layer-decay 0.7"),
    "plain mixmim": (PLAIN_MIXMIM, ""), "mixer": (MIXER, "--optimizer sam --layer-decay 0.7"), "resnet": (RESNET, "")}


@pytest.mark.parametrize("flags, more", SOURCES.values(), ids=SOURCES)
def test_a_checkpoint_supplies_model_sizes_and_all_weights_of_the_encoder(finished, tmp_path, flags, more):
    file = finished(flags) / "checkpoint.pt"
    before = weights(file.parent)

    # a learning rate next to nothing: the weights are still those of the file
    start(f"{TUNE} {STILL} {more} --init {file}", tmp_path)
    after = weights(tmp_path)
    shared = [name for name in after if name in before or f"encoder.{name}" in before]
    encoder = [name for name in after if not name.startswith(("head.", "fc.", "fc_norm."))]
    assert len(shared) > 10 and set(encoder) - set(shared) <= {"norm.weight", "norm.bias"}
    for name in shared:
        if "num_batches" in name or "running" in name or name.startswith(("head.", "fc.")):
            continue
        source = before[f"encoder.{name}"] if f"encoder.{name}" in before else before[name]
        torch.testing.assert_close(after[name], source, rtol=0, atol=1e-6)


def test_a_vit_from_mixmim_is_tuned_without_class_token(finished, tmp_path):
    start(f"{TUNE} --init {finished(PLAIN_MIXMIM) / 'checkpoint.pt'}", tmp_path)
    assert "cls_token" not in weights(tmp_path)


def test_a_position_table_that_pretraining_froze_is_trained(pretrained, tmp_path):
    start(f"{TUNE} --init {pretrained / 'checkpoint.pt'}", tmp_path)
    assert not torch.equal(weights(tmp_path)["pos_embed"], weights(pretrained)["encoder.pos_embed"])


def test_the_head_of_a_run_from_a_checkpoint_starts_near_zero(pretrained):
    run = built(f"{TUNE} --init {pretrained / 'checkpoint.pt'}")
    assert run.model.head.weight.std() < 1e-4
    assert built(CLASSIFY).model.head.weight.std() > 1e-3


def test_another_image_size_resizes_the_position_table(pretrained, tmp_path):
    start(f"{TUNE} --img-size 48 32 --init {pretrained / 'checkpoint.pt'}", tmp_path)
    assert weights(tmp_path)["pos_embed"].shape == (1, 25, 32)


def test_mixmims_encoder_is_tuned_at_another_size_with_other_windows(finished, tmp_path):
    file = finished(MIXMIM) / "checkpoint.pt"
    start(f"{TUNE} --img-size 48 32 --window-size 6 6 3 --init {file}", tmp_path)
    assert weights(tmp_path)["absolute_pos_embed"].shape[1] == 12 * 8


@pytest.mark.parametrize("flags, more", [
    (MIXMIM, "--shift"), (PRETRAIN, "--no-class-token"), (PRETRAIN, "--depth 4"), (MIXMIM, "--model vit_demo")])
def test_a_flag_that_builds_another_encoder_than_the_checkpoints_is_refused(finished, tmp_path, capsys, flags, more):
    error = refused(f"{TUNE} {more} --init {finished(flags) / 'checkpoint.pt'}", capsys, tmp_path / "run")
    assert more.split()[0] in error and not (tmp_path / "run").exists()


def test_init_from_a_file_in_maes_layout(tmp_path, capsys):
    encoder = create_vit("vit_demo", embed_dim=32, depth=2, num_heads=2, patch_size=8, num_classes=0).state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 16), "decoder_embed.weight": torch.zeros(16, 32),
               "decoder_pred.weight": torch.zeros(192, 16)}
    saved = {"model": {**encoder, **decoder}, "args": argparse.Namespace(model="mae_vit"), "epoch": 3}
    torch.save(saved, tmp_path / "mae.pth")
    start(f"{CLASSIFY} --epochs 1 {STILL} --init {tmp_path / 'mae.pth'}", tmp_path / "run")
    assert "MAE" in capsys.readouterr().out
    after = weights(tmp_path / "run")
    for name, value in encoder.items():
        if name in after and not name.startswith("norm."):
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


def test_init_from_a_checkpoint_of_ours_without_its_flags(pretrained, tmp_path):
    """Weights alone, as older versions or other people's scripts saved them."""
    torch.save({"model": weights(pretrained)}, tmp_path / "bare.pt")
    start(f"{CLASSIFY} --epochs 1 --init {tmp_path / 'bare.pt'}", tmp_path / "run")
    assert "val_acc" in log(tmp_path / "run")[-1]


def test_a_file_that_changed_between_two_runs_is_read_again(pretrained, tmp_path):
    file = tmp_path / "start.pt"
    loaded = []
    for scale in (1.0, 2.0):
        state = {name: scale * value for name, value in weights(pretrained).items()}
        torch.save({"model": state}, file)
        loaded.append(built(f"{CLASSIFY} --init {file}").model.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(loaded[1], 2 * loaded[0])


# ---------------------------------------------------------------------------- attacks and corruptions


def test_the_adversarial_loss_is_the_loss_on_fgsms_images():
    run = built(f"{RESNET} --adversarial --attack-eps 6")
    run.model.train()
    scale = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    run.data.mean, run.data.std = scale["mean"], scale["std"]
    images = v2.functional.normalize(torch.rand(8, 3, 32, 32), **scale)
    labels = torch.arange(8)
    statistics = run.model.bn1.running_mean
    before = statistics.clone()

    torch.manual_seed(1)
    loss = run.task.loss(run.model, (images, labels, None), run.args, run.data)
    moved = statistics.clone()

    # the attack by hand
    with torch.no_grad():
        statistics.copy_(before)
    torch.manual_seed(1)
    attacked = fgsm(run.model, images, labels, 6 / 255, **scale)
    with torch.no_grad():
        statistics.copy_(before)
    torch.testing.assert_close(loss, F.cross_entropy(run.model(attacked), labels))
    torch.testing.assert_close(statistics, moved)  # moved once, by the attacked images

    run.args.adversarial = False
    assert loss > run.task.loss(run.model, (images, labels, None), run.args, run.data)


def test_robustness_at_the_end_is_what_the_functions_say_of_the_saved_model(finished):
    flags = f"{RESNET} --epochs 2 --eval-corruptions --eval-pgd --attack-eps 2"
    folder = finished(flags)
    first, last = epochs(folder)
    assert "pgd_acc" not in first and "corrupted_acc" not in first

    model, data = load_run(folder).model, built(flags).data
    scale = dict(mean=data.mean, std=data.std)
    corrupted, correct = [], 0
    for images, labels in batches(data.val, 8):  # the batches of the run
        table = corruption_accuracy(model, images, labels, batch_size=8, **scale)
        corrupted.append(mean_accuracy(table))
        attacked = pgd(model, images, labels, 2 / 255, generator=torch.Generator().manual_seed(0), **scale)
        correct += (model(attacked).argmax(1) == labels).sum().item()
    assert last["corrupted_acc"] == pytest.approx(100 * sum(corrupted) / 2, abs=1e-3)
    assert last["pgd_acc"] == pytest.approx(100 * correct / 16, abs=1e-3)


def test_the_flags_of_a_run_are_kept_with_its_weights(finished):
    saved = checkpoint(finished(CLASSIFY))
    assert saved["args"]["task"] == "classify" and len(saved["classes"]) == 10
    assert len(saved["mean"]) == len(saved["std"]) == 3


@pytest.mark.parametrize("flags, fixed, moved", [
    ("--tune-last 1", "blocks.0.", "blocks.1."),
    ("--tune-last 0", "blocks.", "head."),
    (f"--model mixmim_demo {HIERARCHICAL} --tune-last 2", "layers.0.", "layers.2."),
])
def test_only_the_last_blocks_are_tuned(tmp_path, flags, fixed, moved):
    sizes = "" if "mixmim" in flags else VIT
    words = f"--task classify {sizes} --data-size 16 --batch-size 8 --epochs 1 {flags}"
    before = built(words).model.state_dict()
    start(words, tmp_path)
    after = weights(tmp_path)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any(name.startswith(moved) for name in changed) and "head.weight" in changed
    assert not [name for name in changed if name.startswith((fixed, "patch_embed", "pos_embed", "cls_token"))]


@pytest.mark.parametrize("flags", ["--tune-last 3", "--tune-last 0 --model resnet8"])
def test_more_blocks_than_there_are_cannot_be_tuned(capsys, flags):
    sizes = "" if "resnet" in flags else VIT
    assert "--tune-last" in refused(f"--task classify {sizes} --data-size 16 {flags}", capsys)
