"""Finished parts of an experiment, so that a killed run goes on where it was: [`PartStore`]."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.reproduce.machine import describe_commit


class PartStore:
    """
    One JSON file for each finished part, named by the part and by a hash of everything its result depends on.

    Args:
        folder (`Path`): Where the files are; it is made when the first part is finished.

    Attributes:
        used (`dict[str, dict]`): File name -> `seconds`, `cpu_seconds`, `commit` and `was_finished` of every part asked
            for so far; `was_finished` tells whether it was there already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.used: dict[str, dict[str, Any]] = {}

    def belongs_to(self, **facts: str) -> None:
        """
        Keep this folder for one scale and one set of data: parts and models are found by names that do not hold these.

        Raises:
            `ValueError`: if its parts were made with others.
        """
        path = self.folder.with_name("about.json")
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            for name, value in facts.items():
                if kept[name] != value:
                    raise ValueError(
                        f"What is in {self.folder.parent} was made with {name}={kept[name]}, but this run has {name}={value}. "
                        "Give another `--output_dir`, or delete that folder."
                    )
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1), encoding="utf-8")

    def get(self, part: str, arguments: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """
        The result of a part: read where it was finished with these arguments, else computed and kept.

        Args:
            part (`str`): Name for people and for the file, such as `"base-nano-uniform-seed1"`.
            arguments (`Mapping[str, Any]`): All that decides the result, in plain values.
            compute (`Callable[[], Any]`): Gives the result, in plain values.

        Returns:
            The result as JSON gives it back: tuples are lists, keys are strings.
        """
        written = json.dumps(arguments, sort_keys=True)
        path = self.folder / f"{part}-{hashlib.sha256(written.encode()).hexdigest()[:12]}.json"
        was_finished = path.exists()
        if not was_finished:
            start, cpu_start = time.perf_counter(), time.process_time()
            result = compute()
            contents = {
                "part": part,
                "arguments": json.loads(written),
                "result": result,
                "seconds": round(time.perf_counter() - start, 3),
                "cpu_seconds": round(time.process_time() - cpu_start, 3),
                "commit": describe_commit(),
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(contents, indent=1, sort_keys=True, ensure_ascii=False), encoding="utf-8")
            partial.replace(path)
            print(f"{part}: {contents['seconds']:.1f} s", flush=True)
        contents = json.loads(path.read_text(encoding="utf-8"))
        facts = {name: contents[name] for name in ("seconds", "cpu_seconds", "commit")}
        self.used.setdefault(path.name, {**facts, "was_finished": was_finished})  # a part may be asked for again
        return contents["result"]
