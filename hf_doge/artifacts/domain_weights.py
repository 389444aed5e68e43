"""The artifact that learning domain weights ends in, https://huggingface.co/papers/2310.15393."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_doge.artifacts.folder import FETCHED_FILES, read_folder, write_folder
from hf_doge.artifacts.hub.fetch import fetch_folder
from hf_doge.artifacts.readers import read_ratios
from hf_doge.artifacts.summary import summarize
from hf_doge.artifacts.trajectory import Trajectory
from hf_doge.checks import (
    check_count,
    check_flag,
    check_json,
    check_mapping,
    check_names,
    check_number,
    check_path,
    check_ratios,
    check_same_domains,
    check_simplex,
    show,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from matplotlib.figure import Figure


class DomainWeights:
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

    def __init__(
        self,
        mean: Mapping[str, float],
        *,
        last: Mapping[str, float] | None = None,
        trajectory: Trajectory | None = None,
        recipe: Mapping[str, Any] | None = None,
        domains: Mapping[str, Mapping[str, Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.mean = check_simplex("mean", mean)
        self.last = dict(self.mean)
        if last is not None:
            check_mapping("last", last)
            check_same_domains("last", last, self.mean)
            self.last = check_simplex("last", {name: last[name] for name in self.mean})
        if trajectory is not None:
            if not isinstance(trajectory, Trajectory):
                raise ValueError(f"`trajectory` must be a `Trajectory`, but got {show(trajectory)}.")
            check_same_domains("trajectory", trajectory.domains, self.mean)
        self.trajectory = trajectory
        if domains is not None:
            check_mapping("domains", domains)
            check_same_domains("domains", domains, self.mean)
        known = {name: check_mapping(f"domains[{name!r}]", (domains or {}).get(name, {})) for name in self.mean}
        self.domains = check_json("domains", known)
        self.recipe = check_json("recipe", check_mapping("recipe", recipe, optional=True) or {})
        self.metadata = check_json("metadata", check_mapping("metadata", metadata, optional=True) or {})
        self.unknown_keys: dict[str, Any] = {}
        for name, facts in self.domains.items():
            for key in ("num_rows", "num_tokens"):
                count = facts.get(key)
                if count is not None and (
                    isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 2**63
                ):
                    raise ValueError(f"`{key}` of domain {name!r} must be an integer >= 0, but got {count!r}.")

    @classmethod
    def from_mapping(
        cls,
        ratios: Mapping[str, float],
        *,
        recipe: Mapping[str, Any] | None = None,
        domains: Mapping[str, Mapping[str, Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> "DomainWeights":
        """
        Weights in the given ratios, whatever they sum to: `{"wiki": 3, "web": 1}` is `{"wiki": 0.75, "web": 0.25}`.

        Raises:
            ValueError: A ratio is negative or not finite, or all are 0.
        """
        checked = check_ratios("ratios", ratios)
        total = math.fsum(checked.values())
        mean = {name: ratio / total for name, ratio in checked.items()}
        return cls(mean, recipe=recipe, domains=domains, metadata=metadata)

    @classmethod
    def uniform(cls, domains: Iterable[str] | Mapping[str, Mapping[str, Any]]) -> "DomainWeights":
        """The same weight for every domain: of these names, or of a mapping as in [`~DomainWeights.domains`]."""
        names = check_names(domains)
        known = domains if isinstance(domains, Mapping) else None
        return cls.from_mapping(dict.fromkeys(names, 1.0), recipe={"name": "uniform"}, domains=known)

    @classmethod
    def natural(cls, domains: Mapping[str, Mapping[str, Any]]) -> "DomainWeights":
        """
        Weights in proportion to the tokens each domain has: what plain training on all the data amounts to.

        Args:
            domains (`Mapping[str, Mapping]`): As in [`~DomainWeights.domains`], with `num_tokens` for every domain.

        Raises:
            ValueError: A domain lacks `num_tokens`, or none has a token.
        """
        tokens = _known_tokens(domains, "Natural weights")
        return cls.from_mapping(tokens, recipe={"name": "natural"}, domains=domains)

    @classmethod
    def from_temperature(cls, domains: Mapping[str, Mapping[str, Any]], *, temperature: float) -> "DomainWeights":
        """
        Weights in proportion to `num_tokens ** (1 / temperature)`: natural at 1, nearer to uniform the higher it is.

        Args:
            domains (`Mapping[str, Mapping]`): As in [`~DomainWeights.domains`], with `num_tokens` for every domain.
            temperature (`float`): Positive.

        Raises:
            ValueError: A domain lacks `num_tokens`, none has a token, or the temperature is not positive and finite.
        """
        temperature = check_number("temperature", temperature, above=0)
        tokens = _known_tokens(domains, "Weights by temperature")
        most = max(tokens.values())
        ratios = {name: (count / most) ** (1 / temperature) if count else 0.0 for name, count in tokens.items()}
        return cls.from_mapping(ratios, recipe={"name": "temperature", "temperature": temperature}, domains=domains)

    @classmethod
    def unimax(
        cls, domains: Mapping[str, Mapping[str, Any]], *, num_tokens: int, max_epochs: float
    ) -> "DomainWeights":
        """
        Equal parts, except that no domain is read more than `max_epochs` times within a budget of `num_tokens`: what a
        small domain cannot take goes to the others in equal parts (UniMax, https://huggingface.co/papers/2304.09151).

        Args:
            domains (`Mapping[str, Mapping]`): As in [`~DomainWeights.domains`], with `num_tokens` for every domain.
            num_tokens (`int`): Tokens of the whole training, at least 1.
            max_epochs (`float`): Positive.

        Raises:
            ValueError: A domain lacks `num_tokens`, or all of them together cannot fill the budget.
        """
        tokens = _known_tokens(domains, "UniMax weights")
        num_tokens, max_epochs = check_count("num_tokens", num_tokens), check_number("max_epochs", max_epochs, above=0)
        if max_epochs * sum(tokens.values()) < num_tokens:
            raise ValueError(
                f"{max_epochs} epochs of {sum(tokens.values())} tokens must fill the budget of {num_tokens} tokens, but do "
                "not. Raise `max_epochs` or lower `num_tokens`."
            )
        left, shares = float(num_tokens), {}
        by_size = sorted(tokens, key=tokens.get)
        for position, name in enumerate(by_size):
            shares[name] = min(left / (len(by_size) - position), max_epochs * tokens[name])
            left -= shares[name]
        recipe = {"name": "unimax", "num_tokens": num_tokens, "max_epochs": max_epochs}
        return cls.from_mapping({name: shares[name] for name in tokens}, recipe=recipe, domains=domains)

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

    @property
    def names(self) -> tuple[str, ...]:
        """The domains, in order."""
        return tuple(self.mean)

    @property
    def entropy(self) -> float:
        """Entropy of the mean weights in nats, from 0 (one domain only) to [`~DomainWeights.max_entropy`] (uniform)."""
        return -math.fsum(weight * math.log(weight) for weight in self.mean.values() if weight > 0)

    @property
    def max_entropy(self) -> float:
        """Entropy of uniform weights over as many domains, in nats."""
        return math.log(len(self.mean))

    @property
    def natural_proportions(self) -> dict[str, float] | None:
        """Share of each domain in all tokens; `None` unless every domain's `num_tokens` is known and one is positive."""
        tokens = {name: facts.get("num_tokens") for name, facts in self.domains.items()}
        if None in tokens.values() or not any(tokens.values()):
            return None
        total = sum(tokens.values())
        return {name: count / total for name, count in tokens.items()}

    def expected_epochs(self, num_tokens: int) -> dict[str, float]:
        """
        How often each domain is repeated when `num_tokens` tokens are drawn by `mean`, in sequences that are equally long
        in all domains. DoGE does not price repetition, so look here before giving a small domain a large weight.

        Raises:
            ValueError: `num_tokens` is negative, or a domain of positive weight has no known token.
        """
        num_tokens = check_number("num_tokens", num_tokens, least=0)
        available = {name: facts.get("num_tokens") for name, facts in self.domains.items()}
        unknown = [name for name, weight in self.mean.items() if weight > 0 and not available[name]]
        if unknown:
            raise ValueError(
                f"Domains of positive weight must have `num_tokens` > 0, but {unknown} have {[available[n] for n in unknown]}."
            )
        return {n: weight * num_tokens / available[n] if weight > 0 else 0.0 for n, weight in self.mean.items()}

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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DomainWeights):
            return NotImplemented
        return vars(self) == vars(other)

    def __repr__(self) -> str:
        heaviest = sorted(self.mean.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name}: {weight:.4f}" for name, weight in heaviest[:8])
        return f"DomainWeights({shown}{f', and {len(heaviest) - 8} more' if len(heaviest) > 8 else ''})"


def _known_tokens(domains: Mapping[str, Mapping[str, Any]], which: str) -> dict[str, int]:
    for name, facts in check_mapping("domains", domains).items():
        check_mapping(f"domains[{name!r}]", facts)
    unknown = [name for name, facts in domains.items() if facts.get("num_tokens") is None]
    if unknown:
        raise ValueError(f"{which} need `num_tokens` of every domain, but domains {unknown} have none.")
    return {name: facts["num_tokens"] for name, facts in domains.items()}
