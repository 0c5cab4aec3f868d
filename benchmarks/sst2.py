"""What the experiments on SST-2 share: the sentences, and the interval of an accuracy.

The data is not in the repository: `sst2_{train,dev,test}.tsv`, a sentence, a tab and 0 (negative)
or 1 (positive) a line, in the folder of `common.add_data_option`.
"""

import math
from pathlib import Path
from typing import NamedTuple

from lora_jax.files import replacing

ROOT = Path(__file__).parent.parent
SPLITS = ("train", "dev", "test")


class Sentence(NamedTuple):
    """One line of a file.

    Attributes:
      text: tokenized words with spaces between them, as SST-2 has them.
      label: 0 negative, 1 positive.
      source: `sst2_dev.tsv:12`.
    """

    text: str
    label: int
    source: str


def read(folder: Path, split: str) -> list[Sentence]:
    """The sentences of a split.

    Raises:
      SystemExit: the file is not there, or a line is not as it should be.
    """
    path = folder / f"sst2_{split}.tsv"
    if not path.is_file():
        raise SystemExit(
            f"{path}: no such file; say where the data is: --data DIR or LORA_JAX_DATA"
        )
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        text, tab, label = line.rpartition("\t")
        if not tab or not text or label not in ("0", "1"):
            raise SystemExit(
                f"{path}:{number}: expected a sentence, a tab and 0 or 1, got {line!r}"
            )
        found.append(Sentence(text, int(label), f"{path.name}:{number}"))
    return found


def wilson(correct: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which stays within 0 and 1."""
    p, z2 = correct / total, z * z / total
    middle = (p + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(p * (1 - p) / total + z2 / (4 * total))
    return middle - half, middle + half


def percent(share: float, interval: tuple[float, float] | list[float] | None = None) -> str:
    """`81.2 % [78.5, 83.7]`."""
    text = f"{100 * share:.1f} %"
    return (
        text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    )


def shrink(path: Path) -> None:
    """Writes a PNG anew with 160 colors: fewer bytes, and to the eye the same lines."""
    from PIL import Image

    with Image.open(path) as image:
        few = image.convert("RGB").quantize(160)
    with replacing(path) as new:
        few.save(new, format="PNG", optimize=True)
