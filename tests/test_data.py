import os
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import data as module
import train
from augment import FitSize
from data import (
    AUGMENTATIONS,
    EvalBatches,
    Folder,
    Images,
    TrainBatches,
    augmentation,
    channel_statistics,
    first_of_shuffle,
    make_loader,
    open_source,
    seeded,
)
from shapes import Shapes
from tasks import classify, evaluation_transform, load_run, probe
from training import sources
from training.world import World

CPU = torch.device("cpu")


def write_folder(
    root, parts=("train", "val"), sizes=((32, 32),), kinds=("cat", "dog"), each=4, mode="RGB", suffix="png"
):
    """Random images in root/part/kind/n.suffix; sizes (H, W) take turns."""
    rng = np.random.default_rng(0)
    for part in parts:
        for kind in kinds:
            (root / part / kind).mkdir(parents=True)
            for n in range(each):
                height, width = sizes[n % len(sizes)]
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / part / kind / f"{n}.{suffix}")
    return root


def collect(dataset, batches, workers):
    return [(images, labels, noise) for images, labels, noise in make_loader(dataset, batches, workers, CPU)]


# ---------------------------------------------------------------------------- randomness


def test_seeded_draws_depend_on_the_three_numbers_alone():
    def draw(*key):
        with seeded(*key):
            return torch.rand(8), torch.randperm(8)

    torch.manual_seed(3)
    first = draw(1, 2, 3)
    torch.manual_seed(4)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(1, 2, 3)))
    others = [draw(*key)[0] for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, -1), (3, 2, 1), (2, 1, 3))]
    assert all(not torch.equal(first[0], other) for other in others)


def test_neighboring_keys_do_not_share_random_streams():
    keys = [(s, e, i) for s in range(4) for e in range(6) for i in range(-1, 60)]
    draws = []
    for key in keys:
        with seeded(*key):
            draws.append(torch.rand(()).item())
    assert len(set(draws)) > 0.999 * len(keys)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.1


def test_seeded_leaves_the_global_generator_where_it_was_even_after_an_error():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with seeded(0, 0, 0):
        torch.rand(3)
    with pytest.raises(KeyError), seeded(0, 0, 0):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_every_global_generator_alone(workers):
    source = Shapes(8)
    dataset = Images(source, augmentation("strong", (32, 32), source.mean, source.std), noise_size=4)
    batches, loader_batches = TrainBatches(8, 4, seed=0), EvalBatches(8, 4)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    list(batches), collect(dataset, batches, workers), collect(dataset, loader_batches, workers)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()


def test_two_workers_load_what_the_main_process_loads():
    source = Shapes(16)
    dataset = Images(source, augmentation("strong", (32, 32), source.mean, source.std), seed=3, noise_size=5)
    batches = TrainBatches(16, 4, seed=3)
    batches.epoch = 2
    for here, there in zip(collect(dataset, batches, 0), collect(dataset, batches, 2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(32, 32), (48, 32), (33, 65), (16, 16)])
def test_every_augmentation_gives_the_same_normalized_image_for_the_same_key(name, size):
    source = Shapes(4, img_size=40)
    dataset = Images(source, augmentation(name, size, source.mean, source.std), seed=1, noise_size=3)
    torch.manual_seed(0)
    image, label, noise = dataset[0, 2]
    assert image.shape == (3, *size) and image.dtype == torch.float32 and image.isfinite().all()
    assert label == source[2][1] and noise.shape == (3,)
    torch.manual_seed(1)
    again, _, same_noise = dataset[0, 2]
    assert torch.equal(image, again) and torch.equal(noise, same_noise)
    later = dataset[1, 2]
    assert not torch.equal(noise, later[2])
    assert torch.equal(image, later[0]) == (name == "none")


def test_the_mask_noise_does_not_depend_on_the_augmentation():
    source = Shapes(4)
    noises = [
        Images(source, augmentation(name, (32, 32), source.mean, source.std), noise_size=6)[1, 3][2]
        for name in AUGMENTATIONS
    ]
    assert all(torch.equal(noises[0], noise) for noise in noises)


# ---------------------------------------------------------------------------- order


