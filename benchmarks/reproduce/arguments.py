"""What an experiment is given: [`Arguments`]."""

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.reproduce.store import PartStore

SCALES = ("tiny", "small", "gpu")


@dataclass(frozen=True)
class Arguments:
    """
    What `benchmarks.reproduce.<name>.run` is given.

    Attributes:
        name (`str`): The experiment.
        data_dir (`Path`): Folder with the subfolders `lm`, `multilingual` and `classification`.
        output_dir (`Path`): The experiment's own folder for models, learned weights and finished parts.
        scale (`str`): One of `SCALES`.
        store (`PartStore`): The finished parts.
        seeds (`tuple[int, ...]`, *optional*): Seeds asked for; `None` for those of the experiment at this scale.
        stages (`tuple[str, ...]`, *optional*): Stages asked for; `None` for all.
    """

    name: str
    data_dir: Path
    output_dir: Path
    scale: str
    store: PartStore
    seeds: tuple[int, ...] | None = None
    stages: tuple[str, ...] | None = None

    @property
    def device(self) -> torch.device:
        """Where a Trainer puts its models."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def choose_stages(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """
        The stages to run, in the experiment's order.

        Raises:
            `ValueError`: if one that was asked for is unknown.
        """
        unknown = sorted(set(self.stages or ()) - set(known))
        if unknown:
            raise ValueError(f"`--stages` of {self.name} must be among {list(known)}, but got {unknown}.")
        return tuple(stage for stage in known if self.stages is None or stage in self.stages)
