"""What a run is: written into each of its checkpoints, and compared before one of them is resumed."""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from hf_doge.entries import NAMES, OBJECT, Kind, find_misfit
from hf_doge.gradients.sharding import is_sharded
from hf_doge.sampling.collation import SeededCollator
from hf_doge.sampling.transforms import DomainTransforms
from hf_doge.text import public_name
from hf_doge.training.collator import ColumnCollator
from hf_doge.training.config import SELF_TERMS, DoGEConfig
from hf_doge.training.described_functions import describe_code, describe_function, digest, digest_values, name_of
from hf_doge.training.domain_batches import TargetBatches
from hf_doge.training.global_batch import examples_per_step
from hf_doge.training.learning_state import STATE_FILE
from hf_doge.training.packing import LengthsCollator
from hf_doge.training.provenance import to_plain
from hf_doge.training.recipe import Recipe
from hf_doge.training.saved_entries import damaged, read_entries

RUN_FILE = "run_identity.json"  # in a checkpoint

# Arguments that move no weight, or none but by rounding: where things go, what is shown, saved and evaluated, how the
# work is shared out. What is made of the batch sizes is compared as `examples_per_step`, the length and the seeds apart.
_MAY_DIFFER = re.compile(
    r"^(output_dir|log.*|report_to|run_name|project|trackio_.*|disable_tqdm|hub_.*|push_to_hub.*|save_.*|eval_.*|do_.*|"
    r"per_device_.*|gradient_accumulation_steps|max_steps|num_train_epochs|seed|data_seed|dataloader_.*|local_rank|"
    r"resume_from_checkpoint|ddp_.*|use_cpu|accelerator_config|parallelism_config|fsdp.*|deepspeed.*|tf32|"
    r"(gradient|activation)_checkpointing.*|torch_.*|use_liger_kernel|liger_kernel_config|use_cache|include_.*|debug|"
    r"auto_find_batch_size|prediction_loss_only|.*_full_eval|batch_eval_metrics|enable_jit_checkpoint|load_best_model.*|"
    r"metric_for_best_model|greater_is_better|ignore_data_skip|restore_callback_states_.*|full_determinism|"
    r"remove_unused_columns|label_names|length_column_name|skip_memory_metrics|average_tokens_across_devices|"
    r"predict_with_generate|generation_.*|dataset_num_proc|.*_num_proc)$"
)
_DOGE_ARGUMENTS = {field.name for field in fields(DoGEConfig)} - {field.name for field in fields(TrainingArguments)}
# What saving and loading a model, its tokenizer and its first batch write into a configuration.
_UNSTEADY_CONFIG = re.compile(
    r"^(transformers_version|architectures|.*dtype|_.*|use_cache|.*_token_id|problem_type|.*name_or_path|.*attn_impl.*|inference_mode)$"
)
_SAME_BATCH = re.compile(r"^(seed|return_.*|pad_to_multiple_of|padding_free|tf_.*)$")  # of a collator: ours seeds it
_ARGUMENTS = ({one.name for one in fields(DoGEConfig)} - {"recipe", "seed"}) | {
    *("unit", "draw", "max_epochs_per_domain", "initial_weights"),  # of the trainers
}
# Entries of a checkpoint without which others are not compared: names that are only other ones would leave all else unseen.
_NAMED = {"domains": NAMES, "recipe": OBJECT}
_LENGTHLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")


