"""Which format the weights at a path have."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.pretrained.hugging_face import HUGGING_FACE
from megafn.runtime.pretrained.megafn_checkpoint import FORMAT_OF_MEGAFN
from megafn.runtime.pretrained.mp_rank import MP_RANK
from megafn.runtime.pretrained.torch_dist import TORCH_DIST
from megafn.runtime.pretrained.weight_source import WeightFormat

# A path is of the first format that finds something there.
FORMATS: tuple[WeightFormat, ...] = (FORMAT_OF_MEGAFN, HUGGING_FACE, TORCH_DIST, MP_RANK)


@frozen(kw_only=True)
class Place:
    """Where weights lie, and which of FORMATS they have."""

    path: Path
    number: int

    @property
    def format(self) -> WeightFormat:
        return FORMATS[self.number]


def find_weights(path: str | Path) -> Place:
    """Looks at names of files only. Raises CheckpointError if there are no weights at the path."""
    path = Path(path)
    for number, candidate in enumerate(FORMATS):
        found = candidate.find(path)
        if found is not None:
            return Place(path=found, number=number)
    what = "holds no weights that can be read" if path.exists() else "does not exist"
    names = ", ".join(f"a {candidate.name}" for candidate in FORMATS)
    raise CheckpointError(f"{path} {what}: give {names}")
