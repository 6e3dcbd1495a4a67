"""Static pictures with matplotlib (extra ``plot``): schedule, pipeline, error, roofline.

Each function returns a ``matplotlib.figure.Figure`` that a notebook shows as it stands and that
``savefig`` writes.  ``theme`` is "light" or "dark".  pyplot is not imported and the user's
rcParams neither change nor show.  Without matplotlib: ``MissingDependencyError``.
"""

from cpgemm.pictures.error import quantization_error
from cpgemm.pictures.pipeline import pipeline
from cpgemm.pictures.roofline import roofline
from cpgemm.pictures.tiles import tile_schedule

__all__ = ["pipeline", "quantization_error", "roofline", "tile_schedule"]
