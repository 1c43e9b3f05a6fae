"""What all formats have in common: choice of sites, strengths, and what is no λv everywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsteer import SteeringVector, SteeringVectorSet
from dsteer.errors import ConfigError, MeasurementError, StoreError
from dsteer.exchange import FORMATS, export, read
from dsteer.steering.intervene import Intervention, Schedule

VECTOR = SteeringVector([1.0, 2.0], "resid_post.1")
SET = SteeringVectorSet([VECTOR, SteeringVector([3.0, 4.0], "resid_post.2")], {"model_blocks": 4})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "generated"}, "positions generated at resid_post.1"),
        ({"positions": (0, 2)}, r"positions \(0, 2\)"),
        ({"operation": "ablate"}, "operation ablate"),
        ({"operation": "noise"}, "operation noise"),
        ({"operation": "scale", "vector": None}, "operation scale"),
        ({"schedule": Schedule("linear", steps=3)}, "schedule Schedule at"),
        ({"relative": True}, "relative True"),
        ({"strength": [1.0, 2.0]}, "a vector or strength a row"),
        ({"vector": torch.ones(3, 2)}, "a vector or strength a row"),
    ],
)
def test_what_is_no_addition_everywhere_is_refused(
    name: str, settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    what = Intervention("resid_post.1", **{"vector": VECTOR, **settings})
    with pytest.raises(ConfigError, match=f"{name} can't express {message}") as caught:
        export(what, tmp_path / "v", name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True, eq=False)
class Conditional(Intervention):
    """One that has a setting more, as conditional steering does."""

    only_if: object = None


def test_settings_that_no_format_knows_are_refused(tmp_path: Path) -> None:
    plain = Conditional("resid_post.1", VECTOR)
    assert export(plain, tmp_path / "v.gguf", "gguf")
    with pytest.raises(ConfigError, match=r"gguf can't express only_if Path at resid_post.1"):
        export(replace(plain, only_if=type("Path", (), {})()), tmp_path / "w.gguf", "gguf")


def test_interventions_bring_their_strengths(tmp_path: Path) -> None:
    """1 + s of each, times that of the file; a bare tensor will do."""
    given = [
        Intervention("resid_post.1", VECTOR, strength=2.0),
        Intervention("resid_post.0", torch.tensor([5.0, 7.0]), strength=torch.tensor(-1.0)),
    ]
    export(given, tmp_path / "v.gguf", "repeng", strength=0.5)
    again = read(tmp_path / "v.gguf", "repeng")
    assert {site: vector.tensor.tolist() for site, vector in again.items()} == {
        "resid_post.0": [-2.5, -3.5],
        "resid_post.1": [1.0, 2.0],
    }


def test_sites_are_chosen(tmp_path: Path) -> None:
    export(SET, tmp_path / "v.pt", "stack", sites=["resid_post.2"])
    assert list(read(tmp_path / "v.pt", "stack")) == ["resid_post.2"]
    export(VECTOR, tmp_path / "w.gguf", "gguf")
    assert list(read(tmp_path / "w.gguf", "gguf")) == ["resid_post.1"]
    with pytest.raises(
        ConfigError, match=r"site 'resid_post.3': the vectors are at resid_post.1, "
    ):
        export(SET, tmp_path / "x.pt", "stack", sites="resid_post.3")


@pytest.mark.parametrize("name", ["gguf", "rotalabs", "card"])
def test_the_order_of_metadata_does_not_matter(name: str, tmp_path: Path) -> None:
    """A safetensors file gives it in any order."""
    metadata = {"position": "all", "method": "mean", "model_blocks": 4}
    contents = []
    for number, items in enumerate((metadata.items(), reversed(metadata.items()))):
        path = tmp_path / str(number)
        export(SteeringVectorSet([VECTOR], dict(items)), path, name)
        files = [path] if path.is_file() else sorted(path.iterdir())
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"format 'ggfu': no such format; did you mean 'gguf'\?"):
        export(SET, tmp_path / "v", "ggfu")
    with pytest.raises(ConfigError, match="no such format"):
        read(tmp_path, "csv")
    with pytest.raises(MeasurementError, match="strength inf"):
        export(SET, tmp_path / "v", "gguf", strength=float("inf"))
    for name in FORMATS:
        with pytest.raises(StoreError, match="no such file or folder"):
            read(tmp_path / "absent", name)
        with pytest.raises(StoreError) as caught:  # an empty folder is none of them
            read(tmp_path, name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gguf", "repeng", "rotalabs", "stack"])
def test_a_strength_too_large_for_the_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"1e\+39 makes the vector at .* too large"):
        export(VECTOR if name != "stack" else SET, tmp_path / "v", name, strength=1e39)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["stack", "lm-eval", "rotalabs"])
def test_files_broken_at_any_place_are_refused(name: str, tmp_path: Path) -> None:
    """torch's reader fails on such files in many ways, not with one kind of error."""
    value = {
        "stack": torch.ones(3, 2),
        "lm-eval": {"h.1": {"action": "add", "steering_vector": torch.ones(2)}},
        "rotalabs": torch.ones(2),
    }[name]
    stem = tmp_path / "layer_1"
    stem.with_suffix(".json").write_text('{"layer_index": 1}')
    file = stem.with_suffix(".pt")
    path = tmp_path if name == "rotalabs" else file
    torch.save(value, file, _use_new_zipfile_serialization=False)
    read(path, name)
    whole = file.read_bytes()
    for length in range(0, len(whole), 3):
        file.write_bytes(whole[:length])
        with pytest.raises(StoreError) as caught:
            read(path, name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["stack", "lm-eval", "rotalabs"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
        lambda x: x.to(torch.complex64),
    ],
)
def test_tensors_without_plain_numbers_are_refused(name: str, change: Any, tmp_path: Path) -> None:
    stem = tmp_path / "layer_1"
    stem.with_suffix(".json").write_text('{"layer_index": 1}')
    file = stem.with_suffix(".pt")
    tensor = change(torch.ones((3, 2) if name == "stack" else 2))
    entry = {"action": "add", "steering_vector": tensor}
    torch.save({"h.1": entry} if name == "lm-eval" else tensor, file)
    with pytest.raises(StoreError, match="expected") as caught:
        read(tmp_path if name == "rotalabs" else file, name)
    assert "\n" not in str(caught.value)
