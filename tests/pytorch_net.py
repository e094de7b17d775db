"""The paper's nets in plain PyTorch: to convert, to compare with, to time."""


def make_net(depth: int):
    """The CIFAR ResNet of `depth` = 6n+2 layers with option A, as PyTorch initialises it."""
    return build((depth // 6,) * 3, (16, 32, 64))


def build(
    sizes: tuple[int, ...],
    widths: tuple[int, ...],
    *,
    classes: int = 10,
    imagenet: bool = False,
    expansion: int = 1,
    strided: int = 1,
    option: str = "A",
    zeros: str = "split",
):
    """A ResNet with `sizes` blocks in its stages; `imagenet`: with torchvision's stem and names.

    Basic blocks have `expansion` 1, bottlenecks 4. Convolution number `strided` of a block, from 1,
    has the stride. `option` is "A" or "B"; the `zeros` of A are "split" or all "after".
    """
    from torch import nn
    from torch.nn import functional

    shortcut, head = ("downsample", "fc") if imagenet else ("shortcut", "linear")

    class Block(nn.Module):
        def __init__(self, width_in, width, stride):
            super().__init__()
            kernels = (3, 3) if expansion == 1 else (1, 3, 1)
            channels = [width_in, *[width] * (len(kernels) - 1), width * expansion]
            self.layers, self.stride = len(kernels), stride
            for i, kernel in enumerate(kernels, 1):
                own = stride if i == strided else 1
                conv = nn.Conv2d(*channels[i - 1 : i + 1], kernel, own, kernel // 2, bias=False)
                setattr(self, f"conv{i}", conv)
                setattr(self, f"bn{i}", nn.BatchNorm2d(channels[i]))
            new = channels[-1] - width_in
            before = new // 2 if zeros == "split" else 0
            self.pad = (0, 0, 0, 0, before, new - before)
            self.changes = bool(stride != 1 or new)
            if option == "B" and self.changes:
                conv = nn.Conv2d(width_in, channels[-1], 1, stride, bias=False)
                setattr(self, shortcut, nn.Sequential(conv, nn.BatchNorm2d(channels[-1])))

        def forward(self, x):
            y = x
            for i in range(1, self.layers + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = functional.relu(y) if i < self.layers else y
            if hasattr(self, shortcut):
                x = getattr(self, shortcut)(x)
            elif self.changes:
                x = functional.pad(x[:, :, :: self.stride, :: self.stride], self.pad)
            return functional.relu(x + y)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, widths[0], *(7, 2, 3) if imagenet else (3, 1, 1), bias=False)
            self.bn1 = nn.BatchNorm2d(widths[0])
            width_in = widths[0]
            for stage, (size, width) in enumerate(zip(sizes, widths, strict=True), 1):
                blocks = []
                for block in range(size):
                    blocks.append(Block(width_in, width, 2 if stage > 1 and block == 0 else 1))
                    width_in = width * expansion
                setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            setattr(self, head, nn.Linear(width_in, classes))

        def forward(self, x):
            x = functional.relu(self.bn1(self.conv1(x)))
            if imagenet:
                x = functional.max_pool2d(x, 3, 2, 1)
            for stage in range(1, len(sizes) + 1):
                x = getattr(self, f"layer{stage}")(x)
            return getattr(self, head)(x.mean(dim=(2, 3)))

    return Net()
