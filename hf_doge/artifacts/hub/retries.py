"""Trying again: a while later, and for longer each time."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from hf_doge.artifacts.hub.errors import asked_delay, is_transient, shortly

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """
    How long to keep trying.

    Attributes:
        tries (`int`): Further tries of each request.
        first_wait (`float`): Seconds before the first of them; doubled each time.
        longest_wait (`float`): Seconds; if the Hub asks for more, its error is raised.
        sleep (`Callable`).
    """

    tries: int = 6
    first_wait: float = 1.0
    longest_wait: float = 300.0
    sleep: Callable[[float], None] = time.sleep

    def delays(self) -> Iterator[float]:
        """Seconds before each further try."""
        yield from (min(self.first_wait * 2**number, self.longest_wait) for number in range(self.tries))

    def next_delay(self, error: Exception, delays: Iterator[float], *, also: bool = False) -> float | None:
        """
        Seconds to wait before another try, or `None` if there is none to be made.

        Args:
            error (`Exception`): Of the last try.
            delays (`Iterator[float]`): From [`~Patience.delays`].
            also (`bool`): Whether this error is worth another try in any case.
        """
        if not (also or is_transient(error)):
            return None
        delay, asked = next(delays, None), asked_delay(error) or 0.0
        return None if delay is None or asked > self.longest_wait else max(delay, asked)

    def call(self, action: Callable[[], Result]) -> Result:
        """
        Call until it succeeds, fails in a way that another try does not mend, or all tries are used up.

        Args:
            action (`Callable`): May be called any number of times.
        """
        delays = self.delays()
        while True:
            try:
                return action()
            except Exception as error:  # what the Hub answered, or did not: from four libraries
                delay = self.next_delay(error, delays)
                if delay is None:
                    raise
                logger.info("The Hub did not answer as it should (%s). Trying again in %.3g s.", shortly(error), delay)
            self.sleep(delay)
