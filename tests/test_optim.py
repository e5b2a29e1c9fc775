"""How images become steps, the learning rate, groups of weights, averages, accumulation, and SAM inside the loop."""

import math
from argparse import Namespace

import pytest
import torch
from small_runs import (
    CLASSIFY,
    DETECT,
    FLAT,
    RESNET,
    SEGMENT,
    STILL,
    VIT,
    assert_close,
    assert_same_bits,
    built,
    checkpoint,
    log,
    on_each_loss,
    start,
    weights,
)
from torch.nn import functional as F
from torch.utils.data import default_collate

from data import TrainBatches
from training import optim

NO_FLAGS = dict(accum=1, lr=None, blr=0.004, min_lr=0.0, warmup_epochs=None, epochs=3, batch_size=8, task="classify")


# ---------------------------------------------------------------------------- the plan


def test_a_plan_counts_steps_and_scales_the_learning_rate_with_the_effective_batch():
    plan = optim.plan_steps(Namespace(**NO_FLAGS), 100, 1)
    assert (plan.batch_size, plan.effective, plan.steps_per_epoch, plan.total_steps) == (8, 8, 12, 36)
    assert plan.lr == pytest.approx(0.004 * 8 / 256)
    assert plan.warmup == pytest.approx(0.05 * 36)


def test_a_plan_counts_micro_batches_and_processes():
    plan = optim.plan_steps(Namespace(**{**NO_FLAGS, "accum": 4}), 200, 2)
    assert (plan.effective, plan.steps_per_epoch) == (64, 3)  # 12 batches: windows of 4
    assert plan.lr == pytest.approx(0.004 * 64 / 256)


def test_the_last_window_of_an_epoch_may_be_short():
    plan = optim.plan_steps(Namespace(**{**NO_FLAGS, "accum": 5}), 100, 1)
    assert plan.steps_per_epoch == 3  # 12 batches: 5, 5, 2


def test_a_given_learning_rate_and_warmup_are_kept():
    plan = optim.plan_steps(Namespace(**{**NO_FLAGS, "lr": 0.3, "warmup_epochs": 0.5}), 80, 1)
    assert plan.lr == 0.3 and plan.warmup == 5


@pytest.mark.parametrize("flags, word", [(dict(batch_size=101), "batch-size 101"), (dict(accum=13), "accum 13")])
def test_an_empty_epoch_is_an_error_that_names_the_flag(flags, word):
    with pytest.raises(ValueError, match=word):
        optim.plan_steps(Namespace(**{**NO_FLAGS, **flags}), 100, 1)


# ---------------------------------------------------------------------------- the learning rate


def learning_rate(step, min_lr=0.0, warmup=10, schedule="cosine"):
    """Of a run of 100 steps with a peak of 1."""
    plan = optim.Plan(batch_size=8, effective=8, steps_per_epoch=100, total_steps=100, lr=1.0, warmup=warmup)
    return optim.lr_at(step, plan, Namespace(min_lr=min_lr, schedule=schedule))


@pytest.mark.parametrize(
    "step, min_lr, expected",
    [
        (0, 0, 0),
        (5, 0, 0.5),
        (10, 0, 1),
        (40, 0, 0.75),  # cos(pi / 3) = 1/2
        (55, 0, 0.5),
        (100, 0, 0),
        (55, 0.1, 0.55),
        (100, 0.1, 0.1),
    ],
)
def test_the_learning_rate_matches_hand_computed_values(step, min_lr, expected):
    assert learning_rate(step, min_lr) == pytest.approx(expected)


@pytest.mark.parametrize("step, expected", [(5, 0.5), (10, 1.0), (55, 0.55), (100, 0.1)])
def test_the_linear_schedule_matches_hand_computed_values(step, expected):
    assert learning_rate(step, 0.1, schedule="linear") == pytest.approx(expected)


def test_without_warmup_the_first_step_has_the_full_learning_rate():
    assert learning_rate(0, warmup=0) == pytest.approx(1.0)


def test_the_weight_average_matches_hand_computed_values():
    update = optim.ema_update(0.9)
    for step, expected in ((0, 1.9), (8, 1.5), (10_000, 1.1)):  # d = 0.1, 9/18, and the limit 0.9
        average = torch.tensor([1.0])
        update([average], [torch.tensor([2.0])], torch.tensor(step))
        assert average.item() == pytest.approx(expected)


