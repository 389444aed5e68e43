"""
`hf-doge view`: an influence index in the browser. A text or a training example is traced, domain by domain too, and where
examples have labels the suspicious ones are listed. `examples/space/app.py` shows the same page as a Space.

What is shown is HTML that runs nothing, with all names and texts escaped; the page asks no other site for anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset

from hf_doge.artifacts.cards.html import escape_html, html_table, index_html
from hf_doge.checks import check_count
from hf_doge.cli.console import say
from hf_doge.cli.parser import parse
from hf_doge.text import hide_secrets, printable
from hf_doge.tracing.encoding import Encoding
from hf_doge.tracing.hits import text_columns
from hf_doge.tracing.html import DOMAIN_COLUMNS
from hf_doge.tracing.index import InfluenceIndex
from hf_doge.tracing.pretrained import load_tokenizer
from hf_doge.tracing.queries import check_options

LISTED = 1000  # examples to pick from; others by their number
SUSPICIOUS = 50  # examples in the table of labels
MOST_HITS = 50
_SNIPPET = 120  # characters of an example in a list
_LONGEST = 50_000  # characters of a text that is asked about
_GRADIO = "The page needs gradio. Install it by `pip install 'hf-doge[view]'`, or use `hf-doge search --html`."
_DOMAINS = (
    "<h3>By {}</h3><p>Mean score of its training examples. Above 0: they lowered the loss of what is traced.</p>"
)
_LABELS = "<p>Examples that pushed their own prediction most: what a model can learn only by heart. Wrong labels tend to stand here.</p>"
# Whatever a text may hold, the browser loads nothing from elsewhere.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


@dataclass
class ViewArguments:
    """Which index, and where the page is."""

    _argument_group_name = "view"

    index: str = field(
        metadata={"positional": True, "help": "Folder of `hf-doge index` or TracInWECallback, or a Hub name."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of an index on the Hub."})
    streaming: bool = field(default=False, metadata={"help": "Fetch from the Hub only what the queries touch."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub name. Default: the one of the checkpoints."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on. 0.0.0.0 lets others in."})
    port: int | None = field(default=None, metadata={"help": "Port. Default: the first free one from 7860 on."})

    def __post_init__(self) -> None:
        check_count("--port", self.port, most=65535, optional=True)


class Viewer:
    """
    What the page shows of an index, as HTML. A question that cannot be answered is answered with the reason.

    Args:
        index ([`InfluenceIndex`]): Opened from a folder, or from the Hub with `streaming=True`.
    """

    def __init__(self, index: InfluenceIndex) -> None:
        self.index = index
        self.first = self._rows(range(min(len(index), LISTED)))
        columns = self.first.column_names
        self.fields = text_columns(self.first.features)
        self.cosine = bool(check_options({}, index.reader)["cosine"])  # what the index says
        self.has_labels = "label" in columns
        names = self.first["label_name"] if "label_name" in columns else ()
        self.label_names = sorted({name for name in names if name is not None})
        self.domain_columns = [name for name in (*DOMAIN_COLUMNS, "label_name") if name in columns]

    def listed(self) -> list[tuple[str, int]]:
        """The first examples to pick from: what a person reads of each, and its number."""
        return [(self._snippet(row, number), number) for number, row in enumerate(self.first)]

    def trace(
        self, text: str, second: str = "", label: str | None = None, top_k: int = 5, cosine: bool | None = None
    ) -> tuple[str, str]:
        """
        Proponents and opponents of what the model makes of a text, and the same by domain.

        Args:
            text (`str`): The text, or the first of a pair, or a prompt.
            second (`str`): The second of a pair, or the completion of a prompt.
            label (`str`, *optional*): Name of the label that is traced; by default what the model predicts.
            top_k (`int`): Hits of each kind.
            cosine (`bool`, *optional*): Divide scores by the norms of both gradients; by default as the index says.
        """
        if not (text or "").strip():
            return _told("Write a text first."), ""
        if len(text) + len(second or "") > _LONGEST:
            return _told(f"A text must have at most {_LONGEST:,} characters."), ""
        query: dict[str, Any] = {"text": text}
        if (second or "").strip():
            names = (
                ("sentence1", "sentence2") if len(self.fields) == 2 or self.has_labels else ("prompt", "completion")
            )
            query = dict(zip(names, (text, second), strict=True))
        return self._answer(query | ({"label": label} if label else {}), top_k, cosine)

    def trace_example(self, number: int | str, top_k: int = 5, cosine: bool | None = None) -> tuple[str, str]:
        """The same of a training example, which is none of its own hits."""
        word = str(number).strip()
        if not word.isdecimal() or int(word) >= len(self.index):
            return _told(f"An example must be a number from 0 to {len(self.index) - 1:,}."), ""
        (row,) = self._rows([int(word)])
        query = self._query_of(row)
        if not set(query) - {"label"}:
            return _told(
                "The index keeps neither the text of this example nor its tokens and labels, so it cannot be asked about."
            ), ""
        return self._answer(query, top_k, cosine, exclude=[int(word)])

    def suspicious(self) -> str:
        """The examples that pushed their own prediction most, as a table."""
        try:
            rows = self.index.self_influence().select(range(min(SUSPICIOUS, len(self.index))))
        except (ValueError, OSError) as error:
            return _told(error)
        told = [*([] if self.label_names else ["label"]), *self.domain_columns]
        columns: dict[str, list[Any]] = {
            "text": [self._text(row) for row in rows],  # the first column is the one to the left
            "example": rows["example_id"][:],
            "score": [f"{score:.3g}" for score in rows["score"]],
            **{_title(name): rows[name][:] for name in told},
        }
        return _LABELS + html_table(columns)

    def _answer(
        self, query: Mapping[str, Any], top_k: int, cosine: bool | None, exclude: Sequence[int] = ()
    ) -> tuple[str, str]:
        queries: Any = [dict(query)]
        if "input_ids" in query:
            queries = Dataset.from_list(queries)
        try:
            hits = self.index.search(queries, top_k=min(int(top_k), MOST_HITS), exclude=exclude, cosine=cosine)
            domains = "".join(self._by(name, queries, cosine) for name in self.domain_columns)
            return self.index.show(hits).html, domains
        except (ValueError, OSError) as error:
            return _told(error), ""

    def _by(self, column: str, queries: Any, cosine: bool | None) -> str:
        found = self.index.domain_influence(queries, column, cosine=cosine)
        rows = sorted(found, key=lambda row: -row["score"])
        largest = max(abs(row["score"]) for row in rows) or 1.0
        columns = {
            _title(column): [row["domain"] for row in rows],
            "score": [f"{row['score']:+.3g}" for row in rows],
            "examples": [f"{row['num_examples']:,}" for row in rows],
        }
        return _DOMAINS.format(escape_html(_title(column))) + html_table(
            columns, bars=[row["score"] / largest for row in rows]
        )

    def _rows(self, ids: Sequence[int]) -> Dataset:
        return self.index.reader.examples_of(list(ids))

    def _query_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A training example as it is asked about: by its tokens where the index keeps them, else by its texts."""
        kept = ("input_ids", "attention_mask", "labels", "label")
        tokens = {name: row[name] for name in kept if row.get(name) is not None}
        # Without the labels that it was trained on, all its tokens would be asked about.
        if row.get("input_ids") and ({"labels", "label"} & {*tokens} or not Encoding.of(self.index.config).masks):
            return tokens
        names = [("prompt", "completion"), tuple(self.fields)]
        found = next((n for n in names if n and all(isinstance(row.get(one), str) for one in n)), ())
        query = {name: row[name] for name in found}
        return query | ({"label": row["label"]} if row.get("label") is not None else {})

    def _text(self, row: Mapping[str, Any]) -> str:
        text = " / ".join(str(row[name]) for name in self.fields if row.get(name) is not None)
        tokenizer = self.index.processing_class
        if not text and row.get("input_ids") and tokenizer is not None:
            text = str(tokenizer.decode(row["input_ids"][:_SNIPPET], skip_special_tokens=True))
        text = printable(" ".join(text.split()))
        return text if len(text) <= _SNIPPET else text[: _SNIPPET - 3] + "..."

    def _snippet(self, row: Mapping[str, Any], number: int) -> str:
        facts = [str(row[name]) for name in self.domain_columns if row.get(name) is not None]
        return " · ".join([str(number), *map(printable, facts), self._text(row)])


