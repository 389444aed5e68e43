"""Whether what a model is given in training is what the collator made: rows of the DataLoader against those of a forward."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_doge.gradients.example_losses import ANSWERS, IGNORE_INDEX

_COMPARED = ("input_ids", "labels", *ANSWERS)


class TrainedBatches:
    """
    Stands below accelerate's adapter of a train DataLoader and keeps a copy of the tokens and labels of its last batches,
    before anything of the Trainer has them. Batches pass unchanged. What it is asked besides, it asks the DataLoader.

    Args:
        dataloader (`DataLoader`): As accelerate prepared it, not yet iterated. Of another one nothing is seen.
        num_kept (`int`): How many batches are read before the first of them has been trained on, at most.
    """

    def __init__(self, dataloader: Any, *, num_kept: int) -> None:
        self._dataloader = dataloader
        self._kept: deque[dict[str, Tensor]] = deque(maxlen=num_kept)
        self._is_below = hasattr(dataloader, "base_dataloader")
        self.base_dataloader: Any = dataloader.base_dataloader if self._is_below else dataloader
        if self._is_below:
            dataloader.base_dataloader = self

    def __getattr__(self, name: str) -> Any:
        if name == "base_dataloader":  # not there yet
            raise AttributeError(name)
        return getattr(self.base_dataloader, name)

    # As accelerate's adapter has it, which asks for ours.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.base_dataloader)

    def __len__(self) -> int:
        return len(self.base_dataloader)

    def __iter__(self) -> Iterator[Any]:
        return map(self._keep, self.base_dataloader)

    def close(self) -> None:
        """Leave the DataLoader as it was, also where another one of these has been put below it since."""
        above: Any = self._dataloader
        while self._is_below and above.base_dataloader is not self:
            above = above.base_dataloader
        if self._is_below:
            above.base_dataloader = self.base_dataloader
        self._is_below = False
        self._kept.clear()

    def other_input(self, given: Mapping[str, Any]) -> str | None:
        """
        Which input is not as the collator made it, if one is.

        Args:
            given (`Mapping`): What the model is called with; some examples of the last batches, whose padding may be cut.
        """
        if not self._kept:
            return None
        made = list(self._kept)
        names = [
            name
            for name in _COMPARED
            if all(name in batch for batch in made) and (_has_lines(given, name) or name == "input_ids")
        ]
        if "input_ids" in names and not _has_lines(given, "input_ids"):
            return "input_ids"
        masked = all("attention_mask" in batch for batch in made) and isinstance(given.get("attention_mask"), Tensor)
        for count in range(1, len(names) + 1):
            dtypes = {name: given[name].dtype for name in names[:count]}
            known = {line for batch in made for line in _lines(batch, dtypes, masked=masked)}
            if not known.issuperset(_lines(given, dtypes, masked=masked)):
                return names[count - 1]
        return None

    def _keep(self, batch: Any) -> Any:
        if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            names = [name for name in (*_COMPARED, "attention_mask") if _has_lines(batch, name)]
            self._kept.append({name: batch[name].detach().clone() for name in names})
        return batch


def _has_lines(batch: Mapping[str, Any], name: str) -> bool:
    """Whether an input has one line for each example."""
    values, ids = batch.get(name), batch.get("input_ids")
    return isinstance(values, Tensor) and values.ndim > 0 and (not isinstance(ids, Tensor) or len(values) == len(ids))


def _lines(batch: Mapping[str, Any], dtypes: Mapping[str, torch.dtype], *, masked: bool) -> list[bytes]:
    """Some inputs of each example, without its padding."""
    values = {name: batch[name].detach().cpu().to(dtype).double() for name, dtype in dtypes.items()}
    mask = batch["attention_mask"].cpu() != 0 if masked else None
    lines = []
    for place in range(len(next(iter(values.values())))):
        parts = []
        for name, value in values.items():
            own = value[place]
            if mask is not None and own.shape == mask[place].shape:
                own = own[mask[place]]
            elif name == "labels" and own.ndim == 1 and bool((own != IGNORE_INDEX).any()):
                labelled = (own != IGNORE_INDEX).nonzero()
                own = own[labelled.min() : labelled.max() + 1]
            parts.append(own.flatten().numpy().tobytes())
        lines.append(b"".join(parts))
    return lines
