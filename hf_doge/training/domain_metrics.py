"""What a training tells of its domains: loss, tokens, share and epochs of each, added up without a word to other processes."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from hf_doge.entries import COUNT, NAMES, Kind, find_misfit, vector_of
from hf_doge.gradients.vectors import Reduction
from hf_doge.training.checkpoints import TRAINER_STATE_FILE
from hf_doge.training.loss_watch import SeenLosses
from hf_doge.training.packing import EXAMPLE_LENGTHS, owners_in_line
from hf_doge.training.saved_entries import damaged, read_entries

STATE_KEY = "domain_metrics"  # in the Trainer's state, and so in `trainer_state.json` of a checkpoint

logger = logging.getLogger(__name__)

# Shapes: K = domains, B = examples of a micro-batch, R = rows of its loss.


class DomainMeter:
    """
    Adds up loss, tokens and examples by domain, on the device of the training and for this process alone, until they are
    collected: then one message sums them over the processes.

    Args:
        names (`Sequence[str]`): The domains.
        device (`torch.device`): Of the training.
        sizes (`Sequence[int]`, *optional*): Rows of each domain, for its epochs.
        unit (`str`): What shares are of, `"examples"` or `"tokens"`.

    Attributes:
        problem (`str` or `None`): Why the losses of domains are not known, once that is so.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device,
        *,
        sizes: Sequence[int] | None = None,
        unit: str = "examples",
    ) -> None:
        self.unit = unit
        self.names = tuple(names)
        self.device = device
        self.sizes = None if sizes is None else torch.as_tensor(sizes)
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        # Since the last collection; the last place is for examples of other domains.
        self._losses, self._tokens, self._examples = (
            torch.zeros(len(self.names) + 1, dtype=dtype, device=self.device)
            for dtype in (exact, torch.int64, torch.int64)
        )
        num_domains = len(self.names)
        self._all_tokens = torch.zeros(num_domains, dtype=torch.int64)  # before that, of all processes
        self._all_examples = torch.zeros(num_domains, dtype=torch.int64)
        self._strays = torch.zeros((), dtype=torch.int64, device=self.device)  # labels of no example
        self.problem: str | None = None
        self._counts_tokens = True

    def add(self, domain_ids: Tensor, seen: SeenLosses, inputs: Mapping[str, Any]) -> None:
        """
        A micro-batch of this process.

        Args:
            domain_ids (`torch.Tensor` of shape `(B,)`, int64): Domain of each example; -1 for another one.
            seen ([`SeenLosses`]): What its forward showed.
            inputs (`Mapping`): What the model was given.
        """
        # Nothing here waits for the device.
        domain_ids = domain_ids.to(self.device, non_blocking=True)
        domain_ids = torch.where(domain_ids < 0, len(self.names), domain_ids)
        self._examples.index_add_(0, domain_ids, torch.ones_like(domain_ids))
        self._counts_tokens = self._counts_tokens and seen.counted is not None
        if seen.problem is not None and self.problem is None:
            self._give_up(seen.problem)
        if seen.counted is None:
            return
        rows = seen.counted.to(self.device)
        owners, problem = self._owners(domain_ids, rows, inputs)
        if owners is None:
            if self._counts_tokens:
                self._give_up(problem, tokens_too=True)
            return
        _add_rows(self._tokens, rows, owners)
        if self.problem is None and seen.losses is not None:
            _add_rows(self._losses, torch.where(rows, seen.losses.to(self.device), 0), owners)

    def _owners(self, domain_ids: Tensor, rows: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor | None, str]:
        """Domains of the examples, or of all rows where the examples lie end to end in one line; or what is wrong."""
        lines, num_rows = _num_lines(inputs), len(rows)
        if EXAMPLE_LENGTHS in inputs:
            num_tokens, nobody = inputs["position_ids"].numel(), len(self.names)
            if num_rows not in (num_tokens, num_tokens - 1):
                return None, f"it has {num_rows} terms in a line of {num_tokens} tokens"
            return owners_in_line(domain_ids, inputs[EXAMPLE_LENGTHS], num_tokens, nobody=nobody)[:num_rows], ""
        if lines == len(domain_ids):
            if num_rows % lines == 0:
                return domain_ids, ""
            return None, f"it has {num_rows} terms in a batch, which do not divide among {lines} examples"
        positions = inputs.get("position_ids")
        if lines == 1 and isinstance(positions, Tensor) and num_rows in (positions.numel(), positions.numel() - 1):
            example = (positions.flatten()[:num_rows].to(self.device) == 0).cumsum(0) - 1
            self._strays += (rows & (example >= len(domain_ids))).sum()  # padding at the end has no labels
            return domain_ids[example.clamp(max=len(domain_ids) - 1)], ""
        return None, f"the collator made {lines} lines of {len(domain_ids)} examples"

    def _give_up(self, problem: str, *, tokens_too: bool = False) -> None:
        self.problem = problem
        self._counts_tokens = self._counts_tokens and not tokens_too
        told = "tokens, share and epochs" if self._counts_tokens else "share and epochs"
        if Reduction().process_index > 0:
            return
        logger.warning(
            "The loss of each domain is not logged, since %s. The logs tell %s of the domains. Evaluate on one dataset per "
            "domain (`eval_dataset={name: dataset}`) to see their losses.",
            problem,
            told,
        )

    def _gather(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, tokens and examples since the last collection, over all processes, each of shape `(K,)` on the CPU."""
        if self._strays > 0:
            self._give_up("an example holds several texts, which are not told apart", tokens_too=True)
            self._strays.zero_()
        flags = torch.tensor([self.problem is not None, not self._counts_tokens])
        parts = [sums[:-1] for sums in (self._losses, self._tokens, self._examples)] + [flags]
        numbers = Reduction().sum(torch.cat([part.to(self.device, self._losses.dtype) for part in parts])).cpu()
        losses, tokens, examples, flags = numbers.split([len(self.names)] * 3 + [2])
        # What one process cannot see is a sum without its part, on all of them.
        if flags[0]:
            self.problem = self.problem or "another process could not see it"
        self._counts_tokens = self._counts_tokens and not bool(flags[1])
        return losses, tokens.long(), examples.long()

    def collect(self, epochs: Mapping[str, float] | None = None) -> dict[str, float]:
        """
        What to log, on all processes together; the loss and the share are since the last collection, the rest since the start.

        Args:
            epochs (`Mapping[str, float]`, *optional*): Of each domain, where they are known better than by counting.

        Returns:
            `dict[str, float]`: `domain_loss/...` (mean cross-entropy of the tokens that count, of domains that had one),
            `domain_tokens/...` (labels that count), `domain_share/...` (of the examples), `domain_epochs/...`.
        """
        losses, tokens, examples = self._gather()
        self._all_tokens += tokens
        self._all_examples += examples
        for sums in (self._losses, self._tokens, self._examples):
            sums.zero_()
        logs = {}
        for k, name in enumerate(self.names):
            if self.problem is None and tokens[k] > 0:
                logs[f"domain_loss/{name}"] = float(losses[k] / tokens[k])
        if self._counts_tokens:
            logs |= self._by_name("domain_tokens", self._all_tokens)
        drawn = tokens if self.unit == "tokens" else examples
        if drawn.any():
            logs |= self._by_name("domain_share", drawn.double() / drawn.sum())
        if epochs is None and self.sizes is not None:
            return logs | self._by_name("domain_epochs", self._all_examples / self.sizes)
        return logs | {f"domain_epochs/{name}": value for name, value in (epochs or {}).items()}

    def _by_name(self, kind: str, values: Tensor) -> dict[str, float]:
        return {f"{kind}/{name}": value for name, value in zip(self.names, values.tolist(), strict=True)}

    def save(self, state: TrainerState) -> None:
        """Put what was added up into the Trainer's state, which a checkpoint holds; on all processes together."""
        losses, tokens, examples = self._gather()
        numbers = {
            "names": list(self.names),
            "losses": losses.tolist(),
            "tokens": tokens.tolist(),
            "examples": examples.tolist(),
            "all_tokens": self._all_tokens.tolist(),
            "all_examples": self._all_examples.tolist(),
        }
        by_name: Any = state.stateful_callbacks  # a dict, which transformers declares as what it is made of
        by_name[STATE_KEY] = numbers

    def load(self, numbers: Mapping[str, Any] | None) -> None:
        """Go on from what [`save`] put into a checkpoint; from nothing for `None` or other domains."""
        self.reset()
        if numbers is None or tuple(numbers["names"]) != self.names:
            return
        self._all_tokens += torch.tensor(numbers["all_tokens"])
        self._all_examples += torch.tensor(numbers["all_examples"])
        if Reduction().process_index == 0:  # the sums of all processes, of which one goes on
            for name in ("losses", "tokens", "examples"):
                sums = getattr(self, f"_{name}")
                sums[:-1] += torch.tensor(numbers[name], dtype=sums.dtype).to(self.device)


def saved_in(state: TrainerState) -> dict[str, Any] | None:
    """What [`DomainMeter.save`] put into the state of a run that was resumed."""
    by_name: Any = state.stateful_callbacks
    return by_name.get(STATE_KEY) if state.global_step > 0 else None


def read_saved(checkpoint: Path | None) -> dict[str, Any] | None:
    """What [`DomainMeter.save`] put into a checkpoint, if it did."""
    if checkpoint is None:
        return None
    path = checkpoint / TRAINER_STATE_FILE
    callbacks = read_entries(path).get("stateful_callbacks") or {}
    numbers = callbacks.get(STATE_KEY) if isinstance(callbacks, dict) else None
    if numbers is None:
        return None
    misfit = find_misfit(numbers, {"names": NAMES}, whose=f"in `{STATE_KEY}` its")
    if misfit is None:
        vector = vector_of(len(numbers["names"]))
        counts = Kind(vector.words, lambda value: vector.is_met(value) and all(map(COUNT.is_met, value)))
        kinds = {"losses": vector, **dict.fromkeys(("tokens", "examples", "all_tokens", "all_examples"), counts)}
        misfit = find_misfit(numbers, kinds, whose=f"in `{STATE_KEY}` its")
    if misfit is not None:
        raise damaged(path, misfit)
    return numbers


def _add_rows(sums: Tensor, values: Tensor, owners: Tensor) -> None:
    """Add values of rows, shape `(R,)`, to the sums of their domains; `owners` are of the rows or of the examples."""
    if len(owners) < len(values):
        values = values.view(len(owners), -1).sum(dim=1, dtype=sums.dtype)
    sums.index_add_(0, owners, values.to(sums.dtype))


def _num_lines(inputs: Mapping[str, Any]) -> int:
    """Lines of a micro-batch: of what the model reads, or else of the first tensor."""
    named = [inputs[name] for name in ("input_ids", "inputs_embeds", "labels") if isinstance(inputs.get(name), Tensor)]
    tensors = named or [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0]
    return len(tensors[0]) if tensors else 0
