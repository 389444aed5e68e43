"""Random gradient rows for the tests of the influence index, and the dense matrices they stand for."""

import pyarrow as pa
import torch

from hf_doge.artifacts.influence import IndexWriter
from hf_doge.gradients.token_rows import TokenRows

VOCABULARY_SIZE = 50
WIDTH = 8
NUM_EXAMPLES = 40
FACTS = {"epoch": 1.0, "learning_rate": 0.1, "path": "run/checkpoint-1", "model_class": "Bert", "fingerprint": "f"}


def random_rows(num_examples, *, seed=0, size=1e-4, max_tokens=12, dtype=torch.float64):
    """Examples of up to `max_tokens` tokens; some have none."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, max_tokens + 1, (num_examples,), generator=generator)
    tokens = [torch.randperm(VOCABULARY_SIZE, generator=generator)[:length].sort().values for length in lengths]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    rows = torch.randn(int(offsets[-1]), WIDTH, generator=generator, dtype=torch.float64) * size
    return TokenRows(offsets, torch.cat(tokens), rows.to(dtype), False)


def one_example(tokens, rows):
    """A single example as a batch."""
    return TokenRows(torch.tensor([0, len(tokens)]), torch.tensor(tokens, dtype=torch.long), rows, False)


def batches(rows, size):
    for start in range(0, len(rows), size):
        end = min(start + size, len(rows))
        first, last = int(rows.offsets[start]), int(rows.offsets[end])
        offsets = rows.offsets[start : end + 1] - first
        yield TokenRows(offsets, rows.tokens[first:last], rows.rows[first:last], False)


def dense(rows, *, exclude=()):
    """Each example's gradient of the whole embedding matrix, flattened, in float64."""
    matrix = torch.zeros(len(rows), VOCABULARY_SIZE, rows.rows.shape[1], dtype=torch.float64)
    for number, (tokens, values) in enumerate(rows):
        matrix[number, tokens] = values.double()
    matrix[:, list(exclude)] = 0
    return matrix.flatten(1)


def dense_scores(queries, rows, *, exclude=()):
    return (dense(queries, exclude=exclude) @ dense(rows, exclude=exclude).T).numpy()


def examples_table(num_examples=NUM_EXAMPLES):
    texts = [f"text {number}" for number in range(num_examples)]
    return pa.table({"example_id": list(range(num_examples)), "text": texts})


def open_writer(folder, *, examples=True, **options):
    sizes = {"width": WIDTH, "vocabulary_size": VOCABULARY_SIZE, "num_examples": NUM_EXAMPLES}
    options = {**sizes, "max_segment_bytes": 2000, **options}
    writer = IndexWriter(folder, **options)
    if examples:
        writer.write_examples(examples_table(options["num_examples"]))
    return writer


def publish(checkpoint):
    """Of whichever writer it is."""
    checkpoint._index.publish(checkpoint)


def write_checkpoint(writer, rows, *, name="checkpoint-1", step=1, batch_size=7, **facts):
    with writer.checkpoint(name, step=step, **{**FACTS, **facts}) as checkpoint:
        for batch in batches(rows, batch_size):
            checkpoint.add(batch)
        writer.publish(checkpoint)


def write_index(folder, *checkpoints, **options):
    """An index of the given rows, one checkpoint each."""
    num_examples = len(checkpoints[0])
    writer = open_writer(folder, **{"num_examples": num_examples, **options})
    for number, rows in enumerate(checkpoints):
        write_checkpoint(writer, rows, name=f"checkpoint-{number}", step=number)
    return folder


def some(rows, first, last):
    """Examples `[first, last)` alone."""
    start, end = int(rows.offsets[first]), int(rows.offsets[last])
    return TokenRows(rows.offsets[first : last + 1] - start, rows.tokens[start:end], rows.rows[start:end], False)


def grow_index(folder, *checkpoints, **options):
    """Add to an index of [`write_index`] the examples that `checkpoints` have more than it has."""
    writer = open_writer(folder, **{"num_examples": len(checkpoints[0]), "add_examples": True, **options})
    for number, rows in enumerate(checkpoints):
        new = some(rows, writer.first_example, len(rows))
        write_checkpoint(writer, new, name=f"checkpoint-{number}", step=number)
    return folder


def equal_rows(num_examples, *, num_tokens, width, vocabulary_size):
    """Examples of equally many tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = [
        torch.randperm(vocabulary_size, generator=generator)[:num_tokens].sort().values for _ in range(num_examples)
    ]
    rows = torch.randn(num_examples * num_tokens, width, generator=generator)
    return TokenRows(torch.arange(num_examples + 1) * num_tokens, torch.cat(tokens), rows, False)
