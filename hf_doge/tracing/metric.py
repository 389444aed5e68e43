"""In which metric an index is recorded, where `metric="auto"` leaves that to the optimizer of the training."""

import warnings
from collections.abc import Callable

from hf_doge.artifacts.influence import IndexWriter
from hf_doge.artifacts.influence.metric import metric_of
from hf_doge.tracing.opening import SharedIndex
from hf_doge.tracing.processes import run_on_main_process
from hf_doge.tracing.second_moments import NoSecondMoments, SecondMoments


def moments_for(
    index: SharedIndex, asked: str, find: Callable[[], SecondMoments], *, name: str
) -> SecondMoments | None:
    """
    The second moments that the rows of a checkpoint are measured by, or `None` for plain gradients. All processes call it.

    The first checkpoint decides for an index: with `"auto"` its rows are in Adam's metric if the optimizer keeps second
    moments of the embeddings. Otherwise they are plain, with a warning unless that is the metric of the optimizer (SGD).

    Args:
        index ([`SharedIndex`]): To be recorded to.
        asked (`str`): `metric` of the settings.
        find (`Callable`): Returns the moments, or raises [`NoSecondMoments`].
        name (`str`): Of the checkpoint.

    Raises:
        NoSecondMoments: There are none, but the metric was asked for, or that of the checkpoints before needs them.
    """
    metric = run_on_main_process(lambda heartbeat: _decide(index.writer, asked, find))
    if metric == "gradient":
        return None
    try:
        return find()
    except NoSecondMoments as error:
        if asked == "optimizer":
            raise
        raise NoSecondMoments(
            f"The index in {str(index.writer.folder)!r} is in the metric of Adam, as its first checkpoint had second moments,"
            f" and {name!r} must not be recorded in another. {error}",
            why=error.why,
        ) from error


def _decide(writer: IndexWriter, asked: str, find: Callable[[], SecondMoments]) -> str:
    """The metric of the index; on the main process."""
    metric = metric_of(writer.config)
    if metric != "auto":
        return metric
    try:
        find()
    except NoSecondMoments as error:
        if not error.is_exact:
            warnings.warn(
                f"`metric='auto'` records plain gradients, as {error.why}: {error} To have the metric of Adam, train with it and"
                " record with `metric='optimizer'`; `metric='gradient'` says that the plain ones are meant.",
                stacklevel=3,
            )
        writer.decide_metric("gradient", error.why)
        return "gradient"
    writer.decide_metric("optimizer")
    return "optimizer"
