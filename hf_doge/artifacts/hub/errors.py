"""What the Hub and the network answer, told apart: worth another try, or to be told to the user with what to do."""

from collections.abc import Iterator
from typing import Any, NoReturn
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
from huggingface_hub.utils import get_token

from hf_doge.text import hide_secrets, printable

# httpx in huggingface_hub 1, httpx2 in 2: whichever it is, its errors of transport have this class.
TransportError: type[Exception] = HfHubHTTPError.__mro__[1]

_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_EXPIRED = {400, 401, 403, 404, 410}  # what stores answer when the address they signed is too old
_MOVED = {409, 412}


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
    The error to raise for what another try would not mend, with what to do; itself where it says enough.

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
            f"A repository must be named like 'user/name', but got {repo_id!r}: {hide_secrets(str(error))}"
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
            f"There is no {url} that your token can see. Check the name, and that it is a *dataset* repository; for a"
            f" private one log in by `hf auth login`, or set HF_TOKEN. {said}"
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
    return next((one.response for one in _chain(error) if getattr(one, "response", None) is not None), None)


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
    message = next((one.server_message for one in _chain(error) if getattr(one, "server_message", None)), None)
    return f"(The Hub says: {hide_secrets(_on_one_line(str(message)))})" if message else ""
