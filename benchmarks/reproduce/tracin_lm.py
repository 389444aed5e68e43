"""
A small language model: does removing the documents that TracIn names, and retraining, raise the loss of a held-out text?

Decided before the first result was seen:

- Documents are the first 48 tokens of texts of the eight English domains; 600 to train on, 75 of each domain. Byte-level BPE of
  768 tokens. A Llama of 2 layers of width 48 whose output matrix is tied to the embedding (83,184
  parameters), 8 epochs of Adam, batches of 32, learning rate from 5e-3 to 0, four checkpoints. (800 documents
  before one training was timed; the learning rate by the training loss of one run each at 3e-3, 5e-3 and 1e-2.)
- A query is a held-out document, one of each domain in a round: 24 tokens are context and the loss is that of the 24 that
  follow. The gradient of a training document is that of its whole loss.
- Scores are of seed 1's run. The 30 strongest proponents of 600 are removed and the model is retrained under a seed of the
  round's own, never 1; the number is the change of the continuation's loss in nats per token. Three rounds are planned; should
  the clock stop it, whole rounds count and no others. Intervals: 95 %, Student's t over queries (a bootstrap at first, which is too
  narrow for the eight of one round; changed when one had been read).
- Scorers: TracIn on the input side of the embedding matrix (`tracin_we`, plain and cosine), on its output side (`tracin_last`),
  on the whole matrix, as its own gradient is (`tracin_full`), on the attention of the second of two layers (`tracin_middle`);
  BM25 over the words of the whole query; `same_domain`, drawn at random from the query's own domain; `random`.
- Stages `sparse0`, ..., added when all three rounds had been read and `tracin_full` was best: it gives every document a row for every token of the
  vocabulary, which no index can hold. `tracin_full_own` keeps the rows of the tokens that the document itself has, as many as the input side
  alone has, of documents and queries alike; `tracin_full_topk` the rows of largest norm, as many as a document has tokens.
- The claim holds if `tracin_we` raises the loss more than `bm25` with an interval of the paired difference that leaves 0 out.
  What it says of documents rather than of domains is its difference from `same_domain`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.reproduce.arguments import Arguments
from benchmarks.reproduce.layer_gradients import layer_gradients
from benchmarks.reproduce.report import Results, Table, new_figure
from hf_doge.data.domain_files import find_domain_files, read_documents
from hf_doge.data.tokenizer import train_tokenizer
from hf_doge.evaluation.influence.case_deletion import strongest
from hf_doge.evaluation.influence.journal import removal_digest
from hf_doge.evaluation.influence.scorers import BM25Scorer
from hf_doge.evaluation.influence.scorers.embedding import record_rows
from hf_doge.evaluation.influence.small_models import TrainingRecipe, to_batches, train_classifier
from hf_doge.evaluation.influence.small_tasks import split_words
from hf_doge.evaluation.intervals import t_interval

DOMAINS = ("arxiv_latex", "books", "code", "legal", "news", "qa", "web", "wikipedia")
SCORERS = (
    "tracin_we",
    "tracin_we_cosine",
    "tracin_last",
    "tracin_full",
    "tracin_middle",
    "bm25",
    "same_domain",
    "random",
)
SPARSE = ("tracin_full_own", "tracin_full_topk")
PLAIN = {"input": "tracin_we", "output": "tracin_last", "full": "tracin_full", "middle": "tracin_middle"}


@dataclass(frozen=True)
class Sizes:
    """How large the experiment is."""

    domains: tuple[str, ...] = DOMAINS
    num_documents: int = 75  # of each domain
    num_removed: int = 30
    num_rounds: int = 3
    num_tokens: int = 48
    num_context: int = 24
    vocab_size: int = 768
    width: int = 48
    num_layers: int = 2
    num_heads: int = 2
    num_epochs: int = 8
    batch_size: int = 32
    learning_rate: float = 5e-3


SIZES = {
    "small": Sizes(),
    "gpu": Sizes(
        num_documents=600,
        num_removed=240,
        num_rounds=8,
        num_tokens=256,
        num_context=128,
        vocab_size=8192,
        width=768,
        num_layers=12,
        num_heads=12,
        learning_rate=5e-4,
    ),
    "tiny": Sizes(
        domains=("code", "legal"),
        num_documents=12,
        num_removed=4,
        num_rounds=1,
        num_tokens=16,
        num_context=8,
        vocab_size=300,
        width=16,
        num_epochs=4,
        batch_size=8,
    ),
}


class NextTokens(nn.Module):
    """A causal model as a classifier of each position: `logits` of shape `(B, V, T - 1)`, as `F.cross_entropy` takes them."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return SequenceClassifierOutput(logits=logits[:, :-1].transpose(1, 2))


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids of one length: `(N, T)` to train on, and by round and domain `(rounds, K, T)` to ask about."""

    train: Tensor
    train_domains: np.ndarray
    queries: Tensor
    vocab_size: int
    train_words: list[list[str]]
    query_words: list[list[str]]  # by round and domain


@cache
def load_corpus(data_dir: Path, tokenizer_dir: Path, sizes: Sizes) -> Corpus:
    """Draw, tokenise and cut; the tokenizer is trained once and kept."""
    generator = np.random.default_rng(0)
    texts = {
        (domain, split): _read_texts(data_dir, domain, split, generator)
        for domain in sizes.domains
        for split in ("train", "validation")
    }
    if not tokenizer_dir.exists():
        files = find_domain_files(data_dir)
        train_tokenizer(
            [partial(read_documents, files[domain]["train"]) for domain in sizes.domains], sizes.vocab_size
        ).save_pretrained(tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)

    def documents(domain: str, split: str, count: int) -> Tensor:
        lines = []
        for text in texts[domain, split]:
            ids = tokenizer(text[: 20 * sizes.num_tokens])["input_ids"][: sizes.num_tokens]
            if len(ids) == sizes.num_tokens:
                lines.append(ids)
            if len(lines) == count:
                return torch.tensor(lines)
        raise ValueError(
            f"{domain}.{split} must have {count} texts of {sizes.num_tokens} tokens or more, but it has {len(lines)}. "
            "Choose another `--scale` or other data."
        )

    train = torch.cat([documents(domain, "train", sizes.num_documents) for domain in sizes.domains])
    queries = torch.stack([documents(domain, "validation", sizes.num_rounds) for domain in sizes.domains], dim=1)
    words = [split_words(tokenizer.decode(ids)) for ids in [*train, *queries.flatten(0, 1)]]
    return Corpus(
        train=train,
        train_domains=np.repeat(np.arange(len(sizes.domains)), sizes.num_documents),
        queries=queries,
        vocab_size=len(tokenizer),
        train_words=words[: len(train)],
        query_words=words[len(train) :],
    )


def _read_texts(data_dir: Path, domain: str, split: str, generator: np.random.Generator) -> list[str]:
    texts = list(read_documents(find_domain_files(data_dir)[domain][split]))
    return [texts[position] for position in generator.permutation(len(texts))]


def make_model(sizes: Sizes, vocab_size: int, seed: int) -> NextTokens:
    """A new model whose weights depend on the seed alone."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        max_position_embeddings=sizes.num_tokens,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NextTokens(LlamaForCausalLM(config))


