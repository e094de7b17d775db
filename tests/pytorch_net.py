"""The CIFAR nets of the paper in plain PyTorch: to convert, to compare with, to time."""


def make_net(depth: int, option: str = "A", zeros: str = "split"):
    """ResNet of 6n+2 layers as PyTorch initialises it, under the names in circulation.

    Args:
      depth: 6n+2.
      option: "A" or "B", of the shortcuts that change the shape.
      zeros: of option A: "split" before and after the old channels, or all "after" them.
    """
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, width_in, width, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            before = (width - width_in) // 2 if zeros == "split" else 0
            self.stride, self.pad = stride, (before, width - width_in - before)
            if option == "B" and stride != 1:
                conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

        def forward(self, x):
            y = functional.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            if hasattr(self, "shortcut"):
                x = self.shortcut(x)
            elif self.stride != 1:
                x = x[:, :, :: self.stride, :: self.stride]
                x = functional.pad(x, (0, 0, 0, 0, *self.pad))
            return functional.relu(x + y)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            width_in = 16
            for stage, width in enumerate((16, 32, 64), 1):
                blocks = []
                for block in range((depth - 2) // 6):
                    stride = 2 if stage > 1 and block == 0 else 1
                    blocks.append(Block(width_in, width, stride))
                    width_in = width
                setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            x = functional.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.linear(x.mean(dim=(2, 3)))

    return Net()
