import pytest
import torch
import torchvision
from torch import nn

from resnet import PRESETS, ResNet, create_resnet


@pytest.mark.parametrize("name, expected", [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_the_large_presets_are_torchvisions_with_fc_called_head(name, expected):
    torch.manual_seed(0)
    ours, theirs = create_resnet(name).eval(), getattr(torchvision.models, name)().eval()
    state = {key.replace("fc.", "head."): value for key, value in theirs.state_dict().items()}
    assert list(ours.state_dict()) == list(state)
    assert sum(p.numel() for p in ours.parameters()) == expected
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name, expected", [("resnet8", 78_042), ("resnet20", 272_474)])
def test_the_small_presets_have_the_parameters_counted_by_hand(name, expected):
    model = create_resnet(name, num_classes=10)
    # stem; per block two 3 x 3 convolutions, each with scale and shift; two 1 x 1 shortcuts with theirs; head
    n = PRESETS[name]["layers"][0]
    count = 3 * 16 * 9 + 32 + 64 * 10 + 10
    for inside, outside in ((16, 16), (16, 32), (32, 64)):
        count += 9 * inside * outside + 9 * outside**2 + 4 * outside + (n - 1) * (18 * outside**2 + 4 * outside)
        count += inside * outside + 2 * outside if inside != outside else 0
    assert sum(p.numel() for p in model.parameters()) == count == expected


def test_the_small_form_halves_the_map_twice():
    sizes = []
    model = create_resnet("resnet20", num_classes=10)
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[1:])))
    model(torch.randn(2, 3, 32, 32))
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_the_small_form_starts_with_the_variance_that_torchvision_gives():
    torch.manual_seed(0)
    for name, module in create_resnet("resnet20").named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name


def test_without_classes_it_gives_the_mean_over_places():
    model = create_resnet("resnet8", num_classes=0).eval()
    maps = []
    model.layer3.register_forward_hook(lambda module, args, out: maps.append(out))
    x = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(model(x), maps[0].mean((2, 3)))
    assert model.num_features == 64
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_without_memory(name):
    with torch.device("meta"):
        assert create_resnet(name).num_classes == 1000


@pytest.mark.parametrize("make, word", [
    (lambda: create_resnet("resnet9000"), "resnet9000"),
    (lambda: ResNet(layers=(2, 2)), "layers"),
    (lambda: create_resnet("resnet18", width=128), "width"),
    (lambda: create_resnet("resnet8", width=0), "width"),
    (lambda: create_resnet("resnet8", img_size=(1, 2, 3)), "img_size"),
    (lambda: ResNet(layers=(2, 2, 0)), "layers"),
    (lambda: create_resnet("resnet8")(torch.randn(2, 1, 32, 32)), "images"),
    (lambda: create_resnet("resnet8")(torch.randn(3, 32, 32)), "images"),
])
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
