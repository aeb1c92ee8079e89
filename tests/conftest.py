"""Fixtures shared by all tests: the oracles, and checkpoints and bundles that are made once per session.

Tests run in random order, file by file. One that exports has the marker `export`, by the fixtures it takes or its own.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.locks import locked

HERE = Path(__file__).resolve().parent
TRACES = "LVLM_EDGE_TRACES"  # the environment variable that names a folder of traced graphs to keep between runs
CLAIMED = pytest.StashKey[dict[Path, set[str]]]()  # by file, what its tests claim, those that -m leaves out too
EXPORTS = {"export_once", "eager_once", "exported", "quick_tracing"}  # fixtures of tests that export


def unpacked(archive: Path, folder: Path) -> Path:
    """The reference outputs, unpacked once for the archive as it is now."""
    done = folder / "sha256"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    with locked(folder):
        if not done.is_file() or done.read_text("utf-8") != digest:
            shutil.rmtree(folder, ignore_errors=True)
            with tarfile.open(archive) as packed:
                packed.extractall(
                    folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
                )  # from 3.11.4 on
            done.write_text(digest, "utf-8")
    return folder


def reference_outputs() -> Path:
    """Their folder: the one that `LVLM_EDGE_ORACLES` names, or that of the repository's own."""
    named = os.environ.get("LVLM_EDGE_ORACLES")
    return Path(named) if named else unpacked(HERE / "oracles" / "reference.tar.xz", HERE / ".oracles")


ORACLES = reference_outputs()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="the order of the tests, as an earlier run printed it")


def pytest_configure(config: pytest.Config) -> None:
    of_worker = getattr(config, "workerinput", {}).get("seed")
    if config.option.seed is None:
        config.option.seed = random.randrange(10**6) if of_worker is None else of_worker


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a worker of pytest-xdist the order of the others."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.write_line(f"order of the tests: --seed {config.option.seed}")


@pytest.hookimpl(tryfirst=True)  # pytest itself then puts tests of one fixture together, and drops what -m leaves out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle the files, and the tests of each; mark those that export, and put files of such tests first."""
    order = random.Random(config.option.seed)
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
        if EXPORTS & set(getattr(item, "fixturenames", ())):
            item.add_marker("export")
        item.user_properties += [(support.PROPERTY, claim) for claim in support.claims(item)]
    config.stash[CLAIMED] = {
        path: {claim for item in of_file for claim in support.claims(item)} for path, of_file in files.items()
    }
    shuffled = order.sample(list(files.values()), len(files))
    shuffled.sort(key=exporting, reverse=True)  # so that workers end with short files, all at about the same time
    items[:] = [item for of_file in shuffled for item in order.sample(of_file, len(of_file))]


def exporting(items: list[pytest.Item]) -> float:
    """The share of a file's tests that export."""
    return sum(item.get_closest_marker("export") is not None for item in items) / len(items)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with `fastv_oracle` runs once per case in the folder."""
    if "fastv_oracle" in metafunc.fixturenames:
        names = sorted(path.stem for path in (ORACLES / "fastv").glob("*.json"))
        metafunc.parametrize("fastv_oracle", names or ["missing"], indirect=True)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What stands for `~/.cache`: tests write nothing into the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """Collecting garbage does not look at what was there before the test: PyTorch alone takes a tenth of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The folder of reference outputs."""
    assert ORACLES.is_dir(), f"{ORACLES}: no reference outputs there; LVLM_EDGE_ORACLES names another folder"
    return ORACLES


@pytest.fixture
def fastv_oracle(oracles: Path, request: pytest.FixtureRequest) -> Path:
    """The JSON file of one FastV case."""
    return oracles / "fastv" / f"{request.param}.json"


def once(make: Callable[..., Path]) -> Callable[..., Path]:
    """A function that makes a folder once for the same arguments."""
    made: dict[str, Path] = {}

    def get(*given: Any, **options: Any) -> Path:
        key = repr((given, sorted(options.items())))
        if key not in made:
            made[key] = make(*given, **options)
        return made[key]

    return get


def small_bundles(write: Callable[..., Path], folders: pytest.TempPathFactory) -> Callable[..., Path]:
    """A way to export that makes each bundle once; small capacities where none are given."""
    make = once(lambda checkpoint, **options: write(checkpoint, folders.mktemp("bundle") / "bundle", **options))
    return lambda checkpoint, **options: make(checkpoint, **{"max_text_tokens": 64, "max_new_tokens": 16} | options)


@pytest.fixture(scope="session")
def checkpoint_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoints.build` that makes each checkpoint once."""
    from tests import checkpoints

    return once(lambda **options: checkpoints.build(tmp_path_factory.mktemp("checkpoint"), **options))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`originals.build` that makes each checkpoint once."""
    from tests import originals

    return once(lambda **options: originals.build(tmp_path_factory.mktemp("original"), **options))


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def quick_tracing(common: Path) -> Iterator[None]:
    """Graphs traced once for the whole run."""
    import torch

    from lvlm_edge.exporter.graphs import trace
    from tests import trace_cache

    torch.set_num_threads(1)  # the models are too small for more
    with pytest.MonkeyPatch.context() as patch:
        folder = Path(os.environ.get(TRACES, common / "traces"))
        patch.setattr(trace, "trace", trace_cache.cached(trace.trace, folder))
        yield


@pytest.fixture(autouse=True)
def tracing_is_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """`quick_tracing` for what is marked; all else has to do without tracing."""
    if request.node.get_closest_marker("export") or "lvlm_edge.exporter.graphs.trace" not in sys.modules:
        yield
        return
    from lvlm_edge.exporter.graphs import trace
    from tests import trace_cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "trace", trace_cache.refused(trace.trace))
        yield


@pytest.fixture(scope="session")
def export_once(tmp_path_factory: pytest.TempPathFactory, quick_tracing: None) -> Callable[..., Path]:
    """`export` as `small_bundles` has it."""
    from lvlm_edge.exporter import export

    return small_bundles(export, tmp_path_factory)


@pytest.fixture(scope="session")
def eager_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """`export_once` without tracing: PyTorch runs the bodies of the graphs (`tests/eager.py`)."""
    import torch

    from tests import eager

    torch.set_num_threads(1)  # the models are too small for more
    with eager.running():
        yield small_bundles(eager.export, tmp_path_factory)


@pytest.fixture(params=["bodies", pytest.param("graphs", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """`eager_once` for `bodies`; `export_once` for `graphs`, slow but where `cases.both` says otherwise."""
    name = {"bodies": "eager_once", "graphs": "export_once"}[request.param]
    found: Callable[..., Path] = request.getfixturevalue(name)
    return found


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
    params=[
        *("none-mha-float32", "none-gqa-float32", "fastv-gqa-float32", "fastv-gqa-float16"),
        pytest.param("fastv-mha-float32", marks=pytest.mark.slow),
    ],
)
def made(
    request: pytest.FixtureRequest, checkpoint_once: Callable[..., Path], export_once: Callable[..., Path]
) -> Made:
    """Every kind of bundle, one after the other: methods, head layouts and precisions."""
    method, heads, dtype = request.param.split("-")
    checkpoint = checkpoint_once(**HEADS[heads])
    return Made(heads, method, dtype, checkpoint, export_once(checkpoint, dtype=dtype, **METHODS[method]))
