"""The artifact that learning domain weights ends in, https://huggingface.co/papers/2310.15393."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hf_doge.artifacts.folder import FETCHED_FILES, read_folder, write_folder
from hf_doge.artifacts.hub.fetch import fetch_folder
from hf_doge.artifacts.readers import read_ratios
from hf_doge.artifacts.record import WeightsRecord
from hf_doge.artifacts.summary import summarize
from hf_doge.checks import check_flag, check_path

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from matplotlib.figure import Figure


class DomainWeights(WeightsRecord):
    """
    How much of each data domain to train on, and how that was found.

    Args:
        mean (`Mapping[str, float]`):
            Domain name -> weight: the mean of the weights over the run, the one to train with. At least 0, summing to 1
            within 1e-6. For ratios that do not sum to 1 there is [`~DomainWeights.from_mapping`].
        last (`Mapping[str, float]`, *optional*): Weights after the last update, same domains. `mean` when not given.
        trajectory (`Trajectory`, *optional*): Weights, scores and losses step by step, same domains.
        recipe (`Mapping`, *optional*): `name` of the recipe and every argument of it.
        domains (`Mapping[str, Mapping]`, *optional*):
            Domain name -> what is known of its data: `num_rows`, `num_tokens`, `fingerprint`, ...
        metadata (`Mapping`, *optional*): Model, tokenizer, versions, commit, date.
            `recipe`, `domains` and `metadata` hold what JSON can.

    Attributes:
        mean, last (`dict[str, float]`): In the order of the domains.
        trajectory (`Trajectory` or `None`).
        recipe, metadata (`dict`).
        domains (`dict[str, dict]`): One entry for every domain, empty where nothing is known.
        unknown_keys (`dict`): What a newer version of this package has written beside these; saved again as it is.

    Raises:
        ValueError: Weights off the simplex, or domains that differ; the message names the domain.
    """

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "DomainWeights":
        """
        Read weights written by others, normalising their ratios.

        Known are the JSON of DoReMi (`train_domain_weights`), the YAML of RegMix (`train`), and plain
        `{name: ratio}` in JSON or YAML. Names stay as they are written.

        Raises:
            ValueError: The file is malformed, repeats a key, or a ratio is no finite number >= 0. Names file and domain.
        """
        path = Path(check_path("path", path))
        ratios, shape = read_ratios(path)
        try:
            return cls.from_mapping(ratios, metadata={"source_file": path.name, "source_format": shape})
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error

    def summary(self) -> str:
        """A table of the domains, heaviest first, under a line on the recipe."""
        return summarize(self)

    def plot(self, path: str | os.PathLike | None = None) -> "Figure":
        """
        Draw the trajectory, and the weights against uniform and natural proportions. See
        [`~hf_doge.plots.plot_domain_weights`].
        """
        from hf_doge.plots import plot_domain_weights

        return plot_domain_weights(self, check_path("path", path, optional=True))

    def save_pretrained(self, save_directory: str | os.PathLike, *, plot: bool = False) -> None:
        """
        Save as a dataset folder: `domain_weights.json`, `weights/` and `trajectory/` in Parquet, `README.md`.

        `datasets.load_dataset(save_directory, "weights")` and `"trajectory"` open it. An artifact in the folder is
        replaced as one: a crash at any point leaves the old or the new one to [`~DomainWeights.from_pretrained`], and
        saving again completes it. Other files stay, and so does what a person wrote into `README.md`: only the block between
        our markers and our keys of its YAML are written again; without markers only digests of the data change, with a warning.

        Several processes may call this for one folder, as those of `accelerate launch` do in a script that knows of none:
        they save one after the other, and each can read an artifact when it returns.

        Args:
            save_directory (`str` or `os.PathLike`): New, empty, or an artifact to replace.
            plot (`bool`): Also draw `plot.png` for the card, where matplotlib is installed.

        Raises:
            FileExistsError: The folder holds something else than an artifact.
            NotADirectoryError: `save_directory` is a file.
        """
        write_folder(self, Path(check_path("save_directory", save_directory)), plot=check_flag("plot", plot))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        model_id: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tag: str | None = None,
    ) -> "CommitInfo | None":
        """
        Push to a dataset repository on the Hub, in one commit that everybody sees whole or not at all.

        What the repository holds already is not sent again, and where it holds everything nothing is committed; so a push
        that failed or was killed is repeated by the same call. Requests that fail are tried again for about a minute, or as
        long as the Hub asks for. Files of others in the repository stay, and so does what a person wrote into its card.

        Args:
            repo_id (`str`): `"user/name"`, or `"name"` of your own. Made if it does not exist.
            model_id (`str`, *optional*): Repository of the model that the weights were learned with, for the card.
            commit_message (`str`, *optional*), commit_description (`str`, *optional*): Of the commit.
            private (`bool`, *optional*): Whether a new repository is private. One that exists stays as it is.
            token (`str` or `bool`, *optional*): Access token with the write role; by default the one you logged in with.
            revision (`str`, *optional*): Branch to push to, made if it does not exist. By default `main`.
            create_pr (`bool`): Open a pull request instead.
            tag (`str`, *optional*): Tag to put on the commit, so that others can pin it.

        Returns:
            `huggingface_hub.CommitInfo`: The commit; of a repository that held everything already, its head. `None` on all
                processes but the first of those that `accelerate launch` or `torchrun` started, when that one has pushed.

        Raises:
            PermissionError: There is no token, or it may not write there. Says what to do.
            ValueError: The name is not valid, or a file holds an access token.
            FileExistsError: The repository holds something else, or `tag` is taken.
            PushError: The Hub could not be reached for too long. Says what it holds now.
        """
        from hf_doge.artifacts.weights_publication import (
            push_weights,
        )  # needs the Hub's client, which a folder does not

        return push_weights(
            self,
            repo_id,
            model_id=model_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tag=tag,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "DomainWeights":
        """
        Load what [`~DomainWeights.save_pretrained`] or [`~DomainWeights.push_to_hub`] wrote.

        Args:
            name_or_path (`str` or `os.PathLike`):
                A local folder, else the name of a dataset repository on the Hub. When offline, its last download is read.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*): Access token, as in `huggingface_hub`.
            cache_dir (`str` or `os.PathLike`, *optional*): Of downloads; the Hub's own cache by default.
            local_files_only (`bool`): Ask nobody, read the last download.
            force_download (`bool`): Fetch again what is in the cache.

        Raises:
            FileNotFoundError: There is no such folder and no such repository, or no artifact in it.
            PermissionError: The repository is private or gated, and the token may not read it.
            ValueError: A file is malformed, was altered or cut short, or is from a newer version that cannot be read.
            OSError: The disk is full, or the Hub could not be reached for too long.
        """
        folder = fetch_folder(
            name_or_path,
            file_hint=" Read a single file by `DomainWeights.from_file`.",
            allow_patterns=FETCHED_FILES,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        arguments, unknown_keys = read_folder(folder)
        weights = cls(**arguments)
        weights.unknown_keys = unknown_keys
        return weights
