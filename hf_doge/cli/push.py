"""`hf-doge push`: bring domain weights or an influence index to the Hub."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from hf_doge.artifacts import DomainWeights
from hf_doge.cli.console import say
from hf_doge.cli.parser import parse_once

WEIGHTS_MANIFEST, INDEX_MANIFEST = "domain_weights.json", "config.json"


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = _parse(argv)
    options = {
        "commit_message": args.message,
        "private": args.private or None,
        "revision": args.revision,
        "create_pr": args.create_pr,
        "tag": args.tag,
    }
    if (args.folder / WEIGHTS_MANIFEST).is_file():
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


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        prog="hf-doge push",
        description=(
            "Push domain weights or an influence index to a dataset repository on the Hub, in one commit. Pushing again "
            "sends only what is missing. Log in first by `hf auth login`, or set HF_TOKEN."
        ),
    )
    parser.add_argument("folder", type=Path, help="Folder of domain weights or of an influence index.")
    parser.add_argument("repo_id", help="Where to: user/name. Made if it does not exist.")
    parser.add_argument("--message", default=None, help="Message of the commit.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument("--revision", default=None, help="Branch to push to; made if it does not exist.")
    parser.add_argument("--create_pr", action="store_true", help="Propose it instead, as a pull request.")
    parser.add_argument("--tag", default=None, help="Tag to put on the commit.")
    parser.add_argument(
        "--redact_text", action="store_true", help="Leave out every column of an index's examples that can hold text."
    )
    parser.add_argument("--keep_columns", nargs="+", default=(), help="But for these.")
    parser.add_argument(
        "--publish_text",
        action="store_true",
        help="Publish the texts also where the repository holds the index without them.",
    )
    parser.add_argument("--no_models", action="store_true", help="Leave out the weights of an index's checkpoints.")
    return parse_once(parser, argv)
