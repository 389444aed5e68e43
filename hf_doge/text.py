"""Text of others, read so that it does no harm and shown so that it cannot pretend to be ours; and what others may read of us."""

import json
import re
from collections.abc import Hashable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

# What a reader does not see, or what changes how its surroundings look: controls (C0, C1), line and paragraph separators,
# bidirectional controls, fillers and zero-width characters, tags, surrogates. The joiners that Persian or Hindi need stay
# between letters of such a script.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ufeff\uffa0\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e01ef\ud800-\udfff]"
    "|[\u200c\u200d](?![^\x00-\u02ff])|(?<![^\x00-\u02ff])[\u200c\u200d]"
)
# libyaml's, ten times as fast, where PyYAML was built with it.
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DEEPEST = 100  # levels of JSON and YAML
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
    # Signed addresses.
    re.compile(rf"([?&][\w-]*(?:signature|credential|sig|security-token)=){_VALUE}", flags=re.IGNORECASE),
    re.compile(r"(\bbearer\s+)([\w.~+/=-]{8,})", flags=re.IGNORECASE),
)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
_HUB_NAME = re.compile(r"(datasets/)?[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(@[A-Za-z0-9._/-]+)?")
_SEPARATORS = re.compile(r"(://|[=,;:'\"\n]+)")  # paths come behind them, as in `--data=wiki:/home/me/x`
_PATH_START = r"(?:~[\w.-]*|\.{1,2}|[A-Za-z]:)?[/\\]+(?=[^\s/\\])"
_PATH = re.compile(rf"(?<!\S){_PATH_START}\S+|(?<!\S)~[\w.-]+(?!\S)")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: Any, *, keep: str = "") -> str:
    """
    Text with every character that a terminal would obey, or that is invisible, as JSON escapes it.

    Args:
        text (`Any`): Text, or anything that has a `str`.
        keep (`str`): Characters that stay, such as line breaks where the text may have several lines.
    """
    return UNSEEN.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), str(text))


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
    return _TOKEN.sub(lambda match: f"{''.join(re.findall('^[A-Za-z]+[_-]?', match[0]))}{HIDDEN}", text)


def holds_token(text: str) -> bool:
    """Whether a text surely has an access token: shorter words that begin alike are none."""
    return _SURE_TOKEN.search(text) is not None


def names_secret(name: str, *, flag: bool = False) -> bool:
    """Whether the value of a flag of a command (else of a key) is secret."""
    return (_SECRET_FLAG if flag else _SECRET_KEY).fullmatch(name) is not None


def _hidden(value: str) -> str:
    quote = value[0] if value[0] in "'\"" else ""
    return f"{quote}{HIDDEN}{quote}"


def public_name(name: Any) -> str | None:
    """
    Name of a model, tokenizer or dataset as others may read it: a name on the Hub as it is, of a local path its last part.

    A name counts as a path if it is absolute, does not have the form `name` or `owner/name`, or is here on disk.
    """
    if name is None or not str(name):
        return None
    text = hide_secrets(str(name))
    return text if _HUB_NAME.fullmatch(text) and not _exists(text) else _last_part(text)


def public_content(content: Any) -> Any:
    """
    What JSON holds with every text that is a path cut to its last part, every path within a text likewise, and without
    tokens. For configurations of models, which name where they were loaded from, and arguments.
    """
    if isinstance(content, Mapping):
        return {
            key: HIDDEN if value and isinstance(value, str) and names_secret(str(key)) else public_content(value)
            for key, value in content.items()
        }
    if isinstance(content, list | tuple):
        return [public_content(value) for value in content]
    return without_paths(content) if isinstance(content, str) else content


def without_paths(text: str) -> str:
    """Text without tokens, and with every path in it cut to its last part."""
    text = hide_secrets(text)
    pieces = _SEPARATORS.split(text)
    for position in range(0, len(pieces), 2):
        piece, before = pieces[position], pieces[position - 1] if position else ""
        if before == "://" and not pieces[position - 2].endswith("file"):
            continue  # an address
        if re.match(_PATH_START, piece) or before == "://":
            pieces[position] = _last_part(piece)  # whole: names of folders may hold spaces
        else:
            pieces[position] = _PATH.sub(lambda match: _last_part(match[0]), piece)
    return "".join(pieces)


def _last_part(path: str) -> str:
    """The last part of a path or an address, without query and fragment."""
    parts = [part for part in re.split(r"[/\\]+", re.sub(r"[?#].*", "", path)) if part.strip("~.:")]
    return parts[-1] if parts else "."


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # too long for the file system, so no file
        return False


def parse_json(text: bytes, *, source: str) -> Any:
    """
    `json.loads` that refuses repeated keys, and what no honest file holds: thousands of levels, numbers of thousands of digits.

    Raises:
        ValueError: Malformed, too deep, or a key stands twice in one object. Names `source`.
    """
    try:
        content = json.loads(text, object_pairs_hook=partial(_unique, source=source))
        _refuse_deep(content)
    except RepeatedKeyError:
        raise
    except RecursionError as error:
        raise ValueError(f"{source!r} must be JSON of at most {_DEEPEST} levels, but has more.") from error
    except ValueError as error:
        raise ValueError(f"{source!r} must be JSON in UTF-8, but it is not: {printable(error)}.") from error
    return content


def check_yaml(text: bytes | str) -> None:
    """
    Look at YAML before anything is made of it.

    Raises:
        yaml.YAMLError: It is malformed, has too many levels (at which libyaml's reader ends the process), or its references
            would unfold to far more than is written.
    """
    most = 100_000 + 10 * len(text)
    sizes: dict[str, int] = {}  # of what has been read under a name; a reference into itself finds none
    open_nodes: list[tuple[str | None, int]] = []  # name, and entries counted until it began
    count = 0
    for event in yaml.parse(text, Loader=SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_nodes.pop()
            sizes |= {} if name is None else {name: count - before + 1}
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"the reference *{event.anchor} must be to something that ends before it")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent) and event.anchor is not None:
            sizes[event.anchor] = 1
        count += 1
        if len(open_nodes) > _DEEPEST:
            raise yaml.YAMLError(f"it has more than {_DEEPEST} levels")
        if count > most:
            raise yaml.YAMLError("its references unfold to far more than is written")


def _unique(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    refuse_repeated((key for key, _ in pairs), source)
    return dict(pairs)


class RepeatedKeyError(ValueError):
    """A key stands twice in one mapping."""


def refuse_repeated(keys: Iterable[Hashable], source: str) -> None:
    """
    Raises:
        RepeatedKeyError: A key stands twice. Names `source`.
    """
    seen = set()
    for key in keys:
        if key in seen:
            raise RepeatedKeyError(
                f"Keys must be unique, but {key!r:.200} stands twice in {source!r}. Keep one of them."
            )
        seen.add(key)


def _refuse_deep(content: Any) -> None:
    level = [content]
    for _ in range(_DEEPEST + 1):
        level = [
            one
            for value in level
            if isinstance(value, dict | list)
            for one in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise RecursionError
