"""Text of others, shown so that it cannot pretend to be ours: one helper for a terminal; `artifacts.cards` has those for Markdown."""

import re
from collections.abc import Iterable
from typing import Any

# What a reader does not see, or what changes how its surroundings look: controls (C0, C1), line and paragraph separators,
# bidirectional controls, fillers and zero-width characters, tags, surrogates. The joiners that Persian or Hindi need stay
# between letters of such a script.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ufeff\uffa0\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e01ef\ud800-\udfff]"
    "|[\u200c\u200d](?![^\x00-\u02ff])|(?<![^\x00-\u02ff])[\u200c\u200d]"
)
HIDDEN = "***"
# What begins an access token (of the Hub first), and at least how many characters follow.
_TOKEN_FORMS = (
    r"(?<![A-Za-z0-9])(?:(?:hf_|hf_app_|api_org_|gh[pousr]_)[A-Za-z0-9]{%d,}|(?:hf_oauth_|hf_jwt_|github_pat_|glpat-)[\w.-]{%d,}"
    r"|sk-(?:proj-)?[A-Za-z0-9_]{%d,})"
)
_TOKEN, _SURE_TOKEN = (re.compile(_TOKEN_FORMS % ((least,) * 3)) for least in (20, 30))
_SECRET_NAME = (
    r"(?:\w+[_-])?(?:(?:hub|hf|api|access|auth|bearer)[_-]?token|password|passwd|secret|api[_-]?key|secret[_-]?key)"
)
_SECRET_KEY = re.compile(rf"{_SECRET_NAME}|token", flags=re.IGNORECASE)
_SECRET_FLAG = re.compile(rf"-{{1,2}}(?:{_SECRET_NAME}|(?:\w+[_-])?token)", flags=re.IGNORECASE)
_VALUE = r"""("[^"]*"|'[^']*'|[^\s&#"',;)]+)"""
_GIVEN = (
    re.compile(rf"(?<!\S)(-{{1,2}}(?:{_SECRET_NAME}|token)(?:=|\s+)){_VALUE}", flags=re.IGNORECASE),  # --hub_token X
    re.compile(rf"((?<![\w-])(?:{_SECRET_NAME}|token)=){_VALUE}", flags=re.IGNORECASE),  # HF_TOKEN=X, ?token=X
    re.compile(
        rf"([?&][\w-]*(?:signature|credential|sig|security-token)=){_VALUE}", flags=re.IGNORECASE
    ),  # signed addresses
    re.compile(r"(\bbearer\s+)([\w.~+/=-]{8,})", flags=re.IGNORECASE),
)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: Any, *, keep: str = "") -> str:
    """
    Text with every character that a terminal would obey, or nobody would see, as JSON escapes it.

    Args:
        text (`Any`): Of anything its `str`.
        keep (`str`): Characters that stay, such as line breaks where the text may have several lines.
    """
    return _UNSEEN.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), str(text))


def require_printable(what: str, names: Iterable[Any]) -> None:
    """
    Args:
        what (`str`): What the names are of, as a message begins: "Domain names".
        names (`Iterable`): Those that are strings are looked at.

    Raises:
        ValueError: A name has a character that [`printable`] would escape. The message shows it escaped.
    """
    for name in names:
        if isinstance(name, str) and _UNSEEN.search(name):
            raise ValueError(
                f"{what} must have no line breaks, control characters or characters that cannot be seen, but got"
                f' "{printable(name)[:200]}". Rename it.'
            )


def _escaped(character: str) -> str:
    if character in _SHORT:
        return _SHORT[character]
    units = character.encode("utf-16-be", errors="surrogatepass")
    return "".join(f"\\u{units[start : start + 2].hex()}" for start in range(0, len(units), 2))


def hide_secrets(text: str) -> str:
    """Text without access tokens, what follows `--hub_token`, `token=` and their like, and the user of an address."""
    text = _CREDENTIALS.sub("", text)
    for pattern in _GIVEN:
        text = pattern.sub(lambda match: f"{match[1]}{_hidden(match[2])}", text)
    return _TOKEN.sub(lambda match: f"{re.match('[A-Za-z]+[_-]?', match[0])[0]}{HIDDEN}", text)


def holds_token(text: str) -> bool:
    """Whether a text surely has an access token: shorter words that begin alike are none."""
    return _SURE_TOKEN.search(text) is not None


def names_secret(name: str, *, flag: bool = False) -> bool:
    """Whether a flag of a command (else a key) is one whose value nobody may read."""
    return (_SECRET_FLAG if flag else _SECRET_KEY).fullmatch(name) is not None


def _hidden(value: str) -> str:
    quote = value[0] if value[0] in "'\"" else ""
    return f"{quote}{HIDDEN}{quote}"