def test_an_epoch_takes_every_index_once_and_the_next_in_another_order():
    batches = TrainBatches(24, 4, seed=0)
    orders = []
    for epoch in range(3):
        batches.epoch = epoch
        keys = [key for batch in batches for key in batch]
        assert len(list(batches)) == len(batches) == 6
        assert all(e == epoch for e, _ in keys)
        orders.append([index for _, index in keys])
        assert sorted(orders[-1]) == list(range(24))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] == [index for batch in TrainBatches(24, 4, seed=0) for _, index in batch]
    assert orders[0] != [index for batch in TrainBatches(24, 4, seed=1) for _, index in batch]


def test_the_incomplete_last_batch_is_dropped():
    assert [len(batch) for batch in TrainBatches(23, 4, seed=0)] == [4] * 5


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_share_each_global_batch_of_one_process(world):
    whole = list(TrainBatches(26, 4 * world, seed=5))
    shares = [list(TrainBatches(26, 4, seed=5, rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert [key for share in shares for key in share[step]] == batch
    assert {len(share) for share in shares} == {len(whole)}


def test_start_skips_batches_without_moving_the_others():
    batches = TrainBatches(20, 4, seed=0)
    whole = list(batches)
    batches.start = 3
    assert list(batches) == whole[3:]
    batches.start = 5
    assert list(batches) == []


def test_a_batch_larger_than_the_set_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="at most 10"):
        TrainBatches(21, 11, seed=0, world=2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_covers_21_samples_exactly_once(world):
    ranks = [EvalBatches(21, 4, rank, world) for rank in range(world)]
    keys = [key for batches in ranks for batch in batches for key in batch]
    assert sorted(keys) == [(0, i) for i in range(21)]
    assert all(len(list(batches)) == len(batches) for batches in ranks)


def test_a_rest_that_is_too_small_joins_the_batch_before_it():
    sizes = {n: [len(batch) for batch in EvalBatches(n, 5, smallest=2)] for n in (1, 4, 5, 6, 7, 11, 12)}
    assert sizes == {1: [1], 4: [4], 5: [5], 6: [6], 7: [5, 2], 11: [5, 6], 12: [5, 5, 2]}
    assert all(len(EvalBatches(n, 5, smallest=2)) == len(batches) for n, batches in sizes.items())


def test_a_rank_may_have_nothing_to_evaluate():
    assert list(EvalBatches(1, 4, rank=1, world=2)) == []


# ---------------------------------------------------------------------------- folders


@pytest.mark.parametrize("second", ["val", "test"])
def test_a_folder_may_call_its_second_half_val_or_test(tmp_path, second):
    write_folder(tmp_path, ("train", second))
    assert len(open_source("folder", str(tmp_path), True, (32, 32))) == 8
    half = open_source("folder", str(tmp_path), False, (32, 32))
    assert [half[i][1] for i in range(8)] == [0] * 4 + [1] * 4 and half.classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("L", "png"),
        ("P", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("L", "jpg"),
        ("RGB", "jpg"),
        ("RGB", "JPEG"),
        ("RGB", "webp"),
        ("RGB", "bmp"),
        ("CMYK", "jpg"),
        ("1", "png"),
    ],
)
def test_files_of_any_kind_become_three_channels_of_bytes(tmp_path, mode, suffix):
    source = Folder(str(write_folder(tmp_path, mode=mode, suffix=suffix)), train=True)
    image, _ = source[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    if mode in ("L", "LA", "1"):
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    wanted = np.asarray(Image.open(source.samples[0][0]).convert("RGB"), dtype=np.int32)
    assert np.abs(image.permute(1, 2, 0).numpy().astype(np.int32) - wanted).mean() < 3  # decoders round differently


def test_a_png_of_16_bits_keeps_its_brightness(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.fromarray(np.full((32, 32), 0x8000, dtype=np.uint16)).save(tmp_path / part / "cat" / "0.png")
    source = Folder(str(tmp_path), train=True)
    for _ in range(2):  # read from the file, then from the cache
        out = augmentation("none", (32, 32), (0, 0, 0), (1, 1, 1))(source[0][0])
        torch.testing.assert_close(out, torch.full((3, 32, 32), 0.5), atol=0.01, rtol=0)
        source.cache([0], progress=False)


def test_cached_images_equal_the_files(tmp_path):
    plain, cached = (Folder(str(write_folder(tmp_path / name)), train=True) for name in "ab")
    assert cached.cache([5, 1, 2], progress=False)
    for path, _ in cached.samples:  # what is cached is not read again
        open(path, "wb").close()
    for i in (5, 1, 2):
        assert torch.equal(plain[i][0], cached[i][0]) and plain[i][1] == cached[i][1]
    with pytest.raises(ValueError, match="cannot read image"):
        cached[0]


def test_images_of_mixed_sizes_are_not_cached_and_still_load(tmp_path):
    source = Folder(str(write_folder(tmp_path, sizes=((32, 32), (40, 60)))), train=True)
    assert not source.cache(list(range(8)), progress=False)
    assert source[0][0].shape == (3, 32, 32) and source[1][0].shape == (3, 40, 60)
    dataset = Images(source, augmentation("mae", (32, 32), source.mean, source.std))
    assert collect(dataset, EvalBatches(8, 8), 0)[0][0].shape == (8, 3, 32, 32)


def test_images_too_many_for_the_memory_are_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", 8 * 32 * 32 * 3 - 1)
    source = Folder(str(write_folder(tmp_path)), train=True)
    assert not source.cache(list(range(8)), progress=False) and source.cache(list(range(7)), progress=False)


def break_one(root):
    path = root / "train" / "cat" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-200])  # a download that stopped early: the header is whole
    return path


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.slow)]
)  # torch clears failed workers away in 10 s
def test_a_truncated_jpeg_stops_with_its_path_or_is_replaced_and_counted(tmp_path, workers):
    path = break_one(write_folder(tmp_path, suffix="jpg", sizes=((64, 64),)))
    source = Folder(str(tmp_path), train=True)
    with pytest.raises(ValueError, match=f"cannot read image {path}"):
        collect(Images(source, augmentation("none", (64, 64), source.mean, source.std)), EvalBatches(8, 4), workers)
    source = Folder(str(tmp_path), train=True, skip_bad=True)
    images, labels, _ = collect(
        Images(source, augmentation("none", (64, 64), source.mean, source.std)), EvalBatches(8, 8), workers
    )[0]
    assert source.bad.nonzero().flatten().tolist() == [2]  # counted here, wherever it was read
    assert torch.equal(images[2], images[3]) and labels.tolist() == [0] * 4 + [1] * 4


