"""Models of mlx-lm, quantised ones too: states, vectors, steered generation and guidance.

Everything else of dsteer takes what these functions return: ``extract`` gives the same
:class:`dsteer.PairedActivations`, builders the same :class:`dsteer.SteeringVectorSet`, and a set
that was built on transformers steers here as it is.
"""

import importlib.util

from dsteer.errors import MissingExtraError

if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx_lm") is None:
    raise MissingExtraError("mlx", "dsteer.mlx")

from dsteer.mlx.build import contrast as contrast
from dsteer.mlx.build import prefix_contrast as prefix_contrast
from dsteer.mlx.capture import extract as extract
from dsteer.mlx.capture import read as read
from dsteer.mlx.generate import answer as answer
from dsteer.mlx.generate import generate as generate
from dsteer.mlx.generate import stream as stream
from dsteer.mlx.load import load as load
from dsteer.mlx.scale import Scale as Scale
from dsteer.mlx.scale import calibrate as calibrate
from dsteer.mlx.scale import natural_scale as natural_scale
from dsteer.mlx.scale import residual_norms as residual_norms
from dsteer.mlx.steering import guide as guide
from dsteer.mlx.steering import steer as steer
from dsteer.mlx.vectors import from_arrays as from_arrays
from dsteer.mlx.vectors import load_vectors as load_vectors
from dsteer.mlx.vectors import save_arrays as save_arrays
from dsteer.mlx.vectors import to_arrays as to_arrays