def _title(column: str) -> str:
    return "label" if column == "label_name" else column


def _told(reason: object) -> str:
    return f"<p>{escape_html(hide_secrets(' '.join(str(reason).split())))}</p>"


def make_page(viewer: Viewer) -> Any:
    """The page, a `gradio.Blocks`; all questions wait for each other."""
    gr = require_gradio()
    second = "Second text" if len(viewer.fields) == 2 else "" if viewer.has_labels else "Completion (may be left out)"
    with gr.Blocks(title="hf_doge: what made the model do this?", analytics_enabled=False) as page:
        gr.HTML(index_html(viewer.index.config))
        top_k = gr.Slider(1, MOST_HITS, value=5, step=1, label="Hits of each kind", render=False)
        cosine = gr.Checkbox(viewer.cosine, label="Divide by the gradients' lengths (cosine)", render=False)
        hits, domains, labels = gr.HTML(render=False), gr.HTML(render=False), gr.HTML(render=False)
        ask = partial(_connect, outputs=[hits, domains])
        with gr.Tab("Trace a text"):
            text = gr.Textbox(label="Text", lines=3)
            other = gr.Textbox(label=second, lines=2, visible=bool(second))
            choices = [("what the model predicts", ""), *((name, name) for name in viewer.label_names)]
            label = gr.Dropdown(choices, value="", label="Label", visible=bool(viewer.label_names))
            ask(
                gr.Button("Trace", variant="primary"),
                viewer.trace,
                inputs=[text, other, label, top_k, cosine],
                name="trace",
            )
        with gr.Tab("Trace a training example"):
            number = gr.Dropdown(viewer.listed(), value=0, label="Example", allow_custom_value=True)
            button = gr.Button("Trace", variant="primary")
            ask(button, viewer.trace_example, inputs=[number, top_k, cosine], name="trace_example")
        if viewer.has_labels:
            with gr.Tab("Suspicious labels"):
                button = gr.Button("List them")
                _connect(button, viewer.suspicious, inputs=[], outputs=[labels], name="suspicious")
                labels.render()
        for part in (top_k, cosine, domains, hits):
            part.render()
    return page


