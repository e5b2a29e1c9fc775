"""Pre-training by MAE, MIRL and MixMIM: what it learns, its ablations, its pictures."""

import math

import pytest
import torch
from small_runs import (
    CLASSIFY,
    CONTRAST,
    HIERARCHICAL,
    MIXMIM,
    PRETRAIN,
    STILL,
    TINY,
    VIT,
    assert_close,
    assert_same_bits,
    assert_same_run,
    built,
    checkpoint,
    epochs,
    interrupted_run,
    log,
    on_each_loss,
    refused,
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


# ---------------------------------------------------------------------------- from a checkpoint


def init_of(folder):
    return f"--init {folder / 'checkpoint.pt'}"


@pytest.mark.parametrize("flags", [f"{MAE} --raw-pixels --mask-ratio 0.5", f"{PRETRAIN} --no-pairing", MIXMIM,
                                   PLAIN_MIXMIM], ids=["mae", "mirl", "mixmim", "plain mixmim"])
def test_a_run_by_the_same_method_goes_on_with_all_its_weights(finished, tmp_path, capsys, flags):
    folder = finished(flags)
    start(f"--task pretrain {init_of(folder)} --data-size 64 --batch-size 8 --epochs 1 {STILL}", tmp_path)
    assert "decoders included" in capsys.readouterr().out
    assert_close(weights(tmp_path), weights(folder), 1e-6)  # method, sizes and decoders are the file's

    # and its loss is that of the run's last epoch: the same mask ratio, the same targets
    assert log(tmp_path)[-1]["val_loss"] == pytest.approx(epochs(folder)[-1]["val_loss"], abs=1e-5)


@pytest.mark.parametrize("flags", [MAE, CLASSIFY, CONTRAST, f"{MAE} --decoder-embed-dim 64"],
                         ids=["mae", "classify", "contrast", "other decoder"])
def test_another_method_task_or_decoder_takes_the_encoder_only(finished, capsys, flags):
    folder, method = finished(flags), "mae --decoder-embed-dim 32" if "64" in flags.split()[-1] else "mirl --segments 2"
    run = built(f"--task pretrain --method {method} --data-size 16 --batch-size 8 {init_of(folder)}")
    saved = {name.removeprefix("encoder."): value for name, value in weights(folder).items()}
    encoder = run.model.encoder.state_dict()
    assert_same_bits({name: value for name, value in encoder.items() if name.startswith("blocks.")},
                     {name: value for name, value in saved.items() if name.startswith("blocks.")})
    assert "start from random weights" in capsys.readouterr().out


def test_interrupted_it_resumes_without_the_file_it_started_from(finished, tmp_path):
    source = tmp_path / "source.pt"
    source.write_bytes((finished(MAE) / "checkpoint.pt").read_bytes())
    flags = f"--task pretrain --init {source} --data-size 64 --batch-size 8 --epochs 2"
    start(flags, tmp_path / "whole")
    interrupted_run(flags, tmp_path / "parts")
    source.unlink()
    start(f"--resume --output-dir {tmp_path / 'parts'}")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("more, words", [
    ("--method mixmim --depth 4", ("--depth 4", "depth 2")), ("--then-probe", ("--then-probe", "--init")),
    ("--method mixmim --model mixmim_demo", ("mixmim_demo", "vit_demo"))])
def test_what_a_checkpoint_does_not_fit_is_refused(finished, capsys, more, words):
    error = refused(f"--task pretrain {init_of(finished(MAE))} {more}", capsys)
    assert all(word in error for word in words), error


@pytest.mark.parametrize("name, value", [("decoder_depth", "x"), ("mask_ratio", "a"), ("mask_ratio", 7.0),
                                         ("decoder_embed_dim", -3), ("decoder_num_heads", [1, 77])])
def test_options_in_a_damaged_checkpoint_are_refused_in_one_sentence(finished, tmp_path, capsys, name, value):
    saved = checkpoint(finished(MAE))
    saved["args"][name] = value
    torch.save(saved, tmp_path / "checkpoint.pt")
    error = refused(f"--task pretrain {init_of(tmp_path)}", capsys)
    assert f"--{name.replace('_', '-')}" in error or "77" in error, error


def test_a_model_without_class_token_is_not_masked_by_mae(finished, capsys):
    error = refused(f"--task pretrain --method mae {init_of(finished(PLAIN_MIXMIM))} --data-size 16", capsys)
    assert "class token" in error
