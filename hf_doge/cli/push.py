"""`hf-doge push`: bring domain weights or an influence index to the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_doge.artifacts import DomainWeights
from hf_doge.artifacts.domain_weights import DOMAIN_WEIGHTS_FOLDER
from hf_doge.cli.console import say
from hf_doge.cli.parser import parse

WEIGHTS_MANIFEST, INDEX_MANIFEST = "domain_weights.json", "config.json"


@dataclass
class PushArguments:
    """What is pushed, and where to."""

    _argument_group_name = "push"

    folder: Path = field(
        metadata={
            "positional": True,
            "help": "Folder of domain weights, of a run that found some, or of an influence index.",
        }
    )
    repo_id: str = field(metadata={"positional": True, "help": "Where to: user/name. Made if it does not exist."})
    message: str | None = field(default=None, metadata={"help": "Message of the commit."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; made if it does not exist."})
    create_pr: bool = field(default=False, metadata={"help": "Propose it instead, as a pull request."})
    tag: str | None = field(default=None, metadata={"help": "Tag to put on the commit."})
    redact_text: bool = field(
        default=False, metadata={"help": "Leave out every column of an index's examples that can hold text."}
    )
    keep_columns: list[str] = field(default_factory=list, metadata={"help": "But for these."})
    publish_text: bool = field(
        default=False, metadata={"help": "Publish the texts also where the repository holds the index without them."}
    )
    no_models: bool = field(default=False, metadata={"help": "Leave out the weights of an index's checkpoints."})


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    (args,) = parse(
        argv,
        PushArguments,
        prog="hf-doge push",
        description=(
            "Push domain weights or an influence index to a dataset repository on the Hub, in one commit. Pushing again "
            "sends only what is missing. Log in first by `hf auth login`, or set HF_TOKEN."
        ),
    )
    options = {
        "commit_message": args.message,
        "private": args.private or None,
        "revision": args.revision,
        "create_pr": args.create_pr,
        "tag": args.tag,
    }
    if any((folder / WEIGHTS_MANIFEST).is_file() for folder in (args.folder, args.folder / DOMAIN_WEIGHTS_FOLDER)):
        if args.redact_text or args.keep_columns or args.no_models or args.publish_text:
            raise ValueError(
                "`--redact_text`, `--keep_columns`, `--publish_text` and `--no_models` are for influence indices."
            )
        commit = DomainWeights.from_pretrained(args.folder).push_to_hub(args.repo_id, **options)
    elif (args.folder / INDEX_MANIFEST).is_file():
        from hf_doge.tracing.index import InfluenceIndex

        commit = InfluenceIndex.from_pretrained(args.folder).push_to_hub(
            args.repo_id,
            redact_text=args.redact_text,
            keep_columns=args.keep_columns,
            include_models=not args.no_models,
            publish_text=args.publish_text,
            **options,
        )
    else:
        raise FileNotFoundError(
            f"A folder to push must hold {WEIGHTS_MANIFEST} (domain weights) or {INDEX_MANIFEST} (an influence index), but"
            f" {str(args.folder)!r} holds neither. `hf-doge learn` and `hf-doge index` write such folders."
        )
    if commit is not None:
        say(commit.pr_url or commit.commit_url)
    return 0
