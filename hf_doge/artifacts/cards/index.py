"""The card of an influence index."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_doge.artifacts.cards.card import Card, TableFacts, data_header
from hf_doge.artifacts.cards.text import (
    code,
    counted,
    escape,
    file_size,
    hub_link,
    join,
    json_block,
    listing,
    part_of,
    place_of,
    render,
    revision,
    run_facts,
    sources_of,
    table,
)
from hf_doge.files import sha256
from hf_doge.gradients.layers import ChosenLayers

_CONFIGS = ("gradients", "examples", "checkpoints", "offsets", "metric", "basis")
_SETTINGS = (
    "loss_reduction",
    "loss_fn",
    "tied",
    "top_k",
    "top_k_unit",
    "record",
    "metric",
    "second_moment",
    "virtual",
    "special_tokens",
    "dtype",
    "width",
    "stored_width",
    "projection",
    "vocabulary_size",
)

_FEW_LAYERS = 12  # that a card lists

# Which uses of a matrix that is tied to the output layer its gradient is of.
_SIDES = {
    "output": " as the model predicts it",
    "full": " as the model reads it and, where the output layer is tied to the embeddings, predicts it",
    "own": " as the model reads it and, where the output layer is tied to the embeddings, predicts it",
}
_METRICS = {
    "gradient": "plain inner products of gradients{because}",
    "optimizer": "inner products divided by `sqrt(v) + eps` of Adam, which trained the model{because}",
}
# What the rows of an index in the optimizer's metric are.
_DIVIDED = {
    "optimizer": ", divided by `sqrt(sqrt(v) + eps)` of Adam, so that inner products of rows are those of the metric in which it steps"
}


def index_card(
    config: Mapping[str, Any],
    folder: str | os.PathLike,
    *,
    files: Mapping[str, bytes] | None = None,
    repo_id: str | None = None,
    redacted: bool = False,
    draft: str | None = None,
) -> Card:
    """
    The README.md of an influence index.

    Args:
        config (`Mapping`): The content of its config.json.
        folder (`str` or `os.PathLike`): Where its files lie.
        files (`Mapping[str, bytes]`, *optional*): Path in the index -> content, of files that are about to be there.
        repo_id (`str`, *optional*): The repository it will be in; without one the code in the card names a placeholder.
        redacted (`bool`): Whether the texts of the examples were taken out; the card says so.
        draft (`str`, *optional*): As of [`Card`].

    Raises:
        FileNotFoundError: A file that `config` names is not there.
    """
    paths = data_paths(config)
    folder, files = Path(folder), dict(files or {})
    recorded = _checksums(config) | {path: sha256(content) for path, content in files.items()}
    checksums = {name: [recorded[path] for path in found] for name, found in paths.items()}
    patterns = {name: _patterns(name, found) for name, found in paths.items()}
    tables = {
        name: TableFacts.of([files[path] if path in files else folder / path for path in found])
        for name, found in paths.items()
    }
    title = "Influence index" if repo_id is None else f"Influence index: {str(repo_id).rpartition('/')[2]}"
    header = {
        "pretty_name": title,
        "tags": ["hf_doge", "influence", "tracin-we", "training-data-attribution"],
        **data_header(tables, patterns, checksums, default=next(iter(tables))),
    }
    block = _render(config, tables, repo_id=repo_id, redacted=redacted)
    return Card(header, title, block, _CONFIGS, draft)


def data_paths(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Configuration -> the Parquet files that config.json names for it, in the order `load_dataset` reads them."""
    segments = [file for checkpoint in config["checkpoints"] for file in checkpoint["files"]]
    tops = sorted(config["files"])
    found = {
        "gradients": [file["path"] for file in segments],
        "examples": [path for path in tops if path.startswith("examples/")],
        "checkpoints": [path for path in tops if path.startswith("checkpoints/")],
        "offsets": [file["offsets_path"] for file in segments if file.get("offsets_path")],
        **{
            name: [file["path"] for checkpoint in config["checkpoints"] for file in checkpoint.get(name, ())]
            for name in ("metric", "basis")
        },
    }
    return {name: paths for name, paths in found.items() if paths}


def _checksums(config: Mapping[str, Any]) -> dict[str, str]:
    segments = [file for checkpoint in config["checkpoints"] for file in checkpoint["files"]]
    return {
        **config["files"],
        **{file["path"]: file["sha256"] for file in segments},
        **{
            file["path"]: file["sha256"]
            for checkpoint in config["checkpoints"]
            for name in ("metric", "basis")
            for file in checkpoint.get(name, ())
        },
        **{file["offsets_path"]: file["offsets_sha256"] for file in segments if file.get("offsets_path")},
    }


def _patterns(name: str, paths: list[str]) -> list[str]:
    """Gradients folder by folder, as a pattern over all would find checkpoints that are not whole."""
    if name in ("gradients", "offsets", "metric", "basis"):
        return list(dict.fromkeys(f"{path.rpartition('/')[0]}/*.parquet" for path in paths))
    return paths


