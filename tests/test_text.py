"""What others wrote can pretend nothing where we show it: terminal, Markdown, YAML, HTML, pictures, log keys, errors."""

import json
import re
import unicodedata

import pyarrow as pa
import pytest
from datasets import Dataset

from hf_doge import DomainWeightedSampler, DomainWeights, interleave_domains
from hf_doge.artifacts.cards.card import dump_header, parse_header
from hf_doge.artifacts.cards.text import code, code_block, escape, json_block
from hf_doge.artifacts.influence.manifest import parse_config
from hf_doge.artifacts.provenance import public_command
from hf_doge.checks import require_printable
from hf_doge.cli import main
from hf_doge.evaluation.comparison import Comparison, MixtureRun
from hf_doge.text import hide_secrets, printable, public_content
from hf_doge.tracing.html import render_page, shade
from hf_doge.tracing.words import Reading
from tests.artifacts.influence_rows import open_writer, random_rows, write_checkpoint, write_index

UNSEEN = [
    "\n",
    "\r",
    "\x1b[2J",
    "\x9b31m",
    "\x85",
    "\u2028",
    "\u202e",
    "\u2066",
    "\u200b",
    "\ufeff",
    "\u200d",
    "\xad",
    "\U000e0041",
]
EVIL = (
    "x" + "".join(UNSEEN) + "``` | `a` <script>alert(1)</script> --> <!-- end hf_doge --> [l](http://a) www.a.example"
)


def is_harmless(text, keep="\n"):
    return all(
        character in keep or unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp", "Cs")
        for character in text
    )


@pytest.mark.parametrize("unseen", UNSEEN)
def test_names_with_characters_that_nobody_sees_are_refused_at_every_entrance(unseen):
    name = f"wi{unseen}ki"
    told = re.escape(printable(name))
    for entrance in (
        lambda: DomainWeights({name: 1.0}),
        lambda: DomainWeights.uniform([name]),
        lambda: DomainWeights({"a": 1.0}, metadata={name: 1}),
        lambda: DomainWeights({"a": 1.0}, recipe={"deep": [{name: 1}]}),
        lambda: DomainWeightedSampler([name, name], {name: 1}),
        lambda: interleave_domains(
            {name: Dataset.from_dict({"x": [1]}), "a": Dataset.from_dict({"x": [1]})}, {name: 1, "a": 1}
        ),
        lambda: Comparison([MixtureRun(name, 1, {"a": 1.0}, {"a": 1.0}, {"a": 1.0}, 5)]),
        lambda: Comparison([MixtureRun("a", 1, {"a": 1.0}, {"a": 1.0, name: 1.0}, {"a": 1.0}, 5)]),
    ):
        with pytest.raises(ValueError, match=f"cannot be seen, but got .*{told}") as refused:
            entrance()
        assert is_harmless(str(refused.value), keep="")


def test_names_of_all_scripts_pass():
    names = [
        "wiki",
        "\u0648\u06cc\u06a9\u06cc\u200c\u067e\u062f\u06cc\u0627",
        "क्\u200dष",
        "维基",
        "👨\u200d👩",
        "é",
        "a b",
        "a\xa0b",
    ]
    require_printable("Names", names)
    assert [printable(name) for name in names] == names


def test_a_foreign_artifact_with_such_a_name_is_refused_in_harmless_words(tmp_path):
    DomainWeights.uniform(["wiki", "web"]).save_pretrained(tmp_path / "artifact")
    manifest = tmp_path / "artifact" / "domain_weights.json"
    manifest.write_text(manifest.read_text().replace('"wiki"', '"wi\\u001b[2Jki"'))
    with pytest.raises(ValueError, match=r'got "wi\\u001b\[2Jki"') as refused:
        DomainWeights.from_pretrained(tmp_path / "artifact")
    assert is_harmless(str(refused.value), keep="")


