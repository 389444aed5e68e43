"""The figure that all pictures are drawn on. It needs matplotlib: `hf-doge[plot]`."""

import io

from matplotlib.figure import Figure


class DrawnFigure(Figure):
    """
    A figure that a notebook shows without `%matplotlib`: Jupyter asks for `_repr_png_`, and matplotlib teaches it figures only
    once pyplot is in use.
    """

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()
