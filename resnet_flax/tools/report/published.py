"""Published results on CIFAR-10, from `published.toml`."""

import pathlib
import tomllib

_DATA = tomllib.loads(pathlib.Path(__file__).with_suffix(".toml").read_text("utf-8"))

PAPER_STEPS: int = _DATA["paper_steps"]
SOURCES: dict[str, str] = _DATA["sources"]
ERRORS: dict[str, dict[str, str]] = _DATA["errors"]
TABLES: list[dict] = _DATA["tables"]
TRAINING_ERRORS: dict[str, float] = _DATA["fig6_training_errors"]
PARAMETERS: dict[str, int] = _DATA["parameters"]
HIGHWAY: list[list[float]] = _DATA["highway"]


def paper_error(model: str) -> float:
    """Test error, %, in the paper's Table 6 (plain nets: its Fig. 6)."""
    return float(ERRORS[model]["[R]"].split()[0])
