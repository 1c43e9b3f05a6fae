"""Where a set of steering vectors comes from, and whether it suits a model."""

from __future__ import annotations

from collections.abc import Mapping

from dsteer.activations.reading import sample_weights
from dsteer.errors import ModelError
from dsteer.models.anatomy import Anatomy, model_name, text_config
from dsteer.models.load import Model
from dsteer.names import telling_parts
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json


def of_model(model: Model) -> dict[str, Json]:
    """What a set's metadata says of the model that its vectors were read from.

    Returns:
        ``model`` (a hub id as it stands, of a folder its telling name), ``model_revision`` (of a
        hub model), ``model_type``, ``model_blocks`` (L), ``model_width`` (d) and ``model_weights``
        (a fingerprint).
    """
    anatomy, name = Anatomy.of(model), model_name(model)
    commit = getattr(model.config, "_commit_hash", None)
    return {
        "model": name if commit else telling_parts(name)[-1],
        "model_revision": commit,
        "model_type": text_config(model.config).model_type,
        "model_blocks": anatomy.n_blocks,
        "model_width": anatomy.width,
        "model_weights": sample_weights(model),
    }


def require_fit(vectors: SteeringVectorSet | SteeringVector, model: Model) -> None:
    """Check that vectors may act in a model: its width, and what their metadata says of theirs.

    A tuned model has its base's type, blocks and width, so vectors of one act in the other.

    Raises:
        ModelError: another width, type or number of blocks.
    """
    anatomy = Anatomy.of(model)
    own: dict[str, Json] = {
        "model_width": anatomy.width,
        "model_blocks": anatomy.n_blocks,
        "model_type": text_config(model.config).model_type,
    }
    require_like(vectors, own, model_name(model))


def require_like(
    vectors: SteeringVectorSet | SteeringVector, own: Mapping[str, Json], name: str
) -> None:
    """Check what is said of a model, in the keys of a set's metadata; see :func:`require_fit`."""
    words = {"model_width": "width", "model_blocks": "blocks", "model_type": "type"}
    theirs = {"model_width": vectors.width, **vectors.metadata}
    for key, word in words.items():
        value = own[key]
        if theirs.get(key, value) != value:
            raise ModelError(
                f"{name}: its {word} is {value}, and the vectors are of {theirs[key]} "
                f"({theirs.get('model', 'an unnamed model')}); expected vectors of a model like it"
            )
