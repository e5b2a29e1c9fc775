import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from supcon import ProjectionHead, SupCon, supcon_loss
from vit import create_vit

quick = settings(max_examples=50, deadline=None)


def randn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def by_the_formula(features, labels, temperature):
    """Equation (3), one pair at a time."""
    batch, views, _ = features.shape
    z = [features[b, v] / features[b, v].norm() for b in range(batch) for v in range(views)]
    owner = [b if labels is None else int(labels[b]) for b in range(batch) for _ in range(views)]
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if owner[p] == owner[i]]
        if positives:
            bottom = sum(math.exp(z[i] @ z[a] / temperature) for a in others)
            losses.append(
                -sum(math.log(math.exp(z[i] @ z[p] / temperature) / bottom) for p in positives) / len(positives)
            )
    return sum(losses) / len(losses) if losses else 0.0


# ---------------------------------------------------------------------------- the loss


def test_two_classes_with_two_views_on_a_cross_give_the_hand_computed_loss():
    east, north = [2.0, 0.0], [0.0, 5.0]  # lengths do not matter
    features = torch.tensor([[east, east], [north, north]])
    # each anchor: one positive with cosine 1, two negatives with cosine 0
    wanted = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + 2))
    assert supcon_loss(features, torch.tensor([3, 8]), temperature=0.5).item() == pytest.approx(wanted, rel=1e-6)
    # one class: three positives each, -log p is log(e^2 + 2) - 2 for one of them and log(e^2 + 2) for two
    assert supcon_loss(features, torch.tensor([1, 1]), 0.5).item() == pytest.approx(
        math.log(math.exp(2) + 2) - 2 / 3, rel=1e-6
    )


@quick
@given(
    batch=st.integers(1, 5),
    views=st.integers(1, 3),
    width=st.integers(1, 4),
    classes=st.integers(1, 4),
    temperature=st.sampled_from([0.1, 0.5, 2.0]),
    seed=st.integers(0, 1000),
)
def test_the_loss_is_the_formula_written_as_loops(batch, views, width, classes, temperature, seed):
    if batch * views < 2:
        return
    features = randn(batch, views, width, seed=seed, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))
    assert supcon_loss(features, labels, temperature).item() == pytest.approx(
        by_the_formula(features, labels, temperature), rel=1e-9, abs=1e-9
    )
    if views > 1:
        assert supcon_loss(features, None, temperature).item() == pytest.approx(
            by_the_formula(features, None, temperature), rel=1e-9, abs=1e-9
        )


def test_without_labels_it_is_simclrs_cross_entropy_over_the_other_views():
    features = randn(5, 2, 7)
    z = F.normalize(
        torch.cat([features[:, 0], features[:, 1]]), dim=1
    )  # SimCLR's order: all first views, all second views
    logits = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    target = torch.cat([torch.arange(5, 10), torch.arange(5)])
    torch.testing.assert_close(supcon_loss(features, None, 0.2), F.cross_entropy(logits, target))
    torch.testing.assert_close(
        supcon_loss(features, torch.arange(5), 0.2), F.cross_entropy(logits, target)
    )  # all classes differ


def test_order_of_images_order_of_views_and_names_of_classes_do_not_matter():
    features, labels = randn(6, 2, 5), torch.tensor([0, 1, 0, 2, 1, 2])
    loss = supcon_loss(features, labels)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    for same in (
        supcon_loss(features[order], labels[order]),
        supcon_loss(features.flip(1), labels),
        supcon_loss(features, 10 - 3 * labels),
        supcon_loss(7 * features, labels),
    ):
        torch.testing.assert_close(same, loss)


def test_an_image_alone_in_its_class_is_pulled_to_its_own_other_view():
    features = randn(3, 2, 4).requires_grad_()
    supcon_loss(features, torch.tensor([0, 0, 1])).backward()
    assert features.grad.isfinite().all()
    alone = randn(1, 2, 4)  # nothing to push away: p = 1
    assert supcon_loss(alone, torch.tensor([5])).item() == pytest.approx(0, abs=1e-6)


def test_with_one_view_a_class_of_one_is_a_negative_only():
    features = randn(3, 1, 4).requires_grad_()
    loss = supcon_loss(features, torch.tensor([0, 0, 1]))
    assert loss.item() == pytest.approx(
        by_the_formula(features.detach(), torch.tensor([0, 0, 1]), 0.1), rel=1e-5
    )  # mean of two anchors
    loss.backward()
    assert features.grad.isfinite().all() and features.grad[2].any()  # the others push it away