def recipe_of(sizes: Sizes) -> TrainingRecipe:
    """Four checkpoints at even distances."""
    return TrainingRecipe(
        num_epochs=sizes.num_epochs,
        batch_size=sizes.batch_size,
        learning_rate=sizes.learning_rate,
        checkpoint_epochs=tuple(sizes.num_epochs * quarter // 4 for quarter in (1, 2, 3, 4)),
    )


def as_data(documents: Tensor) -> dict[str, Tensor]:
    """What [`NextTokens`] is trained on."""
    return {
        "input_ids": documents,
        "attention_mask": torch.ones_like(documents),
        "labels": documents[:, 1:].contiguous(),
    }


@torch.no_grad()
def continuation_losses(model: NextTokens, documents: Tensor, num_context: int) -> Tensor:
    """Mean loss of the tokens after the context, nats per token, shape `(Q,)`."""
    data = as_data(documents)
    losses = F.cross_entropy(model(data["input_ids"], data["attention_mask"]).logits, data["labels"], reduction="none")
    return losses[:, num_context - 1 :].mean(dim=1)


@cache
def train_explained(data_dir: Path, tokenizer_dir: Path, sizes: Sizes):
    """Seed 1's checkpoints, which all scores are of."""
    corpus = load_corpus(data_dir, tokenizer_dir, sizes)
    return train_classifier(
        partial(make_model, sizes, corpus.vocab_size),
        as_data(corpus.train),
        recipe_of(sizes),
        seed=1,
        keep_checkpoints=True,
    )


def gradients_by_side(model: LlamaForCausalLM, batches: Sequence[Mapping[str, Tensor]], middle: Sequence[str]):
    """For each batch the dense gradients `(B, P)` of the embedding matrix by side, and of the middle layers."""
    rows = record_rows(model, batches)
    matrix = model.get_input_embeddings().weight
    start = 0
    for batch in batches:
        size = len(batch["input_ids"])
        read = torch.zeros(size, *matrix.shape)
        for position in range(size):
            tokens, values = rows[start + position]
            read[position, tokens] = values.float()
        start += size
        layers = layer_gradients(model, [batch], ["lm_head", *middle])
        output = layers["lm_head"]
        yield {
            "input": read.flatten(1),
            "output": output,
            "full": read.flatten(1) + output,
            "middle": torch.cat([layers[name] for name in middle], dim=1),
        }


@dataclass(frozen=True)
class Paired:
    """
    Queries and a batch of training documents at one checkpoint.

    Attributes:
        rate (`float`): Learning rate of the checkpoint.
        place (`slice`): Where the documents stand among all of them.
        ours, theirs (`dict[str, torch.Tensor]`): Gradients `(B, P)` of documents and queries, see [`gradients_by_side`].
        documents, queries (`torch.Tensor` of shape `(B, T)`): Their tokens.
    """

    rate: float
    place: slice
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]
    documents: Tensor
    queries: Tensor

    def add_to(self, scores: np.ndarray, ours: Tensor, theirs: Tensor) -> None:
        """Add what the checkpoint says of these documents to scores `(K, N)`."""
        scores[:, self.place] += self.rate * (theirs @ ours.T).double().numpy()


