"""
Pushing an artifact to the Hub: all of it in one commit, or nothing.

Large files go first, in batches, where no reader sees them; then one commit on a known parent shows all at once. Whenever an
answer is lost, or somebody else was quicker, the head is read again and compared file by file with what was to be there: so
a commit that was made although its answer never came is found, a repeated push sends what is missing, and nothing is
committed twice.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from hf_doge._version import __version__
from hf_doge.artifacts.hub.errors import (
    Patience,
    PushError,
    Result,
    check_destination,
    explain,
    is_first_process,
    is_moved,
    is_transient,
    shortly,
    told_to_others,
    wait_for_first,
)
from hf_doge.artifacts.hub.publication import CARD_FILE, Head, Plan, Publication, refuse_other_content, size
from hf_doge.checks import check_flag, check_text, refuse_tokens

logger = logging.getLogger(__name__)

_REPO_TYPE = "dataset"
_BATCH_BYTES = 64 * 2**20  # uploaded between two points that a killed push can go on from
_BATCH_FILES = 100
_UNTOUCHED = "What the repository held is as it was"


def push_publication(
    publication: Publication,
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    patience: Patience | None = None,
) -> CommitInfo | None:
    """
    Make a dataset repository hold a publication. See [`DomainWeights.push_to_hub`] for the arguments.

    Returns:
        `CommitInfo`: The commit that was made, or the head where it holds everything already. `None` on all processes but
            the first one that `accelerate launch` or `torchrun` started: one pushes for all, and the others wait for it.

    Raises:
        PermissionError: There is no token, or it may not write.
        ValueError: The name is none, the Hub refuses the card, or a text of the commit holds an access token.
        FileExistsError: The repository holds something else, or `tag` is taken.
        PushError: The Hub could not be reached, or not in time.
    """
    check_flag("private", private, optional=True)
    check_text("commit_message", commit_message)
    check_text("commit_description", commit_description, optional=True)
    names = {"repo_id": repo_id, "revision": revision, "tag": tag}
    refuse_tokens(commit_message=commit_message, commit_description=commit_description, **names)
    place = f"{repo_id}@{revision}"
    if not is_first_process():
        wait_for_first(place)
        return None
    with told_to_others(place):
        check_destination(repo_id, token=token, revision=revision, tag=tag, create_pr=create_pr)
        push = _Push(publication, repo_id, token, patience or Patience(), revision, create_pr=create_pr, tag=tag)
        return push.run(message=commit_message, description=commit_description, private=private)


def ensure_repository(
    repo_id: str,
    *,
    manifest: str,
    check_manifest: Callable[[bytes], object],
    token: str | bool | None = None,
    private: bool | None = None,
) -> None:
    """
    Make a dataset repository if it does not exist; if it does, see that an artifact may be pushed to it.

    Args:
        manifest (`str`), check_manifest (`Callable[[bytes], object]`): As of the [`Publication`] that is to be pushed.

    Raises:
        PermissionError, ValueError, FileExistsError, PushError: As [`push_publication`].
    """
    check_destination(repo_id, token=token)
    push = _Push(None, repo_id, token, Patience(tries=1))
    push.prepare(private)
    push.require_replaceable(push.read_head(None), manifest, check_manifest)


class _Push:
    def __init__(
        self,
        publication: Publication | None,
        repo_id: str,
        token: str | bool | None,
        patience: Patience,
        revision: str | None = None,
        *,
        create_pr: bool = False,
        tag: str | None = None,
    ) -> None:
        self.publication, self.repo_id, self.revision = publication, repo_id, revision
        self.create_pr, self.tag, self.patience = create_pr, tag, patience
        self.api = HfApi(
            token=token if isinstance(token, str) else None, library_name="hf_doge", library_version=__version__
        )
        self._operations: dict[str, CommitOperationAdd] = {}
        self._proposals: set[str] = set()
        self._standing = _UNTOUCHED  # what is true of the repository, for errors

    def run(self, *, message: str, description: str | None, private: bool | None) -> CommitInfo:
        """From the name to the tag."""
        self.prepare(private)
        if self.create_pr:
            self._proposals = self._list_proposals()
        commit = self._commit(message, description or "")
        if self.tag is not None:
            self._set_tag(self.tag, commit.oid)
        logger.info("%s holds the artifact at commit %s.", commit.commit_url.partition("/commit/")[0], commit.oid[:12])
        return commit

    def prepare(self, private: bool | None) -> None:
        """Make the repository and the branch exist."""
        if "/" not in self.repo_id:
            self.repo_id = f"{self._try(self.api.whoami)['name']}/{self.repo_id}"

        def look() -> str | None:
            try:
                return self.api.repo_info(self.repo_id, repo_type=_REPO_TYPE, revision=self.revision).sha
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

        if self._try(look) is not None:
            return
        self._try(lambda: self.api.create_repo(self.repo_id, repo_type=_REPO_TYPE, private=private, exist_ok=True))
        if self.revision is not None and not self.revision.startswith("refs/pr/"):
            create = partial(self.api.create_branch, self.repo_id, branch=self.revision)
            self._try(partial(create, repo_type=_REPO_TYPE, exist_ok=True))

    def _commit(self, message: str, description: str) -> CommitInfo:
        """Until the head holds the publication."""
        delays = self.patience.delays()
        while True:
            head = self.read_head(self.revision)
            plan = self._compare(head)
            if plan.is_empty:
                return self._describe(head.commit, message, description)
            self._standing = _UNTOUCHED
            self._require_free_tag()
            operations = self._upload(plan)
            try:
                return self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    repo_type=_REPO_TYPE,
                    revision=self.revision,
                    create_pr=self.create_pr,
                    parent_commit=head.commit,
                )
            except Exception as error:  # what the Hub answered, or did not: from four libraries
                delay = self.patience.next_delay(error, delays, also=is_moved(error))
                if is_transient(error):
                    self._standing = "The answer to the commit was lost, so it may be there or not"
                elif delay is None:
                    self._give_up(error)
                logger.info("The Hub did not take the commit (%s). Looking whether it is there.", shortly(error))
                failure = error
            if delay is None:
                return self._last_look(failure, message, description)
            self.patience.sleep(delay)
            proposal = self._find_proposal() if self.create_pr else None
            if proposal is not None:
                number, head = proposal
                return self._describe(head.commit, message, description, proposal=number)

    def _last_look(self, failure: Exception, message: str, description: str) -> CommitInfo:
        """Whether the commit is there, whose answer was lost, when there is to be no other."""
        number, head = None, None
        with self._no_patience():
            if self.create_pr:
                number, head = self._find_proposal() or (None, None)
            elif self._compare(found := self.read_head(self.revision)).is_empty:
                head = found
        if head is None:
            self._standing = _UNTOUCHED
            self._give_up(failure)
        return self._describe(head.commit, message, description, proposal=number)

    @contextmanager
    def _no_patience(self) -> Iterator[None]:
        patience, self.patience = self.patience, replace(self.patience, tries=0)
        yield
        self.patience = patience

    def read_head(self, revision: str | None) -> Head:
        """What the repository holds now. The tree is that of the commit, whatever comes after it."""
        commit = self._try(lambda: self.api.repo_info(self.repo_id, repo_type=_REPO_TYPE, revision=revision).sha)
        entries = self._try(
            lambda: list(self.api.list_repo_tree(self.repo_id, repo_type=_REPO_TYPE, revision=commit, recursive=True))
        )
        assert commit is not None  # the Hub tells it of every revision
        return Head(commit, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)})

    def require_replaceable(self, head: Head, manifest: str, check_manifest: Callable[[bytes], object]) -> None:
        """
        Raises:
            FileExistsError: The repository holds something else.
        """
        content = self._download(head, manifest) if manifest in head.files else None
        refuse_other_content(self.repo_id, head, manifest, content, check_manifest)

    def _compare(self, head: Head) -> Plan:
        """
        Raises:
            FileExistsError: The repository holds something else.
        """
        publication = self.publication
        assert publication is not None  # only `ensure_repository` has none, and compares nothing
        self.require_replaceable(head, publication.manifest, publication.check_manifest)
        has_card = publication.card is not None and CARD_FILE in head.files
        return publication.compare(head, self._download(head, CARD_FILE) if has_card else None)

    def _upload(self, plan: Plan) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Bring the large files there, where no reader sees them yet."""
        operations = [self._operation(path, source) for path, source in plan.changed.items()]
        batch: list[CommitOperationAdd] = []
        for position, operation in enumerate(operations):
            batch.append(operation)
            full = sum(one.upload_info.size for one in batch) >= _BATCH_BYTES or len(batch) == _BATCH_FILES
            if full or position == len(operations) - 1:
                upload = partial(self.api.preupload_lfs_files, self.repo_id, tuple(batch), repo_type=_REPO_TYPE)
                self._try(partial(upload, revision=self.revision, create_pr=self.create_pr, free_memory=False))
                batch = []
        return [*operations, *(CommitOperationDelete(path_in_repo=path) for path in plan.removed)]

    def _operation(self, path: str, source: bytes | Path) -> CommitOperationAdd:
        """The same one at each try, as it remembers what is uploaded; a new one for new content."""
        known = self._operations.get(path)
        if known is None or known.path_or_fileobj != (source if isinstance(source, bytes) else str(source)):
            known = CommitOperationAdd(path_in_repo=path, path_or_fileobj=source)
            if known.upload_info.size != size(source):
                raise PushError(f"{str(source)!r} is being written. Push when that has ended.")
            self._operations[path] = known
        return known

    def _download(self, head: Head, path: str) -> bytes:
        def fetch() -> bytes:
            # Not into the cache, which may be read-only, and would have a commit of a file.
            with TemporaryDirectory() as folder:
                local = hf_hub_download(
                    self.repo_id,
                    path,
                    repo_type=_REPO_TYPE,
                    revision=head.commit,
                    token=self.api.token,
                    local_dir=folder,
                )
                return Path(local).read_bytes()

        return self._try(fetch)

    def _describe(self, commit: str, message: str, description: str, *, proposal: int | None = None) -> CommitInfo:
        """As if `create_commit` had answered."""
        url = f"{self.api.endpoint}/datasets/{self.repo_id}"
        return CommitInfo(
            commit_url=f"{url}/commit/{commit}",
            commit_message=message,
            commit_description=description,
            oid=commit,
            pr_url=None if proposal is None else f"{url}/discussions/{proposal}",
        )

    def _list_proposals(self) -> set[str]:
        def look() -> set[str]:
            refs = self.api.list_repo_refs(self.repo_id, repo_type=_REPO_TYPE, include_pull_requests=True)
            return {one.ref for one in refs.pull_requests or ()}

        return self._try(look)

    def _find_proposal(self) -> tuple[int, Head] | None:
        """A proposal that came into being by this push, though its answer was lost."""
        for ref in sorted(self._list_proposals() - self._proposals):
            head = self.read_head(ref)
            if self._compare(head).is_empty:
                return int(ref.rpartition("/")[2]), head
        return None

    def _tags(self) -> dict[str, str]:
        """Name -> commit."""
        refs = self._try(lambda: self.api.list_repo_refs(self.repo_id, repo_type=_REPO_TYPE))
        return {one.name: one.target_commit for one in refs.tags}

    def _require_free_tag(self) -> None:
        """
        Raises:
            FileExistsError: The tag is on other content than what is to be pushed.
        """
        if self.tag is not None and not self._holds(self._tags().get(self.tag)):
            raise FileExistsError(
                f"{self.repo_id!r} has a tag {self.tag!r} already, on other content. Choose another name, or delete it by"
                f" `hf repos tag delete {self.repo_id} {self.tag} --type dataset`. Nothing was pushed."
            )

    def _holds(self, commit: str | None) -> bool:
        """Whether the commit of a tag has the publication; also if there is no tag."""
        if commit is None:
            return True
        head = self.read_head(commit)
        if self.publication is None or self.publication.manifest not in head.files:
            return False
        try:
            return self._compare(head).is_empty
        except FileExistsError:  # something else was there then
            return False

    def _set_tag(self, tag: str, commit: str) -> None:
        """Try until the tag is on the commit or on another one with the same content, whichever process put it there."""
        delays, at = self.patience.delays(), f"at commit {commit[:12]}"
        lacking = f"The artifact is there, but without its tag {tag!r}, {at}"
        self._standing = f"The artifact is there, {at}; whether it has its tag {tag!r} is not known"
        while True:
            found = self._tags().get(tag)
            if found == commit or (found is not None and self._holds(found)):
                return
            if found is not None:
                raise FileExistsError(
                    f"{self.repo_id!r} has a tag {tag!r} already, on commit {found[:12]}, which has other content."
                    f" {lacking}. Choose another name."
                )
            try:
                # Not `exist_ok`: a tag that somebody else has made meanwhile may be on another commit.
                self.api.create_tag(self.repo_id, repo_type=_REPO_TYPE, tag=tag, revision=commit)
                return
            except Exception as error:  # as above
                delay = self.patience.next_delay(error, delays, also=is_moved(error))
                failure = error
            if delay is None:
                if is_transient(failure):  # it may have been made, and the answer lost
                    with self._no_patience():
                        if self._tags().get(tag) == commit:
                            return
                self._standing = lacking
                self._give_up(failure)
            self.patience.sleep(delay)

    def _try(self, action: Callable[[], Result]) -> Result:
        """One request, or several that can be repeated together."""
        try:
            return self.patience.call(action)
        except Exception as error:  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> NoReturn:
        if is_transient(error) or is_moved(error):
            raise PushError(
                f"The push to {self.repo_id!r} did not end: {shortly(error)}. {self._standing}. Push again later: only what"
                " is missing will be sent."
            ) from error
        explained = explain(error, self.repo_id, action="push to")
        if explained is error:
            raise error
        standing = "" if self._standing == _UNTOUCHED else f" {self._standing}."
        raise type(explained)(f"{str(explained).rstrip()}{standing}") from error
