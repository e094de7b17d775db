"""Published test errors on CIFAR-10, %, and where they are from.

A net is named as in `models.ARCHITECTURES`, with "-A", "-B" or "-C" where its shortcuts are not its
own, and "-bias<b>" where its gates do not begin at -6.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Source:
    """Where numbers are from.

    Attributes:
      name: heads a column.
      where: paper or repository.
      protocol: how they came about.
      errors: test error by net, % with its deviation where there is one, as published.
    """

    name: str
    where: str
    protocol: str
    errors: Mapping[str, str]


PAPER = Source(
    "[R]",
    "arXiv:1512.03385, Table 6",
    "at 110 layers the best of five, and mean ± deviation; plain nets read off Fig. 6, about ± 0.1",
    {
        "resnet20": "8.75",
        "resnet32": "7.51",
        "resnet44": "7.17",
        "resnet56": "6.97",
        "resnet110": "6.43 (6.61 ± 0.16)",
        "resnet1202": "7.93",
        "plain20": "9.67",
        "plain32": "10.1",
        "plain44": "11.3",
        "plain56": "13.3",
        "plain110": "> 60",
    },
)

IDENTITY_MAPPINGS = Source(
    "[I]",
    "arXiv:1603.05027, Tables 1 to 3",
    "medians of 5; exclusive gating: the best of several biases",
    {
        "resnet110": "6.61",
        "resnet110_constant_scaling": "12.35",
        "resnet110_exclusive_gating": "8.70",
        "resnet110_shortcut_gating-bias0": "12.86",
        "resnet110_shortcut_gating": "6.91",
        "resnet110_conv_shortcut": "12.22",
        "resnet110_dropout_shortcut": "fails",
        "resnet110_bn_after_addition": "8.17",
        "resnet110_relu_before_addition": "7.84",
        "resnet110_relu_only_preact": "6.71",
        "resnet110_preact": "6.37",
        "resnet164_bottleneck": "5.93",
        "resnet164_preact": "5.46",
        "resnet1001_bottleneck": "7.61",
        "resnet1001_preact": "4.92",
    },
)

OTHERS = (
    Source(
        "akamaster",
        "akamaster/pytorch_resnet_cifar10",
        "200 epochs, one run, best epoch on the test set (leakage)",
        {
            "resnet20": "8.27",
            "resnet32": "7.37",
            "resnet44": "6.90",
            "resnet56": "6.61",
            "resnet110": "6.32",
            "resnet1202": "6.18",
        },
    ),
    Source(
        "a-martyn",
        "a-martyn/resnet",
        "50k images, 164 epochs, last epoch",
        {
            "resnet20": "8.04",
            "resnet32": "7.79",
            "resnet44": "7.51",
            "resnet56": "7.46",
            "plain20": "9.69",
            "plain32": "10.04",
            "plain44": "11.56",
            "plain56": "13.07",
        },
    ),
    Source(
        "AmroAbujabal",
        "AmroAbujabal/resnet-cifar-repro",
        "64k iterations, last, 3 seeds",
        {"resnet20": "8.39 ± 0.31", "resnet56": "7.45 ± 0.69"},
    ),
    Source(
        "chenyaofo",
        "chenyaofo/pytorch-cifar-models",
        "another recipe: cosine, 200 epochs of batch 256, decay 5e-4, Nesterov, option B; last",
        {"resnet20": "7.44", "resnet32": "6.59", "resnet44": "6.15", "resnet56": "5.79"},
    ),
    Source(
        "osmr",
        "osmr/imgclsmob",
        "another recipe: heavy augmentation, long schedule, test set used as validation (leakage)",
        {"resnet20": "5.97", "resnet56": "4.52", "resnet110": "3.69", "resnet1202": "3.53"},
    ),
)

# Tables to fill: title, nets, sources beside the runs, whether to show it without any run.
TABLES = (
    (
        "Residual nets [R, Table 6]",
        ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet1202"),
        (PAPER, *OTHERS),
        True,
    ),
    (
        "Plain nets [R, Fig. 6]",
        ("plain20", "plain32", "plain44", "plain56", "plain110"),
        (PAPER, OTHERS[1]),
        True,
    ),
    (
        "Shortcut options [R, §3.3]; the paper compares them on ImageNet only",
        ("resnet20", "resnet20-B", "resnet20-C", "resnet56", "resnet56-B", "resnet56-C"),
        (PAPER,),
        False,
    ),
    (
        "Shortcuts of ResNet-110 [I, Table 1]",
        (
            "resnet110",
            "resnet110_constant_scaling",
            "resnet110_exclusive_gating",
            "resnet110_shortcut_gating-bias0",
            "resnet110_shortcut_gating",
            "resnet110_conv_shortcut",
            "resnet110_dropout_shortcut",
        ),
        (IDENTITY_MAPPINGS,),
        False,
    ),
    (
        "Order of layers in ResNet-110 [I, Table 2]",
        (
            "resnet110",
            "resnet110_bn_after_addition",
            "resnet110_relu_before_addition",
            "resnet110_relu_only_preact",
            "resnet110_preact",
        ),
        (IDENTITY_MAPPINGS,),
        False,
    ),
    (
        "Pre-activation and bottlenecks [I, Table 3]",
        (
            "resnet47_bottleneck",
            "resnet110",
            "resnet110_preact",
            "resnet164_bottleneck",
            "resnet164_preact",
            "resnet1001_bottleneck",
            "resnet1001_preact",
        ),
        (IDENTITY_MAPPINGS,),
        False,
    ),
)

# What the paper's curves end at [R, Fig. 6], %: (test, training or None), read off but for the test
# errors of residual nets, which are those of Table 6.
ENDS = {
    "plain20": (9.67, 1.4),
    "plain32": (10.1, 1.4),
    "plain44": (11.3, 2.7),
    "plain56": (13.3, 5.7),
    "resnet20": (8.75, 0.5),
    "resnet32": (7.51, 0.3),
    "resnet44": (7.17, 0.2),
    "resnet56": (6.97, 0.14),
    "resnet110": (6.43, 0.1),
}

# [R, Table 6]: parameters and test error, %, of nets that are not in this project.
OTHER_NETS = {"Highway-19": (2.3e6, 7.54), "Highway-32": (1.25e6, 8.80)}
# The same of those that are.
OWN_NETS = {
    "resnet20": (269_722, 8.75),
    "resnet32": (464_154, 7.51),
    "resnet44": (658_586, 7.17),
    "resnet56": (853_018, 6.97),
    "resnet110": (1_727_962, 6.43),
    "resnet1202": (19_421_274, 7.93),
}
