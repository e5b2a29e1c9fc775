"""Augmentations: sizes and colors by hand, and RandAugment beside timm's, pixel by pixel."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from augment import OPERATIONS, FitSize, RandAugment, augmentation
from data import seeded
from shapes import Shapes

FILL = (124, 116, 104)
TIMM = dict(Posterize="PosterizeIncreasing", Solarize="SolarizeIncreasing", Color="ColorIncreasing",
            Contrast="ContrastIncreasing", Brightness="BrightnessIncreasing", Sharpness="SharpnessIncreasing",
            TranslateX="TranslateXRel", TranslateY="TranslateYRel")


def picture(height=48, width=56):
    """A smooth image of all colors, (3, H, W)."""
    noise = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic")
    return (255 * smooth[0].clamp(0, 1)).byte()


# ---------------------------------------------------------------------------- augmentations by name


def test_no_augmentation_normalizes_by_hand():
    image = torch.full((3, 32, 32), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
    out = augmentation("none", (32, 32), (0.1, 0.2, 0.3), (0.5, 0.5, 0.1))(image)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([0.2, 0.0, -1.0]))


def test_pad_crop_moves_an_image_by_at_most_an_eighth():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 16, 16] = 255
    places = set()
    for i in range(60):
        with seeded(0, 0, i):
            out = augmentation("padcrop", (32, 32), (0, 0, 0), (1, 1, 1))(image)
        y, x = out[0].nonzero()[0].tolist()
        places.add((y, min(abs(x - 16), abs(x - 15))))  # 15: flipped
    assert {abs(y - 16) for y, _ in places} == set(range(5)) and max(x for _, x in places) == 4


def test_an_unknown_augmentation_names_the_known_ones():
    with pytest.raises(ValueError, match="none, padcrop, crop"):
        augmentation("magic", (32, 32), (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("size, shorter", [(32, 37), (160, 183), (224, 256), (225, 225), (384, 384), (512, 512)])
def test_evaluation_resizes_to_8_7_of_the_crop_up_to_224_px_and_to_the_crop_above(size, shorter, monkeypatch):
    sizes = []
    resize = F.resize
    monkeypatch.setattr(F, "resize", lambda image, size, *args, **options: sizes.append(size) or resize(image, size))
    out = FitSize((size, size))(torch.zeros(3, 400, 600, dtype=torch.uint8))
    assert out.shape == (3, size, size)
    assert sizes == [[shorter, round(600 / 400 * size * (8 / 7 if size <= 224 else 1))]]


@pytest.mark.parametrize("ratio, shorter", [(1.0, 32), (0.5, 64), (0.8, 40)])
def test_a_crop_ratio_says_which_share_of_the_shorter_side_is_seen(ratio, shorter):
    ramp = torch.arange(shorter).expand(3, shorter, shorter).to(torch.uint8)  # value = column; needs no resizing
    out = augmentation("none", (32, 32), (0, 0, 0), (1, 1, 1), crop_ratio=ratio)(ramp) * 255
    first = (shorter - 32) // 2
    torch.testing.assert_close(out[0, 0], torch.arange(first, first + 32.0))


def test_an_image_of_the_right_size_is_cropped_where_a_crop_ratio_is_given_only():
    image = picture(32, 32)
    assert torch.equal(FitSize((32, 32))(image), image)
    larger = F.resize(image, [64, 64], F.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(FitSize((32, 32), crop_ratio=0.5)(image), larger[:, 16:48, 16:48])


def test_an_image_of_another_size_is_cropped_in_the_center():
    gradient = torch.arange(256).expand(3, 256, 256).to(torch.uint8)  # value = column
    assert torch.equal(FitSize((224, 224))(gradient), gradient[:, 16:240, 16:240])
    assert FitSize((32, 48))(torch.zeros(3, 100, 60, dtype=torch.uint8)).shape == (3, 32, 48)


def test_of_a_long_strip_only_the_middle_is_resized(monkeypatch):
    widths = []
    resize = F.resize

    def watch(image, size, *args, **options):
        widths.append(image.shape[-1])
        return resize(image, size, *args, **options)

    monkeypatch.setattr(F, "resize", watch)
    strip = picture(4, 5000)
    out = FitSize((32, 32))(strip)
    assert widths == [56]  # 16 crops of 32 px, at a scale of 8 / 7 * 32 / 4
    whole = resize(strip[:, :, 2400:2600], [37, 1829], F.InterpolationMode.BICUBIC, antialias=True)
    difference = out.float() - F.center_crop(whole, [32, 32]).float()
    assert difference.abs().max() <= 3  # of 255: the sizes are rounded


def test_the_inception_crop_aliases_as_that_of_the_jax_code_and_the_mae_crop_does_not():
    stripes = (torch.arange(256) % 2 * 255).byte().expand(3, 256, 256)  # too fine for 32 px: gray, if averaged
    spread = {}
    for name in ("mae", "inception"):
        with seeded(0, 0, 0):
            spread[name] = augmentation(name, (32, 32), (0, 0, 0), (1, 1, 1))(stripes).std().item()
    assert spread["mae"] < 0.1 < 0.2 < spread["inception"]


# ---------------------------------------------------------------------------- SimCLR's colors


@pytest.fixture(scope="module")
def simclr_draws():
    """A picture of pure red after the augmentation, 600 times."""
    image = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)
    transform = augmentation("simclr", (8, 8), (0, 0, 0), (1, 1, 1))
    draws = []
    for i in range(600):
        with seeded(1, 0, i):
            draws.append(transform(image)[:, 4, 4])
    return torch.stack(draws)


def test_a_fifth_of_simclrs_views_is_gray(simclr_draws):
    gray = (simclr_draws.amax(1) - simclr_draws.amin(1)) < 1 / 255
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.05)  # three standard deviations


def test_a_fifth_of_simclrs_other_views_keeps_its_colors(simclr_draws):
    same = (simclr_draws == torch.tensor([1.0, 0, 0])).all(dim=1)
    assert same.float().mean().item() == pytest.approx(0.8 * 0.2, abs=0.05)


@pytest.mark.parametrize("size, blurred", [(32, 0.0), (40, 0.5)])
def test_simclr_blurs_half_of_the_views_above_32_px_and_none_below(size, blurred):
    checks = (torch.arange(size)[:, None] + torch.arange(size)) % 2 * 255
    image = checks.byte().expand(3, size, size)
    transform = augmentation("simclr", (size, size), (0, 0, 0), (1, 1, 1))
    blur = [step for step in transform.draw.transforms if "GaussianBlur" in repr(step)]
    assert len(blur) == (blurred > 0)
    if blur:
        with seeded(0, 0, 0):
            changed = [not torch.equal(blur[0](image), image) for _ in range(400)]
        # sigma of 0.1 to 0.25 or so rounds to no blur at all
        assert blurred - 0.1 < np.mean(changed) < blurred + 0.06


# ---------------------------------------------------------------------------- RandAugment


@pytest.fixture(scope="module")
def timm_augment():
    return pytest.importorskip("timm.data.auto_augment")


def timm_operation(module, name, probability=1.0):
    options = dict(img_mean=FILL, interpolation=Image.BICUBIC, magnitude_std=0.5)
    return module.AugmentOp(TIMM.get(name, name), probability, 9, options)


def timm_values(module, operation, level, sign, monkeypatch):
    """The arguments that timm computes for a level. sign: which way its coin falls"""
    monkeypatch.setattr(module.random, "random", lambda: 0.0 if sign == 1 else 1.0)
    return operation.level_fn(level, operation.hparams) if operation.level_fn else ()


def test_the_table_has_timms_increasing_operations(timm_augment):
    assert {TIMM.get(name, name) for name in OPERATIONS} == set(timm_augment._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_timms_value_at_every_level_from_0_to_10(name, timm_augment, monkeypatch):
    operation = timm_operation(timm_augment, name)
    for level in (0, 0.3, 1, 2, 2.5, 3, 4, 5, 6, 7, 7.49, 8, 9, 9.99, 10):
        for sign in (1, -1):
            expected = timm_values(timm_augment, operation, level, sign, monkeypatch)
            value = OPERATIONS[name].value(level, sign)
            assert not expected or value == pytest.approx(expected[0], abs=1e-9), (level, sign)
            assert not expected or isinstance(value, int) == isinstance(expected[0], int)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [0, 4.2, 9, 9.7])
def test_an_operation_gives_timms_pixels(name, level, timm_augment, monkeypatch):
    image = F.to_pil_image(picture())
    operation = timm_operation(timm_augment, name)
    for sign in (1, -1):
        values = timm_values(timm_augment, operation, level, sign, monkeypatch)
        expected = operation.aug_fn(image, *values, **operation.kwargs)
        ours = OPERATIONS[name].apply(image, OPERATIONS[name].value(level, sign), list(FILL))
        assert torch.equal(F.pil_to_tensor(ours), F.pil_to_tensor(expected)), sign


def test_ranges_by_hand():
    at_nine = {name: operation.value(9) for name, operation in OPERATIONS.items()}
    assert at_nine["Rotate"] == 27 and at_nine["Posterize"] == 1 and at_nine["Solarize"] == 26
    assert at_nine["SolarizeAdd"] == 99 and at_nine["Color"] == pytest.approx(1.81)
    assert at_nine["ShearX"] == pytest.approx(0.27) and at_nine["TranslateY"] == pytest.approx(0.405)
    assert OPERATIONS["Color"].value(9, -1) == pytest.approx(0.19)


def test_level_10_leaves_no_bits():
    image = F.to_pil_image(picture())
    assert F.pil_to_tensor(OPERATIONS["Posterize"].apply(image, OPERATIONS["Posterize"].value(10), [])).sum() == 0


@pytest.fixture(scope="module")
def recorded():
    """(name, value) of every operation that acted on 3,000 images, and how many acted on each."""
    seen, acted = [], []
    spies = {}
    for name, operation in OPERATIONS.items():
        def record(image, value, fill, name=name):
            seen.append((name, value))
            return image

        spies[name] = operation._replace(apply=record)
    image = picture(4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("augment.OPERATIONS", spies)
        augment = RandAugment((0.5, 0.5, 0.5))
        for i in range(3000):
            before = len(seen)
            with seeded(0, 0, i):
                augment(image)
            acted.append(len(seen) - before)
    return seen, acted


def test_each_of_two_operations_acts_half_of_the_time_and_all_are_equally_likely(recorded):
    seen, acted = recorded
    shares = torch.tensor(acted).bincount(minlength=3) / 3000
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.5, 0.25]), atol=0.03, rtol=0)
    for name in OPERATIONS:
        assert sum(n == name for n, _ in seen) / len(seen) == pytest.approx(1 / 15, abs=0.015)


def test_the_level_is_jittered_by_half_around_9_and_stays_within_10(recorded):
    seen, _ = recorded
    angles = torch.tensor([value for name, value in seen if name == "Rotate"])
    levels = angles.abs() / 3
    assert levels.max() <= 10 and levels.mean().item() == pytest.approx(9, abs=0.12)
    assert levels.std().item() == pytest.approx(0.5, abs=0.08)
    assert (angles > 0).float().mean().item() == pytest.approx(0.5, abs=0.12)


def test_as_many_images_stay_untouched_as_with_timm(timm_augment):
    source = Shapes(20, img_size=48, scenes="crowded")
    images = [source[i][0] for i in range(20)]
    theirs = timm_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", dict(img_mean=FILL, interpolation=3))
    ours = RandAugment([value / 255 for value in FILL])
    np.random.seed(0), random.seed(0), torch.manual_seed(0)
    untouched = [0, 0]
    for i in range(1000):
        image = images[i % 20]
        untouched[0] += torch.equal(ours(image), image)
        try:
            untouched[1] += torch.equal(F.pil_to_tensor(theirs(F.to_pil_image(image))), image)
        except ValueError:  # newer PIL refuses to keep no bits: black with us
            pass
    ours, theirs = (count / 1000 for count in untouched)
    assert ours == pytest.approx(theirs, abs=0.05) and 0.23 < ours < 0.33


def test_what_moves_in_has_the_mean_color():
    augment = RandAugment((0.485, 0.456, 0.406))
    assert augment.fill == [124, 116, 104]
    moved = OPERATIONS["TranslateX"].apply(F.to_pil_image(picture()), 0.4, augment.fill)
    assert F.pil_to_tensor(moved)[:, :, -20:].flatten(1).unique(dim=1).tolist() == [[124], [116], [104]]


def test_the_random_numbers_are_torchs_alone():
    image = picture()
    augment = RandAugment((0.5, 0.5, 0.5))
    draws = []
    for other in (0, 1):
        random.seed(other), np.random.seed(other)
        torch.manual_seed(5)
        draws.append([augment(image) for _ in range(10)])
    assert all(torch.equal(a, b) for a, b in zip(*draws))
    assert len({tuple(out.flatten().tolist()) for out in draws[0]}) > 3


def test_strong_is_randaugment_then_erasing():
    first, finish, last = augmentation("strong", (32, 32), (0, 0, 0), (1, 1, 1)).draw.transforms[-3:]
    assert [type(step).__name__ for step in (first, finish.transforms[-1], last)] == [
        "RandAugment", "Normalize", "RandomErasing"]
