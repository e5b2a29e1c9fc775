"""Data: image sets, and randomness without state.

Every random choice about a sample, its crop, its flip, its mask, is a pure function of

    (seed, epoch, index)

so the same run gives the same weights with any number of workers, and a run interrupted
anywhere continues exactly: there is no generator whose state could get lost. To that end
the batch sampler hands out keys (epoch, index) instead of bare indices.

Sets: shapes (generated, shapes.py), cifar10, cifar100, and folder: train/ and val/ (or
test/) with a folder per class, or any images without labels. Augmentations are in augment.py.

Needs: torch, torchvision, tqdm; augment.py, files.py, shapes.py.
Demo: python data.py (a few seconds) saves data_demo.png, one image under each augmentation.
"""

import atexit
import multiprocessing.util  # whose own function at exit must be registered before ours, to run after it
import os
import signal
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from tqdm import tqdm

from augment import AUGMENTATIONS, FitSize, augmentation  # noqa: F401  imported from here elsewhere
from files import read_image, shown
from shapes import Shapes

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CACHE_BYTES = 1 << 30  # a set of equal-sized images below this is decoded once, into one uint8 tensor


# ---------------------------------------------------------------------------- randomness and order


def key_of(seed, epoch, index):
    """One number from three."""
    return ((seed * 1_000_003 + epoch) * 1_000_000_007 + index) % 2**63


@contextmanager
def seeded(seed, epoch, index):
    """Inside, torch's CPU generator is a function of the three numbers; outside, it has not moved."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(key_of(seed, epoch, index))
    try:
        yield
    finally:
        torch.set_rng_state(state)


class TrainBatches:
    """Batch sampler: lists of (epoch, index), this rank's share of each global batch.

    Set `epoch`, and `start` to skip batches when resuming. The last incomplete batch is dropped, as in the
    official codes; the order is shuffled anew each epoch.
    """

    def __init__(self, num_samples, batch_size, seed, rank=0, world=1):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0
        if len(self) == 0:
            raise ValueError(f"batch_size {batch_size} x {world} processes is larger than the {num_samples} training "
                             f"images; use at most {num_samples // world}")

    def __len__(self):
        return self.num_samples // (self.batch_size * self.world)

    def __iter__(self):
        with seeded(self.seed, self.epoch, -1):
            order = torch.randperm(self.num_samples)
        for step in range(self.start, len(self)):
            first = (step * self.world + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size].tolist()]


class EvalBatches:
    """Batch sampler: every sample exactly once over all ranks, no padding; the last batches may be short.

    A rest of fewer than `smallest` samples joins the batch before it.
    """

    def __init__(self, num_samples, batch_size, rank=0, world=1, smallest=1):
        self.indices, self.batch_size, self.smallest = range(rank, num_samples, world), batch_size, smallest

    def __len__(self):
        full, rest = divmod(len(self.indices), self.batch_size)
        return full + (rest >= self.smallest or full == 0 < rest)

    def __iter__(self):
        for batch in range(len(self)):
            stop = None if batch == len(self) - 1 else (batch + 1) * self.batch_size
            yield [(0, index) for index in self.indices[batch * self.batch_size : stop]]


def make_loader(dataset, batches, workers, device, collate=None):
    """A DataLoader whose own random numbers leave the global generator alone.

    collate: how samples become a batch; None: stacked
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=leave_signals,
    )


def as_lists(samples):
    """Collate for samples of different sizes: a tuple of lists instead of stacked tensors."""
    return tuple(map(list, zip(*samples)))


def leave_signals(worker):
    """Ctrl-C and a job's SIGTERM reach every process, but only the main one should act; workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers():
    """At exit Python would end loading processes by SIGTERM, which they ignore, and wait for ever."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers and hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call them lost
    for process in workers:
        process.kill()


# ---------------------------------------------------------------------------- image sets


