"""
What the Hub and the network answer, told apart: worth another try, or to be told to the user with what to do. And waiting:
for another try, or for the process that pushes for all that a launcher started.
"""

import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token, validate_repo_id

from hf_doge.checks import check_flag
from hf_doge.text import hide_secrets, printable

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# httpx in huggingface_hub 1, httpx2 in 2: whichever it is, its errors of transport have this class.
TransportError: type[Exception] = HfHubHTTPError.__mro__[1]

_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_EXPIRED = {400, 401, 403, 404, 410}  # what stores answer when the address they signed is too old
_MOVED = {409, 412}
# What git refuses in the name of a branch or a tag.
_NOT_IN_GIT_NAMES = re.compile(r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|@\{|//|(^|/)\.|\.lock(/|$)|^[-/@]$|^[-/]|[/.]$|^$")
_COMMIT = re.compile("[0-9a-f]{40}")
_SECONDS_TO_BEGIN = 10 * 60.0  # of the first process, until the others no longer wait for its push
_SECONDS_BETWEEN_LOOKS = 0.1
_pushes: Counter[str] = Counter()  # of this process, by what is pushed to


class PushError(ConnectionError):
    """The Hub did not take a push, after all tries. Says what is there now; the same push again completes it."""


class FetchError(ConnectionError):
    """A download did not end, after all tries. What came is kept; the same call again goes on."""


def check_token(token: str | bool | None) -> None:
    """
    Refuse a token that no request can carry, before an error of the network's repeats it.

    Args:
        token (`str` or `bool`, *optional*): As in `huggingface_hub`; unless it is text, the one of this machine is looked at.

    Raises:
        ValueError: It is empty, or not one word of plain letters.
    """
    if token is not None and not isinstance(token, str | bool):
        raise ValueError(f"`token` must be text, True, False or None, but got a {type(token).__name__}.")
    found = token if isinstance(token, str) else None if token is False else get_token()
    if found is not None and (found.split() != [found] or not found.isascii() or not found.isprintable()):
        raise ValueError(
            "An access token of the Hub must be one word, like 'hf_...', but the one given is empty or has spaces, line breaks"
            " or other letters in it. Copy it again from https://huggingface.co/settings/tokens."
        )


def check_reading(token: str | bool | None, revision: Any) -> None:
    """[`check_token`] and [`check_git_name`] of what is about to be read."""
    check_token(token)
    check_git_name("revision", revision)


def check_git_name(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: No branch, tag or commit can be called so. In an address, `..` would lead elsewhere.
    """
    if value is not None and not (isinstance(value, str) and _NOT_IN_GIT_NAMES.search(value) is None):
        raise ValueError(f"`{name}` must be a name that git allows, such as 'v1.0', but got {value!r}.")


def check_destination(
    repo_id: Any, *, token: str | bool | None, revision: Any = None, tag: Any = None, create_pr: bool = False
) -> None:
    """
    Refuse to push to what can be none, before the Hub is asked.

    Args:
        repo_id, token, revision, tag, create_pr: See [`DomainWeights.push_to_hub`].

    Raises:
        ValueError: A name is not valid, or arguments exclude each other.
        PermissionError: There is no token.
    """
    if not isinstance(repo_id, str):
        raise ValueError(f"A repository must be named like 'user/name', but got {repo_id!r}.")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise explain(error, repo_id, action="push to") from error
    for name, value in (("revision", revision), ("tag", tag)):
        check_git_name(name, value)
        if value is not None and _COMMIT.fullmatch(value):
            raise ValueError(f"`{name}` must not look like a commit, which readers take it for, but got {value!r}.")
    check_token(token)
    check_flag("create_pr", create_pr)
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise PermissionError(
            f"To push to {repo_id!r} the Hub needs an access token with the *write* role. Log in by `hf auth login`, set"
            " HF_TOKEN, or pass `token`."
        )
    if create_pr and tag is not None:
        raise ValueError(f"A proposal cannot be tagged before it is merged: drop `tag={tag!r}` or `create_pr=True`.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(
            f"A proposal is made to `main`: drop `revision={revision!r}` or `create_pr=True`. To add to one that is open,"
            " push to its own branch, as `revision='refs/pr/1'`."
        )


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, if there is one."""
    response = _response_of(error)
    return None if response is None else response.status_code


def is_of_the_hub(url: str) -> bool:
    """Whether an address is the Hub's own, and not that of a store of large files, which signs addresses for a while."""
    from huggingface_hub import constants

    mine, other = urlsplit(constants.ENDPOINT), urlsplit(url)
    return (mine.scheme, mine.netloc) == (other.scheme, other.netloc)


def is_expired(error: BaseException) -> bool:
    """Whether a store did not take its own address any more. The Hub signs another when it is asked again."""
    response = _response_of(error)
    return response is not None and response.status_code in _EXPIRED and not is_of_the_hub(str(response.url))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a while."""
    if isinstance(error, (PushError, FetchError, OfflineModeIsEnabled, LocalTokenNotFoundError, HFValidationError)):
        return False
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT or is_expired(error)
    # Errors of transport have no answer. The store of large files says ConnectionError, or RuntimeError.
    return isinstance(error, (TransportError, ConnectionError, TimeoutError, RuntimeError))


def is_moved(error: BaseException) -> bool:
    """Whether somebody else committed in between."""
    return status_of(error) in _MOVED


def asked_delay(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait, by `Retry-After` or `ratelimit`; `None` if it does not say."""
    for one in _chain(error):
        headers = getattr(getattr(one, "response", None), "headers", {})
        wanted = headers.get("Retry-After", "")
        if wanted.isdecimal():
            return float(wanted)
        parts = dict(part.strip().partition("=")[::2] for part in headers.get("ratelimit", "").split(";"))
        if parts.get("r") == "0" and parts.get("t", "").isdecimal():
            return float(parts["t"])
    return None


def explain(error: Exception, repo_id: str, *, action: str) -> Exception:
    """
    The error to raise for what another try would not fix, with what to do; the same error where it says enough.

    Args:
        error (`Exception`): From `huggingface_hub`, about what the Hub itself answered.
        repo_id (`str`): The dataset repository.
        action (`str`): `"push to"` or `"read"`.
    """
    status, said = status_of(error), _server_message(error)
    url = f"the dataset repository {repo_id!r}"
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError(
            f"Cannot {action} {url}: HF_HUB_OFFLINE is set. Unset it, or fetch the artifact once while online."
        )
    if isinstance(error, HFValidationError):
        return ValueError(
            f"A repository must be named like 'user/name', but got {repo_id!r}: {printable(hide_secrets(str(error)))}"
        )
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"Access to {url} must be asked for on its page, and given, before you can {action} it. {said}"
        )
    if isinstance(error, RevisionNotFoundError) and action == "push to":
        return FileNotFoundError(
            f"`revision` must be a branch of {url}, or an open pull request as 'refs/pr/1': tags and commits stay what they"
            f" are. {said}"
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"There is no such branch, tag or commit in {url}. {said}")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"There is no dataset repository {repo_id!r} that your token can see. Check the name, and that it is none of a model;"
            f" for a private one log in by `hf auth login`, or set HF_TOKEN. {said}"
        )
    if status == 401:
        return PermissionError(
            f"The Hub does not know the access token, so you cannot {action} {url}. Log in again by `hf auth login`, or set"
            f" HF_TOKEN. {said}"
        )
    if status == 403:
        need = "a token with the *write* role for it" if action == "push to" else "a token that may read it"
        return PermissionError(
            f"Your token may not {action} {url}. Use {need} (https://huggingface.co/settings/tokens), or a name of your own."
            f" {said}"
        )
    if isinstance(error, BadRequestError) or status == 400:
        return ValueError(f"The Hub refuses to {action} {url} as it was asked to: {said or error}")
    if status is not None:
        wrong = "does not know what it was asked for" if status == 404 else f"answered with status {status}"
        kind = FileNotFoundError if status == 404 else ConnectionError
        return kind(
            f"Cannot {action} {url}: the Hub {wrong}. Check the name, HF_ENDPOINT and your plan's limits. {said}"
        )
    return error


def raise_explained(error: Exception, repo_id: str, *, action: str) -> NoReturn:
    """Raise what [`explain`] makes of an error, from within its handler."""
    explained = explain(error, repo_id, action=action)
    if explained is error:
        raise error
    raise explained from error


def _response_of(error: BaseException) -> Any | None:
    """Uploads to the store of large files wrap it in errors of their own."""
    responses = (getattr(one, "response", None) for one in _chain(error))
    return next((one for one in responses if one is not None), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def shortly(error: BaseException) -> str:
    """An error in less than a line."""
    status = status_of(error)
    if status is not None:
        return f"HTTP status {status}{' of the store of large files' if is_expired(error) else ''}"
    return f"{type(error).__name__}: {hide_secrets(_on_one_line(str(error)))[:200]}"


def _on_one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _server_message(error: Exception) -> str:
    messages = (getattr(one, "server_message", None) for one in _chain(error))
    message = next((one for one in messages if one), None)
    return f"(The Hub says: {hide_secrets(_on_one_line(str(message)))})" if message else ""


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
        return (min(self.first_wait * 2**number, self.longest_wait) for number in range(self.tries))

    def next_delay(self, error: Exception, delays: Iterator[float], *, also: bool = False) -> float | None:
        """
        Seconds to wait before another try, or `None` if there is none to be made.

        Args:
            error (`Exception`): The error of the last try.
            delays (`Iterator[float]`): From [`~Patience.delays`].
            also (`bool`): Whether this error is worth another try in any case.
        """
        if not (also or is_transient(error)):
            return None
        delay, asked = next(delays, None), asked_delay(error) or 0.0
        return None if delay is None or asked > self.longest_wait else max(delay, asked)

    def call(self, action: Callable[[], Result]) -> Result:
        """
        Call until it succeeds, fails in a way that another try does not fix, or all tries are used up.

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


def is_first_process() -> bool:
    """Whether this process pushes for all that `accelerate launch` or `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def told_to_others(place: str) -> Iterator[None]:
    """On the first process, around a push: the others hear when it begins and ends, well or not."""
    store = _store()
    if store is None:
        yield
        return
    _pushes[place] += 1
    keys = [_key(place, what) for what in ("begun", "ended")]
    with suppress(RuntimeError):  # nobody is left to hear it
        store.set(keys[0], "")
    try:
        yield
    finally:
        with suppress(RuntimeError):
            store.set(keys[1], "")


def wait_for_first(place: str) -> None:
    """
    On the others: wait for the end of the push that the first process makes by the same call. Where it makes none, or the
    processes have no group to hear of each other, this returns.

    Raises:
        PushError: The first process ended before its push did.
    """
    store = _store()
    if store is None:
        return
    _pushes[place] += 1
    end = time.monotonic() + _SECONDS_TO_BEGIN
    try:
        while not store.check([_key(place, "ended")]):
            if time.monotonic() > end and not store.check([_key(place, "begun")]):
                logger.warning("The first process does not push to %s, so this one goes on.", place)
                return
            # Not `store.wait`, which keeps all other threads of this process from the store.
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    except RuntimeError as error:  # the store is gone, and with it who held it
        raise PushError(f"The process that pushes to {place} ended before its push did. Push again.") from error


def _key(place: str, what: str) -> str:
    return f"hf_doge/push/{place}/{_pushes[place]}/{what}"


def _store() -> Any | None:
    distributed = sys.modules.get("torch.distributed")  # a process that has not imported it has no group
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return None
    # torch has no public name for the store it was set up with.
    return distributed.distributed_c10d._get_default_store() if distributed.get_world_size() > 1 else None
