"""Contrast: two views of an image attract each other, and so do images of one class (SupCon).

The objective is in supcon.py. It trains an encoder with a projection head and no classifier; --task probe or
classify with --init judges the features.
"""

import torch

from data import Images, augmentation, first_of_shuffle
from supcon import SupCon
from tasks import Data
from tasks.classify import add_tuning_flags, build_encoder, complete_encoder
from training import pictures, sources

DEFAULTS = dict(epochs=20, batch_size=64, blr=2e-3, min_lr=1e-6, beta2=0.999, layer_decay=1.0)


def add_flags(flag):
    add_tuning_flags(flag, augment="simclr")


def complete(args):
    args.augment = args.augment or "simclr"
    complete_encoder(args)
    if args.batch_size < 2:
        raise ValueError(f"--batch-size {args.batch_size} leaves nothing to compare; use at least 2")
    if args.augment == "none":
        raise ValueError("--augment none makes both views the same image; take simclr or padcrop")


def open_data(args, world):
    found = sources.open_images(args, world)
    val_indices = found.val_indices
    if len(val_indices) < 2 * world.size:
        raise ValueError(f"the validation set has {len(val_indices)} images for {world.size} processes, but each "
                         "needs two, to compare them; add images")
    if args.val_images is None:  # folders are sorted by class, but images are compared within a batch
        val_indices = first_of_shuffle(len(found.val), len(found.val))
    transform = augmentation(args.augment, args.img_size, found.mean, found.std, args.crop_ratio)
    plain = augmentation("none", args.img_size, found.mean, found.std, args.crop_ratio)
    train = Images(found.train, transform, args.seed, found.indices, views=2)
    val = Images(found.val, plain, args.seed, val_indices)
    return Data(train, val, list(found.train.classes), found.mean, found.std, smallest=2)


def build(args, data, world):
    return SupCon(build_encoder(args, data, world))


def loss(model, batch, args, data):
    views, labels, _ = batch
    return model(views, labels).loss  # each process compares its own images


def evaluate(model, loader, args, data, world):
    """One view per image: the positives are the others of its class."""
    loss = count = 0
    for images, labels, _ in loader:
        images, labels = images.to(world.device), labels.to(world.device)
        loss += model(images[:, None], labels).loss.item() * len(images)
        count += len(images)
    loss, count = world.sum([loss, count])
    return {"val_loss": loss / count}


def save_picture(folder, model, args, data, rows=6):
    """Validation images, each beside the one that is nearest in feature space."""
    samples = pictures.spread(data.val, 64)
    images = torch.stack([image for image, *_ in samples])
    features = embed(model, images.to(next(model.parameters()).device))
    similarity = features @ features.T
    nearest = similarity.fill_diagonal_(-1.0).argmax(dim=1)
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))
    query = torch.linspace(0, len(images) - 1, min(rows, len(images))).long()
    pixels = images * std + mean
    pictures.save_grid(folder / "neighbors.png", {"image": pixels[query], "nearest of 64": pixels[nearest[query]]})


def embed(model, images):
    """Features of unit length, of the encoder and not of the projection head."""
    return torch.nn.functional.normalize(model.encoder(images).float(), dim=1).cpu()


def predict(model, images, args, classes):
    """The encoder's features, of unit length."""
    return [dict(features=row.tolist()) for row in embed(model, torch.stack(images))]


def draw(image, prediction, classes):
    return pictures.captioned(image, [f"{len(prediction['features'])} features"])
