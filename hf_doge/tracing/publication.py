"""An influence index as it goes to the Hub: no local paths, the models it needs next to it, text only if it may be seen."""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import CommitInfo

from hf_doge.artifacts.cards.card import read_card
from hf_doge.artifacts.cards.index import index_card
from hf_doge.artifacts.hub.publication import Publication
from hf_doge.artifacts.hub.push import ensure_repository, push_publication
from hf_doge.artifacts.influence.manifest import (
    CARD_FILE,
    CHECKPOINTS_FILE,
    MANIFEST,
    TABLE_FOLDERS,
    checkpoints_table,
    examples_files,
    parse_config,
    read_config,
    recorded_checksums,
    require_checkpoints,
)
from hf_doge.artifacts.parquet import read_parquet, to_parquet
from hf_doge.checks import check_flag, check_names
from hf_doge.files import sha256, to_json
from hf_doge.text import hide_secrets, parse_json, public_content, public_name
from hf_doge.tracing.examples import LABEL_COLUMNS
from hf_doge.tracing.models import MODELS, checkpoint_folders

logger = logging.getLogger(__name__)

# What a search needs of a saved model. Optimizer, random states and arguments stay behind: they are pickles, or have paths.
_MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken", "preprocessor_config.json"),
    "processor_config.json",
)


def index_publication(
    folder: Path,
    config: Mapping[str, Any],
    repo_id: str,
    *,
    redact_text: bool = False,
    keep_columns: Sequence[str] = (),
    include_models: bool = True,
    publish_text: bool = False,
) -> Publication:
    """
    The files of an index for the Hub. Those of gradients and models are read when they are sent, not now.

    Args:
        folder (`Path`): Of the index.
        config (`Mapping`): Its config.json, as it is to be published.
        repo_id (`str`): Where it goes to; the card says so.
        redact_text (`bool`): Leave out all columns of the examples that are not numbers, dates or labels.
        keep_columns (`Sequence[str]`): Columns to publish anyway.
        include_models (`bool`): Publish the weights of the checkpoints that are on this machine.
        publish_text (`bool`): Publish the texts also where the repository holds an index without them.

    Raises:
        ValueError: `keep_columns` names no column, or is given without `redact_text`.
    """
    check_flag("redact_text", redact_text)
    check_flag("include_models", include_models)
    redact_text, publish_text = check_flag("redact_text", redact_text), check_flag("publish_text", publish_text)
    keep_columns = [keep_columns] if isinstance(keep_columns, str) else keep_columns
    keep_columns = list(check_names(keep_columns, what="`keep_columns`")) if keep_columns else []
    if keep_columns and not redact_text:
        raise ValueError(f"`keep_columns` goes with `redact_text=True`, but got {list(keep_columns)} without it.")
    files: dict[str, bytes | Path] = {}
    checkpoints = []
    for checkpoint in config["checkpoints"]:
        path, model_files = _published_models(checkpoint, folder, include_models=include_models)
        checkpoints.append({**checkpoint, "path": path})
        files |= model_files
    checksums = {path: checksum for path, checksum in config["files"].items() if path != CHECKPOINTS_FILE}
    checksums |= recorded_checksums(config)
    files |= {path: folder / path for path in checksums}
    rewritten = {CHECKPOINTS_FILE: checkpoints_table(checkpoints)}
    if redact_text:
        rewritten |= _redacted_examples(folder, config, keep_columns)
    recorded = {**config["files"], **{path: sha256(content) for path, content in rewritten.items()}}
    published = public_content({**config, "checkpoints": checkpoints, "files": recorded})
    published["redacted"] = redact_text or bool(config.get("redacted"))
    files |= {**rewritten, MANIFEST: to_json(published)}
    card = index_card(
        published,
        folder,
        files=rewritten,
        repo_id=repo_id,
        redacted=published["redacted"],
        draft=read_card(folder / CARD_FILE),
    )
    return Publication(
        files,
        manifest=MANIFEST,
        owned=_is_owned,
        check_manifest=_check_of(repo_id, redacted=published["redacted"], publish_text=publish_text),
        card=card,
        checksums={path: checksum for path, checksum in checksums.items() if path not in rewritten},
    )


def push_index_folder(
    folder: Path,
    repo_id: str,
    *,
    redact_text: bool = False,
    keep_columns: Sequence[str] = (),
    include_models: bool = True,
    publish_text: bool = False,
    commit_message: str | None = None,
    **options: Any,
) -> CommitInfo | None:
    """Push the checkpoints of an index that are whole by now. See [`InfluenceIndex.push_to_hub`] for the arguments."""
    config = read_config(folder)
    require_checkpoints(config, str(folder))
    publication = index_publication(
        folder,
        config,
        repo_id,
        redact_text=redact_text,
        keep_columns=keep_columns,
        include_models=include_models,
        publish_text=publish_text,
    )
    message = commit_message or f"Upload influence index, {len(config['checkpoints'])} checkpoints"
    return push_publication(publication, repo_id, commit_message=message, **options)


def prepare_index_push(
    repo_id: str, *, redact_text: bool = False, token: str | bool | None, private: bool | None
) -> None:
    """
    Make the repository now, so that what would refuse a later push does so before the work.

    Raises:
        PermissionError, ValueError, FileExistsError:
            As [`push_publication`]. A Hub that does not answer is no reason: it may later.
    """
    check = _check_of(repo_id, redacted=redact_text, publish_text=False)
    try:
        ensure_repository(repo_id, manifest=MANIFEST, check_manifest=check, token=token, private=private)
    except ConnectionError as error:
        logger.warning("%s The index is pushed at the end if that has changed by then.", error)