def describe_identity(trainer: Trainer, *, max_steps: int, has_planned_draws: bool) -> dict[str, Any]:
    """
    What a resumed run must share with the one that wrote the checkpoint, in plain values; the trainers add their own.

    It may differ in where it writes, what it logs, saves and evaluates, in devices, processes, workers and accumulation
    as long as a step has as many examples, and in the ways to compute the same (gradient checkpointing, compilation).
    The number of steps may differ where nothing that was trained depends on it: with a schedule such as `"constant"`,
    whose warmup is a number of steps, and without a plan of how often each domain is drawn.

    Args:
        trainer (`Trainer`): Before training: its model as it was given.
        max_steps (`int`): At which it ends.
        has_planned_draws (`bool`): Whether the draws are planned over the whole run.
    """
    args, model = trainer.args, trainer.model
    identity = {
        field.name: to_plain(getattr(args, field.name))
        for field in fields(args)
        if field.init and field.name not in _DOGE_ARGUMENTS and not _MAY_DIFFER.match(field.name)
    }
    identity |= {"examples_per_step": examples_per_step(args), "training_seed": args.seed}
    identity["seed"] = args.seed if args.data_seed is None else args.data_seed
    has_own_schedule = trainer.lr_scheduler is not None and not getattr(trainer, "_created_lr_scheduler", False)
    is_lengthless = identity["lr_scheduler_type"] in _LENGTHLESS_SCHEDULES and (
        args.get_warmup_steps(1000) == args.get_warmup_steps(2000)
    )
    if has_planned_draws or not (has_own_schedule or is_lengthless):
        identity["max_steps"] = max_steps
    if has_own_schedule:
        identity["lr_scheduler"] = _describe_schedule(trainer.lr_scheduler, max_steps)
    collator = _describe_collator(trainer.data_collator)
    transforms = _find_transforms(trainer.train_dataset)
    identity |= {"loss": _describe_loss(trainer), "code": _describe_code(trainer, transforms)}
    identity["transforms"] = {name: describe_function(one) for name, one in transforms.items()}
    assert args.output_dir is not None  # the arguments set one
    return {**identity, "data_collator": collator, "model": _describe_model(model, Path(args.output_dir))}


def _describe_collator(collator: Any) -> dict[str, Any]:
    """
    Its name, the special tokens of its tokenizer, and the settings of one that is a dataclass, as those of transformers and trl
    are; of others none are known.
    """
    collator = _unwrapped(collator)
    described: dict[str, Any] = describe_function(collator, "class")
    tokens = getattr(getattr(collator, "tokenizer", None), "special_tokens_map", {})
    described |= {f"tokenizer.{name}": str(token) for name, token in tokens.items() if name.endswith("_token")}
    if not is_dataclass(collator):
        return described
    settings = {one.name: getattr(collator, one.name) for one in fields(collator) if not _SAME_BATCH.match(one.name)}
    return described | {name: value for name, value in settings.items() if isinstance(value, (bool, int, float, str))}


def _unwrapped(collator: Any) -> Any:
    while isinstance(collator, (SeededCollator, ColumnCollator, LengthsCollator)):
        collator = collator.collator
    return collator


def _describe_loss(trainer: Trainer) -> dict[str, Any]:
    """Whose `compute_loss` it is, and the function that the trainer was given."""
    owner = next(one for one in type(trainer).__mro__ if "compute_loss" in vars(one))
    return {"compute_loss": name_of(owner), **describe_function(trainer.compute_loss_func, "compute_loss_func")}


def _find_transforms(dataset: Any) -> dict[str, Any]:
    """The transform of the train set by "", or those of its domains by their names, where there are any."""
    found = (getattr(dataset, "format", None) or {}).get("format_kwargs", {}).get("transform")
    if isinstance(found, DomainTransforms):
        by_name = zip(found.names, found.formats, strict=True)
        return {name: one["format_kwargs"]["transform"] for name, one in by_name if one["type"] == "custom"}
    return {} if found is None else {"": found}