def paired_gradients(data_dir: Path, tokenizer_dir: Path, round_number: int, sizes: Sizes) -> Iterator[Paired]:
    """Gradients of the queries of a round beside those of each batch of training documents, at every checkpoint."""
    corpus = load_corpus(data_dir, tokenizer_dir, sizes)
    queries = corpus.queries[round_number]
    _, checkpoints = train_explained(data_dir, tokenizer_dir, sizes)
    train_batches = _batches(corpus.train, corpus.train, sizes.batch_size)
    asked = queries.clone()
    asked[:, : sizes.num_context] = -100
    (query_batch,) = _batches(queries, asked, len(queries))
    middle = middle_layers(sizes)
    for model, rate in checkpoints:
        (theirs,) = gradients_by_side(model.model, [query_batch], middle)
        start = 0
        for batch, ours in zip(train_batches, gradients_by_side(model.model, train_batches, middle), strict=True):
            documents = batch["input_ids"]
            place = slice(start, start + len(documents))
            yield Paired(rate, place, ours, theirs, documents, queries)
            start = place.stop


def document_scores(data_dir: Path, tokenizer_dir: Path, round_number: int, sizes: Sizes) -> dict[str, np.ndarray]:
    """Scores of every training document for the queries of a round, `(K, N)` by scorer."""
    corpus = load_corpus(data_dir, tokenizer_dir, sizes)
    num_queries = len(corpus.queries[round_number])
    scores = {name: np.zeros((num_queries, len(corpus.train))) for name in SCORERS}
    for pair in paired_gradients(data_dir, tokenizer_dir, round_number, sizes):
        for side, name in PLAIN.items():
            pair.add_to(scores[name], pair.ours[side], pair.theirs[side])
        directions = (F.normalize(found["input"], dim=1) for found in (pair.ours, pair.theirs))
        pair.add_to(scores["tracin_we_cosine"], *directions)
    first = round_number * num_queries
    scores["bm25"] = BM25Scorer().scores(
        *_word_batches(corpus.train_words, corpus.query_words[first : first + num_queries])
    )
    generator = np.random.default_rng(round_number)
    scores["random"] = generator.random(scores["bm25"].shape)
    same = np.arange(len(sizes.domains))[:, None] == corpus.train_domains[None]
    scores["same_domain"] = generator.random(scores["bm25"].shape) + same
    return scores


