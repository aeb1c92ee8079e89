"""Fixtures shared by all tests: the oracles, and checkpoints and bundles that are made once per session."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ORACLES = Path(os.environ.get("LVLM_EDGE_ORACLES", Path(__file__).resolve().parents[2] / "shared" / "oracles"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with `fastv_oracle` runs once per case in the folder."""
    if "fastv_oracle" in metafunc.fixturenames:
        names = sorted(path.stem for path in (ORACLES / "fastv").glob("*.json"))
        metafunc.parametrize("fastv_oracle", names or ["missing"], indirect=True)


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The folder of reference outputs. They are no part of this repository: a clone by itself does without."""
    if not ORACLES.is_dir():
        reason = f"{ORACLES}: no reference outputs there; set LVLM_EDGE_ORACLES to their folder"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    return ORACLES


@pytest.fixture
def fastv_oracle(oracles: Path, request: pytest.FixtureRequest) -> Path:
    """The JSON file of one FastV case."""
    return oracles / "fastv" / f"{request.param}.json"


@pytest.fixture(scope="session")
def checkpoint_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoints.build` that makes each checkpoint once."""
    from tests import checkpoints

    made: dict[str, Path] = {}

    def build(**arguments: Any) -> Path:
        key = repr(sorted(arguments.items()))
        if key not in made:
            made[key] = checkpoints.build(tmp_path_factory.mktemp("checkpoint"), **arguments)
        return made[key]

    return build


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`originals.build` that makes each checkpoint once."""
    from tests import originals

    made: dict[str, Path] = {}

    def build(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = originals.build(tmp_path_factory.mktemp("original"), **options)
        return made[key]

    return build


@pytest.fixture(scope="session")
def quick_tracing() -> Iterator[None]:
    """The exporter's table of operators made once: it takes a third of an export's time, and is always the same."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        table = getattr(_registration, "ONNXRegistry", None)
        if hasattr(table, "from_torchlib"):  # a private name, so without it tests only take longer
            patch.setattr(table, "from_torchlib", staticmethod(functools.cache(table.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def export_once(tmp_path_factory: pytest.TempPathFactory, quick_tracing: None) -> Callable[..., Path]:
    """`export` that makes each bundle once; small capacities where none are given."""
    import torch

    from lvlm_edge.exporter import export

    torch.set_num_threads(1)  # the models are too small for more
    made: dict[str, Path] = {}

    def exported(checkpoint: Path, **arguments: Any) -> Path:
        arguments = {"max_text_tokens": 64, "max_new_tokens": 16} | arguments
        key = repr((checkpoint, sorted(arguments.items())))
        if key not in made:
            made[key] = export(checkpoint, tmp_path_factory.mktemp("bundle") / "bundle", **arguments)
        return made[key]

    return exported


HEADS = {
    "mha": {},
    "gqa": {"text": {"num_attention_heads": 8, "num_key_value_heads": 2}},
}
METHODS = {
    "none": {"method": "none"},
    "fastv": {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.5},
}


@pytest.fixture(scope="session")
def mha(checkpoint_once: Callable[..., Path]) -> Path:
    """A checkpoint in which every query head has its own key head."""
    return checkpoint_once(**HEADS["mha"])


@pytest.fixture(scope="session")
def gqa(checkpoint_once: Callable[..., Path]) -> Path:
    """A checkpoint of 8 query heads on 2 key heads."""
    return checkpoint_once(**HEADS["gqa"])


class Made:
    """A checkpoint with one of its bundles."""

    def __init__(self, heads: str, method: str, dtype: str, checkpoint: Path, bundle: Path) -> None:
        self.heads, self.method, self.dtype = heads, method, dtype
        self.checkpoint, self.bundle = checkpoint, bundle


@pytest.fixture(
    scope="session",
    params=["none-mha-float32", "none-gqa-float32", "fastv-mha-float32", "fastv-gqa-float32", "fastv-gqa-float16"],
)
def made(
    request: pytest.FixtureRequest, checkpoint_once: Callable[..., Path], export_once: Callable[..., Path]
) -> Made:
    """Every kind of bundle, one after the other: methods, head layouts and precisions."""
    method, heads, dtype = request.param.split("-")
    checkpoint = checkpoint_once(**HEADS[heads])
    return Made(heads, method, dtype, checkpoint, export_once(checkpoint, dtype=dtype, **METHODS[method]))