def test_what_is_shown_in_a_terminal_is_json_for_the_same_characters():
    assert json.loads(f'"{printable("".join(UNSEEN))}"') == "".join(UNSEEN)
    weights = DomainWeights({"a": 1.0}, recipe={"name": EVIL, "note": EVIL}, metadata={"command": EVIL})
    assert is_harmless(weights.summary())
    assert "\n\n" in weights.summary()  # the only empty line is ours
    assert len(weights.summary().splitlines()) < 12


def test_markdown_shows_any_text_as_text():
    for shown in (escape(EVIL), code(EVIL), code_block(EVIL), json_block({"a": EVIL})):
        assert is_harmless(shown)
        assert "<!--" not in shown
    assert "<" not in escape(EVIL)
    assert "://" not in escape(EVIL)
    assert "www." not in escape(EVIL)
    assert len(escape(EVIL).splitlines()) == len(code(EVIL).splitlines()) == 1
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"
    assert code_block(EVIL).splitlines()[-1] == "````"


def test_yaml_holds_any_text_without_showing_what_cannot_be_seen():
    content = {"pretty_name": EVIL, "names": ["é", "no"]}
    assert parse_header(dump_header(content)) == content
    assert is_harmless(dump_header(content))
    assert dump_header({"a": "é"}) == "a: é\n"


def test_the_card_of_weights_with_evil_metadata_stays_ours(tmp_path):
    facts = {"name_or_path": EVIL, "class": EVIL, "revision": EVIL, "config": {"x": EVIL}, "num_parameters": 1}
    metadata = {
        "model": facts, "tokenizer": facts, "command": EVIL, "versions": {"torch": EVIL}, "hf_doge_commit": EVIL,
        "source_file": EVIL, "source_format": EVIL, "training": {"learning_rate": EVIL, "device": EVIL}, "date": EVIL,
    }  # fmt: skip
    DomainWeights({"a|`b`<i>": 1.0}, recipe={"name": EVIL}, metadata=metadata).save_pretrained(tmp_path / "artifact")
    card = (tmp_path / "artifact" / "README.md").read_text(encoding="utf-8")
    assert is_harmless(card)
    assert card.count("<!-- end hf_doge -->") == 1
    prose = re.sub(r"(?s)^(`{3,})\w*\n.*?\n\1$", "", card, flags=re.MULTILINE)
    assert "<script>" not in prose


def test_columns_of_an_index_are_refused_and_shown_as_code(tmp_path):
    rows = random_rows(8)
    for column, name in (("te\nxt", "refused"), ("a`b|<i>", "index")):
        writer = open_writer(tmp_path / name, num_examples=8, examples=False)
        table = pa.table({"example_id": range(8), column: ["a"] * 8})
        if name == "refused":
            with pytest.raises(ValueError, match=r'Columns of the examples .* got "te\\nxt"'):
                writer.write_examples(table)
        else:
            writer.write_examples(table)
            write_checkpoint(writer, rows)
    assert "``a`b\\|<i>``" in (tmp_path / "index" / "README.md").read_text(encoding="utf-8")


def test_an_index_whose_checkpoint_has_such_a_name_is_refused(tmp_path):
    config = json.loads((write_index(tmp_path / "index", random_rows(8)) / "config.json").read_text())
    config["checkpoints"][0]["model_class"] = "Bert\x1b]0;title\x07"
    with pytest.raises(ValueError, match=r'got "Bert\\u001b\]0;title\\u0007"'):
        parse_config(json.dumps(config).encode(), source="config.json")


