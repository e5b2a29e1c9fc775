"""Attacks that stay in their ball, corruptions as strong as their table says, and accuracies counted by hand."""

import copy
import math

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
SCALE = dict(mean=MEAN, std=STD)
every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def per_channel(values):
    return torch.tensor(values).view(3, 1, 1)


def pixels_of(imgs):
    return imgs * per_channel(STD) + per_channel(MEAN)


def normalized(pixels):
    return (pixels - per_channel(MEAN)) / per_channel(STD)


def net(seed=0):
    torch.manual_seed(seed)
    features = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.GELU()
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(8 * 9, 4)).eval()


def batch(n=16, side=8):
    pixels = torch.rand(n, 3, side, side, generator=seeded())
    return normalized(pixels), torch.arange(n) % 4


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

    def signs(self):
        """Where the loss of a batch with labels 0 and 1 grows."""
        sign = self.w.detach().sign()
        return torch.stack([-sign, sign])


def linear_case():
    """A linear model, pixels far from 0 and 1, and their labels."""
    pixels = 0.2 + 0.6 * torch.rand(2, 3, 4, 4, generator=seeded())
    return Linear(), pixels, torch.tensor([0, 1])


# ---------------------------------------------------------------------------- attacks


def test_fgsm_on_a_linear_model_moves_every_pixel_by_eps_times_the_sign():
    model, pixels, labels = linear_case()
    out = fgsm(model, normalized(pixels), labels, eps=0.05, random_start=False, **SCALE)
    torch.testing.assert_close(pixels_of(out) - pixels, 0.05 * model.signs(), atol=1e-6, rtol=0)


def test_with_a_random_start_and_a_step_twice_as_large_fgsm_reaches_the_same_corner():
    model, pixels, labels = linear_case()
    imgs = normalized(pixels)
    corner = fgsm(model, imgs, labels, 0.05, random_start=False, **SCALE)
    torch.testing.assert_close(fgsm(model, imgs, labels, 0.05, alpha=0.1, **SCALE), corner)
    ten_steps = pgd(model, imgs, labels, 0.05, **SCALE)  # steps of eps / 4 reach it from anywhere
    torch.testing.assert_close(ten_steps, corner)


def test_the_default_step_of_fgsm_is_one_and_a_quarter_eps_from_the_random_start():
    model, pixels, labels = linear_case()
    out = fgsm(model, pixels, labels, 0.1, generator=seeded(5))
    start = 0.1 * (2 * torch.rand(pixels.shape, generator=seeded(5)) - 1)
    moved = (start + 0.125 * model.signs()).clamp(-0.1, 0.1)
    torch.testing.assert_close(out - pixels, moved, atol=1e-6, rtol=0)


def test_pixels_at_the_end_of_their_range_stay_inside_it():
    model = Linear()
    out = fgsm(model, torch.ones(1, 3, 4, 4), torch.tensor([1]), 0.1, random_start=False)
    torch.testing.assert_close(out[0], torch.where(model.w > 0, 1.0, 0.9))


@settings(max_examples=25, deadline=None)
@given(
    eps=st.sampled_from([0.0, 1 / 255, 0.1, 1.0]),
    alpha=st.sampled_from([None, 0.0, 0.02, 3.0]),
    steps=st.integers(1, 4),
    restarts=st.integers(1, 3),
    random_start=st.booleans(),
)
def test_every_attack_stays_in_the_ball_and_in_the_range_of_a_pixel(eps, alpha, steps, restarts, random_start):
    model, (imgs, labels) = net(), batch(4)
    out = pixels_of(pgd(model, imgs, labels, eps, alpha, steps, restarts, random_start, MEAN, STD))
    assert (out - pixels_of(imgs)).abs().max() <= eps + 1e-6
    assert out.min() >= -1e-6 and out.max() <= 1 + 1e-6


def test_pgd_reaches_at_least_the_loss_of_fgsm_and_both_more_than_the_clean_one():
    model, (imgs, labels) = net(), batch(64)
    clean = each_loss(model, imgs, labels).mean()
    losses = []
    for attack in (fgsm, pgd):
        attacked = attack(model, imgs, labels, eps=8 / 255, generator=seeded(), **SCALE)
        losses.append(each_loss(model, attacked, labels).mean())
    assert clean < losses[0] < losses[1] + 1e-3


def test_more_restarts_never_lower_the_loss_of_an_image():
    model, (imgs, labels) = net(), batch(32)
    losses = {}
    for restarts in (1, 2, 5):
        attacked = pgd(model, imgs, labels, 0.1, steps=1, restarts=restarts, generator=seeded(), **SCALE)
        losses[restarts] = each_loss(model, attacked, labels)
    assert (losses[2] >= losses[1] - 1e-4).all()
    assert (losses[5] >= losses[2] - 1e-4).all()
    assert (losses[5] > losses[1] + 1e-4).any()


