"""Probe: what are frozen features worth? A linear classifier on them, trained on labels.

The features of the whole set are computed once, without augmentation, and normalized by their mean and
standard deviation over the training set, so that one learning rate fits features of any scale (as MAE's
BatchNorm without parameters). What learns is the linear layer.

The checkpoint holds encoder, normalization and head: a complete classifier.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from data import EvalBatches, Images, augmentation, make_loader
from tasks import Data, classify
from tasks.classify import draw, evaluate, predict  # noqa: F401  the same as there
from training import encoders, sources

DEFAULTS = dict(epochs=50, batch_size=256, blr=0.2, weight_decay=0.0, beta2=0.999)
SAME_AS_PRETRAINING = (  # the flags that the default run hands on
    "data", "data_path", "data_size", "scenes", "train_images", "val_images", "skip_bad", "seed", "workers", "device",
    "precision", "model", "img_size", *encoders.SIZES)


def add_flags(flag):
    flag("--style", choices=("adamw",), default="adamw", help="how the head is trained")
    flag("--pool", choices=("mean", "cls"), help="ViT: which features (default: mean)")
    encoders.encoder_flags(flag)
    sources.image_flags(flag)


def complete(args):
    encoders.inherit(args)
    if encoders.is_vit(args):
        args.pool = args.pool or "mean"
    encoders.complete(args)


def open_data(args, world):
    found = sources.open_images(args, world)
    transform = augmentation("none", args.img_size, found.mean, found.std)
    train = Images(found.train, transform, args.seed, found.indices)
    val = Images(found.val, transform, args.seed, found.val_indices)
    return Data(train, val, list(found.train.classes), found.mean, found.std, learner=lambda model: model.head[1])


def build(args, data, world):
    """The frozen encoder and a head; the sets in `data` become sets of features."""
    encoder = classify.build_encoder(args, data, world).requires_grad_(False)
    encoder.reset_classifier(len(data.classes))
    head = nn.Linear(encoder.num_features, len(data.classes))
    nn.init.trunc_normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    encoder.head = nn.Sequential(nn.BatchNorm1d(encoder.num_features, affine=False, eps=1e-6), head)
    if data.weights is not None:
        encoder.load_state_dict(data.weights)
    if data.train is None:  # load_run: nothing is trained
        return encoder

    # features once: each rank its share, all get all
    args.batch_size = min(args.batch_size, max(1, len(data.train) // world.size))
    encoder.to(world.device)
    data.train, data.val = (features(encoder, images, args, world) for images in (data.train, data.val))

    # normalized once, by the statistics of the whole training set
    norm = encoder.head[0].cpu()
    if data.weights is None:
        norm.running_mean.copy_(data.train.features.mean(dim=0))
        norm.running_var.copy_(data.train.features.var(dim=0))
    for part in (data.train, data.val):
        part.features = norm.eval()(part.features)
    return encoder


class Features(Dataset):
    """Features of a set of images, in its form: (epoch, index) -> (feature, label, nothing)."""

    def __init__(self, images, dim):
        self.images = images
        self.features, self.labels = torch.empty(len(images), dim), torch.empty(len(images), dtype=torch.long)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        return self.features[key[1]], self.labels[key[1]], torch.empty(0)


@torch.no_grad()
def features(encoder, images, args, world):
    """A set of images -> the set of their pooled features, (n, D) and (n,)."""
    encoder.eval()
    head, encoder.head = encoder.head, nn.Identity()
    batches = EvalBatches(len(images), args.batch_size, world.rank, world.size)
    columns, labels = [torch.empty(0, encoder.num_features)], [torch.empty(0, dtype=torch.long)]
    loader = make_loader(images, batches, world.workers(args), world.device)
    for batch, label, _ in tqdm(loader, "features", leave=False, disable=None if world.main else True):
        with world.autocast(args.precision):
            columns.append(encoder(batch.to(world.device)).float().cpu())
        labels.append(label)
    encoder.head = head

    # rank r had the samples r, r + world, ...
    result = Features(images, encoder.num_features)
    for rank, (column, label) in enumerate(world.gather((torch.cat(columns), torch.cat(labels)))):
        result.features[rank::world.size], result.labels[rank::world.size] = column, label
    return result


def loss(model, batch, args, data):
    x, labels, _ = batch
    return nn.functional.cross_entropy(model(x).float(), labels)


def save_picture(folder, model, args, data):
    classify.save_picture(folder, model, args, replace(data, val=data.val.images))
