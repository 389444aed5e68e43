"""Writing a checkpoint whose rows are projected to a basis of its own, which comes before them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from hf_doge.artifacts.influence.basis import BASIS_FILE, decode_basis, encode_basis, read_basis
from hf_doge.artifacts.influence.checkpoint_writer import JOURNAL, JOURNALS, CheckpointWriter, Place
from hf_doge.artifacts.influence.manifest import BASIS
from hf_doge.artifacts.influence.open_index import OpenIndex
from hf_doge.files import sha256, write_atomically, write_json
from hf_doge.gradients.token_rows import TokenRows
from hf_doge.text import parse_json


class FittedCheckpointWriter(CheckpointWriter):
    """
    A [`CheckpointWriter`] of an index with `projection="pca"`: what it writes is `rows @ basis`.

    An interrupted checkpoint goes on with the basis that was written for it, and segments count only next to one: where
    `basis` is `None`, [`~FittedCheckpointWriter.write_basis`] comes before any row. Examples that are added to a whole checkpoint
    have its basis.

    Attributes:
        basis (`torch.Tensor` of shape `(width, stored_width)`, *optional*): Of the checkpoint.
    """

    def __init__(
        self,
        index: OpenIndex,
        facts: dict[str, Any],
        *,
        borders: Sequence[int] | None = None,
        part: int | None = None,
    ) -> None:
        self._basis_place = Place(index.folder, f"{BASIS}/{facts['name']}")
        self._basis_file: dict[str, Any] | None = None  # where the basis is new
        if index.first_example > 0:
            names = [entry["name"] for entry in index.config["checkpoints"]]
            self.basis: Tensor | None = read_basis(index.folder, index.config, names.index(facts["name"]))
        else:
            if part is None:
                self._basis_place.reopen()
            self.basis = self._staged_basis(index.config, facts)
        super().__init__(index, facts, borders=borders, part=part)
        self._projection = self.basis

    def write_basis(self, basis: Tensor) -> None:
        """
        Set the basis of the checkpoint, before its first row.

        Args:
            basis (`torch.Tensor` of shape `(width, stored_width)`): Of orthonormal columns.
        """
        expected = (self._config["width"], self._config["stored_width"])
        if tuple(basis.shape) != expected:
            raise ValueError(f"`basis` must have shape {expected}, but got {tuple(basis.shape)}.")
        if self.basis is not None:
            raise ValueError(f"Checkpoint {self.facts['name']!r} has its basis already. Add its rows.")
        self._require_open()
        content = encode_basis(basis, checkpoint=self.facts["position"])
        file = {"path": self._basis_place.path_of(BASIS_FILE), "sha256": sha256(content)}
        write_atomically(self._basis_place.partial / BASIS_FILE, content)
        journal = {"checkpoint": self.facts, "basis": file}
        write_json(self._basis_place.partial / JOURNAL, journal)  # from now on the basis is there
        self._basis_file, self.basis = file, basis.detach().float().cpu()
        self._projection = self.basis

    def _staged_basis(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Tensor | None:
        """The basis that an interrupted writing of the same checkpoint, or another process, has written; if it is whole."""
        folder = self._basis_place.partial
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            written = parse_json((folder / JOURNAL).read_bytes(), source=str(folder / JOURNAL))
            if written["checkpoint"] == facts:
                file = {name: str(written["basis"][name]) for name in ("path", "sha256")}
                basis = decode_basis(folder / BASIS_FILE, config, number=facts["position"], checksum=file["sha256"])
                self._basis_file = file
                return basis
        return None

    def _continue(self) -> list[dict[str, Any]]:
        if self.basis is None:  # segments are of a basis that is lost
            for place in (self._gradients.final, self._gradients.partial):
                for journal in place.glob(JOURNALS):
                    journal.unlink()
        return super()._continue()

    def add(self, token_rows: TokenRows) -> None:
        """
        Add the next `len(token_rows)` examples, see [`CheckpointWriter.add`].

        Raises:
            ValueError: As there; or there is no basis yet.
        """
        if self.basis is None:
            raise ValueError(f"Checkpoint {self.facts['name']!r} has no basis yet. Call `write_basis` before `add`.")
        super().add(token_rows)

    def entry(self, before: Mapping[str, Any], segments: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What config.json says of the files of this checkpoint; what it says of the basis of an older one stays."""
        told = super().entry(before, segments)
        return told if self._basis_file is None else {**told, "basis": [self._basis_file]}

    def settle(self) -> None:
        """Give the finished files their places."""
        if self._basis_file is not None:
            self._basis_place.settle()
        super().settle()

    def clean(self) -> None:
        """Remove what only an interruption would have needed."""
        super().clean()
        (self._basis_place.final / JOURNAL).unlink(missing_ok=True)
