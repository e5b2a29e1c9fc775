"""Contrast: an encoder trained without a classifier, judged by a probe."""

import pytest
import torch
from small_runs import CONTRAST, VIT, built, log, on_each_loss, start, weights
from torch.utils.data import default_collate
from torchvision.transforms.functional import to_pil_image

import train
from data import augmentation, first_of_shuffle, open_source
from tasks import load_run

MIXER = "--model mixer_demo --patch-size 8 --embed-dim 32 --depth 2"


@pytest.mark.parametrize("model", [VIT, "--model resnet8", MIXER], ids=["vit", "resnet", "mixer"])
def test_contrast_trains_an_encoder_that_can_be_probed(finished, tmp_path, model):
    folder = finished(f"--task contrast {model} --data-size 64 --batch-size 16 --epochs 2")
    last = log(folder)[-1]
    assert "val_acc" not in last and 0 < last["val_loss"] < 10

    start(f"--task probe --data-size 64 --init {folder / 'checkpoint.pt'}", tmp_path)
    assert "val_acc" in log(tmp_path)[-1]
    trained, probed = weights(folder), weights(tmp_path)
    encoder = [name for name in trained if name.startswith("encoder.")]
    assert len(encoder) > 10
    for name in encoder:
        assert torch.equal(probed[name.removeprefix("encoder.")], trained[name])


def test_each_image_comes_in_two_different_views(tmp_path, monkeypatch):
    views = []
    contrast = train.TASKS["contrast"]
    loss = contrast.loss

    def watch(model, batch, args, data):
        views.append(batch[0])
        return loss(model, batch, args, data)

    monkeypatch.setattr(contrast, "loss", watch)
    start(f"{CONTRAST} --epochs 1", tmp_path)
    assert views[0].shape == (8, 2, 3, 32, 32)
    assert not torch.equal(views[0][:, 0], views[0][:, 1])


def test_views_are_simclrs_unless_a_flag_says_otherwise():
    assert built(CONTRAST).args.augment == "simclr"
    assert built(f"{CONTRAST} --img-size 96").args.augment == "simclr"
    assert built(f"{CONTRAST} --augment inception").args.augment == "inception"
    assert built(CONTRAST.replace("contrast", "classify")).args.augment == "padcrop"


def test_every_trainable_tensor_gets_a_gradient():
    run = built(CONTRAST)
    batch = torch.randn(4, 2, 3, 32, 32), torch.arange(4), None
    run.task.loss(run.model, batch, run.args, run.data).backward()
    for name, param in run.model.named_parameters():
        assert (param.grad is not None) == param.requires_grad, name


def test_validation_batches_hold_several_classes_and_no_single_image(tmp_path):
    # a folder is sorted by class: 65 images, in batches of 16, 16, 16 and 17
    for k in range(4):
        for part, count in (("train", 8), ("val", 17 if k == 3 else 16)):
            folder = tmp_path / part / str(k)
            folder.mkdir(parents=True)
            for i in range(count):
                to_pil_image(torch.rand(3, 32, 32)).save(folder / f"{i}.png")
    flags = f"--task contrast {VIT} --epochs 1 --batch-size 16 --data folder --data-path {tmp_path}"
    line = start(flags, tmp_path / "run")

    # the same by hand
    model = load_run(tmp_path / "run").model
    source = open_source("folder", str(tmp_path), False, (32, 32))
    plain = augmentation("none", (32, 32), source.mean, source.std)
    order, total = first_of_shuffle(65, 65), 0
    for batch in (order[:16], order[16:32], order[32:48], order[48:]):
        images, labels = default_collate([(plain(source[i][0]), source[i][1]) for i in batch])
        total += model(images[:, None], labels).loss.item() * len(batch) / 65
    assert line["val_loss"] == pytest.approx(total, abs=1e-4)


def test_the_loss_of_each_micro_batch_is_finite(tmp_path, monkeypatch):
    losses = []
    on_each_loss(monkeypatch, lambda number, model, loss: losses.append(loss.isfinite().item()))
    start(f"{CONTRAST} --epochs 1 --accum 2", tmp_path)
    assert len(losses) == 8 and all(losses)