def test_skipping_bad_images_works_in_the_cache_too(tmp_path):
    break_one(write_folder(tmp_path, suffix="jpg", sizes=((64, 64),)))
    source = Folder(str(tmp_path), train=True, skip_bad=True)
    assert source.cache(list(range(8)), progress=False)
    assert int(source.bad.sum()) == 1 and torch.equal(source[2][0], source[3][0])


def test_a_set_of_nothing_but_broken_images_is_an_error_not_a_loop(tmp_path):
    write_folder(tmp_path, each=1, kinds=("cat",))
    (tmp_path / "train/cat/0.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match="none of the 1 images"):
        Folder(str(tmp_path), train=True, skip_bad=True)[0]


def test_odd_names_stay_in_one_printable_line_and_are_skipped(tmp_path):
    root = write_folder(tmp_path, each=1)
    names = [b"line\nbreak.png", b"not-utf8-\xff.png"]
    for name in names:
        (root / "train" / "cat" / os.fsdecode(name)).write_bytes(b"junk")
    source = Folder(str(root), train=True)
    for i, words in ((1, r"line\\nbreak.png"), (2, r"not-utf8-\\udcff.png")):
        with pytest.raises(ValueError, match=words) as error:
            source[i]
        assert "\n" not in str(error.value) and str(error.value).encode()
    skipping = Folder(str(root), train=True, skip_bad=True)
    assert torch.equal(skipping[1][0], source[3][0]) and skipping.bad.sum() == 2


@pytest.mark.parametrize("height, width", [(1, 1_000_000), (1_000_000, 1)])
def test_of_a_long_strip_only_the_middle_is_resized(height, width, monkeypatch):
    resized = []
    resize = v2.functional.resize

    def watch(image, *arguments, **options):
        resized.append(image)
        return resize(image, *arguments, **options)

    monkeypatch.setattr(v2.functional, "resize", watch)
    strip = torch.zeros(3, 1_000_000, dtype=torch.uint8)
    strip[:, 499_900:500_100] = 9
    image = strip.view(3, height, width)
    out = FitSize((224, 224))(image)
    assert out.shape == (3, 224, 224) and (out == 9).all() and resized[0].numel() < 100


@pytest.mark.parametrize("height, width", [(300, 200), (40, 300), (500, 40)])
def test_ordinary_images_are_resized_whole(height, width):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = 8 / 7 * max(32 / height, 32 / width)
    size = [round(height * scale), round(width * scale)]
    whole = v2.functional.resize(image, size, v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(FitSize((32, 32))(image), v2.functional.center_crop(whole, [32, 32]))


# ---------------------------------------------------------------------------- folders without labels, or without val/


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path):
    root = write_folder(tmp_path, kinds=(".ipynb_checkpoints", "cat", "dog"), each=1)
    (root / "train" / "cat" / "._0.png").write_bytes(b"litter of a Mac")
    source = Folder(str(root), train=True)
    assert source.classes == ["cat", "dog"] and [label for _, label in source.samples] == [0, 1]


def photos(root):
    """Photos of mixed sizes and formats, some in folders."""
    (root / "2019" / "summer").mkdir(parents=True)
    (root / ".thumbnails").mkdir()
    rng = np.random.default_rng(0)
    names = ["a.jpg", "b.PNG", "2019/c.webp", "2019/summer/d.bmp", "2019/summer/e.tif", ".thumbnails/f.png"]
    for n, name in enumerate(names):
        pixels = rng.integers(0, 256, (40 + n, 50 - n, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


def test_any_folder_of_images_serves_where_no_labels_are_needed(tmp_path):
    source = open_source("folder", str(photos(tmp_path)), True, (32, 32), labeled=False)
    names = [os.path.relpath(file, tmp_path) for file, _ in source.samples]
    assert names == ["a.jpg", "b.PNG", "2019/c.webp", "2019/summer/d.bmp", "2019/summer/e.tif"]
    assert {label for _, label in source.samples} == {0} and source[4][0].shape == (3, 44, 46)
    with pytest.raises(ValueError, match="has no folder train/"):
        Folder(str(tmp_path), train=True)
    with pytest.raises(ValueError, match="no image"):
        (tmp_path / "empty").mkdir()
        Folder(str(tmp_path / "empty"), train=True, labeled=False)


def test_photos_in_train_without_class_folders_are_refused_where_labels_are_needed(tmp_path):
    photos(tmp_path / "train" / "photos")
    os.rename(tmp_path / "train" / "photos", tmp_path / "flat")
    os.rmdir(tmp_path / "train")
    os.rename(tmp_path / "flat", tmp_path / "train")
    shutil.rmtree(tmp_path / "train" / "2019")
    with pytest.raises(ValueError, match="--task pretrain"):
        Folder(str(tmp_path), train=True)
    assert len(Folder(str(tmp_path), train=True, labeled=False)) == 2


def test_photos_of_mixed_sizes_pretrain_as_they_are_with_a_validation_set_cut_off(tmp_path, capsys):
    flags = "--task pretrain --data folder --segments 2 --embed-dim 32 --depth 2 --num-heads 2 --patch-size 8"
    flags += f" --img-size 32 --epochs 1 --batch-size 2 --val-share 0.2 --data-path {photos(tmp_path / 'photos')}"
    train.main([*flags.split(), "--output-dir", str(tmp_path / "run")])
    assert re.search(r"val_loss \d", capsys.readouterr().out)


def test_photos_without_data_folder_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(f"--task pretrain --data-path {tmp_path} --output-dir {tmp_path / 'run'}".split())
    assert error.value.code == 2 and "--data-path belongs to --data" in capsys.readouterr().err


def share_flags(**flags):
    plain = dict(data="folder", img_size=[32, 32], data_size=None, data_seed=None, scenes=None, skip_bad=None)
    plain |= dict(download=None, stats=False, train_images=None, val_images=None, task="classify", seed=0)
    plain |= dict(mean_std=None, eval_only=False)
    return SimpleNamespace(**(plain | flags))


def test_a_share_of_train_serves_for_validation_the_same_for_the_same_seed(tmp_path):
    world = SimpleNamespace(main=True, say=print)
    flags = dict(data_path=str(write_folder(tmp_path, ("train",), each=10)), val_share=0.1)
    cut = {seed: sources.open_images(share_flags(seed=seed, **flags), world) for seed in (0, 1)}
    again = sources.open_images(share_flags(**flags), world)
    assert len(cut[0].val_indices) == 2 and sorted(cut[0].indices + cut[0].val_indices) == list(range(20))
    assert cut[0].val_indices == again.val_indices and cut[0].indices == again.indices
    assert cut[0].val_indices != cut[1].val_indices and cut[0].val is cut[0].train
    assert len(cut[0].train.cached[0]) == 20  # both halves are decoded once
    fewer = sources.open_images(share_flags(train_images=5, val_images=1, **flags), world)
    assert len(fewer.indices) == 5 and set(fewer.indices) < set(again.indices)
    assert len(fewer.val_indices) == 1 and set(fewer.val_indices) < set(again.val_indices)
    with pytest.raises(ValueError, match="--val-share 0.01"):
        sources.open_images(share_flags(**{**flags, "val_share": 0.01}), world)
    with pytest.raises(ValueError, match="--val-share"):
        sources.open_images(share_flags(**{**flags, "val_share": None}), world)


@pytest.mark.parametrize("parts, message", [((), "train"), (("val",), "train")])
def test_a_folder_without_its_parts_is_refused(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        open_source("folder", str(write_folder(tmp_path, parts)), True, (32, 32))


def test_cifar_that_is_not_there_is_not_downloaded(tmp_path):
    for name in ("cifar10", "cifar100"):
        with pytest.raises(ValueError, match="--download"):
            open_source(name, str(tmp_path), True, (32, 32))
    assert not list(tmp_path.iterdir())


def test_cifar_gives_bytes_and_labels(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)

    class Fake:
        def __init__(self, root, train, download):
            self.data, self.targets, self.classes = pixels, [3, 1, 4, 1, 5], [str(i) for i in range(10)]

    monkeypatch.setattr(module.datasets, "CIFAR10", Fake)
    source = open_source("cifar10", str(tmp_path), True, (32, 32))
    image, label = source[2]
    assert (
        label == 4 and image.dtype == torch.uint8 and torch.equal(image, torch.from_numpy(pixels[2]).permute(2, 0, 1))
    )
    assert len(source.mean) == len(source.std) == 3 and len(source) == 5 and len(source.classes) == 10


# ---------------------------------------------------------------------------- subsets and statistics


def test_subsets_are_nested_and_do_not_depend_on_any_seed():
    torch.manual_seed(0)
    small = first_of_shuffle(100, 10)
    torch.manual_seed(1)
    large = first_of_shuffle(100, 30)
    assert large[:10] == small and len(set(large)) == 30 and small != list(range(10))
    for count in (0, -1, 101):
        with pytest.raises(ValueError, match="1..100"):
            first_of_shuffle(100, count)


def test_a_subset_trains_on_its_own_images_alone():
    source = Shapes(20)
    dataset = Images(source, augmentation("none", (32, 32), (0, 0, 0), (1, 1, 1)), indices=first_of_shuffle(20, 4))
    assert len(dataset) == 4
    for row, i in enumerate(first_of_shuffle(20, 4)):
        torch.testing.assert_close(dataset[0, row][0], source[i][0].float() / 255)


def test_channel_statistics_match_the_hand_computed_ones():
    black, white = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 4, 4), 255, dtype=torch.uint8)
    white[2] = 51
    mean, std = channel_statistics([(black, 0), (white, 1)])
    assert mean == pytest.approx((0.5, 0.5, 0.1)) and std == pytest.approx((0.5, 0.5, 0.1))
    mean, _ = channel_statistics([(black[:, :1], 0), (white, 1)])  # 4 black pixels, 16 white: every pixel counts once
    assert mean == pytest.approx((0.8, 0.8, 0.16))


def test_the_statistics_of_a_constant_set_do_not_divide_by_zero():
    mean, std = channel_statistics([(torch.full((3, 4, 4), 77, dtype=torch.uint8), 0)] * 3)
    out = augmentation("none", (4, 4), mean, std)(torch.full((3, 4, 4), 77, dtype=torch.uint8))
    assert out.isfinite().all()


def test_shapes_carries_its_own_statistics():
    source = Shapes(1000)
    mean, std = channel_statistics(source)
    assert mean == pytest.approx(source.mean, abs=0.02) and std == pytest.approx(source.std, abs=0.02)


def test_mean_and_std_are_the_sets_own_or_measured_or_given(tmp_path, monkeypatch):
    used = []
    real = classify.augmentation

    def watch(name, size, mean, std, crop_ratio):
        used.append((mean, std))
        return real(name, size, mean, std, crop_ratio)

    monkeypatch.setattr(classify, "augmentation", watch)
    flags = "--task classify --scenes crowded --embed-dim 32 --depth 2 --num-heads 2 --patch-size 8".split()
    flags += "--data-size 16 --batch-size 8 --epochs 1".split()
    for name, more in (("own", ""), ("measured", "--stats"), ("given", "--mean-std 0.5 0.25")):
        train.main([*flags, *more.split(), "--output-dir", str(tmp_path / name)])
    source = Shapes(16)
    assert used[0] == used[1] == (source.mean, source.std)
    assert used[2] == used[3] == channel_statistics(source)
    assert used[4] == used[5] == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    run = load_run(tmp_path / "given")
    gray = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    torch.testing.assert_close(run.transform(gray), torch.full((3, 32, 32), 2.0))  # (1 - 0.5) / 0.25


@pytest.mark.parametrize("task", ["classify", "probe", "contrast", "pretrain"])
def test_every_task_on_whole_images_evaluates_at_the_crop_ratio_of_the_flag(task, tmp_path):
    write_folder(tmp_path / "data", sizes=((48, 48),))
    flags = f"--task {task} --embed-dim 32 --depth 2 --num-heads 2 --patch-size 8 --img-size 32 --batch-size 4 "
    flags += f"--data folder --data-path {tmp_path / 'data'} --crop-ratio 0.5 --mean-std 0.5 0.5"
    args = train.parse(flags.split())
    data = train.TASKS[task].open_data(args, World("cpu"))
    args.mean, args.std = data.mean, data.std
    image = data.val.source[3][0]
    resized = v2.functional.resize(image, [64, 64], v2.InterpolationMode.BICUBIC, antialias=True)
    for transform in (data.val.transform, evaluation_transform(args)):
        torch.testing.assert_close(transform(image), resized[:, 16:48, 16:48] / 255 / 0.5 - 1)
    del args.crop_ratio  # a run of an earlier version
    assert evaluation_transform(args)(image).shape == (3, 32, 32)


def test_the_default_run_hands_crop_ratio_and_input_scale_on_to_its_probe():
    assert {"crop_ratio", "mean_std"} <= set(probe.SAME_AS_PRETRAINING)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_batch_is_normalized_at_once_to_the_bits_of_its_images_one_by_one(name):
    source, shapes = Shapes(12), []
    transform = augmentation(name, (40, 32), source.mean, source.std)
    finish = transform.finish
    counting = transform._replace(finish=lambda images: shapes.append(images.shape) or finish(images))
    keys = [(3, 4), (3, 0), (4, 4)]
    batch = Images(source, counting, seed=5, noise_size=7).__getitems__(keys)
    assert shapes == [(3, 3, 40, 32)]
    for key, (image, label, noise) in zip(keys, batch, strict=True):
        with seeded(5, *key):
            assert torch.equal(noise, torch.rand(7))
            assert torch.equal(image, transform(source[key[1]][0])) and label == source[key[1]][1]
