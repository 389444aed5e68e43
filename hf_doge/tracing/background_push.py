"""Pushing an index while training goes on: one push at a time, of what is whole by then."""

import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class BackgroundPush:
    """
    Calls `push` in a thread of its own, whenever asked to and not already at it. A push that fails stops nothing.

    The thread does not keep the process alive: a push that is cut off has committed nothing, and can be repeated.

    Args:
        push (`Callable[[], Any]`): Pushes what is there when it is called.
        advice (`str`): How to repeat it, for who is told that it failed.
    """

    def __init__(self, push: Callable[[], Any], *, advice: str) -> None:
        self._push, self._advice = push, advice
        self._state = threading.Condition()
        self._is_wanted = self._is_running = False
        self._error: BaseException | None = None

    def request(self) -> None:
        """There is something new. Returns at once."""
        with self._state:
            self._is_wanted = True
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="hf_doge-push", daemon=True).start()

    def finish(self) -> None:
        """Wait until everything that was asked for is pushed, or has failed: then warn."""
        with self._state:
            if self._is_running:
                logger.info("Waiting for the push of the influence index to end.")
            self._state.wait_for(lambda: not self._is_running)
            error, self._error = self._error, None
        if error is not None:
            warnings.warn(
                f"The influence index was not pushed: {error} It is whole on disk. {self._advice}", stacklevel=3
            )

    def _run(self) -> None:
        while True:
            with self._state:
                if not self._is_wanted:
                    self._is_running = False
                    self._state.notify_all()
                    return
                self._is_wanted = False
            error = None
            try:
                self._push()
            # Whatever it was, training goes on, and whoever waits is told: a panic of the client's native code is no
            # `Exception`, and no key stroke comes to this thread.
            except BaseException as problem:
                logger.info("A push of the influence index failed: %s", problem, exc_info=True)
                error = problem
            with self._state:
                self._error = error
