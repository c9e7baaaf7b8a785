"""Convolutional networks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]
NORMS: dict[str, Norm] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
}


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling."""

    def __init__(self, size: int = 28, classes: int = 10) -> None:
        super().__init__()
        flat = 16 * ((size // 2 - 4) // 2) ** 2
        self.c1, self.c2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.f1, self.f2, self.f3 = nn.Linear(flat, 120), nn.Linear(120, 84), nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, size, size] -> [N, classes]."""
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        x = F.relu(self.f2(F.relu(self.f1(torch.flatten(x, 1)))))
        y: Tensor = self.f3(x)
        return y


def cnn28(classes: int = 10) -> nn.Module:
    """The CNN of the FedAvg paper (McMahan et al. 2017), a quarter of its channels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, classes)),
    )


class Residual(nn.Module):
    """The basic block of He et al. 2016."""

    def __init__(self, inside: int, out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.n1, self.n2 = norm(out), norm(out)
        self.c2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.skip = (
            nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), norm(out))
            if stride > 1 or inside != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, inside, H, W] -> [N, out, H / stride, W / stride]."""
        y = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        return F.relu(y + self.skip(x))


class ResNet8(nn.Module):
    """Three residual blocks of ``width``, 2·``width`` and 4·``width`` channels."""

    def __init__(self, width: int = 16, classes: int = 10, kind: str = "batch") -> None:
        super().__init__()
        norm = NORMS[kind]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width), nn.ReLU())
        self.b1 = Residual(width, width, 1, norm)
        self.b2 = Residual(width, 2 * width, 2, norm)
        self.b3 = Residual(2 * width, 4 * width, 2, norm)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, classes]."""
        x = self.b3(self.b2(self.b1(self.stem(x))))
        y: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return y


class SqueezeExcite(nn.Module):
    """Channels weighed by what a small network makes of their means (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        scale = F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))
        return x * F.hardsigmoid(self.up(scale))


class Inverted(nn.Module):
    """The inverted residual of MobileNet: expand, depthwise, project (Sandler et al. 2018)."""

    def __init__(self, inside: int, out: int, stride: int, version: int = 2) -> None:
        super().__init__()
        wide = 4 * inside
        act = nn.ReLU6 if version == 2 else nn.Hardswish
        self.same = stride == 1 and inside == out
        self.expand = nn.Sequential(
            nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide), act()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            *(nn.BatchNorm2d(wide), act()),
        )
        self.excite = SqueezeExcite(wide) if version == 3 else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inside, H, W] -> [N, out, H / stride, W / stride]."""
        y: Tensor = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + y if self.same else y


class MobileNet(nn.Module):
    """MobileNetV2 (ReLU6), or V3 (HardSwish, squeeze and excite), ``blocks`` of each width."""

    def __init__(
        self,
        version: int = 2,
        widths: tuple[int, ...] = (16, 24, 32),
        blocks: int = 2,
        classes: int = 10,
    ) -> None:
        super().__init__()
        act = nn.ReLU6() if version == 2 else nn.Hardswish()
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 3, 2, 1, bias=False),
            *(nn.BatchNorm2d(widths[0]), act),
        ]
        for inside, out in pairwise(widths):
            layers.append(Inverted(inside, out, 2, version))
            layers += [Inverted(out, out, 1, version) for _ in range(blocks - 1)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, classes]."""
        y: Tensor = self.head(self.features(x).mean((2, 3)))
        return y


class UNet(nn.Module):
    """Two levels of U-Net (Ronneberger et al. 2015); ``up`` is convt, nearest or bilinear."""

    def __init__(self, up: str = "convt", width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = _twice(1, width), _twice(width, 2 * width)
        self.up = _upsampling(up, 2 * width, width)
        self.merge, self.out = _twice(2 * width, width), nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, H, W] -> logits [N, 1, H, W]; H and W even."""
        fine = self.down1(x)
        coarse = self.up(self.down2(F.max_pool2d(fine, 2)))
        y: Tensor = self.out(self.merge(torch.cat([coarse, fine], 1)))
        return y


def _twice(inside: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(inside, out, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(out, out, 3, padding=1), nn.ReLU()),
    )


def _upsampling(kind: str, inside: int, out: int) -> nn.Module:
    if kind == "convt":
        return nn.ConvTranspose2d(inside, out, 2, 2)
    corners = False if kind == "bilinear" else None
    scale = nn.Upsample(scale_factor=2, mode=kind, align_corners=corners)
    return nn.Sequential(scale, nn.Conv2d(inside, out, 1))
