"""What the Hub checks of a README's metadata; only what the tests need, but really parsed."""

import re

import yaml

FRONT_MATTER = re.compile(r"^\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|$)", re.DOTALL)

_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd
bsd-2-clause bsd-3-clause cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0
cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-nc-nd-4.0 cdla-permissive-2.0
cdla-sharing-1.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense
zlib pddl llama2 llama3 llama3.1 llama3.2 llama3.3 gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
SIZE_CATEGORIES = (
    *("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"),
    *("10B<n<100B", "100B<n<1T", "n>1T", "other"),
)
LISTS_OF_STRINGS = {
    "model": ("tags", "language", "license", "datasets", "base_model"),
    "dataset": ("tags", "language", "license", "task_categories", "task_ids", "size_categories", "source_datasets"),
    "space": ("tags", "models", "datasets"),
}


def metadata(content: str) -> dict | None:
    """The YAML at the head of a README, or `None` if there is none. Raises `yaml.YAMLError` if it is none."""
    found = FRONT_MATTER.match(content)
    return yaml.safe_load(found.group(1)) if found else None


def readable_metadata(content: str) -> dict:
    """As `metadata`, and empty where it cannot be read: git takes any README, and the page of it is shown nevertheless."""
    try:
        found = metadata(content)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def check_card(content: str, kind: str) -> tuple[list[str], list[str]]:
    """
    Check the metadata of a README.

    Returns:
        The errors for which the Hub refuses it, and the warnings.
    """
    try:
        card = metadata(content)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if card is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return ["YAML Metadata Error: the metadata must be a mapping"], []
    errors = []
    for key in LISTS_OF_STRINGS[kind]:
        value = card.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(one, str) for one in values):
            errors.append(f'"{key}" must be a string or an array of strings')
        elif key in ("tags", "size_categories", "task_categories") and not isinstance(value, list | None):
            errors.append(f'"{key}" must be an array')
        elif key == "license" and (unknown := sorted(set(values) - LICENSES)):
            errors.append(f'"license" must be one of {sorted(LICENSES)}, got {unknown}')
        elif key == "size_categories" and (unknown := sorted(set(values) - set(SIZE_CATEGORIES))):
            errors.append(f'"size_categories" must be one of {list(SIZE_CATEGORIES)}, got {unknown}')
    if kind == "dataset":
        errors += _check_configs(card)
    return errors, []


def _check_configs(card: dict) -> list[str]:
    errors, names = [], []
    configs = card.get("configs", [])
    if not isinstance(configs, list) or any(not isinstance(config, dict) for config in configs):
        return ['"configs" must be an array of objects']
    for number, config in enumerate(configs):
        if not isinstance(config.get("config_name"), str):
            errors.append(f'"configs[{number}].config_name" must be a string')
        names.append(config.get("config_name"))
        files = config.get("data_files", [])
        for one in files if isinstance(files, list) else [files]:
            if isinstance(one, dict) and not isinstance(one.get("split"), str):
                errors.append(f'"configs[{number}].data_files" needs a "split" in each object')
            elif not isinstance(one, str | dict):
                errors.append(f'"configs[{number}].data_files" must be strings or objects')
    if len(set(names)) < len(names):
        errors.append('"configs" names a config twice')
    if sum(config.get("default") is True for config in configs) > 1:
        errors.append('"configs" has more than one default')
    infos = card.get("dataset_info")
    if infos is not None and not isinstance(infos, dict | list):
        errors.append('"dataset_info" must be an object or an array')
    return errors


def tags(card: dict, kind: str) -> list[str]:
    """The tags by which a repository is found: its own, and `key:value` for the others."""
    found = [str(tag) for tag in card.get("tags") or []]
    for key in (*LISTS_OF_STRINGS[kind], "library_name"):
        values = card.get(key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str) and key != "tags":
                found.append(value if key == "library_name" else f"{key}:{value}")
    return found
