import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust import CORRUPTIONS, SEVERITIES, corrupt, corruption_accuracy, fgsm, mean_accuracy, pgd, strength
from shapes import shapes
from vit import create_vit

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)
SIDES = (32, 64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels_of(imgs, mean=MEAN, std=STD):
    return imgs * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)


def normalized(pixels, mean=MEAN, std=STD):
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 9, 4)).eval()


def batch(n=16, side=8):
    return normalized(torch.rand(n, 3, side, side, generator=seeded())), torch.arange(n) % 4


def each_loss(model, imgs, labels):
    with torch.no_grad():
        return F.cross_entropy(model(imgs), labels, reduction="none")


class Linear(nn.Module):
    """Two classes, logits (w x, 0): the loss of class 1 grows along +w, that of class 0 along -w."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 4, generator=seeded(7)))

    def forward(self, x):
        score = (x * self.w).sum(dim=(1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], dim=1)


# ---------------------------------------------------------------------------- attacks


def test_fgsm_on_a_linear_model_moves_every_pixel_by_eps_times_the_sign():
    model, labels = Linear(), torch.tensor([0, 1])
    pixels = 0.2 + 0.6 * torch.rand(2, 3, 4, 4, generator=seeded())
    out = fgsm(model, normalized(pixels), labels, eps=0.05, random_start=False, mean=MEAN, std=STD)
    sign = torch.stack([-model.w.sign(), model.w.sign()])
    torch.testing.assert_close(pixels_of(out) - pixels, 0.05 * sign.detach(), atol=1e-6, rtol=0)


def test_with_a_random_start_and_a_step_twice_as_large_fgsm_reaches_the_same_corner():
    model, labels = Linear(), torch.tensor([0, 1])
    imgs = normalized(0.2 + 0.6 * torch.rand(2, 3, 4, 4, generator=seeded()))
    corner = fgsm(model, imgs, labels, 0.05, random_start=False, mean=MEAN, std=STD)
    torch.testing.assert_close(fgsm(model, imgs, labels, 0.05, alpha=0.1, mean=MEAN, std=STD), corner)
    torch.testing.assert_close(pgd(model, imgs, labels, 0.05, mean=MEAN, std=STD), corner)  # steps of eps / 4 reach it from anywhere


def test_the_default_step_of_fgsm_is_one_and_a_quarter_eps_from_the_random_start():
    model, labels = Linear(), torch.tensor([0, 1])
    pixels = 0.2 + 0.6 * torch.rand(2, 3, 4, 4, generator=seeded())
    out = fgsm(model, pixels, labels, 0.1, generator=seeded(5))
    start = 0.1 * (2 * torch.rand(pixels.shape, generator=seeded(5)) - 1)
    sign = torch.stack([-model.w.sign(), model.w.sign()]).detach()
    torch.testing.assert_close(out - pixels, (start + 0.125 * sign).clamp(-0.1, 0.1), atol=1e-6, rtol=0)


def test_pixels_at_the_end_of_their_range_stay_inside_it():
    model = Linear()
    out = fgsm(model, torch.ones(1, 3, 4, 4), torch.tensor([1]), 0.1, random_start=False)
    torch.testing.assert_close(out[0], torch.where(model.w > 0, 1.0, 0.9))


@settings(max_examples=25, deadline=None)
@given(eps=st.sampled_from([0.0, 1 / 255, 0.1, 1.0]), alpha=st.sampled_from([None, 0.0, 0.02, 3.0]), steps=st.integers(1, 4),
       restarts=st.integers(1, 3), random_start=st.booleans())
def test_every_attack_stays_in_the_ball_and_in_the_range_of_a_pixel(eps, alpha, steps, restarts, random_start):
    model, (imgs, labels) = net(), batch(4)
    out = pixels_of(pgd(model, imgs, labels, eps, alpha, steps, restarts, random_start, MEAN, STD))
    assert (out - pixels_of(imgs)).abs().max() <= eps + 1e-6
    assert out.min() >= -1e-6 and out.max() <= 1 + 1e-6


def test_pgd_finds_at_least_the_loss_of_fgsm_and_both_more_than_the_clean_one():
    model, (imgs, labels) = net(), batch(64)
    options = dict(eps=8 / 255, mean=MEAN, std=STD)
    clean, one, ten = (each_loss(model, x, labels).mean() for x in (
        imgs, fgsm(model, imgs, labels, generator=seeded(), **options), pgd(model, imgs, labels, generator=seeded(), **options)))
    assert clean < one < ten + 1e-3


def test_more_restarts_never_lower_an_images_loss():
    model, (imgs, labels) = net(), batch(32)
    runs = [each_loss(model, pgd(model, imgs, labels, 0.1, steps=1, restarts=r, mean=MEAN, std=STD, generator=seeded()), labels) for r in (1, 2, 5)]
    assert (runs[1] >= runs[0] - 1e-4).all() and (runs[2] >= runs[1] - 1e-4).all() and (runs[2] > runs[0] + 1e-4).any()


def test_mean_and_std_are_the_same_as_attacking_raw_pixels_of_a_model_that_normalizes():
    model, (imgs, labels) = net(), batch(8)
    inside = pgd(model, imgs, labels, 0.05, mean=MEAN, std=STD, generator=seeded())
    raw = pgd(lambda x: model(normalized(x)), pixels_of(imgs), labels, 0.05, generator=seeded())
    close = (pixels_of(inside) - raw).abs() < 1e-5
    assert close.float().mean() > 0.99  # the sign of a gradient near 0 hangs on rounding


def test_an_attack_leaves_parameters_gradients_images_mode_and_statistics_alone():
    model, (imgs, labels) = net(), batch(4)
    model(imgs).sum().backward()
    before = copy.deepcopy((model.state_dict(), [p.grad for p in model.parameters()], imgs))
    state = torch.get_rng_state()
    pgd(model, imgs, labels, 0.1, restarts=2, mean=MEAN, std=STD, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)  # with a generator of its own
    assert not model.training and all(p.requires_grad for p in model.parameters())
    for old, new in zip((*before[0].values(), *before[1], before[2]), (*model.state_dict().values(), *(p.grad for p in model.parameters()), imgs)):
        assert torch.equal(old, new)


def test_an_attack_works_where_gradients_are_off_and_hands_back_a_constant():
    model, (imgs, labels) = net(), batch(4)
    options = dict(eps=0.1, mean=MEAN, std=STD)
    with torch.no_grad():
        off = pgd(model, imgs, labels, generator=seeded(), **options)
    on = pgd(model, imgs.clone().requires_grad_(), labels, generator=seeded(), **options)
    assert torch.equal(on, off) and not on.requires_grad


def test_the_same_generator_gives_the_same_attack_and_another_a_different_one():
    model, (imgs, labels) = net(), batch(4)
    a, b, c = (fgsm(model, imgs, labels, 0.1, mean=MEAN, std=STD, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_soft_labels_grey_images_and_bf16_autocast_work():
    model = create_vit("vit_demo", depth=1, in_chans=1, num_classes=4)
    imgs, labels = torch.rand(2, 1, 32, 32, generator=seeded()), torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        out = fgsm(model, (imgs - 0.5) / 0.5, labels, 0.1, mean=0.5, std=0.5)
        F.cross_entropy(model(out), labels).backward()  # the training step in the same autocast region
    assert out.dtype == torch.float32 and ((out * 0.5 + 0.5) - imgs).abs().max() <= 0.1 + 1e-6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_attack_in_the_same_autocast_region_does_not_change_the_training_gradient():
    model, (imgs, labels) = net(), batch(4)  # autocast keeps its bf16 copies of the weights for the whole region
    grads = []
    for attacked in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if attacked:
                pgd(model, imgs, labels, 0.1, steps=2, restarts=2, mean=MEAN, std=STD)
            grads.append(torch.autograd.grad(F.cross_entropy(model(imgs), labels), model.parameters()))
    for alone, after in zip(*grads):
        assert torch.equal(alone, after)


# ---------------------------------------------------------------------------- corruptions


@every_corruption
@pytest.mark.parametrize("side", SIDES)
def test_every_severity_damages_more_than_the_one_before(name, side):
    imgs = shapes(32, img_size=side)
    damage = [(corrupt(imgs, name, s, seeded()) - imgs).square().mean().item() for s in range(1, 6)]
    assert 0 < damage[0] and damage == sorted(damage) and damage[4] > 1.5 * damage[0], damage


@every_corruption
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 32, 32), (1, 3, 40, 56), (1, 3, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_corruption_keeps_shape_type_and_range_and_leaves_its_input_alone(name, shape, dtype):
    imgs = torch.rand(shape, generator=seeded()).to(dtype)
    before = imgs.clone()
    for severity in (1, 5):
        out = corrupt(imgs, name, severity)
        assert out.shape == imgs.shape and out.dtype == dtype and out.min() >= 0 and out.max() <= 1
    assert torch.equal(imgs, before)


@every_corruption
def test_the_same_seed_gives_the_same_corruption_and_only_noise_hangs_on_it(name):
    imgs = shapes(4)
    state = torch.get_rng_state()
    a, b, c = (corrupt(imgs, name, 3, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and torch.equal(a, c) == ("noise" not in name)
    assert torch.equal(torch.get_rng_state(), state)


@every_corruption
def test_images_of_a_batch_do_not_mix(name):
    if "noise" not in name:
        imgs = shapes(3)
        torch.testing.assert_close(corrupt(imgs, name, 4)[1:2], corrupt(imgs[1:2], name, 4))


@every_corruption
def test_a_flat_grey_image_shows_the_noise_and_nothing_else(name):
    gray = torch.full((64, 1, 32, 32), 128 / 255)
    out = corrupt(gray, name, 2, seeded())
    wanted = {"gaussian_noise": 0.06, "shot_noise": (128 / 255 / 250) ** 0.5}.get(name, 0)  # Poisson: variance of n / c is x / c
    assert out.mean().item() == pytest.approx(128 / 255, abs=1e-3) and out.std().item() == pytest.approx(wanted, rel=0.02, abs=1e-5)


def test_contrast_pulls_each_channel_to_its_mean_by_the_tables_share():
    imgs = torch.rand(2, 3, 32, 32, generator=seeded())
    mean = imgs.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(imgs, "contrast", 2), mean + 0.5 * (imgs - mean))


def test_pixelate_at_224_pixels_severity_5_leaves_blocks_of_4_with_their_mean():
    imgs = torch.rand(1, 3, 224, 224, generator=seeded())
    blocks = F.avg_pool2d(imgs, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    torch.testing.assert_close(corrupt(imgs, "pixelate", 5), blocks, atol=1.6 / 255, rtol=0)  # rounded to 8 bits thrice


def test_blur_of_a_single_point_is_a_gaussian():
    imgs = torch.zeros(1, 1, 33, 32)
    imgs[..., 16, 16] = 1
    out = corrupt(imgs, "blur", 5)[0, 0]  # sigma 1
    g = torch.exp(-torch.arange(-3, 4.0) ** 2 / 2)
    torch.testing.assert_close(out[13:20, 13:20], g[:, None] * g / g.sum() ** 2)
    assert out.sum().item() == pytest.approx(1, rel=1e-5)


def test_strengths_are_the_tables_at_32_and_224_pixels_and_between_them_in_between():
    for name, (small, large) in SEVERITIES.items():
        for s in range(5):
            assert strength(name, s + 1, 32) == strength(name, s + 1, 16) == pytest.approx(small[s])
            assert strength(name, s + 1, 224) == strength(name, s + 1, 512) == pytest.approx(large[s])
            assert strength(name, s + 1, 85) == pytest.approx((small[s] * large[s]) ** 0.5, rel=0.01)  # 84.7 is half way


# ---------------------------------------------------------------------------- accuracy under corruption


class Bright(nn.Module):
    """Class 1 where the mean pixel is above 1/2; takes images normalized by MEAN, STD."""

    def __init__(self):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        mean = pixels_of(x).mean(dim=(1, 2, 3))
        return torch.stack([self.threshold - mean, mean - self.threshold], dim=1)


def test_accuracy_undoes_the_normalization_and_counts_every_image_once():
    level = torch.tensor([0.2, 0.3, 0.7, 0.8, 0.9])
    imgs = normalized(level.view(5, 1, 1, 1).expand(5, 3, 32, 32))
    labels = torch.tensor([0, 0, 1, 1, 0])  # the last one is wrong
    table = corruption_accuracy(Bright().eval(), imgs, labels, MEAN, STD, batch_size=2)
    assert table == {name: [0.8] * 5 for name in CORRUPTIONS}  # none of them changes the brightness
    assert mean_accuracy(table) == pytest.approx(0.8)
    assert mean_accuracy({"a": [1, 1, 1, 1, 0], "b": [0, 0, 0, 0, 0]}) == pytest.approx(0.4)


def test_accuracy_is_repeatable_and_can_be_asked_for_some_corruptions_only():
    model, (imgs, labels) = net(), batch(32)
    state = torch.get_rng_state()
    first, again = (corruption_accuracy(model, imgs, labels, MEAN, STD, names=("shot_noise", "blur")) for _ in range(2))
    assert first == again and list(first) == ["shot_noise", "blur"] and torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("call, words", [
    (lambda: corrupt(torch.rand(1, 3, 8, 8), "fog", 1), "corruption 'fog' is unknown; choose from gaussian_noise"),
    (lambda: corrupt(torch.rand(1, 3, 8, 8), "blur", 6), "severity 6 must be 1, 2, 3, 4 or 5"),
    (lambda: corrupt(torch.rand(1, 3, 8, 8), "blur", 0), "severity 0"),
    (lambda: corrupt(torch.rand(1, 3, 8, 8) * 255, "blur", 1), r"pixels must lie in \[0, 1\]"),
    (lambda: corrupt(torch.rand(1, 3, 8, 8) - 0.5, "blur", 1), r"pixels must lie in \[0, 1\]"),
    (lambda: corrupt(torch.full((1, 3, 8, 8), torch.nan), "blur", 1), r"pixels must lie in \[0, 1\], got nan"),
    (lambda: corrupt(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "blur", 1), "divide uint8 by 255"),
    (lambda: corrupt(torch.rand(3, 8, 8), "blur", 1), r"\(B, C, H, W\)"),
    (lambda: corrupt(torch.rand(1, 4, 8, 8), "jpeg", 1), "jpeg and pixelate take 1 or 3 channels, the images have 4"),
    (lambda: pgd(net(), *batch(2), eps=0.1), "give the mean and std"),  # mean and std forgotten
    (lambda: pgd(net(), *batch(2), eps=0.1, mean=(0.5, 0.5), std=STD), "1 or 3 values"),
    (lambda: pgd(net(), *batch(2), eps=8, mean=MEAN, std=STD), "eps 8 must lie in.*8/255"),
    (lambda: pgd(net(), *batch(2), eps=-0.1, mean=MEAN, std=STD), "eps -0.1"),
    (lambda: pgd(net(), *batch(2), eps=0.1, alpha=-1, mean=MEAN, std=STD), "alpha -1"),
    (lambda: pgd(net(), *batch(2), eps=0.1, steps=0, mean=MEAN, std=STD), "steps 0"),
    (lambda: pgd(net(), *batch(2), eps=0.1, restarts=0, mean=MEAN, std=STD), "restarts 0"),
    (lambda: corruption_accuracy(net().train(), *batch(2), MEAN, STD), r"model.eval\(\)"),
])
def test_bad_input_is_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call, words", [
    (lambda net, x, y: pgd(net, (x * 255).to(torch.uint8), y, 0.1), "float32"),
    (lambda net, x, y: pgd(net, x.bfloat16(), y, 0.1), "float32"),
    (lambda net, x, y: pgd(net, x[:0], y[:0], 0.1), "at least one"),
    (lambda net, x, y: pgd(net, x, y, 0.1, std=0.0), "std"),
    (lambda net, x, y: corruption_accuracy(net, x, y[:, None]), "labels"),
    (lambda net, x, y: corruption_accuracy(net, x, y[:1]), "labels"),
    (lambda net, x, y: corrupt(x, "blur", 1.0), "severity"),
])
def test_what_would_fail_late_or_lie_is_refused_at_once(call, words):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3)).eval()
    with pytest.raises(ValueError, match=words):
        call(net, torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))


def test_one_corruption_may_be_named_without_a_list():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3)).eval()
    assert list(corruption_accuracy(net, torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long), names="blur")) == ["blur"]


def test_inference_mode_is_refused_with_the_way_out():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3)).eval()
    with torch.inference_mode(), pytest.raises(ValueError, match="no_grad"):
        pgd(net, torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long), 0.1)
