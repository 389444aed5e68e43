"""
Two small text classifiers, the paper's CNN and a transformer, and their training from scratch in less than a second: one
run is a short loop without a Trainer, to be repeated without some of its examples.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ARCHITECTURES = ("cnn", "transformer")
OPTIMIZERS = ("sgd", "adam")

# Scale of new embeddings. At 1, the default, the noise of words that training never saw drowns the others.
_CNN_SCALE = 0.1
_TRANSFORMER_SCALE = 0.02  # as in BERT


class ClassifierOutput(NamedTuple):
    """What a small classifier returns: its mean loss, where there are labels, and logits `(B, num_classes)`."""

    loss: Tensor | None
    logits: Tensor


class _Classifier(nn.Module):
    """What both share: an embedding, features of the whole text, a linear last layer `classifier`, the loss."""

    def __init__(self, vocabulary_size: int, num_classes: int, *, width: int, num_features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.classifier = nn.Linear(num_features, num_classes)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def features(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """What the last layer reads, shape `(B, num_features)`."""
        raise NotImplementedError

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ClassifierOutput:
        """
        Logits, and the mean cross-entropy over the batch where there are labels.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): Token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding, which changes nothing.
            labels (`torch.Tensor` of shape `(B,)`, *optional*): Class of each text.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.classifier(self.features(input_ids, mask.bool()))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ClassifierOutput(loss=loss, logits=logits)


class ConvolutionalClassifier(_Classifier):
    """
    The shape of the paper's notebook: two convolutions of 5 tokens, one of 1, maximum over the text, linear layer.

    Unlike the notebook's, padding has no part in it: outputs at padding are zero before each convolution, as beyond
    the ends of a text, and never win the maximum.

    Args:
        vocabulary_size (`int`): Rows of the embedding.
        num_classes (`int`): Size of the output.
        width (`int`): Width of the embedding; the paper has 128.
        num_channels (`int`): Outputs of each convolution; the paper has 50.
    """

    def __init__(self, vocabulary_size: int, num_classes: int, *, width: int = 64, num_channels: int = 50) -> None:
        super().__init__(vocabulary_size, num_classes, width=width, num_features=num_channels)
        nn.init.normal_(self.embedding.weight, std=_CNN_SCALE)
        self.convolutions = nn.ModuleList(
            [
                nn.Conv1d(width, num_channels, 5, padding=2),
                nn.Conv1d(num_channels, num_channels, 5, padding=2),
                nn.Conv1d(num_channels, num_channels, 1),
            ]
        )
        for convolution in self.convolutions:  # the default scale loses the signal before it reaches the last layer
            assert isinstance(convolution, nn.Conv1d)
            assert convolution.bias is not None
            nn.init.kaiming_normal_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    def features(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        mask = mask[:, None]  # (B, 1, T)
        hidden = self.embedding(input_ids).transpose(1, 2)
        for convolution in self.convolutions:
            hidden = F.relu(convolution(hidden * mask))
        return hidden.masked_fill(~mask, -torch.inf).amax(dim=2)


class TransformerClassifier(_Classifier):
    """
    A small transformer encoder, normalised before each part; the last layer reads its output at the first token.

    Args:
        vocabulary_size (`int`): Rows of the embedding.
        num_classes (`int`): Size of the output.
        width (`int`): Width of embedding and layers.
        num_layers (`int`): How many layers.
        num_heads (`int`): Attention heads of each; must divide `width`.
        max_length (`int`): Longest text, in tokens.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_classes: int,
        *,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        max_length: int = 512,
    ) -> None:
        super().__init__(vocabulary_size, num_classes, width=width, num_features=width)
        self.positions = nn.Embedding(max_length, width)
        nn.init.normal_(self.embedding.weight, std=_TRANSFORMER_SCALE)
        nn.init.normal_(self.positions.weight, std=_TRANSFORMER_SCALE)
        self.layers = nn.ModuleList([_Layer(width, num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(width)

    def features(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embedding(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, mask[:, None, None])
        return self.norm(hidden[:, 0])


class _Layer(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """`hidden (B, T, width)`, `mask (B, 1, 1, T)`."""
        parts = self.attention(self.norms[0](hidden)).unflatten(2, (3, self.num_heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)  # (B, heads, T, width / heads) each
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        hidden = hidden + self.mix(attended.transpose(1, 2).flatten(2))
        return hidden + self.outer(F.gelu(self.inner(self.norms[1](hidden))))


def make_classifier(
    architecture: str, vocabulary_size: int, num_classes: int, *, width: int = 64, max_length: int = 512, seed: int
) -> nn.Module:
    """
    A new classifier whose weights depend on `seed` alone; the global random state is left as it was.

    Args:
        architecture (`str`): `"cnn"` or `"transformer"`.
        vocabulary_size (`int`): Number of tokens.
        num_classes (`int`): Number of classes.
        width (`int`): Width of the embedding.
        max_length (`int`): Longest text in tokens, for the transformer.
        seed (`int`): Seeds the initial weights.

    Raises:
        ValueError: if the architecture is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"`architecture` must be one of {list(ARCHITECTURES)}, but got {architecture!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "cnn":
            return ConvolutionalClassifier(vocabulary_size, num_classes, width=width)
        return TransformerClassifier(vocabulary_size, num_classes, width=width, max_length=max_length)


@dataclass(frozen=True)
class TrainingRecipe:
    """
    How each run trains: no weight decay, no dropout, and the learning rate falls to 0 on a line.

    With a constant rate the last steps decide much of what a model predicts, and two runs that differ by a few examples
    differ by three times as much.

    Args:
        num_epochs (`int`): Passes over the data.
        batch_size (`int`): Examples per step.
        learning_rate (`float`): That of the first step.
        optimizer (`str`): `"sgd"` (with momentum 0.9, as in the paper's notebook) or `"adam"`.
        checkpoint_epochs (`Sequence[int]`): After which epochs, counted from 1, weights are kept for the scores; 0 are the
            initial ones, with the learning rate of the first step.
    """

    num_epochs: int = 8
    batch_size: int = 50
    learning_rate: float = 2e-3
    optimizer: str = "adam"
    checkpoint_epochs: tuple[int, ...] = (2, 4, 6, 8)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"`optimizer` must be one of {list(OPTIMIZERS)}, but got {self.optimizer!r}.")
        if not self.checkpoint_epochs or not all(0 <= epoch <= self.num_epochs for epoch in self.checkpoint_epochs):
            raise ValueError(
                f"`checkpoint_epochs` must be epochs from 0 to {self.num_epochs}, but got {self.checkpoint_epochs}."
            )


