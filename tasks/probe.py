"""Probe: what are frozen features worth? A linear classifier on them, trained on labels.

The features of the whole set are computed once, without augmentation, and normalized by their mean and
standard deviation over the training set. Then the linear layer is fitted:

    --style lbfgs   logistic regression at its optimum, the penalty chosen on a held-out quarter of the training set
    --style adamw   step by step in the loop of train.py
    --style mae     as MAE probes: new crops in every epoch, normalized by the statistics of each batch, LARS; the
                    features are computed anew in every step

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
from training.flags import positive
from training.logistic import logistic_regression

DEFAULTS = dict(style="lbfgs", batch_size=256, weight_decay=0.0)
ITERATIVE = dict(epochs=50, blr=0.2, beta2=0.999)  # --style adamw
PUBLISHED = dict(epochs=20, blr=4.0, augment="crop")  # --style mae; MAE: 90 epochs, blr 0.1, 16,384 images a step
PENALTIES = [1e-5, 1e-4, 1e-3, 1e-2]  # --style lbfgs
NEUTRAL = dict(epochs=(None, 1), accum=(1,), optimizer=("adamw",), blr=(None,), lr=(None,), warmup_epochs=(None,),
               clip_grad=(None,), ema=(None,), beta2=(None,))  # what L-BFGS has no use for
SAME_AS_PRETRAINING = (  # the flags that the default run hands on
    "data", "data_path", "data_size", "data_seed", "scenes", "train_images", "val_images", "skip_bad", "mean_std",
    "crop_ratio", "seed", "workers", "device", "precision", "model", "img_size", *encoders.SIZES)


def add_flags(flag):
    flag("--style", choices=("lbfgs", "adamw", "mae"), help="how the head is fitted")
    flag("--penalties", type=positive, nargs="+", help="lbfgs: to choose from (default: 1e-5 1e-4 1e-3 1e-2)")
    flag("--pool", choices=("mean", "cls"), help="ViT: which features (default: mean; --style mae: cls)")
    encoders.encoder_flags(flag)
    sources.image_flags(flag)
    sources.augment_flag(flag, "--style mae: crop, else none")


def complete(args):
    encoders.inherit(args)
    published = args.style == "mae"
    if encoders.is_vit(args) and args.pool is None:
        args.pool = "cls" if published and args.class_token is not False else "mean"
    encoders.complete(args)
    if published and args.model.startswith("resnet"):
        raise ValueError(f"--style mae trains in batches, in which the BatchNorm of {args.model} would move; take "
                         "another style")
    if published and args.batch_size == 1:
        raise ValueError("--batch-size 1 leaves --style mae, which normalizes by each batch, nothing to average over; "
                         "take at least 2")
    if not published and args.augment not in (None, "none"):
        raise ValueError(f"--augment {args.augment} acts with --style mae only: the others compute features once")
    if args.style == "lbfgs":
        for name, values in NEUTRAL.items():
            if getattr(args, name) not in values:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} acts with --style adamw only; add "
                                 "it or drop the flag")
        args.epochs = 1
        args.penalties = args.penalties or PENALTIES
        return
    if args.penalties is not None:
        raise ValueError("--penalties acts with --style lbfgs only; drop it")
    for name, value in (PUBLISHED if published else ITERATIVE).items():
        unused = (name == "blr" and args.lr is not None) or (name == "beta2" and args.optimizer != "adamw")
        if getattr(args, name) is None and not unused:
            setattr(args, name, value)


def open_data(args, world):
    found = sources.open_images(args, world)
    plain = augmentation("none", args.img_size, found.mean, found.std, args.crop_ratio)
    transform = augmentation(args.augment or "none", args.img_size, found.mean, found.std, args.crop_ratio)
    train = Images(found.train, transform, args.seed, found.indices)
    val = Images(found.val, plain, args.seed, found.val_indices)
    data = Data(train, val, list(found.train.classes), found.mean, found.std)
    if args.style != "mae":
        data.learner = lambda model: model.head[1]
    return data


def build(args, data, world):
    """The frozen encoder and a head; the sets in `data` become sets of features, except for --style mae."""
    encoder = classify.build_encoder(args, data, world).requires_grad_(False)
    encoder.reset_classifier(len(data.classes))
    head = nn.Linear(encoder.num_features, len(data.classes))
    nn.init.trunc_normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    encoder.head = nn.Sequential(nn.BatchNorm1d(encoder.num_features, affine=False, eps=1e-6), head)
    if data.weights:
        try:
            encoder.load_state_dict(data.weights)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint's weights are not of this probe ({str(error).splitlines()[0]}); resume "
                             "with its own flags") from None
    if data.train is None or args.style == "mae":
        return encoder
    if len(data.train) < 2:
        raise ValueError("one training image has no standard deviation to normalize by; use more --train-images")

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
    if args.style == "lbfgs":
        data.fitted = True
        if data.weights is None:
            fit_head(head, data, args, world)
    return encoder


def fit_head(head, data, args, world):
    """Logistic regression on the normalized features; what is left of their mean and scale goes into the weights."""
    fit = logistic_regression(data.train.features, data.train.labels, len(data.classes), args.penalties, seed=args.seed)
    weight = fit.weight / fit.std
    head.weight.data.copy_(weight)
    head.bias.data.copy_(fit.bias - weight @ fit.mean)
    world.say(f"  logistic regression: penalty {fit.penalty:g} of {', '.join(f'{p:g}' for p in args.penalties)}")


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
    images = data.val.images if isinstance(data.val, Features) else data.val
    classify.save_picture(folder, model, args, replace(data, val=images))