def test_a_page_of_hits_shows_no_character_that_nobody_sees():
    hit = {
        "query": 0, "rank": 1, "kind": "proponent", "example_id": 1, "score": 1.0, "special_token_share": 0.0,
        "words": [EVIL], "word_scores": [1.0], "token_ids": [1], "token_scores": [1.0], "example_token_ids": [1],
        "example_token_scores": [1.0], "query_label": EVIL, "label": 1, "label_name": EVIL,
        "query_text": EVIL, "query_token_ids": [1], "text": EVIL,
    }  # fmt: skip
    reading = Reading(EVIL, [1], [(0, 5)], ["x"])
    page = render_page([hit], None, ["text"], title=EVIL) + shade(reading, {1: 1.0})
    assert is_harmless(page, keep="\r\n\t")
    assert "<script" not in page


def test_hf_doge_report_shows_no_name_as_markup(tmp_path, capsys):
    name = "a|`b`<i>```"
    runs = [
        MixtureRun(mixture, 1, {name: 1.0}, {name: 1.0, "</td>": 2.0}, {name: 1.0}, 5)
        for mixture in ("uniform", "<b>|x")
    ]
    Comparison(runs).save(tmp_path / "comparison")
    DomainWeights({name: 0.5, "```": 0.5}, recipe={"name": EVIL}).save_pretrained(tmp_path / "learned" / "weights")
    assert main(["report", str(tmp_path)]) == 0
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    prose = re.sub(r"(?s)^(`{3,})\w*\n.*?\n\1$", "", report, flags=re.MULTILINE)
    for text in (capsys.readouterr().out, report):
        assert is_harmless(text)
    assert not re.search(r"<b>|<i>|</td>|<script", prose)
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {4, 5}  # one mixture, and two


def test_errors_at_the_shell_are_one_harmless_line(tmp_path, capsys):
    assert main(["report", str(tmp_path / "\x1b[2Jno")]) == 2
    assert is_harmless(capsys.readouterr().err)


SECRET = "aB3" * 12


@pytest.mark.parametrize(
    "text",
    [
        f"hf_{SECRET}", f"x=hf_{SECRET}", f"my_hf_{SECRET}", f"api_org_{SECRET}", f"hf_oauth_{SECRET}.x-{SECRET}", f"ghp_{SECRET}",
        f"--hub_token {SECRET}", f"--hub-token={SECRET}", f"python x.py --token '{SECRET}' --y 1", f"HF_TOKEN={SECRET} python x.py",
        f"https://me:{SECRET}@a.b/c", f"https://{SECRET}@a.b", f"https://a.b/c?x=1&token={SECRET}&y=2", f"Authorization: Bearer {SECRET}",
        f"https://s3/x?X-Amz-Signature={SECRET}&X-Amz-Credential={SECRET}", f"wandb_api_key={SECRET}", f'password="{SECRET}"',
        f"a\n--api_token {SECRET}\nb",
    ],
)  # fmt: skip
def test_no_secret_stays_in_what_others_may_read(text, tmp_path):
    assert SECRET not in hide_secrets(text)
    metadata = {"command": text, "note": text, "model": {"name_or_path": text, "config": {"x": text}}}
    DomainWeights({"a": 1.0}, recipe={"name": "paper", "arguments": {"x": text}}, metadata=metadata).save_pretrained(
        tmp_path
    )
    assert SECRET not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert SECRET not in json.dumps([public_command(["x", *text.split()]), public_content({"x": [text]})])


def test_what_is_no_secret_stays():
    for text in (
        "--special_tokens count --top_k_tokens 3 --tokenizer bert --train_tokenizer_vocab 300",
        "hf_internal-testing/tiny-random-llama_of-many-words hf_doge hf_transfer sk-learn-of-many-words-and-more https://a.b/c?x=1 me@example.com tokens=5 num_tokens=7",
        "[PAD] </s> the token was refused",
    ):
        assert hide_secrets(text) == text
    config = {"eos_token": "</s>", "pad_token": "<pad>", "special_tokens": "count"}
    assert public_content(config) == config
    assert public_content({"hub_token": SECRET, "api_key": SECRET, "token": SECRET}) == {
        "hub_token": "***", "api_key": "***", "token": "***",
    }  # fmt: skip