def _render(
    config: Mapping[str, Any], tables: Mapping[str, TableFacts], *, repo_id: str | None, redacted: bool
) -> str:
    checkpoints, layers = config["checkpoints"], config.get("layers")
    columns = tables["examples"].schema.names if "examples" in tables else []
    traced, listed, facts = _traced(layers), _layers(layers, width=config["width"]), _facts(config)
    return render(
        "index.md.jinja",
        **place_of(repo_id),
        num_examples=f"{config['num_examples']:,}",
        checkpoints=table(
            {
                "checkpoint": [one["name"] for one in checkpoints],
                "step": [f"{one['step']:,}" if isinstance(one["step"], int) else "" for one in checkpoints],
                "epoch": [f"{one['epoch']:g}" if one.get("epoch") is not None else "" for one in checkpoints],
                "learning rate": [f"{one['learning_rate']:g}" for one in checkpoints],
                "weights": [str(one["fingerprint"])[:12] for one in checkpoints],
            }
        ),
        num_rows=f"{tables['gradients'].num_rows:,}" if "gradients" in tables else "0",
        file_bytes=file_size(sum(one.file_bytes for one in tables.values())),
        width=config["stored_width"],
        projected=config["projection"] is not None and "kind" not in config["projection"],
        has_basis="basis" in tables,
        dtype=config["dtype"],
        scaled=config["dtype"] != "float32",
        loss=f"{escape(config['loss_reduction'])} over its tokens"
        if config["loss_reduction"]
        else "as the model defines it",
        top_k=config["top_k"] and escape(config["top_k"]),
        one_sided=bool(config["second_moment"]) and not config.get("metric"),
        divided=_DIVIDED.get(str(config.get("metric")), ""),
        has_metric="metric" in tables,
        sides=_SIDES.get(str(config.get("tied")), ""),
        traced=traced,
        layers=listed,
        has_words=layers is None or layers["embedding"],
        num_words=layers["embedding_shape"][0] if layers else 0,
        columns=", ".join(map(code, columns)),
        numbered=any("number" in one for one in checkpoints),
        has_offsets="offsets" in tables,
        redacted=redacted,
        is_online=config["record"] == "online",
        num_passes=f"{config['num_examples'] * len(checkpoints):,}",
        facts=facts,
        settings=json_block({key: config[key] for key in _SETTINGS if key in config}),
    )


def _traced(layers: Mapping[str, Any] | None) -> str:
    """What the gradients are of."""
    if layers is None:
        return "the word embeddings of the model"
    linear = f"{counted(len(layers['modules']), 'linear layers')} of the model"
    return f"the word embeddings and {linear}" if layers["embedding"] else linear


def _layers(layers: Mapping[str, Any] | None, *, width: int) -> str:
    """Which numbers the rows of each layer have."""
    if layers is None:
        return ""
    chosen = ChosenLayers.from_dict(layers, width=width)
    firsts, few = list(chosen.names()), chosen.layers[:_FEW_LAYERS]
    more = len(chosen.layers) - len(few)
    return table(
        {
            "layer": [one.name for one in few],
            "weight": [" x ".join(map(str, one.shape)) for one in few],
            "kept": [" x ".join(map(str, one.kept)) for one in few],
            "first `token_id`": [str(first) for first in firsts[: len(few)]],
            "rows": [str(chosen.num_rows_of(one)) for one in few],
        }
    ) + (f"\n\n{more:,} more are in `config.json`." if more else "")


def _facts(config: Mapping[str, Any]) -> str:
    dataset, tokenizer = config.get("dataset") or {}, config.get("tokenizer") or {}
    metadata, not_trained = config["metadata"], _not_trained(config)
    model = part_of(metadata, "model")
    classes = sorted({str(one["model_class"]) for one in config["checkpoints"]})
    name = str(model.get("name_or_path") or "")
    return listing(
        {
            "Data": join(
                *sources_of(metadata),
                counted(dataset.get("num_rows"), "examples"),
                f"fingerprint {escape(dataset['fingerprint'])}" if dataset.get("fingerprint") else None,
            ),
            "Model": join(
                *map(escape, classes),
                counted(model.get("num_parameters"), "parameters"),
                f"begun from {hub_link(name)}" if "/" in name else None,
                revision(model),
            ),
            "Metric": _METRICS.get(str(config.get("metric")), "").format(
                because=f", as {escape(metadata['metric'])}" if metadata.get("metric") else ""
            ),
            "Not trained": not_trained,
            "Tokenizer": join(
                hub_link(tokenizer.get("name")),
                counted(tokenizer.get("vocabulary_size"), "tokens"),
                f"fingerprint {escape(tokenizer['fingerprint'])}" if tokenizer.get("fingerprint") else None,
            ),
        }
    ) + run_facts(metadata, written_by=config.get("hf_doge_version"))


def _not_trained(config: Mapping[str, Any]) -> str | None:
    """What was frozen, so that no example ever moved it."""
    named = config["metadata"].get("virtual_parts")
    parts = [part for part in named if isinstance(part, str)] if isinstance(named, list) else []
    if config.get("virtual") is True:
        return "all of it was frozen: the gradients say what a training of it would have done"
    few = ", ".join(map(code, parts[:_FEW_LAYERS])) + (", ..." if len(parts) > _FEW_LAYERS else "")
    return f'{few} (frozen: a search leaves it out unless `virtual="count"`)' if parts else None
