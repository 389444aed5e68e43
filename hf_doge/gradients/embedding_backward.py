"""
One forward and one backward of a model, and the gradient of all that it reads from its embedding matrix.

Shapes: B = batch size, D = embedding width, V = vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType

import torch
from torch import Tensor, nn

from hf_doge.gradients.batches import without_labels
from hf_doge.gradients.embedding_uses import (
    EmbeddingUses,
    Lookup,
    counted_positions,
    input_embedding_matrix,
    join_by_example,
)
from hf_doge.gradients.example_losses import ExampleLosses, logits_of
from hf_doge.gradients.token_rows import PositionGradients


class EmbeddingBackward(AbstractContextManager):
    """
    Differentiates the losses of batches with respect to what a model reads from its embedding matrix.

    Inside the context the model is in evaluation mode, computes without the autocast of accelerate, and none of its
    parameters requires a gradient; all of it is put back exactly as it was.

    Args:
        model (`nn.Module`): With input embeddings.
        losses ([`ExampleLosses`]): What is differentiated.
        tied (`str`), pad_token_id (`int`, *optional*), drop_token_ids (`Sequence[int]`): See [`EmbeddingGradientRecorder`].

    Attributes:
        matrix (`torch.Tensor`): The embedding matrix.
        virtual (`bool`): Whether it is frozen, see [`TokenRows`].
        padding_ids (`tuple[int, ...]`): The tokens that are padding wherever they stand; known inside the context.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        losses: ExampleLosses,
        tied: str = "input",
        pad_token_id: int | None = None,
        drop_token_ids: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.matrix = input_embedding_matrix(model)
        self.losses = losses
        self.tied = tied
        self.pad_token_id = pad_token_id
        self.drop_token_ids = tuple(drop_token_ids)
        self.virtual = not self.matrix.requires_grad
        self._uses: EmbeddingUses | None = None

    def __enter__(self) -> "EmbeddingBackward":
        self.matrix = input_embedding_matrix(self.model)  # may have been resized since
        self.virtual = not self.matrix.requires_grad
        padding = (self.pad_token_id, getattr(self.model.get_input_embeddings(), "padding_idx", None))
        self.padding_ids = tuple(token for token in padding if token is not None)
        with ExitStack() as stack:
            stack.enter_context(full_precision(self.model))
            stack.enter_context(_evaluation_mode(self.model))
            stack.enter_context(_same_problem_type(self.model))
            stack.enter_context(_no_parameter_gradients(self.model))
            uses = EmbeddingUses(self.model, lookups=self.tied != "output", projections=self.tied != "input")
            self._uses = stack.enter_context(uses)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._uses = None
        self._stack.close()

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model computes in."""
        return torch.float16 if torch.is_autocast_enabled(self.matrix.device.type) else self.matrix.dtype

    def prepare(self, batch: Mapping[str, object]) -> dict[str, object]:
        """
        The batch on the model's device, with the labels that count for each example alone, see [`ExampleLosses.prepare`].

        Raises:
            ValueError: It has no token ids, or an example no label.
            RuntimeError: This is called outside the context.
        """
        if self._uses is None:
            raise RuntimeError("`record` must be called inside the context: `with EmbeddingGradientRecorder(...)`.")
        return self.losses.prepare(self.model, self._to_device(batch))

    def _to_device(self, batch: Mapping[str, object]) -> dict[str, object]:
        fed = [name for name in ("inputs_embeds", "decoder_inputs_embeds") if batch.get(name) is not None]
        if fed or batch.get("input_ids") is None:
            raise ValueError(
                f"The batch must hold `input_ids` and no ready embeddings, but its keys are {sorted(batch)}. "
                "TracIn-WE needs to know which token each embedding belongs to: feed token ids."
            )
        device = self.matrix.device
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def differentiate(
        self, batch: Mapping[str, object], *, from_logits: bool = False
    ) -> tuple[PositionGradients, Tensor]:
        """The gradients of every position, and the loss that was differentiated (finite or not, if `from_logits`)."""
        batch_size = batch["input_ids"].shape[0]
        uses = self._uses
        uses.clear()
        with torch.enable_grad():
            if from_logits:
                outputs = self.model(**without_labels(batch))
                differentiated = logits_of(outputs)
                grad_outputs, loss, scales = self.losses.at_logits(differentiated, batch)
            else:
                outputs = self.model(**batch)
                loss, scales = self.losses.total(outputs, batch)
                differentiated, grad_outputs = loss, None
        lookups, projections = list(uses.lookups), list(uses.projections)
        uses.clear()
        if self.tied == "output" and not projections:
            raise ValueError(
                f"`tied='output'` needs an output layer that multiplies by the embedding matrix, but "
                f"`{type(self.model).__name__}` has none. Use `tied='input'`."
            )
        if self.tied != "input" and not projections and _has_tied_output(self.model, self.matrix):
            raise ValueError(
                f"`tied={self.tied!r}` needs to see the output layer multiply by the embedding matrix, but that of "
                f"`{type(self.model).__name__}`, which is tied to it, does so in a way of its own (not by `F.linear` within "
                "a module that holds the matrix). Use `tied='input'`."
            )
        wanted = [use.output for use in (*lookups, *projections)]
        embeddings = self.model.get_input_embeddings()
        if not lookups and any(hasattr(module, "trainable_tokens_delta") for module in embeddings.modules()):
            raise ValueError(
                "The input embeddings must be trained as a whole or not at all, but of those of"
                f" `{type(self.model).__name__}` only some tokens are (`trainable_token_indices` of PEFT), which are kept"
                " apart. Train all of them (`modules_to_save` with the name of the embedding layer), or none."
            )
        if not wanted or not differentiated.requires_grad:
            raise ValueError(
                f"The loss must depend on what the model reads from its input embeddings, but "
                f"`{type(self.model).__name__}` did not read them with gradients on. Feed it token ids."
            )
        grads = torch.autograd.grad(differentiated, wanted, grad_outputs, allow_unused=True, materialize_grads=True)
        lookup_grads, logit_grads = grads[: len(lookups)], grads[len(lookups) :]
        nothing = self.matrix.new_zeros(batch_size, 0, self.matrix.shape[1])
        gradients = PositionGradients(
            token_ids=join_by_example(
                [lookup.token_ids for lookup in lookups], nothing[..., 0].long(), batch["input_ids"]
            ),
            counted=join_by_example(
                [counted_positions(lookup, batch, pad_token_id=self.pad_token_id) for lookup in lookups],
                nothing[..., 0].bool(),
                batch["input_ids"],
            ),
            input_grads=join_by_example(lookup_grads, nothing, batch["input_ids"]),
            hidden=join_by_example([use.inputs for use in projections], nothing, batch["input_ids"]),
            logit_grads=join_by_example(logit_grads, nothing, batch["input_ids"]),
            scales=scales.to(self.matrix.device),
            dropped=torch.tensor(self.drop_token_ids, dtype=torch.long, device=self.matrix.device),
            own_only=self.tied == "own",
        )
        return gradients, loss.detach()

    def run(self, batch: Mapping[str, object]) -> tuple[object, list[Lookup]]:
        """What the model returns with gradients on, and what it has looked up for it."""
        self._uses.clear()
        with torch.enable_grad():
            outputs = self.model(**batch)
        lookups = list(self._uses.lookups)
        self._uses.clear()
        return outputs, lookups


def _has_tied_output(model: nn.Module, matrix: Tensor) -> bool:
    """Whether the model says that its output layer is the embedding matrix."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(output, "weight", None) is matrix


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """The model without the autocast that accelerate puts around its forward: as it computes on its own."""
    original, wrapped = model.__dict__.get("_original_forward"), model.__dict__.get("forward")
    if original is None or wrapped is None:
        yield
        return
    try:
        model.forward = original
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        model.forward = wrapped


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def _same_problem_type(model: nn.Module) -> Iterator[None]:
    """Classifiers of transformers note in their configuration what they make of the first labels: that is training's to do."""
    configs = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "problem_type")]
    kinds = [config.problem_type for config in configs]
    try:
        yield
    finally:
        for config, kind in zip(configs, kinds, strict=True):
            config.problem_type = kind


@contextmanager
def _no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    requiring = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in requiring:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in requiring:
            parameter.requires_grad_(True)