# ---------------------------------------------------------------------------- groups


def groups_of(flags):
    """The trainable weights by name, each with its (lr_scale, weight_decay)."""
    run = built(flags)
    names = {param: name for name, param in run.model.named_parameters()}
    groups = {}
    for group in optim.param_groups(run.model, run.args):
        for param in group["params"]:
            assert names[param] not in groups
            groups[names[param]] = (group["lr_scale"], group["weight_decay"])
    assert groups.keys() == {name for name, param in run.model.named_parameters() if param.requires_grad}
    return groups


def test_layer_decay_and_weight_decay_groups_match_the_hand_computed_ones():
    groups = groups_of(f"{CLASSIFY} --layer-decay 0.5 --weight-decay 0.3")
    assert groups["patch_embed.proj.weight"] == (0.125, 0.3)  # 0.5 ** 3
    assert groups["cls_token"] == (0.125, 0.0) and groups["pos_embed"] == (0.125, 0.0)
    assert groups["blocks.0.attn.qkv.weight"] == (0.25, 0.3)
    assert groups["blocks.1.mlp.fc1.weight"] == (0.5, 0.3)
    assert groups["blocks.1.norm1.weight"] == (0.5, 0.0)
    assert groups["head.weight"] == (1.0, 0.3) and groups["head.bias"] == (1.0, 0.0)
    assert groups["fc_norm.weight"] == (1.0, 0.0)
    for name, (_, decay) in groups.items():
        if name.endswith("bias") or "norm" in name:
            assert decay == 0


def test_pretraining_decays_class_and_mask_tokens_as_the_official_codes_do():
    groups = groups_of(f"--task pretrain --method mae {VIT} --data-size 8 --batch-size 8 --weight-decay 0.3")
    assert groups["encoder.cls_token"] == (1.0, 0.3)
    assert "encoder.pos_embed" not in groups  # frozen
    assert groups["encoder.blocks.0.norm1.weight"] == (1.0, 0.0)


def test_layer_decay_counts_the_blocks_of_all_stages():
    groups = groups_of("--task classify --model mixmim_demo --layer-decay 0.5 --weight-decay 0.3 --data-size 64")
    assert groups["patch_embed.norm.weight"] == (0.5**9, 0.0)  # 2, 2 and 4 blocks
    assert groups["patch_embed.proj.weight"] == (0.5**9, 0.3)
    assert groups["layers.0.blocks.1.attn.qkv.weight"] == (0.5**7, 0.3)
    # decayed, as in the official code
    assert groups["layers.0.blocks.1.attn.relative_position_bias_table"] == (0.5**7, 0.3)
    # with the first block behind it
    assert groups["layers.0.downsample.reduction.weight"] == (0.5**6, 0.3)
    assert groups["layers.1.blocks.0.mlp.fc1.weight"] == (0.5**6, 0.3)
    assert groups["layers.2.blocks.3.norm2.bias"] == (0.5, 0.0)
    assert groups["norm.weight"] == (1.0, 0.0) and groups["head.weight"] == (1.0, 0.3)


def test_contrast_groups_its_encoder_as_classification_does():
    sizes = f"{VIT} --data-size 64 --batch-size 8 --layer-decay 0.5"
    classify = groups_of(f"--task classify {sizes}")
    contrast = groups_of(f"--task contrast {sizes}")
    encoder = [name for name in contrast if name.startswith("encoder.")]
    assert len(encoder) > 20
    for name in encoder:
        assert contrast[name] == classify[name.removeprefix("encoder.")]
    assert {scale for name, (scale, _) in contrast.items() if name.startswith("head.")} == {1.0}


def test_detection_spares_positions_and_norms_from_decay():
    pytest.importorskip("pycocotools")
    groups = groups_of(f"{DETECT} --weight-decay 0.1")
    spared = {name for name, (_, decay) in groups.items() if decay == 0}
    tables = {name for name in groups if name.endswith(("pos_embed", "relative_position_bias_table"))}
    assert len(tables) == 2 and tables <= spared
    assert {name for name in groups if name.endswith(("bias", "norm1.weight"))} <= spared
    assert "roi_heads.box_predictor.cls_score.weight" not in spared