class Checkpoint(NamedTuple):
    """A copy of the model, and the learning rate of the step before it."""

    model: nn.Module
    learning_rate: float


def train_classifier(
    make_model: Callable[[int], nn.Module],
    data: Mapping[str, Tensor],
    recipe: TrainingRecipe,
    *,
    seed: int,
    removed: Collection[int] = (),
    keep_checkpoints: bool = False,
    on_checkpoint: Callable[[nn.Module, torch.optim.Optimizer], None] | None = None,
) -> tuple[nn.Module, list[Checkpoint]]:
    """
    Train from scratch without some examples, and otherwise as alike as can be.

    Initial weights and batches depend on the seed alone: a removed example leaves its place in its batch empty, and
    the loss is the mean over who is left. So two runs of one seed differ by the removed examples and by nothing that
    would come of another shuffle, which is most of the noise between runs.

    Args:
        make_model (`Callable[[int], nn.Module]`): Gives the initial model of a seed; it returns `.logits`.
        data (`Mapping[str, torch.Tensor]`): `input_ids`, `attention_mask` of shape `(N, T)` and `labels (N,)`.
        recipe (`TrainingRecipe`): How to train.
        seed (`int`): Seeds initial weights and batches.
        removed (`Collection[int]`): Positions of examples left out.
        keep_checkpoints (`bool`): Whether to keep the weights after each of `recipe.checkpoint_epochs`.
        on_checkpoint (`Callable`, *optional*): Called with the model and its optimizer at each checkpoint that is kept.

    Returns:
        `tuple[nn.Module, list[Checkpoint]]`: the trained model, in evaluation mode, and its checkpoints.
    """
    model = make_model(seed).train()
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=recipe.learning_rate, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate, fused=True)
    num_examples = len(data["labels"])
    kept = torch.ones(num_examples, dtype=torch.bool)
    kept[list(removed)] = False
    generator = torch.Generator().manual_seed(seed)
    checkpoints: list[Checkpoint] = []
    num_steps = recipe.num_epochs * -(-num_examples // recipe.batch_size)
    learning_rates = iter([recipe.learning_rate * (1 - step / num_steps) for step in range(num_steps)])

    def keep(epoch: int, learning_rate: float) -> None:
        if keep_checkpoints and epoch in recipe.checkpoint_epochs:
            checkpoints.append(Checkpoint(copy.deepcopy(model).eval(), learning_rate))
            if on_checkpoint is not None:
                on_checkpoint(model, optimizer)

    keep(0, recipe.learning_rate)
    for epoch in range(1, recipe.num_epochs + 1):
        for batch in torch.randperm(num_examples, generator=generator).split(recipe.batch_size):
            batch = batch[kept[batch]]
            learning_rate = optimizer.param_groups[0]["lr"] = next(learning_rates)
            if not len(batch):
                continue
            logits = model(input_ids=data["input_ids"][batch], attention_mask=data["attention_mask"][batch]).logits
            optimizer.zero_grad()
            F.cross_entropy(logits, data["labels"][batch]).backward()
            optimizer.step()
        keep(epoch, learning_rate)
    return model.eval(), checkpoints


@torch.no_grad()
def predict_probabilities(model: nn.Module, data: Mapping[str, Tensor], *, batch_size: int = 256) -> Tensor:
    """Probability of every class for every example, shape `(N, num_classes)`; `data` as in [`train_classifier`]."""
    parts = [
        model(input_ids=ids, attention_mask=mask).logits.softmax(dim=1)
        for ids, mask in zip(
            data["input_ids"].split(batch_size), data["attention_mask"].split(batch_size), strict=True
        )
    ]
    return torch.cat(parts)


def to_batches(data: Mapping[str, Tensor], batch_size: int = 64) -> Sequence[dict[str, Tensor]]:
    """Split tensors of one line per example into batches, in order."""
    num_batches = -(-len(data["labels"]) // batch_size)
    return [
        {name: values[i * batch_size : (i + 1) * batch_size] for name, values in data.items()}
        for i in range(num_batches)
    ]
