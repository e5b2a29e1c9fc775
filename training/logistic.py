"""Probe head: logistic regression on frozen features, solved to its optimum.

    z = (x - mean) / std                                                         (1)
    L = mean over samples of cross-entropy(W z + b, y) + penalty / 2 |W|^2       (2)

L is convex, so its minimum depends on no learning rate and no number of epochs. L-BFGS finds it on the full
batch. The penalty is chosen on a held-out part of the training set, then W and b are fitted on all of it.
Needs: torch.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class LogisticRegression(NamedTuple):
    """logits = (x - mean) / std @ weight.T + bias"""

    weight: torch.Tensor  # (K, D)
    bias: torch.Tensor  # (K,)
    mean: torch.Tensor  # (D,)
    std: torch.Tensor  # (D,)
    penalty: float  # the chosen one


def logistic_regression(features, labels, num_classes, penalties=(1e-5, 1e-4, 1e-3, 1e-2), holdout=0.25, seed=0):
    """Fit (2) to features (n, D) and labels (n,), 0 to num_classes - 1 -> LogisticRegression in float64.

    The penalty is the one with the most correct predictions on the held-out share of the samples, of equals
    the largest. `seed` decides which samples are held out. A single penalty needs none.
    """
    penalties = sorted(penalties, reverse=True)
    if not penalties:
        raise ValueError("penalties is empty; give at least one, such as 1e-4")
    if len(features) < num_classes:
        raise ValueError(f"{len(features)} samples are fewer than num_classes {num_classes}; use more samples")
    if len(labels.unique()) < 2:
        raise ValueError(f"all labels are {labels[0].item()}; a classifier needs samples of two classes or more")

    # (1); a constant feature becomes 0
    std, mean = torch.std_mean(features.double(), dim=0)
    std = torch.where(std > 1e-9 * mean.abs(), std, 1.0)
    z = (features - mean) / std

    # choose the penalty, from strong to weak: each optimum is the next start
    weight, bias = z.new_zeros(num_classes, z.shape[1]), z.new_zeros(num_classes)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device)
    held, kept = order.tensor_split([round(holdout * len(z))])
    most, chosen = -1, penalties[0]
    for penalty in penalties if len(penalties) > 1 else ():
        weight, bias = minimize(weight, bias, z[kept], labels[kept], penalty)
        predicted = F.linear(z[held], weight, bias).argmax(dim=1)
        correct = (predicted == labels[held]).sum().item()
        if correct > most:
            most, chosen = correct, penalty

    # refit on all samples
    weight, bias = minimize(weight, bias, z, labels, chosen)
    return LogisticRegression(weight, bias, mean, std, chosen)


def minimize(weight, bias, z, labels, penalty, tolerance=1e-5):
    """Weight (K, D) and bias (K,) at the minimum of (2), where its gradient vanishes; L-BFGS from those given.

    Features are correlated, so (2) is a long narrow valley. With W = V C^-1 and C C^T = cov(z) + K penalty I, its
    Hessian in V is about I / K, and tens of iterations do instead of hundreds.
    """
    num_classes, dim = weight.shape
    identity = torch.eye(dim, dtype=z.dtype, device=z.device)
    c = torch.linalg.cholesky(z.T @ z / len(z) + max(num_classes * penalty, 1e-9) * identity)
    c_inverse = torch.linalg.inv(c)
    v = (weight @ c).requires_grad_()
    bias = bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [v, bias], max_iter=1000, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=tolerance / v.numel() ** 0.5, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        weight = v @ c_inverse
        loss = F.cross_entropy(F.linear(z, weight, bias), labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (v @ c_inverse).detach(), bias.detach()
