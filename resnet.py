"""ResNet: torchvision's, with the methods of the other classifiers here.

The convolutional yardstick of the SAM paper. Layers, initialization and parameter names are
torchvision's, except for the classifier: `head` as in vit.py and mixer.py, where torchvision says `fc`.
checkpoints.load_pretrained reads its published weights, classifier included. The small form for 32 pixels is
the CIFAR ResNet: a stem of 3 x 3 without stride or pooling, and three stages instead of four, each half as
fine and twice as wide.

    h = relu(x + bn conv(relu(bn conv x)))   two 3 x 3 convolutions; x is a 1 x 1 convolution where shapes change    (1)
    h = relu(x + bn conv(relu(bn conv(relu(bn conv x)))))   from ResNet-50 on: 1 x 1 to a quarter, 3 x 3, 1 x 1      (2)

Source: He et al. 2015, arXiv 1512.03385; as a yardstick for ViT and Mixer Chen, Hsieh, Gong 2022,
arXiv 2106.01548. We differ: shortcuts of the small form are 1 x 1 convolutions as in torchvision, the
paper pads with zeros.
Needs: torch, torchvision (and sam.py for the demo).
Demo: python resnet.py (5 s on a CPU) prints sizes, and shows what SAM must take care of: BatchNorm.
"""

import torch
from torch import nn
from torchvision.models import ResNet as TorchvisionResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

PRESETS = {  # keyword arguments of ResNet
    "resnet18": dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    "resnet50": dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    "resnet8": dict(img_size=32, block=BasicBlock, layers=(1, 1, 1)),
    "resnet20": dict(img_size=32, block=BasicBlock, layers=(3, 3, 3)),
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
    width     channels of the small form's first stage, default 16

    ValueError if an option makes no sense.
    """

    in_chans = 3

    def __init__(self, img_size=224, block=BasicBlock, layers=(2, 2, 2, 2), num_classes=1000, width=None):
        if len(layers) not in (3, 4) or min(layers) < 1:
            raise ValueError(
                f"layers {layers} must be four numbers of blocks, or three for the small form, each at least 1"
            )
        small = len(layers) == 3
        if width is not None and (width < 1 or not small):
            raise ValueError(
                f"width {width} must be at least 1 and belongs to the small form of three stages; drop it for four"
            )
        if not isinstance(img_size, int) and not (isinstance(img_size, (tuple, list)) and len(img_size) == 2):
            raise ValueError(f"img_size {img_size!r} must be a whole number or (height, width)")
        width = width or 16
        # the small form first builds a shallow four-stage net, then puts its own stages in place
        super().__init__(block, (1, 1, 1, 1) if small else layers)
        if small:
            self.inplanes = width
            self.conv1, self.bn1, self.maxpool = (
                nn.Conv2d(3, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.Identity(),
            )
            for stage, blocks in enumerate(layers):
                setattr(
                    self,
                    f"layer{stage + 1}",
                    self._make_layer(block, width << stage, blocks, stride=1 if stage == 0 else 2),
                )
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
    from sam import batchnorm_held

    torch.manual_seed(0)
    for name in PRESETS:
        model = create_resnet(name, num_classes=10)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {model.num_features} features")
    print(
        "(expect with 10 classes 11,181,642 and 23,528,522, torchvision's less 990 classes, then 78,042 and 272,474)"
    )

    imgs = torch.randn(16, 3, 32, 32)
    model(imgs)
    before = model.bn1.running_mean.clone()
    with batchnorm_held(model):  # as in SAM's second pass
        model(imgs + 1)
    print(f"running mean moved by a held pass: {(model.bn1.running_mean - before).abs().max():.3f} (expect 0)")
    model(imgs + 1)
    print(f"            and by a common one:   {(model.bn1.running_mean - before).abs().max():.3f} (expect more)")