def _connect(button: Any, answer: Callable, *, inputs: list, outputs: list, name: str) -> None:
    button.click(answer, inputs, outputs, api_name=name, concurrency_id="index", concurrency_limit=1)


def serve(page: Any, **options: Any) -> str:
    """
    Start the page and return its address, which `page.block_thread()` then keeps.

    Args:
        page (`gradio.Blocks`): Of [`make_page`].
        options: Of `gradio.Blocks.launch`.
    """
    gr = require_gradio()
    from starlette.middleware import Middleware

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # else they come from Google
    _, url, _ = page.launch(
        theme=theme,
        app_kwargs={"middleware": [Middleware(_OwnFilesOnly)]},
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        **options,
    )
    return url


class _OwnFilesOnly:
    """Tells the browser to load nothing from elsewhere."""

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def require_gradio() -> Any:
    """
    Raises:
        ValueError: It is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ValueError(_GRADIO) from error
    return gradio


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    (args,) = parse(
        argv,
        ViewArguments,
        prog="hf-doge view",
        description=(
            "Show an influence index in the browser: trace a text or a training example to the examples and words that made "
            "the model do it, see which domains pushed, and which labels are suspicious. Ends with Ctrl-C."
        ),
    )
    require_gradio()
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    index = InfluenceIndex.from_pretrained(
        args.index, revision=args.revision, streaming=args.streaming, processing_class=tokenizer
    )
    page = make_page(Viewer(index))
    say(f"The page is at {serve(page, server_name=args.host, server_port=args.port)} until Ctrl-C.")
    page.block_thread()
    return 0