def test_a_batch_without_any_positive_has_loss_and_gradient_zero():
    features = randn(3, 1, 4).requires_grad_()
    loss = supcon_loss(features, torch.arange(3))
    loss.backward()
    assert loss == 0 and torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_stay_finite_at_a_tiny_temperature_and_large_features(dtype):
    features = (100 * randn(8, 2, 16)).to(dtype).requires_grad_()
    loss = supcon_loss(features, torch.arange(8) % 3, temperature=0.001)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and features.grad.isfinite().all()


def test_the_loss_under_autocast_is_that_of_fp32_to_the_bit():
    features, labels = randn(8, 2, 16), torch.arange(8) % 3
    with torch.autocast("cpu", torch.bfloat16):
        inside = supcon_loss(features, labels)
    assert torch.equal(inside, supcon_loss(features, labels))


def test_the_gradient_agrees_with_finite_differences():
    features = randn(3, 2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: supcon_loss(f, torch.tensor([0, 1, 0]), 0.3), features)


def test_a_step_down_the_gradient_brings_classes_together():
    features, labels = randn(8, 2, 4).requires_grad_(), torch.arange(8) % 2
    for _ in range(300):
        (grad,) = torch.autograd.grad(supcon_loss(features, labels, 0.5), features)
        features = (features - 3 * grad).detach().requires_grad_()
    z = F.normalize(features.detach().flatten(0, 1), dim=1)
    cosine, label = z @ z.T, labels.repeat_interleave(2)
    same = label[:, None] == label
    assert cosine[same].mean() > 0.9 and cosine[~same].mean() < -0.5  # two classes end opposite each other


# ---------------------------------------------------------------------------- the wrapper


def test_the_wrapper_runs_encoder_and_head_and_hands_back_the_loss_of_its_projections():
    torch.manual_seed(0)
    model = SupCon(create_vit("vit_demo", depth=1, num_classes=0), out=32, temperature=0.2)
    views, labels = randn(4, 2, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    out = model(views, labels)
    assert out.features.shape == (4, 2, 96) and out.projections.shape == (4, 2, 32)
    torch.testing.assert_close(out.features[1, 1], model.encoder(views[1, 1][None])[0])  # views keep their places
    torch.testing.assert_close(out.projections, F.normalize(model.head(out.features), dim=-1))
    torch.testing.assert_close(out.loss, supcon_loss(model.head(out.features), labels, 0.2))
    assert not torch.allclose(out.loss, model(views).loss)  # labels count
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_wrapper_trains_under_bf16_autocast():
    model = SupCon(create_vit("vit_demo", depth=1, num_classes=0))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(randn(4, 2, 3, 32, 32), torch.arange(4) % 2)
    out.loss.backward()
    assert out.loss.dtype == out.projections.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_torchvision_resnet_serves_as_encoder_the_way_the_error_says():
    from torchvision.models import resnet18

    encoder = resnet18()
    with pytest.raises(ValueError, match="num_features"):
        SupCon(encoder)
    encoder.num_features, encoder.fc = encoder.fc.in_features, nn.Identity()
    assert SupCon(encoder)(randn(2, 2, 3, 32, 32), torch.tensor([0, 1])).features.shape == (2, 2, 512)


def test_the_projection_head_is_a_two_layer_mlp():
    head = ProjectionHead(6, hidden=5, out=4)
    assert [tuple(p.shape) for p in head.parameters()] == [(5, 6), (5,), (4, 5), (4,)]
    x = randn(3, 6)
    torch.testing.assert_close(
        head(x), (x @ head[0].weight.T + head[0].bias).relu() @ head[2].weight.T + head[2].bias
    )
    assert ProjectionHead(6)[0].out_features == 6 and ProjectionHead(6)[2].out_features == 128


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: supcon_loss(randn(4, 8), torch.arange(4)), r"features \(4, 8\) must be \(B, V, D\)"),
        (lambda: supcon_loss(randn(1, 1, 8), torch.arange(1)), "at least 2 views"),
        (lambda: supcon_loss(randn(4, 1, 8)), "give labels or 2 views"),
        (lambda: supcon_loss(randn(4, 2, 8), torch.arange(8)), r"labels \(8,\) must be \(4,\)"),
        (lambda: supcon_loss(randn(4, 2, 8), torch.eye(4)), r"labels \(4, 4\) must be \(4,\)"),
        (lambda: supcon_loss(randn(4, 2, 8), torch.arange(4), temperature=0), "temperature 0 must be positive"),
        (lambda: SupCon(create_vit("vit_demo", depth=1, num_classes=10))(randn(2, 2, 3, 32, 32)), "num_classes=0"),
        (lambda: SupCon(create_vit("vit_demo", depth=1, num_classes=0))(randn(2, 3)), "stack two augmentations"),
    ],
)
def test_bad_input_is_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