class Images(Dataset):
    """(epoch, index) -> (image, label, noise), noise (noise_size,) uniform, for the mask.

    source     source[i] -> (uint8 image (3, H, W), label); has classes
    transform  of augmentation
    indices    which of the source's images make up this set, None for all
    views      above 1: image is (views, C, H, W), independent draws of the transform
    """

    def __init__(self, source, transform, seed=0, indices=None, noise_size=0, views=1):
        self.source, self.transform, self.seed = source, transform, seed
        self.noise_size, self.views = noise_size, views
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self):
        return len(self.indices)

    def draw(self, key):
        """A sample that is not normalized yet. Call it inside `seeded`: it sets torch's generator."""
        epoch, index = key
        torch.default_generator.manual_seed(key_of(self.seed, epoch, index))
        noise = torch.rand(self.noise_size)  # drawn first, so the mask does not depend on the augmentation
        image, label = self.source[self.indices[index]]
        if self.views > 1:
            return torch.stack([self.transform.draw(image) for _ in range(self.views)]), label, noise
        return self.transform.draw(image), label, noise

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):
        """The samples of a batch, normalized all at once: one image at a time costs more than its crop."""
        with seeded(self.seed, *keys[0]):
            images, labels, noise = zip(*map(self.draw, keys))
        return list(zip(self.transform.finish(torch.stack(images)), labels, noise))


class Cifar(Dataset):
    """torchvision's CIFAR as one uint8 tensor."""

    def __init__(self, name, root, train, download):
        make, self.mean, self.std = {
            "cifar10": (datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            "cifar100": (datasets.CIFAR100, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
        }[name]
        try:
            data = make(root, train=train, download=download)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{name} was not found in data-path {root!r}; point --data-path at it or add --download "
                             f"({str(error).splitlines()[0]})") from None
        self.images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        self.labels, self.classes = data.targets, data.classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


class Folder(Dataset):
    """root/train and root/val (or root/test), a folder per class. Hidden files and folders do not count.

    labeled False: all images at any depth below root/train (or root, if there is no train/), label 0.
    bare: without val/ and test/, the folders of the classes may be in root itself.
    A broken file is a ValueError with its path, or, with skip_bad, is reported, counted (`bad`) and replaced by
    the next one. Small sets of equal-sized images are decoded once (`cache`), here only the `wanted` indices.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, root, train, skip_bad=False, labeled=True, bare=False):
        names = ["train"] if train else ["val", "test"]
        paths = [os.path.join(root, name) for name in names]
        if bare or (train and not labeled):
            paths.append(root)
        path = next((path for path in paths if os.path.isdir(path)), None)
        if path is None:
            raise ValueError(f"data-path {root!r} has no folder {' or '.join(names)}/; expected "
                             f"{names[0]}/CLASS/image.jpg")

        self.samples, self.classes = list_images(path, labeled)
        self.skip_bad, self.cached = skip_bad, None
        # loading processes count here too
        self.bad = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.samples)

    def read(self, i):
        try:
            return read_image(self.samples[i][0])
        except ValueError as error:
            if not self.skip_bad:
                raise ValueError(f"{error}, or add --skip-bad") from None
            self.bad[i] = True
            return None

    def __getitem__(self, i):
        if self.cached is not None and i in self.cached[0]:
            row = self.cached[0][i]
            return self.cached[1][row], self.cached[2][row]
        for j in range(i, i + len(self)):  # the first readable one from here on
            if (image := self.read(j % len(self))) is not None:
                if j != i:
                    used = shown(self.samples[j % len(self)][0])
                    tqdm.write(f"skipped unreadable image {shown(self.samples[i][0])}, used {used}")
                return image, self.samples[j % len(self)][1]
        raise ValueError(f"none of the {len(self)} images can be read")

    def cache(self, wanted, progress=True):
        """Decode these indices once if they are small and of one size; True if done."""
        first = self[wanted[0]][0]
        if first.numel() * len(wanted) > CACHE_BYTES:
            return False
        images, labels = torch.empty((len(wanted), *first.shape), dtype=torch.uint8), []
        bar = tqdm(wanted, desc="decoding images", leave=False, disable=None if progress else True)
        for row, i in enumerate(bar):
            image, label = self[i]
            if image.shape != first.shape:
                return False
            images[row] = image
            labels.append(label)
        self.cached = {i: row for row, i in enumerate(wanted)}, images, labels
        return True


def list_images(path, labeled):
    """-> [(file, label)] in order, and the classes: the folders in path, or one for all files at any depth."""

    def is_image(file):
        hidden = os.sep + "." in file[len(path):]
        return not hidden and datasets.folder.is_image_file(file)

    classes = [""]
    if labeled:
        classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != ".")
        if not classes:
            raise ValueError(f"data-path {path!r} does not hold a folder of images per class; only --task pretrain "
                             "takes images without labels")
    numbers = {name: label for label, name in enumerate(classes)}
    try:
        return datasets.folder.make_dataset(path, numbers, is_valid_file=is_image), classes
    except FileNotFoundError as error:
        empty = str(error).splitlines()[0] if labeled else "no image file below it"
        raise ValueError(f"data-path {path!r} holds no images: {empty}") from None


class Scenes:
    """The generated scenes of shapes.py, one by one, for boxes (coco.py) and labels per pixel (semantic.py)."""

    def __init__(self, size, img_size, seed=0, train=True, scenes="crowded"):
        self.shapes = Shapes(size, img_size, seed, train, scenes)
        self.mean, self.std = self.shapes.mean, self.shapes.std

    def __len__(self):
        return len(self.shapes)

    def name(self, i):
        return f"scene {i}"


def open_source(
    name, path, train, img_size, size=4096, seed=0, download=False, skip_bad=False, scenes="crowded", labeled=True,
    bare=False,
):
    """The image set `name` ("shapes", "cifar10", "cifar100", "folder").

    It has len, [i] -> (uint8 image, label), classes, mean, std.

    size and scenes are for shapes: training scenes, a quarter of them for validation; simple or crowded.
    labeled and bare are for folders: any images without labels; classes in the folder itself, see Folder.
    """
    if name == "shapes":
        return Shapes(size if train else max(1, size // 4), img_size, seed, train, scenes)
    if path is None:
        raise ValueError(f"data {name!r} needs --data-path")
    if name in ("cifar10", "cifar100"):
        return Cifar(name, path, train, download)
    if name == "folder":
        return Folder(path, train, skip_bad, labeled, bare)
    raise ValueError(f"data {name!r} is unknown; choose shapes, cifar10, cifar100 or folder")


def first_of_shuffle(num_samples, count, flag="train-images"):
    """The first `count` of one fixed shuffle, whatever the run's seed: nested subsets to compare on."""
    if not 1 <= count <= num_samples:
        raise ValueError(f"{flag} {count} must lie in 1..{num_samples}, the images there are; after a recipe give "
                         f"--{flag} {num_samples} to use all")
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(0))[:count].tolist()


