"""A signal's features as the numbers a model sees: one function for serving and for training.

It takes one signal's features or whole columns of them, so that neither side can drift from the other.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]

LIMIT = 1e6
"""What lies beyond counts as this: float32 keeps seven digits, and a model splits on order, not on size."""


def encode(features: Mapping[str, "float | npt.NDArray[np.float64]"], names: Sequence[str]) -> Matrix:
    """Args: features: by name, a number each or an array of n each; names: the order of the columns.

    Returns: float32[n, len(names)], n = 1 for numbers. What is not finite becomes NaN.
    Raises: KeyError: a feature is missing.
    """
    columns = [np.atleast_1d(np.asarray(features[name], dtype=np.float64)) for name in names]
    encoded = np.empty((columns[0].size if columns else 0, len(names)), dtype=np.float32)
    for place, column in enumerate(columns):
        encoded[:, place] = np.where(np.isfinite(column), np.clip(column, -LIMIT, LIMIT), np.nan)
    return encoded