def test_mean_and_std_are_the_same_as_attacking_raw_pixels_of_a_model_that_normalizes():
    model, (imgs, labels) = net(), batch(8)
    inside = pgd(model, imgs, labels, 0.05, generator=seeded(), **SCALE)
    raw = pgd(lambda x: model(normalized(x)), pixels_of(imgs), labels, 0.05, generator=seeded())
    close = (pixels_of(inside) - raw).abs() < 1e-5
    assert close.float().mean() > 0.99  # the sign of a gradient near 0 depends on rounding


def test_an_attack_changes_no_parameter_gradient_image_mode_or_statistic():
    model, (imgs, labels) = net(), batch(4)
    model(imgs).sum().backward()

    def everything():
        return [*model.state_dict().values(), *(p.grad for p in model.parameters()), imgs, torch.get_rng_state()]

    before = copy.deepcopy(everything())
    pgd(model, imgs, labels, 0.1, restarts=2, generator=seeded(), **SCALE)
    assert all(torch.equal(old, new) for old, new in zip(before, everything(), strict=True))
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_an_attack_works_where_gradients_are_off_and_returns_a_constant():
    model, (imgs, labels) = net(), batch(4)
    with torch.no_grad():
        off = pgd(model, imgs, labels, 0.1, generator=seeded(), **SCALE)
    on = pgd(model, imgs.clone().requires_grad_(), labels, 0.1, generator=seeded(), **SCALE)
    assert torch.equal(on, off) and not on.requires_grad


def test_the_same_generator_gives_the_same_attack_and_another_a_different_one():
    model, (imgs, labels) = net(), batch(4)
    a, b, c = (fgsm(model, imgs, labels, 0.1, generator=seeded(seed), **SCALE) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_soft_labels_gray_images_and_bf16_autocast_work():
    model = create_vit("vit_demo", depth=1, in_chans=1, num_classes=4)
    imgs = torch.rand(2, 1, 32, 32, generator=seeded())
    labels = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        out = fgsm(model, (imgs - 0.5) / 0.5, labels, 0.1, mean=0.5, std=0.5)
        F.cross_entropy(model(out), labels).backward()  # the training step in the same autocast region
    assert out.dtype == torch.float32
    assert ((out * 0.5 + 0.5) - imgs).abs().max() <= 0.1 + 1e-6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_attack_in_the_same_autocast_region_does_not_change_the_training_gradient():
    model, (imgs, labels) = net(), batch(4)  # autocast keeps its bf16 copies of the weights for the whole region
    grads = []
    for attacked in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if attacked:
                pgd(model, imgs, labels, 0.1, steps=2, restarts=2, **SCALE)
            loss = F.cross_entropy(model(imgs), labels)
            grads.append(torch.autograd.grad(loss, model.parameters()))
    assert all(torch.equal(alone, after) for alone, after in zip(*grads, strict=True))


# ---------------------------------------------------------------------------- corruptions


@every_corruption
@pytest.mark.parametrize("side", [32, 64])
def test_every_severity_damages_more_than_the_one_before(name, side):
    imgs, damage = shapes(32, img_size=side), []
    for severity in range(1, 6):
        corrupted = corrupt(imgs, name, severity, seeded())
        damage.append((corrupted - imgs).square().mean().item())
    assert 0 < damage[0] and damage == sorted(damage)
    assert damage[4] > 1.5 * damage[0]


@every_corruption
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 32, 32), (1, 3, 40, 56), (1, 3, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_corruption_keeps_shape_type_and_range_and_does_not_change_its_input(name, shape, dtype):
    imgs = torch.rand(shape, generator=seeded()).to(dtype)
    before = imgs.clone()
    for severity in (1, 5):
        out = corrupt(imgs, name, severity)
        assert (out.shape, out.dtype) == (imgs.shape, dtype)
        assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(imgs, before)


@every_corruption
def test_the_same_seed_gives_the_same_corruption_and_only_noise_depends_on_it(name):
    imgs, state = shapes(4), torch.get_rng_state()
    a, b, c = (corrupt(imgs, name, 3, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert torch.equal(a, c) == ("noise" not in name)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if "noise" not in name])
def test_images_of_a_batch_do_not_mix(name):
    imgs = shapes(3)
    torch.testing.assert_close(corrupt(imgs, name, 4)[1:2], corrupt(imgs[1:2], name, 4))


@every_corruption
def test_a_flat_gray_image_shows_the_noise_and_nothing_else(name):
    level = 128 / 255
    out = corrupt(torch.full((64, 1, 32, 32), level), name, 2, seeded())
    stds = {"gaussian_noise": 0.06, "shot_noise": (level / 250) ** 0.5}  # Poisson: the variance of n / c is x / c
    assert out.mean().item() == pytest.approx(level, abs=1e-3)
    assert out.std().item() == pytest.approx(stds.get(name, 0), rel=0.02, abs=1e-5)


def test_contrast_pulls_each_channel_to_its_mean_by_the_share_of_the_table():
    imgs = torch.rand(2, 3, 32, 32, generator=seeded())
    mean = imgs.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(imgs, "contrast", 2), mean + 0.5 * (imgs - mean))