def sparse_scores(data_dir: Path, tokenizer_dir: Path, round_number: int, sizes: Sizes) -> dict[str, np.ndarray]:
    """As `document_scores`, of the whole matrix's gradient with few of its rows."""
    corpus = load_corpus(data_dir, tokenizer_dir, sizes)
    keep = {"tracin_full_own": own_rows, "tracin_full_topk": largest_rows}
    scores = {name: np.zeros((len(corpus.queries[round_number]), len(corpus.train))) for name in SPARSE}
    for pair in paired_gradients(data_dir, tokenizer_dir, round_number, sizes):
        whole = [
            (found["full"].unflatten(1, (corpus.vocab_size, -1)), texts)
            for found, texts in ((pair.ours, pair.documents), (pair.theirs, pair.queries))
        ]
        for name, choose in keep.items():
            pair.add_to(scores[name], *(choose(gradients, texts).flatten(1) for gradients, texts in whole))
    return scores


def own_rows(gradients: Tensor, documents: Tensor) -> Tensor:
    """`(B, V, D)` with zeros but for the tokens that each document of `(B, T)` has."""
    owned = torch.zeros(gradients.shape[:2], dtype=torch.bool)
    owned.scatter_(1, documents, True)
    return gradients * owned[..., None]


def largest_rows(gradients: Tensor, documents: Tensor) -> Tensor:
    """`(B, V, D)` with zeros but for the rows of largest norm, as many as a document of `(B, T)` has tokens."""
    chosen = gradients.norm(dim=2).topk(documents.shape[1], dim=1).indices
    return gradients * torch.zeros(gradients.shape[:2]).scatter_(1, chosen, 1.0)[..., None]


def _word_batches(train: list[list[str]], queries: list[list[str]]) -> tuple[Sequence[dict[str, Tensor]], ...]:
    """Words as token ids of their own, so that BM25 compares words and not pieces of them."""
    ids = {word: number for number, word in enumerate(sorted({word for text in [*train, *queries] for word in text}))}
    batches = []
    for texts in (train, queries):
        lines = [torch.tensor([ids[word] for word in text], dtype=torch.long) for text in texts]
        input_ids = nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=-1)
        batches.append([{"input_ids": input_ids, "attention_mask": (input_ids >= 0).long()}])
    return tuple(batches)


def middle_layers(sizes: Sizes) -> list[str]:
    """The attention of the layer in the middle: of two the second."""
    return [f"model.layers.{sizes.num_layers // 2}.self_attn.{name}_proj" for name in "qkvo"]


def _batches(documents: Tensor, labels: Tensor, batch_size: int) -> Sequence[dict[str, Tensor]]:
    return to_batches(
        {"input_ids": documents, "attention_mask": torch.ones_like(documents), "labels": labels}, batch_size
    )


def removals_part(data_dir: Path, tokenizer_dir: Path, round_number: int, sizes: Sizes) -> dict[str, list[list[int]]]:
    """What each scorer removes for each query of a round."""
    return _strongest(document_scores(data_dir, tokenizer_dir, round_number, sizes), sizes)


def sparse_part(data_dir: Path, tokenizer_dir: Path, round_number: int, sizes: Sizes) -> dict[str, list[list[int]]]:
    """The same of the scorers with few rows."""
    return _strongest(sparse_scores(data_dir, tokenizer_dir, round_number, sizes), sizes)


def _strongest(scores: Mapping[str, np.ndarray], sizes: Sizes) -> dict[str, list[list[int]]]:
    return {name: [list(strongest(row, sizes.num_removed, "+")) for row in found] for name, found in scores.items()}


def losses_without(
    data_dir: Path, tokenizer_dir: Path, round_number: int, removed: Sequence[int], seed: int, sizes: Sizes
) -> list[float]:
    """Retrain without some documents: the loss of the continuation of each query of a round."""
    corpus = load_corpus(data_dir, tokenizer_dir, sizes)
    model, _ = train_classifier(
        partial(make_model, sizes, corpus.vocab_size),
        as_data(corpus.train),
        recipe_of(sizes),
        seed=seed,
        removed=removed,
    )
    return continuation_losses(model, corpus.queries[round_number], sizes.num_context).tolist()