def test_layer_decay_reaches_the_blocks_inside_a_pyramid():
    groups = groups_of(f"{SEGMENT} --layer-decay 0.5")
    scales = {name: scale for name, (scale, _) in groups.items()}
    assert scales["pyramid.vit.patch_embed.proj.weight"] == 0.5**5
    assert scales["pyramid.vit.blocks.3.mlp.fc1.weight"] == 0.5
    for name in ("conv_seg.1.weight", "ppm.bottleneck.0.weight", "pyramid.scales.1.weight"):
        assert scales[name] == 1.0


# ---------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    "flags, kind, beta2",
    [
        ("--beta2 0.95", torch.optim.AdamW, 0.95),
        ("", torch.optim.AdamW, 0.999),
        ("--optimizer sgd", torch.optim.SGD, None),
    ],
)
def test_the_optimizer_is_the_one_of_the_flags(flags, kind, beta2):
    run = built(f"{CLASSIFY} {flags}")
    optimizer = optim.build_optimizer(run.model, run.args)
    assert type(optimizer) is kind
    assert beta2 is None or optimizer.defaults["betas"] == (0.9, beta2)


@pytest.mark.parametrize("flags, rho", [("", 0.05), ("--adaptive", 0.5), ("--rho 0.2", 0.2)])
def test_sam_has_the_radius_of_the_flags_or_its_default(flags, rho):
    run = built(f"{CLASSIFY} --optimizer sam {flags}")
    assert run.args.rho == rho
    assert len(optim.build_optimizer(run.model, run.args).param_groups) > 1


# ---------------------------------------------------------------------------- accumulation


def test_accumulated_micro_batches_step_like_one_big_batch(tmp_path):
    flags = f"--task classify {VIT} --data-size 64 --epochs 1 --optimizer sgd {FLAT}"
    big, small = tmp_path / "big", tmp_path / "small"
    start(f"{flags} --batch-size 16", big)
    start(f"{flags} --batch-size 4 --accum 4", small)
    assert_close(weights(big), weights(small), 2e-6)
    assert log(big)[-1]["train_loss"] == pytest.approx(log(small)[-1]["train_loss"], abs=2e-6)


def batches_in_order(run, *sizes):
    """Batches of any size in the run's own order."""
    keys = []
    for batch in TrainBatches(len(run.data.train), 1, run.args.seed):
        keys += batch
    for size in sizes:
        images, labels, _ = default_collate([run.data.train[key] for key in keys[:size]])
        keys = keys[size:]
        yield images, labels


def test_one_accumulated_step_is_the_gradient_of_the_big_batch(tmp_path):
    flags = f"--task classify {VIT} --data-size 16 --batch-size 4 --accum 4 --epochs 1 --optimizer sgd {FLAT}"
    start(flags, tmp_path)
    run = built(flags)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    images, labels = next(batches_in_order(run, 16))
    F.cross_entropy(run.model(images), labels).backward()
    after = weights(tmp_path)
    for name, param in run.model.named_parameters():
        step = (before[name] - after[name]) / 0.05
        torch.testing.assert_close(step, param.grad, rtol=0, atol=1e-5)


def test_a_short_last_window_averages_over_its_own_length(tmp_path):
    flags = f"--task classify {VIT} --data-size 20 --batch-size 4 --accum 4 --epochs 1 --optimizer sgd {FLAT}"
    start(flags, tmp_path)  # 5 batches: a window of 4 and one of 1
    run = built(flags)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)
    for images, labels in batches_in_order(run, 16, 4):
        optimizer.zero_grad()
        F.cross_entropy(run.model(images), labels).backward()
        optimizer.step()
    assert_close(dict(run.model.state_dict()), weights(tmp_path), 2e-6)


# ---------------------------------------------------------------------------- SAM in the loop


def test_sam_logs_both_losses_and_trains_other_weights_than_its_base(finished):
    sam, plain = finished(f"{CLASSIFY} --optimizer sam --rho 0.1"), finished(CLASSIFY)
    steps = [line for line in log(sam) if "epoch" not in line]
    assert steps
    for line in steps:
        assert line["loss_climbed"] > line["loss"] and line["grad_norm"] > 0
    assert not torch.equal(weights(sam)["blocks.0.attn.qkv.weight"], weights(plain)["blocks.0.attn.qkv.weight"])


def test_sam_with_a_vanishing_radius_trains_like_its_base(finished):
    sam, plain = finished(f"{CLASSIFY} --optimizer sam --rho 1e-30"), finished(CLASSIFY)
    assert_same_bits(weights(sam), weights(plain))


