"""Domain weights as they go to the Hub."""

from functools import partial
from typing import Any

from huggingface_hub import CommitInfo

from hf_doge.artifacts.cards import PLOT_FILE, weights_card
from hf_doge.artifacts.folder import MANIFEST, artifact_files, parse_manifest
from hf_doge.artifacts.hub.publication import Publication
from hf_doge.artifacts.hub.push import push_publication
from hf_doge.artifacts.record import WeightsRecord

_FOLDERS = ("weights", "trajectory")


def push_weights(
    weights: WeightsRecord,
    repo_id: str,
    *,
    model_id: str | None = None,
    commit_message: str | None = None,
    **options: Any,
) -> CommitInfo | None:
    """See [`DomainWeights.push_to_hub`]."""
    message = commit_message or f"Upload domain weights, {len(weights.names)} domains"
    publication = weights_publication(weights, repo_id, model_id=model_id)
    return push_publication(publication, repo_id, commit_message=message, **options)


def weights_publication(weights: WeightsRecord, repo_id: str, *, model_id: str | None = None) -> Publication:
    """The files of domain weights for the Hub."""
    files = artifact_files(weights, plot=True)
    tables = {name: content for name, content in files.items() if name.endswith(".parquet")}

    def card(existing: str | None) -> str:
        return weights_card(
            weights,
            data_files=tables,
            repo_id=repo_id,
            model_id=model_id,
            plot=PLOT_FILE in files,
            existing=existing,
        )

    return Publication(
        files,
        manifest=MANIFEST,
        owned=lambda path: path == PLOT_FILE or (path.partition("/")[0] in _FOLDERS and path.endswith(".parquet")),
        check_manifest=partial(parse_manifest, source=f"{MANIFEST} of {repo_id}"),
        card=card,
    )
