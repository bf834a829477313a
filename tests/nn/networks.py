"""ResNet-18, ResNet-50 and a network in the style of MobileNetV2, written out for tests and benchmarks.

torchvision's compiled part can only be loaded with the torch that it was built for. Sources: He et al. 2016, Deep
Residual Learning; Sandler et al. 2018, MobileNetV2. Modules and names are torchvision's, so its checkpoints fit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from steadygrad.nn.fusion import Steps


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def _initialised(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """Two convolutions of 3x3 and a residual: (N, inputs, H, W) to (N, width, H / stride, W / stride)."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        result: Tensor = self.relu(out)
        return result


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, and a residual: to (N, 4 width, H / stride, W / stride)."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        result: Tensor = self.relu(out)
        return result


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, and a linear layer: (N, 3, H, W) to (N, classes)."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], classes: int
    ) -> None:
        super().__init__()
        self.inputs = 64
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(block, 64, depths[0], 1)
        self.layer2 = self._stage(block, 128, depths[1], 2)
        self.layer3 = self._stage(block, 256, depths[2], 2)
        self.layer4 = self._stage(block, 512, depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, classes)
        _initialised(self)

    def _stage(
        self, block: type[BasicBlock | Bottleneck], width: int, depth: int, stride: int
    ) -> nn.Sequential:
        outputs, downsample = width * block.expansion, None
        if stride != 1 or self.inputs != outputs:
            shortcut = _conv(self.inputs, outputs, 1, stride)
            downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))
        blocks = [block(self.inputs, width, stride, downsample)]
        blocks += [block(outputs, width) for _ in range(1, depth)]
        self.inputs = outputs
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.fc(torch.flatten(self.avgpool(x), 1))
        return x


class ConvNormActivation(nn.Sequential):
    """A convolution, a batch norm and ReLU6."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, groups: int) -> None:
        convolution = _conv(inputs, outputs, size, stride, groups)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expands, convolves each channel on its own, and projects; with a residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.use_res_connect = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvNormActivation(inputs, width, 1, 1, 1))
        layers.append(ConvNormActivation(width, width, 3, stride, width))
        layers += [_conv(width, outputs, 1), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(x) if self.use_res_connect else self.conv(x)
        return out


class MobileNetV2(nn.Module):
    """Inverted residuals between two convolutions, and a linear layer: (N, 3, H, W) to (N, classes)."""

    # The columns are expansion, channels, blocks, and the stride of the first block.
    STAGES = (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvNormActivation(3, 32, 3, 2, 1)]
        inputs = 32
        for expansion, outputs, depth, stride in self.STAGES:
            for index in range(depth):
                step = stride if index == 0 else 1
                layers.append(InvertedResidual(inputs, outputs, step, expansion))
                inputs = outputs
        layers.append(ConvNormActivation(inputs, 1280, 1, 1, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
        _initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        x = self.classifier(torch.flatten(x, 1))
        return x


def resnet18(classes: int = 1000) -> ResNet:
    """ResNet-18: 20 batch norms."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet50(classes: int = 1000) -> ResNet:
    """ResNet-50: 53 batch norms."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes)


def mobilenet_v2(classes: int = 1000) -> MobileNetV2:
    """MobileNetV2 of width 1: 52 batch norms, most before a ReLU6."""
    return MobileNetV2(classes)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
}


# What their forwards do, for `register_block`.
STEPS = {
    BasicBlock: Steps(
        "conv1 bn1 relu conv2 bn2", True, shortcut="downsample?", last="relu", in_place=True
    ),
    Bottleneck: Steps(
        "conv1 bn1 relu conv2 bn2 relu conv3 bn3",
        True,
        shortcut="downsample?",
        last="relu",
        in_place=True,
    ),
    InvertedResidual: Steps("conv", "use_res_connect"),
    ResNet: Steps(
        "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool",
        end=lambda model, x: model.fc(torch.flatten(x, 1)),
    ),
}
