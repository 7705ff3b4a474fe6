"""The networks of the paper's experiments."""

from torch import Tensor, nn
from torch.nn.functional import relu


class LogisticRegression(nn.Sequential):
    """One linear layer, which makes the loss convex.

    Args:
        pixels: of an image, over all its channels.

    """

    def __init__(self, pixels: int = 28 * 28) -> None:
        super().__init__(nn.Flatten(), nn.Linear(pixels, 10))


class DigitNetwork(nn.Sequential):
    """Two 5 x 5 convolutions with batch normalisation and 2 x 2 max pooling, then a linear layer, for 28 x 28 pixels.

    Source: the public code of Dahan & Levy, ICML 2024 (arXiv 2405.14759).
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, kernel_size=5, padding=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=5, padding=2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 10),
        )


class ResNet18(nn.Sequential):
    """A residual network of 18 layers for 32 x 32 pixels: its first convolution is 3 x 3, without pooling.

    Args:
        width: channels of the first stage; every other one has twice as many as the one before.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__(
            _convolution(3, width),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *_stage(width, width, stride=1),
            *_stage(width, 2 * width, stride=2),
            *_stage(2 * width, 4 * width, stride=2),
            *_stage(4 * width, 8 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, 10),
        )


class _Block(nn.Module):
    """relu(x + f(x)), where f is two convolutions; a strided projection of x where f changes its shape."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _convolution(channels_in, channels_out, stride),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            _convolution(channels_out, channels_out),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            projection = nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, features: Tensor) -> Tensor:
        return relu(self.shortcut(features) + self.residual(features))


def _stage(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    return [_Block(channels_in, channels_out, stride), _Block(channels_out, channels_out, stride=1)]


def _convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)