def finish_round(
    args: Arguments,
    places: tuple[Path, Path],
    settings: Mapping,
    number: int,
    seed: int,
    sizes: Sizes,
    scorers: Sequence[str],
) -> dict:
    """One query of each domain: the loss of its continuation with all documents, and without each scorer's strongest."""
    arguments = {**settings, "round": number}
    removed = args.store.get(f"removals-round{number}", arguments, partial(removals_part, *places, number, sizes))
    if set(SPARSE) <= set(scorers):
        removed |= args.store.get(f"removals-sparse{number}", arguments, partial(sparse_part, *places, number, sizes))

    known: dict[str, list[float]] = {}  # scorers may agree; a part is asked for once

    def losses(without: Sequence[int]) -> list[float]:
        digest = removal_digest(without)
        if digest not in known:
            known[digest] = args.store.get(
                f"retraining-round{number}-{digest[:6]}",
                {**arguments, "seed": seed, "removed": digest},
                partial(losses_without, *places, number, without, seed, sizes),
            )
        return known[digest]

    domains = load_corpus(*places, sizes).train_domains
    by_words = [set(chosen) for chosen in removed["bm25"]]
    return {
        "round": number,
        "seed": seed,
        "full": losses(()),
        "losses": {
            name: [losses(chosen)[position] for position, chosen in enumerate(removed[name])] for name in scorers
        },
        "same_domain": {
            name: [float((domains[chosen] == position).mean()) for position, chosen in enumerate(removed[name])]
            for name in scorers
        },
        "shared_with_bm25": {
            name: [
                len(words & set(chosen)) / sizes.num_removed
                for words, chosen in zip(by_words, removed[name], strict=True)
            ]
            for name in scorers
        },
        "distinct": {name: len(set().union(*removed[name])) for name in scorers},
    }


def layers_part(data_dir: Path, tokenizer_dir: Path, sizes: Sizes) -> dict:
    """Cancellation ratio by side of the matrix and of the middle layer, and what the explained model has learned."""
    corpus = load_corpus(data_dir, tokenizer_dir, sizes)
    trained, checkpoints = train_explained(data_dir, tokenizer_dir, sizes)
    batches = _batches(corpus.train, corpus.train, sizes.batch_size)
    ratios: dict[str, list[float]] = {side: [] for side in PLAIN}
    for model, _ in checkpoints:
        lengths, net = dict.fromkeys(PLAIN, 0.0), {}
        for gradients in gradients_by_side(model.model, batches, middle_layers(sizes)):
            for side, values in gradients.items():
                lengths[side] += float(values.norm(dim=1).sum())
                net[side] = net.get(side, 0) + values.sum(dim=0).double()
        for side in PLAIN:
            ratios[side].append(lengths[side] / float(net[side].norm()))
    return {
        "cancellation": list(ratios.items()),
        "num_parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "train_loss": float(continuation_losses(trained, corpus.train, 1).mean()),
        "query_loss": float(continuation_losses(trained, corpus.queries.flatten(0, 1), sizes.num_context).mean()),
    }


def run(args: Arguments) -> Results:
    """All rounds, or those among `--stages` (`round0`, ...)."""
    sizes = SIZES[args.scale]
    seeds = args.seeds or tuple(range(2, 2 + sizes.num_rounds))
    rounds = tuple(f"round{number}" for number in range(sizes.num_rounds))
    sparse = tuple(f"sparse{number}" for number in range(sizes.num_rounds))
    stages = args.choose_stages((*rounds, *sparse))
    chosen = [number for number, stage in enumerate(rounds) if stage in stages]
    scorers = (*SCORERS, *SPARSE) if all(sparse[number] in stages for number in chosen) else SCORERS
    places = (args.data_dir / "lm", args.output_dir / f"tokenizer-{sizes.vocab_size}-{len(sizes.domains)}")
    settings = {name: value for name, value in asdict(sizes).items() if name != "num_rounds"}
    parts = [
        finish_round(args, places, settings, number, seeds[number % len(seeds)], sizes, scorers) for number in chosen
    ]
    layers = args.store.get("layers", settings, partial(layers_part, *places, sizes))
    increases = {
        name: np.concatenate([np.array(part["losses"][name]) - np.array(part["full"]) for part in parts])
        for name in scorers
    }
    return Results(
        tables={
            "loss_increase": _increase_table(parts, increases, sizes),
            "domains": _domain_table(parts, increases, sizes),
            "layers": _layers_table(layers),
        },
        figures={
            "num_queries": len(increases["random"]),
            "increase": {name: _rounded(values) for name, values in increases.items()},
            "less_bm25": {name: _rounded(values - increases["bm25"]) for name, values in increases.items()},
        },
        plot=partial(_plot, increases),
        notes=[
            f"{len(chosen)} round(s), {len(increases['random'])} queries; {layers['num_parameters']:,} parameters; loss of the "
            f"explained model {layers['train_loss']:.3f} on its documents, {layers['query_loss']:.3f} on the continuations."
        ],
    )


