"""SupCon: whoever shares a label is a neighbor.

Cross-entropy gives every class one weight vector to point at. Contrastive learning compares images
with each other: two random views of an image should lie close on the unit sphere, all other images
of the batch far away. The labels add what random views cannot know, namely which differences do
not matter: every image of the same class is a positive too.

    z_i = head(encoder(x_i)) / |head(encoder(x_i))|         i: one of the B V views, V of each of B images  (1)
    p_ij = exp(z_i . z_j / t) / sum_{a != i} exp(z_i . z_a / t)    t: temperature                           (2)
    L = mean_i  -1/|P(i)| sum_{j in P(i)} log p_ij          P(i): the other views with i's label            (3)

The sum over the positives stands outside the logarithm ("L_out"; the paper finds it better than
inside). Without labels P(i) is the other views of the same image: that is SimCLR. The head serves
the loss only: judge and keep the encoder's features.

Source: Khosla et al. 2020, arXiv 2004.11362; SimCLR: Chen et al. 2020, arXiv 2002.05709. Written
from the papers. We differ: the mean over the anchors that have a positive, where the paper sums.
Out of scope: gathering features from several processes. Each one contrasts within its own batch,
so that a batch split over two processes has fewer negatives, and another loss, than on one.
Needs: torch, einops.
Demo: python supcon.py (10 s on a CPU) saves supcon_demo.png.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def supcon_loss(features, labels=None, temperature=0.1):
    """(1) to (3): mean loss of the views that have a positive in the batch, 0 if none has.

    features (B, V, D), normalized here; labels (B,) or None (SimCLR) -> scalar, at least float32
    """
    if features.ndim != 3 or features.shape[0] * features.shape[1] < 2:
        raise ValueError(
            f"features {tuple(features.shape)} must be (B, V, D), V views of B images, with at least 2 views to "
            f"compare"
        )
    batch, views = features.shape[:2]
    if labels is None and views < 2:
        raise ValueError(
            "without labels an image's only positives are its other views, but features hold 1 view; give labels or "
            "2 views"
        )
    if labels is not None and tuple(labels.shape) != (batch,):
        raise ValueError(f"labels {tuple(labels.shape)} must be ({batch},), one class number an image")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be positive; try 0.1")
    owner = torch.arange(batch, device=features.device) if labels is None else labels.to(features.device)
    owner = owner.repeat_interleave(views)  # (B V,)
    itself = torch.eye(len(owner), dtype=torch.bool, device=features.device)
    positive = (owner[:, None] == owner) & ~itself  # row i: P(i)

    with torch.autocast(features.device.type, enabled=False):  # exp(1 / t) needs more digits than bf16 has
        z = rearrange(features, "b v d -> (b v) d").to(torch.promote_types(features.dtype, torch.float32))
        z = F.normalize(z, dim=1)
        log_p = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(dim=1)  # (2)
        count = positive.sum(dim=1)
        # `where`, not a product with the mask: the diagonal holds -inf, and 0 * inf is NaN
        each = -torch.where(positive, log_p, 0).sum(dim=1) / count.clamp(min=1)
        return each.sum() / (count > 0).sum().clamp(min=1)  # (3)


class ProjectionHead(nn.Sequential):
    """An MLP from features to the sphere: (..., dim) -> (..., out). hidden None: as wide as dim."""

    def __init__(self, dim, hidden=None, out=128):
        super().__init__(nn.Linear(dim, hidden or dim), nn.ReLU(), nn.Linear(hidden or dim, out))


class Output(NamedTuple):
    loss: torch.Tensor
    features: torch.Tensor  # (B, V, D) of the encoder: what is kept
    projections: torch.Tensor  # (B, V, out) of length 1: what the loss compares


class SupCon(nn.Module):
    """An encoder and its projection head: views (B, V, C, H, W), labels (B,) or None -> Output.

    encoder  any model (N, C, H, W) -> features (N, encoder.num_features): create_vit("vit_demo", num_classes=0)
    """

    def __init__(self, encoder, hidden=None, out=128, temperature=0.1):
        super().__init__()
        if not hasattr(encoder, "num_features"):
            raise ValueError(
                f"{type(encoder).__name__} has no num_features, the width of its features; for torchvision's ResNets "
                "set encoder.num_features = encoder.fc.in_features, then encoder.fc = torch.nn.Identity()"
            )
        if not temperature > 0:
            raise ValueError(f"temperature {temperature} must be positive; try 0.1")
        self.encoder, self.temperature = encoder, temperature
        self.head = ProjectionHead(encoder.num_features, hidden, out)

    def forward(self, views, labels=None):
        if views.ndim < 3 or views.ndim == 4:  # four dimensions are images without the one of the views
            raise ValueError(
                f"views {tuple(views.shape)} must be (B, V, C, H, W); stack two augmentations: torch.stack([a, b], "
                f"dim=1)"
            )
        features = self.encoder(rearrange(views, "b v ... -> (b v) ..."))  # one pass: BatchNorm sees all views
        if features.ndim != 2 or features.shape[1] != self.encoder.num_features:
            raise ValueError(
                f"the encoder gives {tuple(features.shape)}, not (N, {self.encoder.num_features}); build it with "
                f"num_classes=0"
            )
        features = rearrange(features, "(b v) d -> b v d", b=len(views))
        projections = F.normalize(self.head(features).float(), dim=-1)
        return Output(supcon_loss(projections, labels, self.temperature), features, projections)


if __name__ == "__main__":
    # A point has 2 coordinates that tell its class, in which of 4 rings it lies, and 6 larger ones that do not.
    # Two views of a point share all 8 but for a little noise, so only the labels can tell what to ignore.
    classes, nuisance = 4, 6

    def points(n):
        label, turn = torch.randint(classes, (n,)), 2 * torch.pi * torch.rand(n)
        ring = (0.5 + label)[:, None] * torch.stack([turn.cos(), turn.sin()], dim=1)
        return torch.cat([ring, 2 * torch.randn(n, nuisance)], dim=1), label

    def views(x):
        return torch.stack([x, x], dim=1) + 0.1 * torch.randn(len(x), 2, x.shape[1])  # (B, 2, 8)

    def make_model():
        torch.manual_seed(0)
        width = 64
        encoder = nn.Sequential(nn.Linear(2 + nuisance, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        encoder.num_features = width
        return SupCon(encoder, out=2)  # a circle, so that it can be drawn

    def train(model, with_labels, steps=300):
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
        for _ in range(steps):
            x, label = points(64)
            loss = model(views(x), label if with_labels else None).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return model

    @torch.no_grad()
    def judge(model, known, label_known, new, label_new):
        z, z_new = (F.normalize(model.encoder(x), dim=1) for x in (known, new))
        cosine = z_new @ z.T
        same = label_new[:, None] == label_known
        accuracy = (label_known[cosine.argmax(dim=1)] == label_new).float().mean()
        return cosine[same].mean(), cosine[~same].mean(), accuracy

    models = {
        "untrained": make_model(),
        "without labels (SimCLR)": train(make_model(), False),
        "with labels (SupCon)": train(make_model(), True),
    }
    test = *points(500), *points(500)
    for name, model in models.items():
        print(
            "{:24s} cosine within a class {:5.2f}, between classes {:5.2f}; nearest neighbor has the right class "
            "{:.2f}".format(
                name, *judge(model, *test)
            )
        )
    print("(expect: without labels as many right as untrained, for views share the nuisance; with labels above 0.9)")
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: pip install matplotlib")
    else:
        figure, panels = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
        for axes, (name, model) in zip(panels, models.items(), strict=True):
            with torch.no_grad():
                z = model(views(test[2]), test[3]).projections[:, 0]
            radius = 1 + 0.12 * test[3][:, None]  # a ring per class, or they would hide one another
            axes.scatter(*(radius * z).T, c=test[3], cmap="tab10", vmax=9, s=6)
            axes.set(title=name, aspect="equal", xticks=[], yticks=[], xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
        figure.suptitle(
            "new points on the circle, colored by class (each class drawn at its own radius)", fontsize=9
        )
        figure.savefig("supcon_demo.png", dpi=110)
        print("saved supcon_demo.png")
