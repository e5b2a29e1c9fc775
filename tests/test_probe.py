"""Probing: a linear classifier on frozen features."""

import json

import pytest
import torch
from PIL import Image
from small_runs import MIXMIM, PROBE, VIT, assert_same_run, built, checkpoint, killed, log, refused, start, weights
from tasks import load_run

SIZES = "--data-size 64 --batch-size 32 --epochs 5"


@pytest.fixture(scope="module")
def probed(finished, pretrained):
    """An iterative probe of a tiny MIRL."""
    return finished(f"{PROBE} --init {pretrained / 'checkpoint.pt'}")


def test_a_probe_changes_the_head_and_nothing_else(pretrained, probed):
    before, after = weights(pretrained), weights(probed)
    shared = [name for name in after if f"encoder.{name}" in before]
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.mlp.fc2.bias"} <= set(shared)
    for name in shared:
        assert torch.equal(after[name], before[f"encoder.{name}"])

    fresh = built(f"{PROBE} --init {pretrained / 'checkpoint.pt'}").model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], fresh[name])}
    assert changed and all(name.startswith("head.") for name in changed)


def test_only_the_head_has_an_optimizer_state(probed):
    state = checkpoint(probed)["optimizer"]["state"]
    assert len(state) == 2  # weight and bias


def test_a_probes_accuracy_is_that_of_the_saved_classifier(pretrained, probed):
    data = built(f"--task classify {VIT} {SIZES}").data
    images, labels = zip(*[data.val[0, i][:2] for i in range(len(data.val))])
    model = load_run(probed).model
    accuracy = 100 * (model(torch.stack(images)).argmax(1) == torch.tensor(labels)).float().mean().item()
    assert log(probed)[-1]["val_acc"] == pytest.approx(accuracy, abs=1e-3)


def test_a_probe_says_which_weights_learn_and_that_a_random_encoder_is_random(pretrained, tmp_path, capsys):
    start(f"{PROBE} --pool cls", tmp_path / "random")
    assert "random" in capsys.readouterr().out.lower()
    start(f"{PROBE} --init {pretrained / 'checkpoint.pt'}", tmp_path / "trained")
    assert "random" not in capsys.readouterr().out.lower()


def test_a_weight_average_of_the_head_can_be_kept(tmp_path):
    start(f"{PROBE} --ema 0.9", tmp_path)
    assert 0 <= log(tmp_path)[-1]["val_acc"] <= 100 and "ema" in checkpoint(tmp_path)


def test_a_killed_probe_is_resumed_to_the_same_bits(pretrained, probed, tmp_path, monkeypatch):
    killed(monkeypatch, 2, f"{PROBE} --init {pretrained / 'checkpoint.pt'}", tmp_path)
    start("--resume", tmp_path)
    assert_same_run(tmp_path, probed)


def test_mixmims_encoder_is_probed_at_another_size_and_stays_as_it_is(finished, tmp_path):
    source = finished(MIXMIM)
    flags = f"--task probe --style adamw --img-size 48 32 --window-size 6 6 3 {SIZES}"
    start(f"{flags} --init {source / 'checkpoint.pt'}", tmp_path)
    after = weights(tmp_path)
    assert after["absolute_pos_embed"].shape[1] == 12 * 8
    name = "layers.1.blocks.0.attn.qkv.weight"
    assert torch.equal(weights(source)[f"encoder.{name}"], after[name])


def test_a_complete_probe_resumes_to_nothing(pretrained, tmp_path):
    start(f"--task probe {VIT} --data-size 64 --init {pretrained / 'checkpoint.pt'}", tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    start("--resume", tmp_path)
    assert before == (tmp_path / "checkpoint.pt").read_bytes()


def test_a_probed_run_predicts_classes_for_single_images(probed):
    run = load_run(probed)
    (prediction,) = run.predict([torch.zeros(3, 40, 30, dtype=torch.uint8)])
    assert json.dumps(prediction)


@pytest.mark.parametrize("flags, words", [
    (f"--task probe {VIT} --data-size 5", ("5 samples", "10")),
    (f"--task probe {VIT} --penalties", ("--penalties",)),
    (f"--task probe {VIT} --penalties 0", ("--penalties", "0")),
])
def test_what_no_classifier_can_be_fitted_to_is_one_sentence(tmp_path, capsys, flags, words):
    error = refused(flags, capsys, before_training=False)
    assert all(word in error for word in words)


def test_a_folder_of_one_class_is_one_sentence(tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / part / "cat" / f"{i}.png")
    error = refused(f"--task probe {VIT} --data folder --data-path {tmp_path}", capsys, before_training=False)
    assert "two classes" in error


def test_maes_probe_trains_batch_norm_and_head_on_new_crops(pretrained, tmp_path):
    flags = f"--task probe --style mae --init {pretrained / 'checkpoint.pt'} --data-size 64 --batch-size 16"
    start(f"{flags} --epochs 2", tmp_path)
    args = json.loads((tmp_path / "args.json").read_text())
    assert (args["optimizer"], args["augment"], args["pool"]) == ("lars", "crop", "cls")

    # the encoder stays; the statistics are those of batches
    before, after = weights(pretrained), weights(tmp_path)
    shared = [name for name in after if f"encoder.{name}" in before and name.startswith("blocks.")]
    assert shared and all(torch.equal(after[name], before[f"encoder.{name}"]) for name in shared)
    assert after["head.0.num_batches_tracked"] == 8
    assert after["head.1.weight"].abs().max() > 0.02  # it moved from a standard deviation of 0.01


@pytest.mark.parametrize("flags, words", [
    ("--style mae --model resnet8", ("--style mae", "resnet8")),
    ("--style mae --batch-size 1", ("--batch-size 1", "--style mae")),
    ("--style adamw --augment crop", ("--augment crop", "--style mae")),
    ("--style mae --penalties 0.1", ("--penalties", "lbfgs")),
])
def test_flags_of_other_styles_are_refused(capsys, flags, words):
    error = refused(f"--task probe --data-size 64 {flags}", capsys)
    assert all(word in error for word in words)