def _rounded(values: np.ndarray) -> list[float | None]:
    interval = t_interval(values.tolist())
    return [None if value is None else round(value, 4) for value in (interval.mean, interval.low, interval.high)]


def _interval(values: np.ndarray) -> str:
    interval = t_interval(values.tolist())
    return interval.format(4, signed=True) + (" *" if interval.excludes_zero else "")


def _increase_table(parts: Sequence[dict], increases: Mapping[str, np.ndarray], sizes: Sizes) -> Table:
    rows = [
        {
            "round": part["round"],
            "seed": part["seed"],
            "domain": domain,
            "scorer": name,
            "loss_with_all": part["full"][position],
            "loss_without": part["losses"][name][position],
            "same_domain": part["same_domain"][name][position],
            "shared_with_bm25": part["shared_with_bm25"][name][position],
        }
        for part in parts
        for name in increases
        for position, domain in enumerate(sizes.domains)
    ]
    cells = [
        [
            name,
            _interval(increases[name]),
            *(
                "" if name == other else _interval(increases[name] - increases[other])
                for other in ("bm25", "same_domain", "tracin_we", "tracin_full")
            ),
            *(
                f"{100 * np.mean([row[share] for row in rows if row['scorer'] == name]):.0f} %"
                for share in ("same_domain", "shared_with_bm25")
            ),
            f"{np.mean([part['distinct'][name] for part in parts]):.0f}",
        ]
        for name in increases
    ]
    return Table(
        f"Change of the continuation's loss, nats per token, when the {sizes.num_removed} strongest proponents of "
        f"{sizes.num_documents * len(sizes.domains)} documents are gone (higher is better), and less that of other scorers on the "
        "same queries; 95 % intervals over queries (Student's t), * where 0 is outside. Then the share of the removed documents that is "
        "of the query's domain, the share that BM25 removes too, and how many different documents the queries of a round remove.",
        [
            "scorer",
            "change",
            "less bm25",
            "less same_domain",
            "less tracin_we",
            "less tracin_full",
            "domain",
            "as BM25",
            "distinct",
        ],
        cells,
        rows,
    )


def _domain_table(parts: Sequence[dict], increases: Mapping[str, np.ndarray], sizes: Sizes) -> Table:
    rows = [
        {
            "domain": domain,
            "scorer": name,
            "change": float(np.mean([part["losses"][name][position] - part["full"][position] for part in parts])),
            "num_queries": len(parts),
        }
        for name in increases
        for position, domain in enumerate(sizes.domains)
    ]
    cells = [[name, *(f"{row['change']:+.3f}" for row in rows if row["scorer"] == name)] for name in increases]
    return Table(
        f"The same by domain of the query: mean of {len(parts)} queries, too few for an interval.",
        ["scorer", *sizes.domains],
        cells,
        rows,
    )


def _layers_table(layers: dict) -> Table:
    rows = [
        {"side": side, "checkpoint": position, "cancellation": ratio}
        for side, ratios in layers["cancellation"]
        for position, ratio in enumerate(ratios, start=1)
    ]
    cells = [[side, PLAIN[side], *(f"{ratio:.1f}" for ratio in ratios)] for side, ratios in layers["cancellation"]]
    return Table(
        "Cancellation ratio over the training documents at each checkpoint: sides of the embedding matrix, and the middle layer.",
        ["gradient", "scorer", *(f"checkpoint {position}" for position in range(1, len(cells[0]) - 1))],
        cells,
        rows,
    )


def _plot(increases: Mapping[str, np.ndarray], path: Path) -> None:
    """One line per scorer: every query, the mean and its interval."""
    figure = new_figure(7.5, 1.0 + 0.36 * len(increases))
    axes = figure.subplots()
    names = list(reversed(increases))
    for place, name in enumerate(names):
        values = increases[name]
        interval = t_interval(values.tolist())
        axes.plot(values, [place] * len(values), "o", markersize=4, color="#0072b2", markerfacecolor="none", alpha=0.6)
        if interval.low is not None:
            axes.plot([interval.low, interval.high], [place, place], color="black", linewidth=2.4)
        axes.plot(interval.mean, place, "|", color="black", markersize=14, markeredgewidth=2)
    axes.axvline(0, color="grey", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("change of the continuation's loss, nats per token (further right is better)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