def _describe_code(trainer: Trainer, transforms: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The code of functions, by what they are: it may be corrected under its name, so that another one is only warned of."""
    functions = {
        "compute_loss": type(trainer).compute_loss,
        "compute_loss_func": trainer.compute_loss_func,
        "data_collator": _unwrapped(trainer.data_collator),
        **{f"transform {name}".strip(): one for name, one in transforms.items()},
    }
    described = {name: describe_code(one) for name, one in functions.items() if one is not None}
    return {name: code for name, code in described.items() if code}


def _describe_schedule(schedule: Any, max_steps: int) -> dict[str, Any]:
    """A schedule of one's own: its class and, where functions tell the rate, what they say from the first step to the last."""
    schedule = getattr(schedule, "scheduler", schedule)  # as accelerate wraps it
    steps = [part * max_steps // 8 for part in range(9)]
    rates = [[round(float(rate(step)), 9) for step in steps] for rate in getattr(schedule, "lr_lambdas", [])]
    return {"class": name_of(schedule), "factors": rates}


def _describe_model(model: Any, output_dir: Path) -> dict[str, Any]:
    """Its parameters and configuration; its name unless it was read from the folder of the run, as some resume."""
    parameters = [f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in model.named_parameters()]
    described: dict[str, Any] = {"parameters": hashlib.sha256("\n".join(parameters).encode()).hexdigest()[:16]}
    config: Any = getattr(model, "config", None)
    name = getattr(config, "name_or_path", None) or ""
    if not name or not Path(name).resolve().is_relative_to(output_dir.resolve()):
        described["name_or_path"] = public_name(name) or ""
    if hasattr(config, "to_dict"):
        described |= _settings(config.to_dict())
    adapters = getattr(model, "peft_config", None) or {}
    frozen = [
        (key, p) for key, p in model.named_parameters() if not p.requires_grad
    ]  # with adapters not in a checkpoint
    if adapters and not is_sharded(model) and not any(p.is_meta for _, p in frozen):
        described["frozen_weights"] = digest([(key, digest_values(p)) for key, p in frozen])
    for name, adapter in adapters.items():
        settings = _settings(adapter.to_dict() if hasattr(adapter, "to_dict") else adapter, f"adapter {name}.")
        described |= {key: value for key, value in settings.items() if isinstance(value, (int, float))}
    return described


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a configuration holds, parts of parts by their whole name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _settings(value, f"{prefix}{key}.")
        elif not _UNSTEADY_CONFIG.match(str(key)):
            found[f"{prefix}{key}"] = to_plain(value)
    return found


def describe_recipe(args: DoGEConfig, recipe: Recipe, targets: TargetBatches | None) -> dict[str, Any]:
    """How weights are learned and for what, which a resumed run must share, in plain values."""
    described: dict[str, Any] = {"recipe": recipe.to_dict(), "mode": args.mode}
    described["targets"] = None if targets is None else targets.describe()
    described["target_data"] = None if targets is None else targets.fingerprints
    for name in ("alignment_parameters", "lagged_update", "per_device_target_batch_size", "stop_when_undecided"):
        described[name] = getattr(args, name)
    if args.stop_when_undecided:
        described["undecided_window"] = args.undecided_window
    return described | ({"sampler_lag_steps": args.lag_steps} if args.is_online else {})


def refuse_other_run(checkpoint: Path, own: Mapping[str, Any]) -> None:
    """
    Raise if a checkpoint was written by a run that is not this one. What an earlier hf_doge did not write down is not known
    to differ; domains of other names are left to who reads their state, who names them.

    Args:
        checkpoint (`Path`): The folder.
        own (mapping): What [`describe_identity`] and the trainer say of this run.

    Raises:
        `ValueError`: naming all that differs, with both values, or a file that is damaged.
    """
    state = _read(checkpoint / STATE_FILE, {"run": OBJECT, "domain_order": NAMES})
    run = _read(checkpoint / RUN_FILE, _NAMED)
    if misfit := find_misfit(state.get("run", {}), _NAMED, optional=_NAMED, whose="in `run` its"):
        raise damaged(checkpoint / STATE_FILE, misfit)
    saved = {"domains": state.get("domain_order", own["domains"])} | state.get("run", {}) | run
    own = json.loads(json.dumps(own))
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        saved, own = _without_captured(saved), _without_captured(own)
    if saved["domains"] != own["domains"]:
        return
    _warn_of_other_code(checkpoint, saved.get("code"), own.get("code"))
    before, now = {}, {}
    for name, value in own.items():
        if name != "code" and name in saved and saved[name] != value:
            before[name], now[name] = _only_different(
                saved[name], value, is_open=name in ("model", "data_collator", "loss")
            )
    before, now = ({name: part for name, part in one.items() if before[name] != now[name]} for one in (before, now))
    if before:
        why = (
            "the schedule of the learning rate, the plan of the draws or `mu` by `min_spread` depends on `max_steps`. "
        )
        passed = ", ".join(f"{name}={value!r}" for name, value in _arguments_of(before, now, saved).items())
        raise ValueError(
            f"A resumed run must go on as it began, but the checkpoint {checkpoint} has {before} and this run {now}"
            f"{f'; {why}' if 'max_steps' in before else '. '}Set them back{f' (pass `{passed}`)' if passed else ''} or start anew, "
            "or train a new run from the model of that checkpoint."
        )


def _without_captured(described: Any) -> Any:
    """But for what functions capture, which may be the rank of a process: the checkpoint has that of the main one."""
    if not isinstance(described, dict):
        return described
    return {name: _without_captured(one) for name, one in described.items() if not name.endswith("captured")}


def _warn_of_other_code(checkpoint: Path, saved: Any, own: Any) -> None:
    """Functions of the same names whose code is another one, by the same version of Python."""
    before, now = _only_different(saved, own)
    names = [name for name in now or {} if isinstance(saved, dict) and _changed(before.get(name), now[name])]
    if names:
        warnings.warn(
            f"The code of {', '.join(f'`{name}`' for name in names)} is not what it was when {checkpoint} was written, so the resumed "
            "run may compute something else. Set it back if it does, or start a new run.",
            stacklevel=4,
        )


def _changed(before: Any, now: Mapping[str, str]) -> bool:
    return isinstance(before, dict) and any(before.get(version, code) != code for version, code in now.items())


def _arguments_of(before: Mapping[str, Any], now: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """
    The arguments of trainer and configuration by which what differs is as it was; data, models and collators are none.

    Args:
        before, now (mapping): What differs, as the checkpoint and as this run have it.
        saved (mapping): All that the checkpoint has.
    """
    found = {name: value for name, value in before.items() if name in _ARGUMENTS}
    if "recipe" in before:  # an ingredient without a recipe would choose another one
        recipe = {one.name: one.default for one in fields(Recipe)} | saved["recipe"]
        names = [name for name in recipe if name in {**before["recipe"], **now["recipe"]} and name != "name"]
        found = {"recipe": recipe["name"]} | {name: _as_passed(name, recipe[name]) for name in names} | found
    if "training_seed" in before:
        found["seed"] = before["training_seed"]
    if "seed" in before and before["seed"] != saved.get("training_seed"):
        found["data_seed"] = before["seed"]
    return found


def _as_passed(ingredient: str, value: Any) -> Any:
    """The argument that an ingredient of a recipe comes from."""
    if ingredient == "self_term":
        words = (argument for argument, term in SELF_TERMS.items() if term == value and isinstance(argument, str))
        return next(words, value)
    unbounded = {"score_min": -math.inf, "score_max": math.inf, "domain_max_grad_norm": 0.0}
    return unbounded.get(ingredient) if value is None else value


def _only_different(saved: Any, own: Any, *, is_open: bool = False) -> tuple[Any, Any]:
    """The entries of two mappings that differ; where they are `is_open`, those that only one has do not count."""
    if not (isinstance(saved, dict) and isinstance(own, dict)):
        return saved, own
    names = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if is_open:
        names = [name for name in names if name in saved and name in own]
    return {name: saved[name] for name in names if name in saved}, {name: own[name] for name in names if name in own}


def _read(path: Path, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    return read_entries(path, kinds, optional=kinds) if path.exists() else {}
