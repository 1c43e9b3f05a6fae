"""A folder for the hub: the vectors, and a model card that says where they come from."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import yaml

import dsteer
from dsteer.errors import StoreError
from dsteer.exchange.request import Export, new_folder
from dsteer.models.load import Model
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json

VECTORS, README = "vectors.safetensors", "README.md"


def write(wanted: Export, path: Path) -> list[str]:
    """Write the vectors, with λ as the strength that the card recommends, and the card.

    Raises:
        StoreError: something is at ``path``.
    """
    with new_folder(path) as folder:
        wanted.vectors.save(folder / VECTORS)
        (folder / README).write_text(text(wanted.vectors, wanted.strength), encoding="utf-8")
    return ["Read the card before you publish it: it says only what the vectors' metadata does."]


def read(path: Path, _model: Model | None = None) -> SteeringVectorSet:
    """The vectors of such a folder.

    Raises:
        StoreError: it is none.
    """
    return SteeringVectorSet.load(path / VECTORS if path.is_dir() else path)


def text(vectors: SteeringVectorSet, strength: float = 1.0) -> str:
    """The card: front matter, how the vectors were built, their norms, how to load them."""
    known = vectors.metadata
    front: dict[str, Json] = {"library_name": "dsteer", "tags": ["steering-vector", "dsteer"]}
    name, revision = known.get("model"), known.get("model_revision")
    if isinstance(name, str) and revision:  # of the hub; a folder's name is no id there
        front["base_model"] = name
    site = next(iter(vectors))
    built = [
        f"| {_cell(key)} | {_cell(value)} |" for key, value in known.items() if value is not None
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=True).strip(),
            "---",
            "",
            f"# Steering vectors{f' for {name}' if isinstance(name, str) else ''}",
            "",
            f"{len(vectors)} {'vectors' if len(vectors) > 1 else 'vector'} of width "
            f"{vectors.width}, made with dsteer {dsteer.__version__}. `resid_post.k` is the output "
            "of block k, counted from 0; `final_norm` is the state after the last norm. A vector v "
            "is added to the states of all tokens as λv, λ in units of v.",
            "",
            "## How they were built",
            "",
            *(
                ["| | |", "|---|---|", *built]
                if built
                else ["Nothing is known of it: the file has no metadata."]
            ),
            "",
            "## Vectors",
            "",
            "| site | norm | |",
            "|---|---|---|",
            *(
                f"| {site} | {vector.norm:.4g} | {_about(vector)} |"
                for site, vector in vectors.items()
            ),
            "",
            "## Use",
            "",
            "```python",
            "import dsteer",
            "",
            f'vectors = dsteer.SteeringVectorSet.load("{VECTORS}")',
            f'with dsteer.steer(model, vectors["{site}"], strength={strength:g}):',
            "    model.generate(**inputs)",
            "```",
            "",
        ]
    )


def push(folder: str | Path, repository: str) -> str:
    """Upload such a folder to a model repository of the hub, made private where it is new.

    The hub's client uses the token that it was logged in with.

    Returns:
        The repository's address.

    Raises:
        StoreError: the folder is no such, or the hub refuses or is out of reach.
    """
    from huggingface_hub import HfApi

    folder = Path(folder).expanduser()
    missing = [name for name in (README, VECTORS) if not (folder / name).is_file()]
    if missing:
        raise StoreError(f"{folder}: it has no {missing[0]}; expected a folder that card wrote")
    api = HfApi()
    try:
        made = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=[README, VECTORS],
            commit_message="Steering vectors",
        )
    except (OSError, ValueError, httpx2.HTTPError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise StoreError(
            f"{repository}: the hub took nothing ({why}); the folder is at {folder}: check the "
            "name, the connection and the login (hf auth login), and push again"
        ) from None
    return str(made)


def _about(vector: SteeringVector) -> str:
    known = {key: value for key, value in vector.metadata.items() if key != "norm"}
    return ", ".join(f"{key} {_cell(value)}" for key, value in known.items() if value is not None)


def _cell(value: Json) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return plain.replace("|", "\\|").replace("\n", " ")
