"""What chosen layers read and return while a model runs, and the rows that follow from it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_doge.functional.layers import layer_gradients
from hf_doge.gradients.embedding_uses import Uses
from hf_doge.gradients.layers import ChosenLayers, layer_modules


class LayerUses(Uses):
    """
    Collects every use of chosen layers while the model runs inside the context with gradients on.

    What a layer returns is made to require a gradient, so no weight has to, and where words have no rows the backward ends at
    the first of the layers.

    Args:
        model (`nn.Module`): Of which they are.
        chosen ([`ChosenLayers`]): Which.

    Raises:
        ValueError: The model lacks one.
    """

    def __init__(self, model: nn.Module, chosen: ChosenLayers) -> None:
        super().__init__()
        self._chosen, self._model_name = chosen, type(model).__name__
        self._modules = list(layer_modules(model, chosen).values())
        self._uses: list[tuple[int, Tensor, Tensor]] = []  # number of the layer, inputs, output
        self._projections: dict[tuple[int, torch.device, torch.dtype], list[Tensor | None]] = {}

    def __enter__(self) -> "LayerUses":
        for number, module in enumerate(self._modules):

            def collect(module: nn.Module, args: tuple, kwargs: dict, output: Any, *, number: int = number) -> Any:
                if not torch.is_grad_enabled():
                    return output
                inputs = args[0] if args else next(iter(kwargs.values()))
                output = output if output.requires_grad else output.requires_grad_()
                self._uses.append((number, inputs.detach(), output))
                # The model may write into what it gets, which must not change what we differentiate.
                return output.clone()

            self._handles.append(module.register_forward_hook(collect, with_kwargs=True))
        return self

    def clear(self) -> None:
        """Forget what was collected, and with it the graph it belongs to."""
        self._uses = []

    def take(self) -> "list[tuple[int, Tensor, Tensor]]":
        """
        What was collected in one forward: number of the layer, its inputs and its output.

        Raises:
            ValueError: A layer was not used.
        """
        uses, self._uses = self._uses, []
        used = {number for number, _, _ in uses}
        idle = [layer.name for number, layer in enumerate(self._chosen.layers) if number not in used]
        if idle:
            raise ValueError(
                f"Every layer of `layers` must take part when the model runs, but {idle[:3]} of `{self._model_name}` did not"
                " (a merged adapter, or a weight that is used in another way?). Leave them out."
            )
        return uses

    def rows(
        self, uses: Sequence[tuple[int, Tensor, Tensor]], output_grads: Sequence[Tensor | None], input_ids: Tensor
    ) -> Tensor:
        """
        The rows of a batch, up to the scale of each example's loss.

        Args:
            uses (`Sequence`): From [`~LayerUses.take`].
            output_grads (`Sequence[torch.Tensor | None]`):
                Gradient of each output; `None` where the loss does not depend on it (DoRA runs A and B once more for the
                length of their product, which it detaches).
            input_ids (`torch.Tensor` of shape `(batch_size, ...)`): Of the batch.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_rows, width)`, float32 or float64.
        """
        layers = self._chosen.layers
        sums: list[Tensor | None] = [None] * len(layers)
        for (number, inputs, _), grads in zip(uses, output_grads, strict=True):
            if grads is None:
                continue
            p_out, p_in = self._projections_of(number, grads)
            read, moved = (self._by_example(part, input_ids, number) for part in (inputs, grads))
            read = read.to(moved)  # of a model on several devices a layer may read what another one made
            found = layer_gradients(read if p_in is None else read @ p_in, moved if p_out is None else moved @ p_out)
            before = sums[number]
            sums[number] = found if before is None else before + found
        parts = []
        dtype = torch.promote_types(uses[0][2].dtype, torch.float32)
        for layer, total in zip(layers, sums, strict=True):
            if total is None:
                total = torch.zeros(len(input_ids), *layer.kept, dtype=dtype)
            parts.append(self._chosen.cut(layer, total).to(input_ids.device))
        return torch.cat(parts, dim=1)

    def _projections_of(self, number: int, like: Tensor) -> list[Tensor | None]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (number, like.device, dtype)
        if key not in self._projections:
            matrices = self._chosen.projections(self._chosen.layers[number])
            self._projections[key] = [None if one is None else one.to(like.device, dtype) for one in matrices]
        return self._projections[key]

    def _by_example(self, part: Tensor, input_ids: Tensor, number: int) -> Tensor:
        """One line per example, `(batch_size, num_positions, d)`, in float32 at least."""
        batch_size, positions = len(input_ids), part.shape[:-1]
        # Several choices of one example may be lines of their own, and so may all positions of a batch, one after the other.
        lines = {batch_size, input_ids.shape[:-1].numel()} | ({input_ids.numel()} if len(positions) == 1 else set())
        if batch_size > 1 and (not positions or positions[0] not in lines):
            raise ValueError(
                f"A layer of `layers` must be used with one line per example, but a batch of {batch_size} used"
                f" {self._chosen.layers[number].name!r} with shape {tuple(positions)} (an expert that sees some positions alone?)."
                " Leave it out, or use batch size 1."
            )
        dtype = torch.promote_types(part.dtype, torch.float32)
        return part.reshape(batch_size, -1, part.shape[-1]).to(dtype)
