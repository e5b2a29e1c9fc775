import math
import time

import pytest
import torch
from torch.nn import functional as F

from training.logistic import logistic_regression


def blobs(n=600, dim=6, classes=4, spread=1.0, seed=0):
    """Overlapping Gaussian blobs whose features are correlated and of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centers = torch.randn(classes, dim, generator=generator)
    mixing = torch.randn(dim, dim, generator=generator) * torch.logspace(-3, 3, dim)
    return (centers[labels] + spread * torch.randn(n, dim, generator=generator)) @ mixing + 5, labels


def gradient(fit, features, labels):
    """Of the loss (2) by autograd, from nothing but its definition."""
    z = (features.double() - fit.mean) / fit.std
    weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    loss = F.cross_entropy(z @ weight.T + bias, labels) + fit.penalty / 2 * weight.square().sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (weight, bias))])


def accuracy(fit, features, labels):
    logits = (features.double() - fit.mean) / fit.std @ fit.weight.T + fit.bias
    return (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("penalty", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("classes, dim", [(2, 1), (4, 6), (10, 64)])
def test_the_gradient_vanishes_at_the_optimum(penalty, classes, dim):
    features, labels = blobs(dim=dim, classes=classes)
    fit = logistic_regression(features, labels, classes, [penalty])
    assert gradient(fit, features, labels).norm() < 1e-4
    assert fit.penalty == penalty and fit.weight.shape == (classes, dim) and fit.bias.shape == (classes,)


def test_two_balanced_points_match_the_optimum_found_by_hand():
    # standardized features -+ s with s = sqrt(1/2); by symmetry w_1 = -w_0 = w with s sigmoid(-2 w s) = penalty w
    features, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1])
    fit = logistic_regression(features, labels, 2, [0.1])
    low, high, s = 0.0, 100.0, 0.5**0.5
    for _ in range(100):
        w = (low + high) / 2
        if s / (1 + math.exp(2 * w * s)) > 0.1 * w:
            low = w
        else:
            high = w
    torch.testing.assert_close(fit.weight[:, 0], torch.tensor([-w, w], dtype=torch.float64), atol=1e-4, rtol=0)


def test_separable_classes_are_separated():
    features, labels = blobs(spread=0.01)
    assert accuracy(logistic_regression(features, labels, 4), features, labels) == 1


def test_the_scale_and_the_offset_of_features_do_not_matter():
    features, labels = blobs()
    fit = logistic_regression(features, labels, 4, [1e-3])
    moved = logistic_regression(features * 100 - 7, labels, 4, [1e-3])
    torch.testing.assert_close(moved.weight, fit.weight, atol=1e-4, rtol=1e-3)


def test_constant_and_doubled_features_do_no_harm():
    features, labels = blobs()
    fit = logistic_regression(features, labels, 4, [1e-4])
    more = torch.cat([features, torch.full((len(features), 1), 3.7), features[:, :1]], dim=1)
    wide = logistic_regression(more, labels, 4, [1e-4])
    assert wide.weight.isfinite().all() and wide.weight[:, -2].abs().max() < 1e-8
    assert gradient(wide, more, labels).norm() < 1e-4
    assert abs(accuracy(wide, more, labels) - accuracy(fit, features, labels)) < 0.01


def test_the_penalty_is_chosen_on_held_out_samples():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    features = torch.randn(120, 80, generator=generator)  # noise, and one weak hint
    features[:, 0] += labels
    weak = logistic_regression(features, labels, 2, [1e-6])
    fit = logistic_regression(features, labels, 2, [1e-6, 0.3])
    assert (
        accuracy(weak, features, labels) == 1 and fit.penalty == 0.3
    )  # the best on the training set is the worse choice
    assert fit.penalty == logistic_regression(features, labels, 2, [0.3, 1e-6]).penalty
    again = logistic_regression(features, labels, 2, [0.3])
    torch.testing.assert_close(fit.weight, again.weight, atol=1e-4, rtol=0)  # refitted on all samples


def test_of_equally_good_penalties_the_largest_is_chosen():
    features, labels = blobs(spread=0.01)
    assert logistic_regression(features, labels, 4, [1e-5, 1e-4, 1e-3]).penalty == 1e-3


def test_the_result_depends_on_no_global_random_state():
    features, labels = blobs()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = logistic_regression(features, labels, 4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first.weight, logistic_regression(features, labels, 4).weight)


def test_a_class_without_samples_is_never_predicted():
    features, labels = blobs()
    fit = logistic_regression(features, labels, 5)
    assert fit.weight.isfinite().all() and fit.bias.argmin() == 4


def test_sixteen_thousand_samples_take_seconds():
    features, labels = blobs(16384, 64, 10, spread=3.0)
    start = time.process_time()
    logistic_regression(features, labels, 10)
    assert time.process_time() - start < 15  # about 2 on an idle core


@pytest.mark.parametrize(
    "words, change",
    [
        ("penalties", dict(penalties=[])),
        ("all labels are 2", dict(labels=torch.full((600,), 2))),
        ("600 samples.*num_classes 700", dict(num_classes=700)),
    ],
)
def test_bad_input_is_refused_in_one_sentence(words, change):
    features, labels = blobs()
    with pytest.raises(ValueError, match=words) as error:
        logistic_regression(**{**dict(features=features, labels=labels, num_classes=4), **change})
    assert "\n" not in str(error.value)
