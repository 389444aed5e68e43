"""
Less padding in a batch that is recorded: its examples by similar length, each group as wide as its longest.

Rows of an example depend neither on the batch nor on padding, which [`EmbeddingGradientRecorder`] has checked before any
of this is used; so the padded batch may be run in pieces, and what padding would have cost is saved.

Shapes: B = batch size, T = positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# A forward and backward of next to nothing costs some 30 microseconds per module, in which one thread multiplies and adds
# half a million times in each direction (a small BERT on one core); twice that, for what goes with a group besides.
_WORK_PER_MODULE = 1_000_000
_LEAST_TOKENS = 64  # matrices of fewer lines are multiplied more slowly


@dataclass
class Group:
    """
    Some examples of a batch without the positions that are padding in all of them.

    Attributes:
        examples (`torch.Tensor` of shape `(n,)`): Which of the batch.
        positions (`torch.Tensor` of shape `(t,)`): Which positions are left.
        batch (`dict`): Of these alone.
    """

    examples: Tensor
    positions: Tensor
    batch: dict[str, object]


def padding_mask(batch: Mapping[str, object]) -> Tensor | None:
    """The `attention_mask (B, T)` of `input_ids (B, T)`, as bool; None if the batch has no such mask."""
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    if not isinstance(mask, Tensor) or input_ids.ndim != 2 or mask.shape != input_ids.shape:
        return None
    return mask.bool()


@dataclass(frozen=True)
class Layout:
    """
    How the tensors of a batch are laid out, learned from one and expected of others.

    Attributes:
        keys (`frozenset[str]`): All keys of the batch.
        by_example (`frozenset[str]`): Those of tensors of shape `(B, ...)`.
        by_position (`frozenset[str]`): Those of tensors of shape `(B, T, ...)` or `(1, T, ...)`.
    """

    keys: frozenset[str]
    by_example: frozenset[str]
    by_position: frozenset[str]

    @classmethod
    def of(cls, batch: Mapping[str, object]) -> "Layout":
        """The layout of a batch of several examples."""
        batch_size, num_positions = batch["input_ids"].shape
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim > 0}
        return cls(
            keys=frozenset(batch),
            by_example=frozenset(key for key, value in tensors.items() if len(value) == batch_size),
            by_position=frozenset(
                key
                for key, value in tensors.items()
                if value.ndim > 1 and value.shape[1] == num_positions and len(value) in (1, batch_size)
            ),
        )

    def fits(self, batch: Mapping[str, object]) -> bool:
        """Whether a batch has these keys, of these shapes."""
        if self.keys != frozenset(batch):
            return False
        found = Layout.of(batch)
        return self.by_example <= found.by_example and self.by_position <= found.by_position


def tokens_per_call(model: nn.Module) -> float:
    """
    How many tokens the model could work through in the time that one more call of it takes, about. Infinite where it
    runs on an accelerator, which does more tokens at once in the same time.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu":
        return float("inf")
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    work = sum(
        parameter.numel()
        for parameter in model.parameters()
        if id(parameter) not in looked_up or id(parameter) in multiplied
    )
    calls = sum(1 for _ in model.modules())
    return max(_LEAST_TOKENS, torch.get_num_threads() * _WORK_PER_MODULE * calls / max(work, 1))


def split_by_length(batch: Mapping[str, object], mask: Tensor, *, layout: Layout, cost: float) -> list[Group]:
    """
    The batch in groups of similar length, such that what they cost together is least.

    Args:
        batch (`Mapping`): Which `layout` fits.
        mask (`torch.Tensor` of shape `(B, T)`): True where there is no padding.
        layout ([`Layout`]): Which of its tensors have lines and positions.
        cost (`float`): What a group costs, in tokens, see [`tokens_per_call`].

    Returns:
        `list[Group]`: every example is in one of them.
    """
    lengths = mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    groups, start = [], 0
    for stop in _borders(lengths[order].tolist(), cost):
        examples = order[start:stop].sort().values
        positions = mask[examples].any(dim=0).nonzero().squeeze(1)
        groups.append(Group(examples, positions, _take(batch, examples, positions, layout)))
        start = stop
    return groups


def _borders(lengths: list[int], cost: float) -> list[int]:
    """Where the groups of ascending `lengths` end, such that the sum of `cost + size * longest` is least."""
    ends = [end for end in range(1, len(lengths) + 1) if end == len(lengths) or lengths[end] != lengths[end - 1]]
    if cost == float("inf"):
        return ends[-1:]
    least = {0: (0.0, 0)}  # end of a group -> what all up to there cost, and where the group begins
    for end in ends:
        longest = lengths[end - 1]
        least[end] = min((total + cost + (end - start) * longest, start) for start, (total, _) in least.items())
    borders, end = [], len(lengths)
    while end:
        borders.append(end)
        end = least[end][1]
    return borders[::-1]


def _take(batch: Mapping[str, object], examples: Tensor, positions: Tensor, layout: Layout) -> dict[str, object]:
    batch_size, num_positions = batch["input_ids"].shape
    taken = dict(batch)
    if len(examples) < batch_size:
        taken |= {key: taken[key][examples] for key in layout.by_example}
    if len(positions) < num_positions:
        taken |= {key: taken[key][:, positions] for key in layout.by_position}
    return taken