def test_a_non_finite_loss_in_either_pass_of_sam_skips_the_step(tmp_path, monkeypatch):
    heads = []

    def act(number, model, loss):
        heads.append(model.head.weight.detach().clone())
        # the first pass of step 2, the second of step 3
        return loss * math.nan if number in (3, 6) else None

    on_each_loss(monkeypatch, act)
    start(f"{CLASSIFY} --optimizer sam --rho 0.1 --epochs 1", tmp_path)
    assert log(tmp_path)[-1]["bad_steps"] == 2
    assert torch.equal(heads[2], heads[4]) and torch.equal(heads[4], heads[6])
    assert not torch.equal(heads[6], heads[8])


class Poison(torch.autograd.Function):
    """A finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def test_a_gradient_that_is_not_finite_counts_as_a_bad_step_of_sam(tmp_path, monkeypatch):
    on_each_loss(monkeypatch, lambda number, model, loss: Poison.apply(loss) if number in (3, 6) else None)
    start(f"{CLASSIFY} --optimizer sam --rho 0.1 --epochs 1", tmp_path)
    assert log(tmp_path)[-1]["bad_steps"] == 2


def test_both_passes_of_sam_see_the_same_mixed_images(tmp_path, monkeypatch):
    losses = []
    on_each_loss(monkeypatch, lambda number, model, loss: losses.append(loss.item()))
    start(f"{CLASSIFY} --epochs 1 --optimizer sam --rho 1e-30 --mixup 0.8 --drop-path 0.2", tmp_path)
    assert len(losses) == 16
    assert losses[::2] == losses[1::2]  # at the same weights: the radius is next to nothing


def test_sam_logs_the_norm_of_the_gradient_before_it_is_clipped(tmp_path):
    norms = {}
    for name, clip in (("clipped", "--clip-grad 0.01"), ("free", "")):
        start(f"{CLASSIFY} --optimizer sam {clip} {STILL}", tmp_path / name)
        norms[name] = [line["grad_norm"] for line in log(tmp_path / name) if "grad_norm" in line]
    assert norms["clipped"] == norms["free"] and norms["clipped"][0] > 0.01


def test_batch_norm_counts_one_batch_per_step_though_sam_passes_twice(finished):
    folder = finished(f"{RESNET} --optimizer sam --base-optimizer sgd --lr 0.05")
    assert weights(folder)["bn1.num_batches_tracked"] == 8


def test_a_weight_average_is_evaluated_and_saved_beside_the_weights(finished):
    averaged, plain = finished(f"{CLASSIFY} --ema 0.9"), finished(CLASSIFY)
    assert "ema" in checkpoint(averaged) and "ema" not in checkpoint(plain)
    assert_same_bits(weights(averaged), weights(plain))
    assert log(averaged)[-1]["val_loss"] != log(plain)[-1]["val_loss"]


def test_lars_steps_match_those_computed_by_hand():
    w, b = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    optimizer = optim.LARS([w, b], lr=10.0, momentum=0.5, weight_decay=0.1)
    w.grad, b.grad = torch.tensor([[-0.3, 0.6]]), torch.tensor([0.2])
    optimizer.step()
    # u = g + 0.1 w = (0, 1), |w| / |u| = 5: w moves by 10 * 0.001 * 5 * (0, 1); b by 10 * 0.2, without decay
    torch.testing.assert_close(w.detach(), torch.tensor([[3.0, 3.95]]))
    torch.testing.assert_close(b.detach(), torch.tensor([0.0]))

    w.grad, b.grad = torch.tensor([[0.7, -0.395]]), torch.tensor([0.0])
    optimizer.step()
    # u = (1, 0), |w| = sqrt(9 + 3.95^2) = 4.96009; momentum (0, 0.005) / 2 + 0.00496009 (1, 0); b: 0.2 / 2
    torch.testing.assert_close(w.detach(), torch.tensor([[3 - 0.0496009, 3.95 - 0.025]]))
    torch.testing.assert_close(b.detach(), torch.tensor([-1.0]))


def test_lars_takes_the_gradient_itself_where_a_norm_is_zero():
    w = torch.zeros(1, 2, requires_grad=True)
    optimizer = optim.LARS([w], lr=1.0)
    w.grad = torch.tensor([[1.0, 2.0]])
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([[-1.0, -2.0]]))
