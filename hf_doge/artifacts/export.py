"""
Domain weights in the forms that other training frameworks read. Each writer names the source of its form.

Domains of weight 0 are left out: some frameworks refuse a 0, and one that waits for every data set to end would never end.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from hf_doge.artifacts.record import WeightsRecord
from hf_doge.checks import check_choice, check_count, check_mapping, check_path, show

_FILE_BUILDERS = {"json": "json", "jsonl": "json", "parquet": "parquet", "csv": "csv", "arrow": "arrow", "txt": "text"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")

Paths = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Mixture:
    """
    What a writer is given: weights above 0 that sum to 1, and where the data of each domain is.

    Attributes:
        weights (`dict[str, float]`): Of the domains that have a part.
        paths (`dict[str, list[str]]`): At least one path for each of them; empty where the form holds none.
        num_rows (`dict[str, int]`): Rows of each of them; empty where the form needs none.
    """

    weights: dict[str, float]
    paths: Paths
    num_rows: Mapping[str, int]

    def path(self, name: str) -> str:
        """The only path of a domain."""
        return self.paths[name][0]


def write_megatron(mixture: Mixture) -> str:
    """
    Weights and prefixes in turn, as `--data-args-path FILE` or `--data-path $(cat FILE)` takes them:
    `get_blend_from_list` of `megatron/core/datasets/utils.py`, megatron-core 0.16.1.
    """
    spaced = [name for name in mixture.weights if mixture.path(name).split() != [mixture.path(name)]]
    if spaced:
        raise ValueError(
            f"Megatron separates paths by white space, so none may hold any, but those of {spaced} do. Rename or link them."
        )
    return "".join(f"{weight!r} {mixture.path(name)}\n" for name, weight in mixture.weights.items())


def write_nemo(mixture: Mixture) -> str:
    """
    One JSON list of weights and prefixes in turn, which `paths: FILE.json` of `MegatronPretraining` reads:
    `try_load_blend_from_json` of `nemo_automodel/components/datasets/llm/megatron_dataset.py`, nemo-automodel 0.7.0. It is
    also the `paths` of NeMo 2's `PreTrainingDataModule`.
    """
    blend = [text for name, weight in mixture.weights.items() for text in (repr(weight), mixture.path(name))]
    return json.dumps(blend, indent=2, ensure_ascii=False) + "\n"


def write_olmo_core(mixture: Mixture) -> str:
    """
    `SourceMixtureList` in YAML, the `source_list` of a `SourceMixtureDatasetConfig`:
    `src/olmo_core/data/source_mixture.py`, ai2-olmo-core 3.0.0. Ratios are of tokens.
    """
    return _yaml(
        {
            "sources": [
                {"source_name": name, "target_ratio": weight, "paths": list(mixture.paths[name])}
                for name, weight in mixture.weights.items()
            ]
        }
    )


def write_levanter(mixture: Mixture) -> str:
    """
    The section `data` of a training's YAML, `LmDataConfig` of `levanter/data/text/datasets.py`, marin-levanter 0.2.20, as in
    "How to Use Dataset Formats" (lib/levanter/docs/guides/Training-Data-Guide.md). Components are folders of its cache.
    """
    nested = [name for name in mixture.weights if "/" in name or "\\" in name or name in (".", "..")]
    if nested:
        raise ValueError(f"Levanter names folders by domains, so none may hold a slash, but {nested} do. Rename them.")

    def source(paths: Sequence[str]) -> dict[str, Any]:
        if any(_builder(path) or "://" in path or path.startswith(("/", ".")) for path in paths):
            return {"type": "url", "train_urls": list(paths)}
        if len(paths) > 1:
            raise ValueError(f"A component of Levanter is files or one data set of the Hub, but got {list(paths)}.")
        return {"type": "hf", "id": paths[0]}

    components = {name: {"source": source(mixture.paths[name])} for name in mixture.weights}
    return _yaml({"data": {"components": components, "train_weights": dict(mixture.weights)}})


def write_llama_factory(mixture: Mixture) -> str:
    """
    The keys of a training's YAML that choose data sets by their names in its `dataset_info.json`: `DataArguments` of
    `src/llamafactory/hparams/data_args.py`, llamafactory 0.9.5, which splits both texts at commas. `interleave_over` begins
    a data set again until each has ended.
    """
    split = [name for name in mixture.weights if "," in name or name != name.strip()]
    if split:
        raise ValueError(
            f"LLaMA-Factory separates names by commas and strips them, but {split} hold commas or begin or end with a space. Rename them."
        )
    return _yaml(
        {
            "dataset": ",".join(mixture.weights),
            "mix_strategy": "interleave_over",
            "interleave_probs": ",".join(map(repr, mixture.weights.values())),
        }
    )


def write_ms_swift(mixture: Mixture) -> str:
    """
    The keys of a YAML for `swift sft FILE.yaml` and `swift pt FILE.yaml`: `DataArguments` of
    `swift/arguments/base_args/data_args.py`, ms-swift 4.6.0. Paths follow its syntax, `[HF::]name-or-path[:subset][#rows]`.
    """
    return _yaml(
        {
            "dataset": [mixture.path(name) for name in mixture.weights],
            "interleave_prob": list(mixture.weights.values()),
            "stopping_strategy": "all_exhausted",
        }
    )


def write_axolotl(mixture: Mixture) -> str:
    """
    The list `datasets` of a training's YAML, `SFTDataset` of `src/axolotl/utils/schemas/datasets.py`, axolotl 0.19.0. It
    knows no weights and joins data sets whole, so each is cut (`split: train[:n]`) to as many rows as the largest mixture
    in these shares has that repeats nothing. `type` is `completion`, plain text: change it for other data.
    """
    total = min(mixture.num_rows[name] / weight for name, weight in mixture.weights.items())
    rows = {name: round(weight * total) for name, weight in mixture.weights.items()}
    none = [name for name, count in rows.items() if count == 0]
    if none:
        raise ValueError(
            f"A mixture that repeats nothing has {total:.1f} rows, of which {none} would have none. Give more rows of the domains"
            " with large weights, or leave these out."
        )
    datasets = []
    for name, count in rows.items():
        paths = mixture.paths[name]
        builder = _builder(paths[0])
        files = {"path": paths[0]} if len(paths) == 1 else {"path": builder, "data_files": list(paths)}
        if len(paths) > 1 and builder is None:
            raise ValueError(
                f"An entry of axolotl is files or one data set of the Hub, but {name!r} has {list(paths)}."
            )
        kind = {"ds_type": builder} if builder else {}
        datasets.append({**files, **kind, "type": "completion", "split": f"train[:{count}]"})
    return _yaml({"datasets": datasets})


def write_mosaic_streaming(mixture: Mixture) -> str:
    """
    `streams` as llm-foundry's `train_loader.dataset.streams` has them, each the arguments of a `streaming.Stream`:
    `streaming/base/stream.py` of mosaicml-streaming 0.13.0, `build_streams` of `llmfoundry/data/text_data.py`.
    """
    streams = {
        name: {"remote" if "://" in mixture.path(name) else "local": mixture.path(name), "proportion": weight}
        for name, weight in mixture.weights.items()
    }
    return _yaml({"streams": streams})


def write_trl(mixture: Mixture) -> str:
    """
    `DatasetMixtureConfig` of `trl/scripts/utils.py`, trl 1.16, as the YAML of `trl sft --config FILE.yaml` has it. A
    `fraction` is a share of rows; trl cuts data sets so that none is repeated, and takes none of them as a stream.
    """
    datasets = []
    for name, weight in mixture.weights.items():
        paths = list(mixture.paths[name])
        builder = _builder(paths[0])
        if builder is None and len(paths) > 1:
            raise ValueError(f"An entry of trl is files or one data set of the Hub, but {name!r} has {paths}.")
        where = {"path": builder, "data_files": paths} if builder else {"path": paths[0]}
        datasets.append({**where, "fraction": weight})
    return _yaml({"datasets": datasets})


def write_datasets(mixture: Mixture) -> str:
    """
    `names`, the order in which to pass data sets to `datasets.interleave_datasets`, and the keyword arguments of that call,
    in JSON (https://huggingface.co/docs/datasets/process#interleave): `interleave_datasets([data[name] for name in names], **rest)`.
    """
    content = {
        "names": list(mixture.weights),
        "probabilities": list(mixture.weights.values()),
        "stopping_strategy": "all_exhausted",
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class _Form:
    write: Callable[[Mixture], str]
    holds_paths: bool = True
    several_paths: bool = False
    needs_rows: bool = False


FORMS = {
    "axolotl": _Form(write_axolotl, several_paths=True, needs_rows=True),
    "datasets": _Form(write_datasets, holds_paths=False),
    "levanter": _Form(write_levanter, several_paths=True),
    "llama-factory": _Form(write_llama_factory, holds_paths=False),
    "megatron": _Form(write_megatron),
    "mosaic-streaming": _Form(write_mosaic_streaming),
    "ms-swift": _Form(write_ms_swift),
    "nemo": _Form(write_nemo),
    "olmo-core": _Form(write_olmo_core, several_paths=True),
    "trl": _Form(write_trl, several_paths=True),
}


def export_weights(
    weights: WeightsRecord,
    form: str,
    *,
    paths: Mapping[str, str | Sequence[str]] | None = None,
    num_rows: Mapping[str, int] | None = None,
) -> str:
    """
    Domain weights as another framework reads them; see [`DomainWeights.export`].

    Raises:
        ValueError: The form is unknown, a path or a number of rows is missing or cannot be held, or a name cannot be held.
    """
    form = check_choice("format", form, sorted(FORMS))
    known, chosen = FORMS[form], {name: weight for name, weight in weights.mean.items() if weight > 0}
    places = _checked_paths(form, known, chosen, paths, weights.mean)
    rows = _checked_rows(form, known, chosen, num_rows, weights.mean)
    return known.write(Mixture(chosen, places, rows))


def _checked_paths(
    form: str, known: _Form, chosen: Mapping[str, float], paths: Mapping | None, domains: Mapping[str, float]
) -> Paths:
    if not known.holds_paths:
        if paths is not None:
            raise ValueError(f"{form!r} names data sets by domains and holds no paths. Leave out `paths`.")
        return {}
    places = _one_for_each(form, "paths", "path of its data", chosen, paths, domains)
    found = {}
    for name, given in places.items():
        several = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
        found[name] = [str(check_path(f"paths[{name!r}]", one)) for one in several]
        if not found[name] or (len(found[name]) > 1 and not known.several_paths):
            law = "at least one path" if known.several_paths else "one path"
            raise ValueError(f"{form!r} holds {law} of each domain, but `paths` has {len(found[name])} of {name!r}.")
    return found


def _checked_rows(
    form: str, known: _Form, chosen: Mapping[str, float], rows: Mapping | None, domains: Mapping[str, float]
) -> Mapping[str, int]:
    if not known.needs_rows:
        if rows is not None:
            raise ValueError(f"{form!r} holds weights and needs no numbers of rows. Leave out `num_rows`.")
        return {}
    counts = _one_for_each(form, "num_rows", "number of rows", chosen, rows, domains)
    return {name: check_count(f"num_rows[{name!r}]", count) for name, count in counts.items()}


def _one_for_each(
    form: str, argument: str, what: str, chosen: Mapping[str, float], given: Mapping | None, domains: Mapping
) -> dict[str, Any]:
    """The values of the domains that have a part, in their order; nothing may be missing, nor of another domain."""
    values = check_mapping(argument, given, optional=True) or {}
    missing = [name for name in chosen if name not in values]
    if missing:
        raise ValueError(
            f"{form!r} needs the {what} of every domain with a weight, but `{argument}` lacks {missing}. Pass"
            f" `{argument}={{{missing[0]!r}: ..., ...}}`."
        )
    unknown = [name for name in values if name not in domains]
    if unknown:
        raise ValueError(f"`{argument}` must be of the domains {list(domains)}, but has {show(unknown)}.")
    return {name: values[name] for name in chosen}


def _builder(path: str) -> str | None:
    """How `datasets.load_dataset` calls files of this kind; `None` for a folder or a name on the Hub."""
    name = path.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    stem, dot, suffix = name.rpartition(".")
    return _FILE_BUILDERS.get(suffix) if stem and dot else None


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.2 would read as numbers (`1e3`), which PyYAML leaves bare."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if re.match(r"[-+.\d]", text) else None)


_Dumper.add_representer(str, _represent_text)


def _yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)
