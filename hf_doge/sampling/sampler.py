"""The order in which a model sees its domains: a function of the seed, the weights and the number of the draw."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from hf_doge.checks import check_choice, check_count, check_number, check_seed
from hf_doge.sampling.domains import DomainIndex
from hf_doge.sampling.permutation import derive_key, pass_keys, permute
from hf_doge.sampling.phases import first_draw_of, read_phases
from hf_doge.sampling.saved_state import find_misfit_of_state
from hf_doge.sampling.schedule import DRAW_MODES, UNITS, DrawSchedule
from hf_doge.sampling.token_draws import RowTokens, refuse_tokenless_domains
from hf_doge.sampling.weights import cap_shares, refuse_empty_domains, to_shares

_FIRST_CHUNK = 2**8  # indices computed at a time: few at first, so that the first comes at once
_CHUNK = 2**14
MOST_DRAWS = 2**62  # of one stream, so that its numbers fit in 64 bits


class DomainWeightedSampler(Sampler[int]):
    """
    Draw dataset rows from domains in given proportions, for any `DataLoader`.

    The stream of draws is a pure function of `(seed, weights, draw number)`. No generator is carried along, so every
    rank has the same stream without talking to another, any draw is reached without those before it, and a resumed run
    goes on with the very next row. Epoch `e` is draws `[e * num_samples, (e + 1) * num_samples)` of the one stream.

    Which domain a draw takes:

    - `draw="quota"`: after any number of draws n, each domain has been drawn `n * weight` times, up or down by less
      than one. (Domains with a weight below 2^-15, if there are several, by less than two; after `set_weights` the
      draws owed are carried over, and a violent change can need a moment to pay them.) Equal weights give plain turns.
    - `draw="iid"`: each draw is independent of the others, as in the DoGE paper.

    With `unit="tokens"` weights are shares of the tokens, not of the examples: by quota, after any number of draws each domain has
    had its weight of all tokens drawn, up or down by about the longest example; independent draws have it on average. Where all
    rows have as many tokens the two units are one. A jump then costs what adding up a pass of the domains costs.

    Inside a domain, rows come in shuffled order without replacement; when the domain is exhausted it is shuffled again.
    This goes on across epochs and across changes of the weights. A domain of weight 0 is never drawn.

    Under accelerate every process takes the whole stream and keeps its batches of it, so all processes together train
    on the stream that one would train on with the same global batch: micro-batch by micro-batch, and by rank inside
    each. For that `num_samples` must be a multiple of the global micro-batch (examples of all processes), since
    otherwise `even_batches` fills the epoch's last batch with the epoch's first rows; [`DomainWeightedTrainer`] sees
    to it. In a loop of your own, pass `set_epoch` to the sampler itself: `skip_first_batches` does not pass it on.

    Memory is O(num_domains) if domains are contiguous ranges of rows. A jump costs at most one block of 65,536 draws
    (`"quota"`), or O(num_domains * log(draws)) and one count per half billion draws (`"iid"`).

    Args:
        domains ([`DomainIndex`], mapping of `str` to `int`, or sequence of labels):
            The domains of the rows. A mapping gives the number of rows of domains that lie one after the other;
            anything else is one label per row, such as `dataset["domain"]`.
        weights (mapping of `str` to `float`, object whose `mean` is one, such as `DomainWeights`, or sequence):
            Finite, `>= 0`, not all 0, in any scale. A sequence follows the order of the domains' names. Or phases, such as
            `[(0, weights), (0.8, other_weights)]`: which weights hold from which part of the `num_epochs` on.
        num_samples (`int`, *optional*):
            Draws in an epoch, `> 0`. Defaults to the number of rows.
        seed (`int`, *optional*, defaults to 0):
            Of the order inside the domains and of the `"iid"` draws.
        draw (`str`, *optional*, defaults to `"quota"`):
            `"quota"` or `"iid"`.
        max_epochs_per_domain (`float`, *optional*):
            How often a domain may be repeated in `num_epochs` epochs, `> 0`. Heavier domains get the weight at which
            they reach the limit and the others share the rest in proportion, which is logged; see `effective_weights`.
            Kept to within one draw by `"quota"`, on average by `"iid"`. Draws after the `num_epochs` have no limit.
        num_epochs (`float`, *optional*, defaults to 1):
            Epochs of `num_samples` that will be drawn, `> 0`; only `max_epochs_per_domain` and phases need it.
        step_size (`int`, *optional*, defaults to 1):
            Draws of a training step; a phase begins with a whole step.
        unit (`str`, *optional*, defaults to `"examples"`):
            What weights are shares of: `"examples"` or `"tokens"`.
        lengths (sequence of `int`, *optional*):
            Tokens of each row, in the order of the data set; needed for `unit="tokens"`.

    Raises:
        `ValueError`: for weights that are negative, not finite or all 0, for unknown or missing domains, for a domain
        with positive weight and no example, or if the limit on epochs leaves too few draws. Domains are named.

    Example:
    ```python
    >>> sampler = DomainWeightedSampler(dataset["domain"], {"wiki": 0.7, "code": 0.3}, seed=0)
    >>> loader = DataLoader(dataset, sampler=sampler, batch_size=32)
    ```
    """

    def __init__(
        self,
        domains: DomainIndex | Mapping[str, int] | Sequence[str | int],
        weights: Mapping[str, float] | Sequence[float] | Any,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        draw: str = "quota",
        max_epochs_per_domain: float | None = None,
        num_epochs: float = 1,
        step_size: int = 1,
        unit: str = "examples",
        lengths: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        if isinstance(domains, Mapping):
            domains = DomainIndex.from_sizes(domains)
        elif not isinstance(domains, DomainIndex):
            domains = DomainIndex.from_labels(domains)
        self.domains = domains
        self.num_samples = check_count(
            "num_samples", domains.num_rows if num_samples is None else num_samples, most=MOST_DRAWS
        )
        self.seed = check_seed("seed", seed)
        self.draw = check_choice("draw", draw, DRAW_MODES)
        self.max_epochs_per_domain = check_number(
            "max_epochs_per_domain", max_epochs_per_domain, above=0, finite=False, optional=True
        )
        self.num_epochs = check_number("num_epochs", num_epochs, above=0, most=MOST_DRAWS / self.num_samples)
        self.epoch = 0
        self._position = 0
        self._is_resuming = False
        self._domain_keys = np.array([derive_key(self.seed, "order", name) for name in domains.names], dtype=np.uint64)
        self.step_size = check_count("step_size", step_size)
        self.unit = check_choice("unit", unit, UNITS)
        self._tokens = self._read_tokens(lengths)
        self._schedule = self._plan(weights)

    def _plan(self, weights: Any) -> DrawSchedule:
        """The schedule of the phases."""
        first_draws, by_phase = zip(*read_phases(weights), strict=True)
        size = {"num_planned": self.num_planned, "step_size": self.step_size}
        borders = [*(first_draw_of(fraction, **size) for fraction in first_draws), self.num_planned]
        counts = np.zeros(len(self.domains.names), np.int64)
        schedule = self._make_schedule(self._read_weights(by_phase[0], first_draw=0, counts=counts, end=borders[1]))
        for number, phase in enumerate(by_phase[1:], start=1):
            first_draw = borders[number]
            counts = schedule.counts(first_draw)
            shares = self._read_weights(phase, first_draw=first_draw, counts=counts, end=borders[number + 1])
            schedule.append(first_draw, shares, counts=counts)
        return schedule

    def _make_schedule(self, shares: np.ndarray) -> DrawSchedule:
        return DrawSchedule(shares, draw=self.draw, seed=self.seed, tokens=self._tokens)

    def _read_tokens(self, lengths: Sequence[int] | np.ndarray | None) -> RowTokens | None:
        """Tokens of the rows, where shares of them are not shares of the examples."""
        if self.unit == "examples":
            return None
        if lengths is None:
            raise ValueError(
                "Weights in tokens need the tokens of each row, but `lengths` is None. Pass one number for each row, or set "
                "`unit='examples'`."
            )
        tokens = RowTokens(self.domains, lengths, self._domain_keys)
        return None if tokens.are_equal and tokens.totals.any() else tokens

    @property
    def effective_weights(self) -> dict[str, float]:
        """The weights last set, as they are drawn: summing to 1, after `max_epochs_per_domain`."""
        return self._by_name(self._schedule.pieces[-1].shares)

    @property
    def next_draw(self) -> int:
        """Number, in the whole stream, of the next draw to hand out. A `DataLoader` has taken those before."""
        return self.epoch * self.num_samples + self._position

    @property
    def num_planned(self) -> int:
        """Draws in `num_epochs`, over which `max_epochs_per_domain` counts."""
        return round(self.num_epochs * self.num_samples)

    def weights_at(self, draw: int) -> dict[str, float]:
        """The weights that `draw` of the whole stream is drawn by, summing to 1."""
        return self._by_name(self._schedule.piece_at(draw).shares)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        """
        The rows of the current epoch, from its start, or once from where `load_state_dict` put it.

        When the last row has been taken the next epoch becomes the current one, so that a loop without `set_epoch`
        does not repeat itself.
        """
        if not self._is_resuming:
            self._position = 0
        self._is_resuming = False
        epoch, position, chunk = self.epoch, self._position, _FIRST_CHUNK
        while position < self.num_samples:
            draw = epoch * self.num_samples + position
            rows = self.indices(draw, draw + min(chunk, self.num_samples - position))
            pieces = self._schedule.pieces
            num_pieces = len(pieces)
            for row in rows.tolist():
                position += 1
                self._position = position
                yield row
                if len(pieces) > num_pieces:  # `set_weights`: the rest of the chunk is void
                    break
            chunk = min(2 * chunk, _CHUNK)
        self.epoch = epoch + 1
        self._position = 0

    def set_epoch(self, epoch: int) -> None:
        """
        Move to the start of an epoch.

        The one exception: between `load_state_dict` or `seek` and the next iteration, the epoch that was loaded keeps
        the position that was loaded, since training loops announce the epoch they resume in.
        """
        epoch = check_count("epoch", epoch, least=0, most=MOST_DRAWS // self.num_samples)
        if self._is_resuming and epoch == self.epoch:
            return
        self.epoch = epoch
        self._position = 0
        self._is_resuming = False

    def seek(self, draw: int) -> None:
        """
        Go on with a draw of the whole stream: the next iteration starts there and ends with that draw's epoch.

        A loader prepared by accelerate announces an epoch of its own count at each iteration, 0 in a new process, and
        another epoch than the one sought starts from its first row. So tell it: `loader.set_epoch(sampler.epoch)`.

        Args:
            draw (`int`): `>= 0`. After `n` optimizer steps, `n` times the examples of a step over all processes.
        """
        self.epoch, self._position = divmod(check_count("draw", draw, least=0, most=MOST_DRAWS), self.num_samples)
        self._is_resuming = True

    def set_weights(
        self, weights: Mapping[str, float] | Sequence[float] | Any, *, first_draw: int | None = None
    ) -> None:
        """
        Use other weights from a draw on. Earlier draws, also those of the current epoch, stay as they are.

        A `DataLoader` takes rows ahead of the training step, by as much as its workers and prefetching allow. For a
        stream that does not depend on that, give a `first_draw` that no loader has reached; see
        [`~hf_doge.sampling.prefetch.prefetch_lead`]. Every process has to do the same.

        Args:
            weights (as for the constructor):
                The new weights.
            first_draw (`int`, *optional*):
                Number in the whole stream, epoch times `num_samples` plus position. Not before the draws handed out,
                nor before the last weights began. Defaults to the next draw to hand out.
        """
        first_draw = check_count(
            "first_draw", self.next_draw if first_draw is None else first_draw, least=-MOST_DRAWS, most=MOST_DRAWS
        )
        earliest = max(self.next_draw, self._schedule.pieces[-1].first_draw)
        if first_draw < earliest:
            raise ValueError(
                f"`first_draw` must be at least {earliest}, since the draws before are handed out or planned under the "
                f"weights set last, but got {first_draw}."
            )
        counts = self._schedule.counts(first_draw)
        self._schedule.append(
            first_draw, self._read_weights(weights, first_draw=first_draw, counts=counts), counts=counts
        )

    def indices(self, start: int, stop: int) -> np.ndarray:
        """
        Rows of draws `[start, stop)` of the whole stream, under the weights known now.

        Returns:
            `np.ndarray` of `int64` and shape `(stop - start,)`.
        """
        domain_ids, ranks = self._schedule.draws(start, stop)
        sizes = self.domains.sizes[domain_ids]
        passes, positions = np.divmod(ranks, sizes)
        keys = pass_keys(self._domain_keys[domain_ids], passes)
        return self.domains.rows(domain_ids, permute(positions, sizes, keys))

    def domain_ids(self, start: int, stop: int) -> np.ndarray:
        """Domains of draws `[start, stop)`, as positions in `domains.names`: `int64` of shape `(stop - start,)`."""
        return self._schedule.draws(start, stop)[0]

    def domain_counts(self, draw: int) -> dict[str, int]:
        """How often each domain is drawn before `draw` of the whole stream."""
        return self._by_name(self._schedule.counts(draw))

    def fingerprint(self) -> str:
        """
        Digest of all that the stream depends on, to the last bit, whatever the place in it.

        Processes with different fingerprints would each train on a part of a stream of their own.
        """
        state = {name: value for name, value in self.state_dict().items() if name not in ("epoch", "position")}
        return hashlib.blake2b(json.dumps([state, self.domains.fingerprint()]).encode(), digest_size=16).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """
        All that the stream and the place in it depend on, ready for JSON.

        The place is behind the rows handed out, including those a `DataLoader` has taken ahead of the training step.
        """
        return {
            **({} if self.unit == "examples" else {"unit": self.unit, "tokens": self._digest_tokens()}),
            "seed": self.seed,
            "draw": self.draw,
            "num_samples": self.num_samples,
            "domains": self._by_name(self.domains.sizes),
            "epoch": self.epoch,
            "position": self._position,
            "schedule": [
                {
                    "first_draw": piece.first_draw,
                    "weights": self._by_name(piece.shares),
                    "domain_counts": self._by_name(piece.counts),
                }
                for piece in self._schedule.pieces
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Take up a stream where `state_dict` left it. The next iteration goes on from there, later ones as usual.

        The weights are those of the state, whatever the constructor was given.

        Raises:
            `ValueError`: if the state is of other domains, sizes, seed, `draw` or `num_samples`, or damaged; what differs is named.
        """
        if misfit := find_misfit_of_state(state, self.domains.names):
            raise ValueError(f"The state must be as `state_dict` gives it, but {misfit}. Resume from another one.")
        sizes = self._by_name(self.domains.sizes)
        if list(state["domains"]) != list(sizes):
            gone, new = sorted(state["domains"].keys() - sizes), sorted(sizes.keys() - state["domains"])
            difference = f"without {gone} and with {new} besides" if gone or new else "in another order"
            raise ValueError(
                f"The state must be of the same domains, but the data has them {difference}. Resume with the data the "
                "state was saved with."
            )
        resized = {name: (size, sizes[name]) for name, size in state["domains"].items() if size != sizes[name]}
        if resized:
            raise ValueError(
                f"The domains must have as many rows as when the state was saved, but (then, now) are {resized}. "
                "Resume with the data the state was saved with."
            )
        saved = {"unit": "examples", "tokens": None, **state}
        own = {name: getattr(self, name) for name in ("seed", "draw", "num_samples", "unit")}
        for name, value in {**own, "tokens": self._digest_tokens()}.items():
            if saved[name] != value:
                raise ValueError(
                    f"The state was saved with `{name}` {saved[name]!r}, but this sampler has {value!r}. "
                    "Make it with the same."
                )
        first, *others = state["schedule"]
        schedule = self._make_schedule(self._from_names(first["weights"], np.float64))
        for piece in others:
            counts = self._from_names(piece["domain_counts"], np.int64)
            schedule.append(piece["first_draw"], self._from_names(piece["weights"], np.float64), counts=counts)
        self._schedule = schedule
        self.epoch, self._position = state["epoch"], state["position"]
        self._is_resuming = True

    def _digest_tokens(self) -> str | None:
        if self._tokens is None:
            return None
        return hashlib.blake2b(self._tokens.content().astype("<i8").tobytes(), digest_size=8).hexdigest()

    def _read_weights(
        self, weights: Any, *, first_draw: int, counts: np.ndarray, end: int | None = None
    ) -> np.ndarray:
        """Shares from what the user gave, after the limit on epochs; `counts` are the draws of each domain so far."""
        shares = to_shares(weights, self.domains.names)
        refuse_empty_domains(shares, self.domains.sizes, self.domains.names)
        if self._tokens is not None:
            refuse_tokenless_domains(shares, self._tokens.totals, self.domains.names)
        if self.max_epochs_per_domain is None:
            return shares
        num_planned = self.num_planned
        if end is not None and first_draw >= min(end, num_planned):  # a phase of no step
            return shares
        if first_draw >= num_planned:
            raise ValueError(
                f"With `max_epochs_per_domain`, weights must begin within the {num_planned} planned draws, but got "
                f"`first_draw` {first_draw}. Raise `num_epochs`."
            )
        num_draws = (num_planned if end is None else end) - first_draw
        budgets = np.maximum(self.max_epochs_per_domain * self.domains.sizes - counts, 0)
        if self._tokens is None:
            return cap_shares(shares, budgets, num_draws, self.domains.names)
        capped = cap_shares(self._tokens.to_examples(shares), budgets, num_draws, self.domains.names)
        return self._tokens.from_examples(capped)

    def _by_name(self, values: np.ndarray) -> dict[str, Any]:
        return dict(zip(self.domains.names, values.tolist(), strict=True))

    def _from_names(self, values: Mapping[str, Any], dtype: type) -> np.ndarray:
        return np.array([values[name] for name in self.domains.names], dtype=dtype)
