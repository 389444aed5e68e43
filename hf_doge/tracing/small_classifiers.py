"""Two small text classifiers that train from scratch in less than a second: the paper's CNN and a transformer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

ARCHITECTURES = ("cnn", "transformer")

# Scale of new embeddings. At 1, the default, the noise of words that training never saw drowns the others.
_CNN_SCALE = 0.1
_TRANSFORMER_SCALE = 0.02  # as in BERT


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
    ) -> SequenceClassifierOutput:
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
        return SequenceClassifierOutput(loss=loss, logits=logits)


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
        seed (`int`): Of the initial weights.

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
