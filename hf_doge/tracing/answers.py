"""What a query asks about: a label by its name, what the model says next, and which tokens of an answer are traced."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hf_doge.checks import show
from hf_doge.gradients.embedding_uses import evaluation_mode
from hf_doge.gradients.example_losses import IGNORE_INDEX
from hf_doge.tracing.encoding import Encoding
from hf_doge.tracing.limits import ModelInputs
from hf_doge.tracing.queries import Query, dialogue_kind, label_field, text_fields
from hf_doge.tracing.targets import Target, find_span
from hf_doge.tracing.token_queries import attended, label_tensor
from hf_doge.tracing.words import read_ids


def read_label(label: Any, model: nn.Module, tokenizer: Any) -> Tensor:
    """The label of a query as a tensor: a number, the name of a class, or the text that a model from text to text writes."""
    if isinstance(label, str) and tokenizer is not None and _writes_from_texts(model):
        return torch.tensor(tokenizer(text_target=label, verbose=False)["input_ids"])
    if isinstance(label, str):
        names = getattr(getattr(model, "config", None), "label2id", None) or {}
        if label not in names:
            raise ValueError(
                f"A label must be a number or one of the model's labels {sorted(names)}, but got {label!r}. Give its "
                "number."
            )
        label = names[label]
    return label_tensor(label)


def no_prediction(model: nn.Module) -> ValueError:
    """Of a query without a label."""
    return ValueError(
        f"Queries without labels can be traced for classifiers and language models, but `{type(model).__name__}` is "
        "neither, so what it predicts is no label. Give the queries `labels`."
    )


def make_prompt(
    record: Mapping[str, Any], tokenizer: Any, encoding: Encoding, model: nn.Module, position: int
) -> Query:
    """
    A query without an answer: a text, a prompt, messages up to the assistant's turn, or tokens.

    Raises:
        ValueError: It has an answer.
    """
    messages, prompt = record.get("messages"), record.get("prompt")
    answered = "completion" if record.get("completion") is not None else label_field(record)
    for name, turns in (("prompt", prompt), ("messages", messages)):
        if turns and not isinstance(turns, str) and turns[-1]["role"] == "assistant":
            answered = name
    if answered is not None:
        raise ValueError(
            f"`next_tokens` traces what the model says next, but query {position} has its answer in `{answered}`. Leave one of the"
            " two out."
        )
    if prompt and isinstance(record.get("text"), str) and "input_ids" not in record:
        raise ValueError(
            f"`next_tokens` must know what is continued, but query {position} has both `prompt` and `text`. Keep one of the two."
        )
    if "input_ids" in record:
        ids = attended(record["input_ids"], record.get("attention_mask"))
    else:
        prompt = messages or prompt
        if not prompt or isinstance(prompt, str):
            prompt = [prompt] if prompt else [record[name] for name in text_fields(record)]
        ids = torch.tensor(encoding.encode_prompt(prompt, tokenizer, record=record, ends=_writes_from_texts(model)))
    return Query({"input_ids": ids}, read_ids(tokenizer, ids.flatten().tolist()))


def say_next(
    query: Query, num_tokens: int, model: nn.Module, inputs: ModelInputs, tokenizer: Any, position: int
) -> None:
    """
    Give a query the answer that the model says, the likeliest token at each step until it ends its text: it alone has labels.

    Raises:
        ValueError: The model writes no text, or the prompt leaves no room for it; or its text would end at what is no token.
    """
    ids, from_texts, whole = query.features["input_ids"], _writes_from_texts(model), model
    _require_writing(model, inputs, "`next_tokens`")
    limit, needed = inputs.max_length, len(ids) + (0 if from_texts else num_tokens)
    if limit is not None and needed > limit:
        raise ValueError(
            f"`next_tokens={num_tokens}` needs room behind the prompt, but query {position} has {len(ids)} tokens and the model reads"
            f" {limit} at most. Shorten it, or ask for fewer."
        )
    device = next(model.parameters()).device
    config = _greedy(model, inputs, tokenizer, num_tokens)
    with evaluation_mode(model), _generating_by(config, model), torch.no_grad():
        found = whole.generate(  # type: ignore[operator]
            input_ids=ids[None].to(device),
            attention_mask=torch.ones_like(ids)[None].to(device),
            generation_config=config,
        )[0].cpu()
    said = found[1:] if from_texts else found[len(ids) :]
    query.target = read_ids(tokenizer, said.tolist()).text
    if from_texts:
        query.features["labels"] = said
        return
    query.features["input_ids"] = found
    query.features["labels"] = torch.cat([torch.full_like(ids, IGNORE_INDEX), said])
    query.reading = read_ids(tokenizer, found.tolist())


def _greedy(model: nn.Module, inputs: ModelInputs, tokenizer: Any, num_tokens: int) -> GenerationConfig:
    """The likeliest token at each step: of the model's own settings only where a text begins and ends."""
    own, config = getattr(model, "generation_config", None), getattr(model, "config", None)
    end = getattr(own, "eos_token_id", None)
    if end is None:
        end = getattr(tokenizer, "eos_token_id", None)
    start = None
    if _writes_from_texts(model):
        names = [(one, name) for name in ("decoder_start_token_id", "bos_token_id") for one in (own, config)]
        start = next((value for one, name in names if (value := getattr(one, name, None)) is not None), None)
    ends = end if isinstance(end, list | tuple) else [end]
    starts = start is None or (type(start) is int and 0 <= start < inputs.vocabulary_size)
    if not starts or not all(token is None or type(token) is int for token in ends):
        name, value = ("eos_token_id", end) if starts else ("decoder_start_token_id", start)
        raise ValueError(
            f"`{name}` of the model's generation_config must be a token, as a whole number, but is {show(value)}. Correct it in"
            " generation_config.json of the checkpoint."
        )
    tokens = {"eos_token_id": end, "decoder_start_token_id": start, "pad_token_id": inputs.pad_token_id}
    return GenerationConfig(max_new_tokens=num_tokens, do_sample=False, num_beams=1, **tokens)