def channel_statistics(source, count=2000):
    """Per-channel mean and std in [0, 1] over up to `count` images."""
    sum_, square = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    pixels = 0
    for i in first_of_shuffle(len(source), min(count, len(source))):
        image = source[i][0].flatten(1).double() / 255
        pixels += image.shape[1]
        sum_ += image.sum(1)
        square += image.square().sum(1)
    mean = sum_ / pixels
    std = (square / pixels - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)  # a constant channel has none
    return tuple(mean.tolist()), tuple(std.tolist())


if __name__ == "__main__":
    from shapes import save_grid

    source = Shapes(8, img_size=64)
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in (source.mean, source.std))
    columns = {}
    for name in AUGMENTATIONS:
        data = Images(source, augmentation(name, (64, 64), source.mean, source.std))
        columns[name] = (torch.stack([data[0, i][0] for i in range(6)]) * std + mean).clamp(0, 1)
    save_grid("data_demo.png", columns)
    data = Images(source, augmentation("mae", (64, 64), source.mean, source.std), noise_size=16)
    again, later = (torch.equal(data[0, 3][0], data[epoch, 3][0]) for epoch in (0, 1))
    print(f"the same (seed, epoch, index) gives the same crop: {again} (expect True); the next epoch: {later} "
          "(expect False)")
    print("statistics of these 8 scenes: mean and std", channel_statistics(source))
    order = TrainBatches(8, batch_size=2, seed=0, rank=1, world=2)
    print(f"rank 1 of 2, batches of 2: keys (epoch, index) {list(order)}")
    print("saved data_demo.png")
