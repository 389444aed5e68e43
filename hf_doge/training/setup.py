"""Checks and choices a trainer makes once, before the first step."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer

from hf_doge.artifacts.domain_weights import DomainWeights
from hf_doge.gradients.alignment import DomainAlignment
from hf_doge.gradients.optimizer_metric import warn_of_other_step
from hf_doge.gradients.per_domain import PerDomainAlignment, StreamedAlignment
from hf_doge.gradients.sharding import is_sharded
from hf_doge.gradients.single_pass import SinglePassAlignment
from hf_doge.gradients.vectors import Vectors, is_spread, num_own_elements
from hf_doge.sampling.streaming import holds_streams
from hf_doge.training.config import DoGEConfig
from hf_doge.training.recipe import Recipe

logger = logging.getLogger(__name__)


def refuse_unsupported(args: Any, train_dataset: Any, *, has_target: bool, has_optimizer: bool) -> None:
    """Raise a `ValueError` for what would give a wrong number, saying what to do instead."""
    if not isinstance(args, DoGEConfig):
        raise ValueError(
            f"`args` must be a `DoGEConfig`, but got {type(args).__name__}. It takes every argument of `TrainingArguments`: write"
            " `DoGEConfig(output_dir, ...)`."
        )
    if isinstance(train_dataset, torch.utils.data.IterableDataset) or not isinstance(
        train_dataset, (Dataset, Mapping)
    ):
        raise ValueError(
            "`train_dataset` must be a `datasets.Dataset` or a dict of datasets or streams, but got "
            f"{type(train_dataset).__name__}. Load it without `streaming=True`, a sample of it is enough for a proxy, or "
            "pass a dict with one stream per domain."
        )
    if args.is_online and holds_streams(train_dataset):
        raise ValueError(
            "`mode='online'` must be able to read any row by its number, so every domain must be a `datasets.Dataset`, "
            "but got streams. Load them without `streaming=True`, or set `mode='proxy'`."
        )
    refuse_unsupported_arguments(args, has_target=has_target, has_optimizer=has_optimizer)


def refuse_unsupported_arguments(args: DoGEConfig, *, has_target: bool, has_optimizer: bool) -> None:
    """The part of [`refuse_unsupported`] that does not depend on the data."""
    if args.recipe == "official" and not has_target:
        raise ValueError(
            "`recipe='official'` compares with a held-out set, but `target_dataset` is None. Pass a held-out mix of "
            "your domains as `target_dataset`, or use `recipe='paper'`."
        )
    refused = {
        "DataParallel over several GPUs": (args.n_gpu > 1, "Set CUDA_VISIBLE_DEVICES to one GPU."),
        "DeepSpeed": (args.deepspeed is not None, "Leave `deepspeed` unset, and use DDP or FSDP2."),
        "tensor, context or sequence parallelism": (
            getattr(args, "parallelism_config", None) is not None,
            "Leave `parallelism_config` unset: DDP over all processes is supported.",
        ),
        "fp16 loss scaling": (args.fp16, "Use `bf16=True` or full precision."),
        "`auto_find_batch_size`": (args.auto_find_batch_size, "Set `per_device_train_batch_size` yourself."),
        "optimizers that step inside the backward pass": (
            any(kind in str(args.optim).lower() for kind in ("lomo", "layerwise")),
            "Use an optimizer that steps once all gradients are there, such as adamw_torch.",
        ),
        "`group_by_length` and other sampling strategies": (
            getattr(args, "train_sampling_strategy", "random") != "random" or getattr(args, "group_by_length", False),
            "Leave the order to the trainer: it draws every domain in every step.",
        ),
    }
    for what, (is_used, advice) in refused.items():
        if is_used:
            raise ValueError(f"DoGETrainer does not learn the right weights with {what} yet. {advice}")
    optim = str(getattr(args.optim, "value", args.optim))
    if args.get_recipe().score_metric == "optimizer" and "adam" not in optim.lower() and not has_optimizer:
        raise ValueError(
            "`score_metric='optimizer'`, as the recipe 'doge_plus' has it (the default), divides by the second moments that Adam and "
            f"AdamW keep, but `optim` is {optim!r}. Use `optim='adamw_torch'`, say, or `recipe='paper'`."
        )


def refuse_unsupported_engine(trainer: Trainer) -> None:
    """
    Raise a `ValueError` if the model is going to be spread over the processes in a way that is not right yet, whoever asked
    for it: the arguments, `accelerate launch`, or how the model was loaded.
    """
    args: Any = trainer.args
    state = trainer.accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    loading = getattr(getattr(trainer.model, "config", None), "distributed_config", None)
    sizes = {name: getattr(loading, name, None) or 1 for name in ("tp_size", "pp_size", "ep_size")}
    if args.fsdp and plugin is None:
        raise ValueError(
            "`fsdp` must shard the model, but accelerate does so on accelerators only, and here would train a whole copy on "
            "every process. Leave `fsdp` unset, which does the same by DDP."
        )
    refused = {
        "FSDP1": (
            plugin is not None and plugin.fsdp_version != 2,
            "Its flat parameters cut across the ones that are compared: use FSDP2, `fsdp_config={'fsdp_version': 2}` or "
            "`accelerate launch --fsdp_version 2`.",
        ),
        "FSDP's CPU offloading": (
            plugin is not None and type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
            "It was not tried. Leave `cpu_offload` off.",
        ),
        "DeepSpeed": (trainer.is_deepspeed_enabled, "Use DDP or FSDP2."),
        "Megatron-LM": (state.distributed_type == DistributedType.MEGATRON_LM, "Use DDP or FSDP2."),
        "tensor, pipeline, expert or context parallelism": (
            bool(getattr(trainer.accelerator, "parallelism_config", None)) or any(size > 1 for size in sizes.values()),
            "Use DDP or FSDP2 over all processes.",
        ),
    }
    for what, (is_used, advice) in refused.items():
        if is_used:
            raise ValueError(f"DoGETrainer does not learn the right weights with {what} yet. {advice}")
    if args.alignment == "single_pass" and uses_fsdp(trainer):
        raise ValueError(
            "`alignment='single_pass'` needs whole gradients of all domains on each process, but FSDP shards the model. "
            "Use `alignment='auto'`, which makes one backward per domain there."
        )
    is_resumable = args.save_strategy != "no" and not args.save_only_model
    has_no_state = args.optim == "sgd" and "momentum" not in (args.optim_args or "")
    if plugin is not None and is_resumable and has_no_state and "FULL" in str(plugin.state_dict_type):
        raise ValueError(
            "A run must be able to resume, but torch does not load an optimizer that keeps nothing, such as SGD without "
            "momentum, from a checkpoint of `FULL_STATE_DICT`. Set `fsdp_config={'state_dict_type': "
            "'SHARDED_STATE_DICT'}` (or `accelerate launch --fsdp_state_dict_type SHARDED_STATE_DICT`)."
        )


def uses_fsdp(trainer: Trainer) -> bool:
    """Whether the model is sharded, or will be when training starts."""
    if trainer.is_fsdp_enabled:
        return True
    assert trainer.model is not None
    return is_sharded(trainer.model)


def refuse_sparse_gradients(model: nn.Module) -> None:
    """Gradients of domains are compared and added as dense tensors."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"Gradients must be dense, but the module {name!r} ({type(module).__name__}) has `sparse=True`. Set "
                f"`model.get_submodule({name!r}).sparse = False` before training, or freeze it."
            )


