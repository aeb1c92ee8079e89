"""The script that compares the TensorRT API that our code touches with what binding wheels have."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

SCRIPT = Path(__file__).parents[2] / "samples/jetson/check_api.py"


@pytest.fixture(scope="module")
def api():
    spec = importlib.util.spec_from_file_location("check_api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def verdicts(api):
    """Name to verdict, of a source text in a version that has the given names."""

    def of(source, *present):
        touched = api.uses(source)
        return {use.name: api.verdict(use.name, touched, set(present)) for use in touched}

    return of


def test_an_attribute_that_is_not_there_is_missing(verdicts):
    assert verdicts("builder.build_engine(network)\nengine.close()", "close") == {
        "build_engine": "MISSING",
        "close": "there",
    }


def test_attributes_of_what_a_tensorrt_object_returns_count(verdicts):
    assert set(verdicts("x = [parser.get_error(i).desc() for i in y]; self._context.run()[0].name")) == {
        "get_error",
        "desc",
        "run",
        "name",
    }


def test_other_objects_own_modules_and_double_underscores_do_not_count(verdicts):
    source = "from lvlm_edge.runtime.backends import trt\ntrt.create()\nfile.write(x)\nengine.__init__()\npath.name"

    assert verdicts(source) == {}


def test_methods_that_tensorrt_calls_count(verdicts):
    source = "class Log(trt.ILogger):\n    def __init__(self): ...\n    def log(self): ..."

    assert set(verdicts(source)) == {"ILogger", "log"}


@pytest.mark.parametrize(
    "source",
    [
        "if hasattr(builder, 'guard'):\n    builder.new()",
        "if ready and hasattr(builder, 'guard'):\n    builder.new()",
        "x = builder.new() if hasattr(builder, 'guard') else None",
        "if not hasattr(builder, 'guard'):\n    pass\nelse:\n    builder.new()",
        "def f():\n    if not hasattr(builder, 'guard'):\n        return\n    builder.new()",
        "def f():\n    builder.new()\nif hasattr(builder, 'guard'):\n    f()",
        "class F:\n    x = builder.new\nif hasattr(builder, 'guard'):\n    F()",
    ],
)
def test_what_is_reached_only_under_a_guard_may_be_missing_with_the_guard(verdicts, source):
    assert verdicts(source)["new"] == "guarded"
    assert verdicts(source, "guard")["new"] == "MISSING"
    assert verdicts(source, "guard", "new")["new"] == "there"


@pytest.mark.parametrize(
    "source",
    [
        "if hasattr(builder, 'guard'):\n    pass\nbuilder.new()",
        "if not hasattr(builder, 'guard'):\n    builder.new()",
        "if ready or hasattr(builder, 'guard'):\n    builder.new()",
        "if not hasattr(builder, 'guard'):\n    pass\nbuilder.new()",
        "def f():\n    builder.new()\nif hasattr(builder, 'guard'):\n    f()\nf()",
        "if hasattr(builder, 'guard'):\n    builder.new()\nbuilder.new()",
        "getattr(builder, 'new')",
    ],
)
def test_a_guard_elsewhere_does_not_count(verdicts, source):
    assert verdicts(source)["new"] == "MISSING"


def test_a_name_asked_for_with_a_default_and_a_flavour_are_guards(verdicts):
    source = "x = getattr(engine, 'alias', None)\nif job['backend'] == 'trt-rtx':\n    config.target()"

    assert verdicts(source) == {"alias": "guarded", "target": "guarded"}
    assert verdicts(source, "trt-rtx") == {"alias": "guarded", "target": "MISSING"}


def made_up_binding():
    """Strings, one of them a tail that an instruction points at."""
    strings = b"\0create_network\0INetworkBuilder\0IRuntime\0"
    at = 64 + strings.index(b"Builder\0")
    code = bytearray(64)
    code[5:9] = (at - 9).to_bytes(4, "little")  # relative to the end of the instruction
    return bytes(code) + strings


def test_a_string_of_its_own_is_there_and_a_tail_only_where_code_points_at_it(api):
    names = ["create_network", "Builder", "Runtime", "network", "create", "absent"]

    assert api.there(made_up_binding(), names) == {"create_network", "Builder"}


@pytest.fixture
def made_up(api, tmp_path, monkeypatch):
    """The script on a made-up source and one made-up wheel, where no other can be had."""
    (tmp_path / "cache/10.3").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "cache/10.3/tensorrt.whl", "w") as archive:
        archive.writestr("tensorrt_bindings/tensorrt.so", made_up_binding())
        archive.writestr("tensorrt_bindings/__init__.py", "__version__ = '10.3.0'")
    nothing = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(api.subprocess, "run", lambda *_, **__: nothing)
    monkeypatch.setattr(api, "SOURCES", [tmp_path / "engine.py"])

    def run(source, *options):
        (tmp_path / "engine.py").write_text(source)
        return CliRunner().invoke(api.main, ["--cache", str(tmp_path / "cache"), *options])

    return run


def test_a_wheel_that_cannot_be_had_is_said_and_fails_unless_allowed(made_up):
    source = "builder.create_network()\ntrt.__version__"

    refused, allowed = made_up(source), made_up(source, "--allow-missing")

    assert refused.exit_code == 1
    assert "10.16: NOT CHECKED, its wheel cannot be had" in refused.stdout
    assert "tensorrt-cu13-bindings==10.16.*: ERROR: No matching distribution" in refused.stderr
    assert allowed.exit_code == 0
    assert "10.3: tensorrt.whl: 2 there, 0 guarded, 0 MISSING" in allowed.stdout


def test_a_missing_attribute_fails_and_is_in_the_table(made_up):
    done = made_up("builder.create_network()\nbuilder.absent()", "--allow-missing")

    assert done.exit_code == 1
    assert re.search(r"^absent +MISSING$", done.stdout, re.MULTILINE)


def test_the_installed_tensorrt_rtx_has_everything_and_not_what_was_removed(api):
    found = importlib.util.find_spec("tensorrt_rtx_bindings")
    if found is None:
        pytest.skip("TensorRT-RTX has no wheel for this machine")
    library = (Path(found.origin).parent / "tensorrt_rtx.so").read_bytes()
    ours = {use.name for path in api.SOURCES for use in api.uses(path.read_text("utf-8"))} - {"__version__"}

    assert {"Builder", "OnnxParser", "set_tensor_address", "num_errors"} <= ours
    assert api.there(library, ours) == ours
    assert api.there(library, ["num_bindings", "execute_async_v2", "int8_calibrator"]) == set()


@pytest.mark.trt
def test_every_supported_version_has_what_our_code_touches():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT CHECKED" not in done.stdout
