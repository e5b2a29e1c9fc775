"""ResNet: torchvision's, with the handles of this house's other classifiers.

The convolutional yardstick of the SAM paper. Layers, initialisation and parameter names are
torchvision's, so published ResNet weights load by key; only the classifier is called `head`, as in
vit.py and mixer.py, and `fc` is gone. The small form for 32 pixels is the CIFAR ResNet: a stem of
3 x 3 without stride or pooling, and three stages instead of four, each half as fine and twice as wide.

    h = relu(x + bn conv(relu bn conv x))    two 3 x 3 convolutions; shortcuts that change shape are 1 x 1    (1)

Source: He et al. 2015, arXiv 1512.03385; as a yardstick for ViT and Mixer Chen, Hsieh, Gong 2022,
arXiv 2106.01548. We differ: shortcuts of the small form are 1 x 1 convolutions as in torchvision, the
paper pads with zeros.
Needs: torch, torchvision.
Demo: python resnet.py (5 s on a CPU) prints sizes, and shows what SAM must take care of: BatchNorm.
"""

import torch
from torch import nn
from torchvision.models import ResNet as TorchvisionResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

PRESETS = {  # keyword arguments of ResNet
    "resnet18": dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    "resnet50": dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    "resnet8": dict(img_size=32, block=BasicBlock, layers=(1, 1, 1), width=16),
    "resnet20": dict(img_size=32, block=BasicBlock, layers=(3, 3, 3), width=16),
}


def create_resnet(name, **overrides):
    """A ResNet by preset name: create_resnet("resnet50", num_classes=10)."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(PRESETS)}")
    return ResNet(**{**PRESETS[name], **overrides})


class ResNet(TorchvisionResNet):
    """torchvision's ResNet: (B, 3, H, W) -> logits (B, num_classes), or features (B, num_features) if num_classes=0.

    img_size  int or (H, W), a note for whoever feeds it: images of any size pass
    block     BasicBlock or Bottleneck of torchvision
    layers    blocks per stage: four stages, or three for the small form
    width     channels of the small form's first stage
    """

    in_chans = 3

    def __init__(self, img_size=224, block=BasicBlock, layers=(2, 2, 2, 2), num_classes=1000, width=16):
        if len(layers) not in (3, 4) or min(layers) < 1:
            raise ValueError(f"layers {layers} must be four numbers of blocks, or three for the small form, each at least 1")
        small = len(layers) == 3
        # the small form first builds a shallow four-stage net, then puts its own stages in place
        super().__init__(block, (1, 1, 1, 1) if small else layers)
        if small:
            self.inplanes = width
            self.conv1, self.bn1, self.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.Identity()
            for stage, blocks in enumerate(layers):
                setattr(self, f"layer{stage + 1}", self._make_layer(block, width << stage, blocks, stride=1 if stage == 0 else 2))
            self.layer4 = nn.Identity()
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.num_features = self.inplanes
        self.fc = nn.Identity()
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes):
        """A fresh head; num_classes=0 removes it, features come out."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes).to(self.conv1.weight) if num_classes else nn.Identity()

    def forward(self, x):
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}")
        return self.head(super().forward(x))


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in PRESETS:
        model = create_resnet(name)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {model.num_features} features")
    print("(expect 11,689,512 and 25,557,032 as torchvision, and 336,696, of which 65,000 are the head for 1,000 classes)")
