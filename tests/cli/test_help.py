"""What a command says of itself, and that all are read by one parser."""

import dataclasses
import re
import subprocess
import sys

import pytest
from transformers import TrainingArguments

from hf_doge.artifacts.domain_weights import DOMAIN_WEIGHTS_FOLDER, DomainWeights
from hf_doge.cli import COMMANDS, main
from hf_doge.cli.completion import whole_parser
from hf_doge.cli.parser import COMMON
from hf_doge.training.config import DoGEConfig
from tests.artifacts.test_domain_weights import make_weights

TRAINED = ("learn", "train", "compare", "sweep")
OF_TRAINER = {one.name for one in dataclasses.fields(TrainingArguments)}


@pytest.fixture
def help_of(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    def read(command, flag="--help"):
        assert main([command, flag]) == 0
        return capsys.readouterr().out

    return read


def flags_in(text):
    return re.findall(r"^  (?:-h, )?--(\w+)", text, flags=re.MULTILINE)


def test_the_help_of_learn_fits_a_screen_and_begins_with_ours(help_of):
    text = help_of("learn")
    assert len(text.splitlines()) <= 94  # two lines for each flag at most
    titles = re.findall(r"^(\w.*):$", text, flags=re.MULTILINE)
    assert [title.split(" (")[0] for title in titles] == [
        "data",
        "model",
        "target",
        "domain weights",
        "training",
        "help",
    ]
    shown = flags_in(text)
    own = {one.name for one in dataclasses.fields(DoGEConfig)} - OF_TRAINER - {"domain_column"}
    assert own < set(shown)
    assert OF_TRAINER & set(shown) == set(COMMON)
    assert min(map(shown.index, COMMON)) > max(map(shown.index, own))


@pytest.mark.parametrize("command", TRAINED)
def test_all_arguments_of_the_trainer_are_shown_when_asked_for(command, help_of):
    brief, whole = help_of(command), help_of(command, "--help_all")
    assert set(flags_in(whole)) >= OF_TRAINER
    assert set(flags_in(brief)) < set(flags_in(whole))


def test_the_first_sentence_of_a_flag_is_shown_and_the_rest_when_asked_for(help_of):
    brief, whole = (" ".join(help_of("learn", flag).split()) for flag in ("--help", "--help_all"))
    assert "Bregman coefficient of the weight update, exp(learning_rate * score / mu), the" in brief
    assert "The paper's runs use 0.01 (universal)" not in brief
    assert "The paper's runs use 0.01 (universal)" in whole


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_flags_in_groups_and_help_at_the_end(command, help_of):
    text = help_of(command)
    assert text.startswith(f"usage: hf-doge {command} ")
    assert flags_in(text)[-2:] == ["help", "help_all"]
    assert re.search(r"^(options|positional arguments|flags):$", text, flags=re.MULTILINE) is None


@pytest.mark.parametrize("command", ["learn", "compare", "train"])
def test_a_flag_of_the_trainer_that_the_help_leaves_out_is_still_a_flag(command, tmp_path, capsys):
    flags = [f"--data_dir={tmp_path / 'none'}", f"--output_dir={tmp_path}", "--adam_beta2=0.9"]
    flags += ["--weights=uniform"] if command == "train" else []
    assert main([command, *flags]) == 2
    assert "`--data_dir` must be a folder" in capsys.readouterr().err
    assert main([command, *flags, "--adam_beta3=0.9"]) == 2
    assert "--adam_beta3" in capsys.readouterr().err


def test_a_flag_before_a_word_does_not_take_it(tmp_path, capsys):
    assert main(["push", "--private", str(tmp_path / "none"), "me/x"]) == 2
    assert "A folder to push must hold" in capsys.readouterr().err


def test_the_folder_of_a_run_is_pushed_as_the_weights_that_it_found(tmp_path, monkeypatch):
    weights, pushed = make_weights(with_trajectory=False), []
    weights.save_pretrained(tmp_path / DOMAIN_WEIGHTS_FOLDER)
    (tmp_path / "config.json").write_text("{}")  # of the model of the run
    monkeypatch.setattr(DomainWeights, "push_to_hub", lambda self, repo_id, **options: pushed.append((self, repo_id)))
    assert main(["push", str(tmp_path), "me/x"]) == 0
    assert pushed == [(weights, "me/x")]


def test_flags_of_a_command_that_is_not_a_training_come_from_a_file_too(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("index: nowhere\ntop_k: 3\n")
    assert main(["search", str(tmp_path / "c.yaml")]) == 2
    assert "Give either `--query`" in capsys.readouterr().err


def test_one_parser_has_every_command_with_all_of_its_flags():
    whole = whole_parser("files")
    (commands,) = (action for action in whole._actions if action.choices)
    assert list(commands.choices) == list(COMMANDS)
    flags = commands.choices["learn"]._option_string_actions
    assert {"--mu", "--adam_beta2", "--help", "--help-all"} <= set(flags)
    assert flags["--mixture"].complete == flags["--data_dir"].complete == "files"
    assert not hasattr(flags["--mu"], "complete")
    assert [one.dest for one in commands.choices["export"]._actions if not one.option_strings] == ["weights"]


def test_a_shell_completes_commands_flags_and_choices(capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words):
        asked = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
        run = f"{script}\n{asked}; _shtab_hf_doge; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True).stdout.split()

    assert completed("hf-doge", "se") == ["search"]
    assert "--streaming" in completed("hf-doge", "view", "--st")
    assert completed("hf-doge", "search", "--kernel", "syn") == ["synonym"]


def test_completion_is_refused_in_words(monkeypatch, capsys):
    assert main(["completion", "fish"]) == 2
    assert "`shell` must be one of" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'hf-doge[completion]'" in capsys.readouterr().err