def test_pixelate_at_224_pixels_severity_5_leaves_blocks_of_4_with_their_mean():
    imgs = torch.rand(1, 3, 224, 224, generator=seeded())
    blocks = F.avg_pool2d(imgs, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    # rounded to 8 bits three times
    torch.testing.assert_close(corrupt(imgs, "pixelate", 5), blocks, atol=1.6 / 255, rtol=0)


def test_blur_of_a_single_point_is_a_gaussian():
    imgs = torch.zeros(1, 1, 33, 32)
    imgs[..., 16, 16] = 1
    out = corrupt(imgs, "blur", 5)[0, 0]  # sigma 1
    g = torch.exp(-torch.arange(-3, 4.0) ** 2 / 2)
    torch.testing.assert_close(out[13:20, 13:20], g[:, None] * g / g.sum() ** 2)
    assert out.sum().item() == pytest.approx(1, rel=1e-5)


@every_corruption
@pytest.mark.parametrize("severity", range(1, 6))
def test_strengths_are_the_tables_at_32_and_224_pixels_and_geometric_between_them(name, severity):
    small, large = (values[severity - 1] for values in SEVERITIES[name])
    assert strength(name, severity, 32) == strength(name, severity, 16) == pytest.approx(small)
    assert strength(name, severity, 224) == strength(name, severity, 512) == pytest.approx(large)
    middle = math.sqrt(32 * 224)
    assert strength(name, severity, middle) == pytest.approx(math.sqrt(small * large))


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


def test_the_mean_accuracy_is_over_corruptions_and_severities():
    assert mean_accuracy({"a": [1, 1, 1, 1, 0], "b": [0, 0, 0, 0, 0]}) == pytest.approx(0.4)


def test_accuracy_is_repeatable_and_can_be_limited_to_named_corruptions():
    model, (imgs, labels), state = net(), batch(32), torch.get_rng_state()
    names = ("shot_noise", "blur")
    first, again = (corruption_accuracy(model, imgs, labels, MEAN, STD, names=names) for _ in range(2))
    assert first == again and tuple(first) == names
    assert torch.equal(torch.get_rng_state(), state)
    one = corruption_accuracy(model, imgs, labels, MEAN, STD, names="blur")
    assert one == {"blur": first["blur"]}


# ---------------------------------------------------------------------------- bad input


def corrupted(imgs, name="blur", severity=1):
    return lambda: corrupt(imgs, name, severity)


def attacked(**options):
    """An attack on a batch of normalized images."""
    options = {**SCALE, "eps": 0.1, **options}
    return lambda: pgd(net(), *batch(2), **options)


def attacked_as(dtype):
    return lambda: pgd(net(), (255 * torch.rand(2, 3, 8, 8)).to(dtype), torch.tensor([0, 1]), 0.1)


def judged(labels, training=False):
    return lambda: corruption_accuracy(net().train(training), batch(2)[0], labels, MEAN, STD)


IMGS, LABELS = torch.rand(1, 3, 8, 8), torch.tensor([0, 1])
BAD = {
    "unknown corruption": (corrupted(IMGS, "fog"), "'fog'.*gaussian_noise"),
    "severity 6": (corrupted(IMGS, severity=6), "severity 6"),
    "severity 0": (corrupted(IMGS, severity=0), "severity 0"),
    "bytes as floats": (corrupted(IMGS * 255), r"\[0, 1\].*255"),
    "bytes": (corrupted((IMGS * 255).to(torch.uint8)), r"\[0, 1\].*255"),
    "negative pixels": (corrupted(IMGS - 0.5), r"\[0, 1\]"),
    "nan": (corrupted(torch.full((1, 3, 8, 8), torch.nan)), "nan"),
    "four channels": (corrupted(torch.rand(1, 4, 8, 8), "jpeg"), "channels.*4"),
    "forgotten mean and std": (attacked(mean=0.0, std=1.0), "mean and std"),
    "too few means": (attacked(mean=(0.5, 0.5)), "mean.*3"),
    "eps in bytes": (attacked(eps=8), "eps 8.*8/255"),
    "negative eps": (attacked(eps=-0.1), "eps -0.1"),
    "negative alpha": (attacked(alpha=-1), "alpha -1"),
    "attacked bytes": (attacked_as(torch.uint8), "float32.*uint8"),
    "attacked half precision": (attacked_as(torch.bfloat16), "float32.*bfloat16"),
    "training mode": (judged(LABELS, training=True), r"model.eval\(\)"),
    "labels as a column": (judged(LABELS[:, None]), "labels"),
    "too few labels": (judged(LABELS[:1]), "labels"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_that_names_it(what):
    call, words = BAD[what]
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_inference_mode_is_refused_with_the_way_out():
    with torch.inference_mode(), pytest.raises(ValueError, match="no_grad"):
        attacked()()