def _check_of(repo_id: str, *, redacted: bool, publish_text: bool) -> Callable[[bytes], None]:
    """What [`Publication`] asks of the config.json that is there."""

    def check(content: bytes) -> None:
        there = bool(parse_config(content, source=f"{MANIFEST} of {repo_id}").get("redacted"))
        if there and not redacted and not publish_text:
            raise PermissionError(
                f"The index in {repo_id!r} was published without the texts of its examples, and this push would publish them."
                " Nothing was pushed. Pass `redact_text=True` (`--redact_text`) to leave them out again, or"
                " `publish_text=True` (`hf-doge push --publish_text`) if everybody who sees the repository may read them."
            )
        if redacted and not there:
            warnings.warn(
                f"This push takes the texts out of the examples, but earlier commits of {repo_id!r} still hold the texts."
                " Delete the repository and push again, if nobody is to read them.",
                stacklevel=2,
            )

    return check


def _is_owned(path: str) -> bool:
    """Whether a path in the repository is of an index: a table, or what we publish of a model. All else is of others."""
    top, _, rest = path.partition("/")
    if top in TABLE_FOLDERS:
        return rest.endswith(".parquet")
    name = rest.rpartition("/")[2]
    return top == MODELS and any(fnmatchcase(name, pattern) for pattern in _MODEL_FILES)


def _published_models(
    checkpoint: Mapping[str, Any], folder: Path, *, include_models: bool
) -> tuple[str | None, dict[str, bytes | Path]]:
    """Where a reader of the repository finds the model of a checkpoint, and its files, if they go there."""
    source = next(checkpoint_folders(checkpoint, folder), None)
    if source is None:
        recorded = checkpoint["path"]
        if recorded and not Path(recorded).is_absolute() and not recorded.startswith(f"{MODELS}/"):
            return recorded, {}  # a name on the Hub
        logger.warning(
            "The model of checkpoint %r is not there any more, so it is not published. Who searches the index must pass it.",
            checkpoint["name"],
        )
        return None, {}
    if not include_models:
        return None, {}
    models = (folder / MODELS).resolve()  # where readers look; a Trainer may save elsewhere in the folder
    inside = source.resolve().is_relative_to(models) and source.resolve() != models
    place = f"{MODELS}/{source.resolve().relative_to(models).as_posix() if inside else checkpoint['name']}"
    found = sorted({path for pattern in _MODEL_FILES for path in source.glob(pattern) if path.is_file()})
    return place, {f"{place}/{path.name}": _model_file(path) for path in found}


def _model_file(path: Path) -> bytes | Path:
    """JSON is read and written without local paths; anything else goes as it is."""
    if path.name not in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        return path
    content = parse_json(path.read_bytes(), source=str(path))
    cleaned = _without_paths(content)
    base = content.get("base_model_name_or_path")
    if base and cleaned["base_model_name_or_path"] != base:
        logger.warning(
            "The adapter %r was trained on a model that is a folder of this machine, and is not published with it. Who"
            " searches the index must pass `load_model`.",
            path.parent.name,
        )
    return path if cleaned == content else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _without_paths(content: Any, key: str = "") -> Any:
    """
    What a model's JSON says, with local paths cut to their last part where the key tells of one, or it leads into the home
    of who pushes. Any other text may be a label or a token that only looks like a path.
    """
    if isinstance(content, Mapping):
        return {name: _without_paths(value, str(name)) for name, value in content.items()}
    if isinstance(content, list):
        return [_without_paths(value, key) for value in content]
    if not isinstance(content, str):
        return content
    if key.endswith("name_or_path"):
        return public_name(content) or ""
    is_local = key.endswith(("_path", "_file", "_dir", "_folder")) or f"{Path.home()}/" in content
    return public_content(content) if is_local else hide_secrets(content)


def _redacted_examples(folder: Path, config: Mapping[str, Any], keep_columns: Iterable[str]) -> dict[str, bytes]:
    """The tables of the examples without what a person could read, or a tokenizer could make readable."""
    kept, redacted = set(keep_columns), {}
    for path, checksum in examples_files(config).items():
        if sha256(folder / path) != checksum:  # afterwards nobody could tell
            raise ValueError(
                f"{str(folder / path)!r} was altered since it was written: its sha256 is not the recorded one. Nothing was"
                " pushed. Record it again."
            )
        table = read_parquet(folder / path, str(folder / path))
        unknown = sorted(kept - set(table.column_names))
        if unknown:
            raise ValueError(f"`keep_columns` must be among {table.column_names}, but got {unknown}.")
        harmless = {field.name for field in table.schema if not _can_hold_text(field.type)}
        harmless |= {f"{name}_name" for name in harmless & {*LABEL_COLUMNS}}  # see `describe_examples`
        names = [name for name in table.column_names if name in kept | harmless]
        redacted[path] = to_parquet(_select(table, names))
    return redacted


def _can_hold_text(kind: pa.DataType) -> bool:
    """Strings, bytes, token ids and whatever nests them. Labels are numbers, their names stand with the column's type."""
    if isinstance(kind, pa.ExtensionType):
        return True
    plain = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_temporal, pa.types.is_null)
    return not any(is_kind(kind) for is_kind in plain)


def _select(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Some columns, and of what `datasets` notes about columns only theirs."""
    table = table.select(names)
    metadata = dict(table.schema.metadata or {})
    if b"huggingface" in metadata:
        noted = json.loads(metadata[b"huggingface"])
        features = noted.get("info", {}).get("features", {})
        kept = {name: features[name] for name in names if name in features}
        return table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": kept}}).encode()})
    return table.replace_schema_metadata({})