def refuse_batch_statistics(model: nn.Module) -> None:
    """A domain's gradient must not depend on which other domains share the batch, nor the model on the target."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"Every example's loss must be its own, but the module {name!r} ({type(module).__name__}) mixes the "
                "examples of a batch. Use a model with layer normalisation."
            )


def choose_alignment(
    trainer: Trainer,
    args: DoGEConfig,
    recipe: Recipe,
    *,
    num_domains: int,
    num_parts: int,
    is_universal: bool,
) -> DomainAlignment:
    """
    The way to the scores: as asked, or the fastest that is exact; the choice and its reason are logged.

    A model that FSDP shards, or will when training starts, is left to the plain ways.
    """
    model = trainer.model
    assert model is not None
    is_told = trainer.is_in_train and trainer.is_world_process_zero()
    if recipe.score_metric == "optimizer" and trainer.optimizer is not None and is_told:
        warn_of_other_step(trainer.optimizer, "`score_metric='optimizer'`", plain="`recipe='paper'`")
    refuse_batch_statistics(model)
    refuse_sparse_gradients(model)
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    _refuse_whole_parameters(model, parameters)
    vectors = Vectors(parameters, _find_scored_names(args, parameters))
    kept = f"{num_domains} domains" + (" in two halves" if num_parts == 2 else "")
    num_domains *= num_parts
    needed = num_domains * sum(num_own_elements(p) * p.element_size() for _, p in parameters) / 2**30
    fits = needed <= args.gradient_memory_budget
    choice, reason = _choose_way(args, fits=fits, shards=uses_fsdp(trainer))
    logger.info("Recipe: %s, mu %g.", recipe.name, recipe.mu)
    logger.info(
        "Alignment: %s (%s); keeping the gradients of %s takes %.3g GiB of the budget of %g GiB.",
        choice,
        reason,
        kept,
        needed,
        args.gradient_memory_budget,
    )
    keeps_all = choice == "per_domain" or (fits and choice != "streamed")
    plain = (PerDomainAlignment if keeps_all else StreamedAlignment)(
        vectors,
        num_domains=num_domains,
        num_targets=num_parts,
        max_norm=recipe.domain_max_grad_norm,
        needs_norms=recipe.normalization != "none" or (is_universal and not recipe.self_term),
    )
    if choice != "single_pass":
        return plain
    return SinglePassAlignment(
        model,
        plain=plain,
        memory_budget=args.gradient_memory_budget * 2**30,
        tolerance=1e-3 if all(p.dtype.itemsize >= 4 for _, p in parameters) and not args.bf16 else 0.1,
        is_required=args.alignment == "single_pass",
    )


def _refuse_whole_parameters(model: nn.Module, parameters: list[tuple[str, nn.Parameter]]) -> None:
    if not parameters:
        raise ValueError("The model must have trainable parameters, but all of them have `requires_grad=False`.")
    whole = [name for name, parameter in parameters if not is_spread(parameter)]
    if is_sharded(model) and whole:
        raise ValueError(
            "FSDP must shard every parameter that is trained, or their gradients are not summed over the processes alike, "
            f"but {whole[:8]} ... are whole on each process. Freeze them, or let FSDP shard them too (`ignored_modules`)."
        )


def _find_scored_names(args: DoGEConfig, parameters: list[tuple[str, nn.Parameter]]) -> set[str] | None:
    """Parameters whose gradients are compared; `None` for all."""
    if args.alignment_parameters is None:
        return None
    names = {name for name, _ in parameters if re.search(args.alignment_parameters, name)}
    if not names:
        raise ValueError(
            f"`alignment_parameters` must match a trainable parameter, but {args.alignment_parameters!r} matches "
            f"none of {[name for name, _ in parameters][:8]} ..."
        )
    return names


def _choose_way(args: DoGEConfig, *, fits: bool, shards: bool) -> tuple[str, str]:
    """Which alignment, and why."""
    if args.alignment != "auto":
        return args.alignment, "as asked for"
    if shards:
        plain = "per_domain" if fits else "streamed"
        return plain, "FSDP shards the model, whose gradients 'single_pass' needs whole"
    return "single_pass", "the default; 'per_domain' or 'streamed' take over where it cannot be exact"


def weights_in_order(weights: DomainWeights | Mapping[str, float] | None, names: tuple[str, ...]) -> Tensor:
    """
    Weights as a vector of shape `(num_domains,)`, summing to 1; uniform for `None`.

    Raises:
        `ValueError`: if the weights are of other domains, or not weights.
    """
    if weights is None:
        return torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    if isinstance(weights, Mapping):
        weights = DomainWeights.from_mapping(weights)
    elif not isinstance(weights, DomainWeights):
        raise ValueError(f"Weights must be `DomainWeights` or a dict by domain, but got {type(weights).__name__}.")
    unknown, missing = sorted(set(weights.mean) - set(names)), sorted(set(names) - set(weights.mean))
    if unknown or missing:
        raise ValueError(
            f"The weights must name the domains of the data, {list(names)}, but they have {unknown} beside these and "
            f"lack {missing}. Rename the domains or leave out what is not in the data."
        )
    vector = torch.tensor([weights.mean[name] for name in names], dtype=torch.float64)
    return vector / vector.sum()