@contextmanager
def _generating_by(config: GenerationConfig, model: nn.Module) -> Iterator[None]:
    """`generate` fills what a given configuration leaves open from the one that the model holds; that is put back."""
    held: list[tuple[Any, Any]] = [
        (module, vars(module)["generation_config"])
        for module in model.modules()
        if "generation_config" in vars(module)
    ]
    try:
        for module, _ in held:
            module.generation_config = config
        yield
    finally:
        for module, own in held:
            module.generation_config = own


def keep_targets(
    queries: Sequence[Query],
    targets: Sequence[Target | None],
    records: Sequence[Mapping[str, Any]],
    *,
    asked: tuple[nn.Module, ModelInputs, Any, Encoding],
    first_position: int,
) -> None:
    """
    Leave labels to those tokens of answers alone that hold some characters of their target.

    Args:
        queries (`Sequence[Query]`): With labels that are tokens.
        targets (`Sequence`): A part of each answer, or where one begins and ends in characters; `None` for all of it.
        records (`Sequence[Mapping]`): What the queries were made of; a completion, last message or text is the answer.
        asked (`tuple`): The model, what it takes, its tokenizer, and how queries were encoded.
        first_position (`int`): What errors call the first query.

    Raises:
        ValueError: The model writes no text; or an answer does not hold the target, or not once, or no token that is predicted;
            or the tokens do not hold the answer.
    """
    for position, (query, target, record) in enumerate(
        zip(queries, targets, records, strict=True), start=first_position
    ):
        if target is not None:
            _keep_target(query, target, record, *asked, position=position)


def _keep_target(
    query: Query,
    target: Target,
    record: Mapping[str, Any],
    model: nn.Module,
    inputs: ModelInputs,
    tokenizer: Any,
    encoding: Encoding,
    *,
    position: int,
) -> None:
    _require_writing(model, inputs, "`target`")
    if tokenizer is None:
        raise ValueError(
            "`target` needs the tokenizer of the model. Pass `processing_class` to `InfluenceIndex.from_pretrained`."
        )
    labels = query.features["labels"]
    answer, own = _answer(query, record, tokenizer, encoding, position)
    places = [place for place in (labels != IGNORE_INDEX).nonzero().squeeze(1).tolist() if place in own]
    reading = read_ids(tokenizer, labels[places].tolist())
    start, stop = find_span(target, reading.text, answer, position)
    first = 0 if _writes_from_texts(model) else 1  # the first token of a text is not predicted
    kept = [
        (place, span)
        for place, span in zip(places, reading.spans, strict=True)
        if span is not None and place >= first and span[0] < stop and (span[1] > start or span[0] == span[1] == start)
    ]
    if not kept:
        raise ValueError(
            f"`target` must hold a token that the model predicts, but characters {start} to {stop} of {reading.text!r:.200} of query"
            f" {position} hold none (the first token of a text is not predicted)."
        )
    query.features["labels"] = torch.full_like(labels, IGNORE_INDEX)
    for place, _ in kept:
        query.features["labels"][place] = labels[place]
    query.target = reading.text[kept[0][1][0] : kept[-1][1][1]].strip()


def _answer(
    query: Query, record: Mapping[str, Any], tokenizer: Any, encoding: Encoding, position: int
) -> tuple[str | None, range]:
    """The text of which a target is a part, `None` where that is what its tokens decode to, and the places of its tokens."""
    labels = query.features["labels"]
    own, answer = range(len(labels)), None
    if "input_ids" in record and query.target is None:
        return None, own
    kind = dialogue_kind(record)
    if query.target is None and kind is not None:
        found = record[kind[-1]]
        answer = found if isinstance(found, str) else found[-1]["content"]
        if not isinstance(answer, str):
            raise ValueError(
                f"`target` must be part of an answer in words, but the answer of query {position} is {show(answer)}. Give its"
                " `content` as one text, or ask with `input_ids` and `labels`."
            )
        own = encoding.answer_places(record, tokenizer)
    elif query.target is None:
        name, texts = label_field(record), [record[one] for one in text_fields(record)]
        answer = record[name] if name is not None else texts[0] if len(texts) == 1 else None
    while own and int(labels[own[-1]]) in {IGNORE_INDEX, *tokenizer.all_special_ids}:
        own = own[:-1]  # the end of the text is no part of the answer
    while own and int(labels[own[0]]) in tokenizer.all_special_ids:
        own = own[1:]
    return answer.removesuffix(tokenizer.eos_token or "") if isinstance(answer, str) else None, own


def _writes_from_texts(model: nn.Module) -> bool:
    name, config = type(model).__name__, getattr(model, "config", None)
    return name.endswith("ForConditionalGeneration") and bool(getattr(config, "is_encoder_decoder", False))


def _require_writing(model: nn.Module, inputs: ModelInputs, what: str) -> None:
    can = callable(getattr(model, "generate", None)) and bool(getattr(model, "can_generate", bool)())
    if not (_writes_from_texts(model) or inputs.continues_texts) or not can:
        raise ValueError(
            f"{what} is about models that write texts, but `{type(model).__name__}` does not. Leave it out."
        )
