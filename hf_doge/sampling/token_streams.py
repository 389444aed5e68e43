"""
Which stream gives the next example, where weights are shares of tokens: of all domains, the one that is due next.

What an example of a stream holds is known when it has been read. So a domain is due by the tokens it has given so far, and half of
what one of its examples has on average, which is estimated on the way. Everything is in a plain dict, for a resumed run to go on.
"""

from typing import Any

import numpy as np

_TOKENLESS = 1000  # examples without a token, after which a domain counts as empty


class TokenTurns:
    """
    The domain of the next draw, from the tokens of those before.

    Args:
        phases (`list[tuple[int, np.ndarray]]`): From which draw on which shares of the tokens hold; the first from draw 0.
        names (`list[str]`): The domains.
        state (`dict`): Where the place is kept, in plain values; from [`TokenTurns.start`] at the beginning.
    """

    def __init__(self, phases: list[tuple[int, np.ndarray]], names: list[str], state: dict[str, Any]) -> None:
        self._phases = phases
        self._names = names
        self._state = state

    @staticmethod
    def start(num_domains: int) -> dict[str, Any]:
        """The place before the first draw."""
        given, tokens, examples = [0.0] * num_domains, [0] * num_domains, [0] * num_domains
        return {"phase": 0, "given": given, "tokens": tokens, "examples": examples}

    def next(self, draw: int) -> tuple[int, int]:
        """Domain of a draw, and how often it was drawn before."""
        state = self._state
        while state["phase"] + 1 < len(self._phases) and self._phases[state["phase"] + 1][0] <= draw:
            self._begin(state["phase"] + 1)
        shares, given = self._phases[state["phase"]][1], np.array(state["given"])
        tokens, examples = np.array(state["tokens"]), np.array(state["examples"])
        overall = tokens.sum() / max(examples.sum(), 1)
        means = np.where(examples > 0, tokens / np.maximum(examples, 1), overall)
        dues = np.divide(given + means / 2, shares, out=np.full(len(shares), np.inf), where=shares > 0)
        domain = int(dues.argmin())
        return domain, int(examples[domain])

    def note(self, domain: int, num_tokens: int) -> None:
        """The draw was made, and its example has so many tokens."""
        state = self._state
        state["given"][domain] += num_tokens
        state["tokens"][domain] += num_tokens
        state["examples"][domain] += 1
        if state["tokens"][domain] == 0 and state["examples"][domain] >= _TOKENLESS:
            raise ValueError(
                f"A domain with a share of the tokens must have some, but the first {_TOKENLESS} examples of "
                f"{self._names[domain]!r} have none. Drop it."
            )

    def _begin(self, phase: int) -> None:
        """Other shares from here on; what a domain is owed is carried over."""
        state, before, now = self._state, self._phases[self._state["phase"]][1], self._phases[phase][1]
        given = np.array(state["given"])
        owed = before * given.sum() - given
        state.update(phase=phase, given=np.where(now > 0, -owed, 0.0).tolist())
