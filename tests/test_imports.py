"""The runtime imports nothing slow, and works without anything that only the exporting machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

BLOCKED = ("click", "huggingface_hub", "onnx", "onnx_ir", "onnxscript", "safetensors", "torch", "transformers")

# Refuses the blocked modules, imports the rest of the line, and prints which of our modules came with it.
PROBE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is not on the device")

sys.meta_path.insert(0, Refuse())
{statement}

import json
print(json.dumps(sorted(name for name in sys.modules if name.startswith("lvlm_edge."))))
"""


def probe(statement: str) -> list[str]:
    code = PROBE.format(blocked=BLOCKED, statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    modules: list[str] = json.loads(done.stdout)
    return modules


@pytest.mark.parametrize("name", BLOCKED)
def test_the_probe_refuses_what_is_not_on_the_device(name):
    with pytest.raises(AssertionError, match=f"{name} is not on the device"):
        probe(f"import {name}")


def test_the_runtime_imports_without_the_exporters_packages():
    modules = probe("import lvlm_edge.runtime")

    assert "lvlm_edge.runtime" in modules


def test_the_runtime_imports_nothing_slow():
    wait = ("PIL", "cuda", "jinja2", "onnxruntime", "tensorrt", "tokenizers")  # until they are asked for

    probe(f"import lvlm_edge.runtime; loaded = set(sys.modules) & set({wait}); assert not loaded, loaded")


def test_no_module_of_the_runtime_imports_the_exporter_or_its_packages():
    every = """
import importlib, pkgutil
import lvlm_edge.runtime as runtime
for module in pkgutil.walk_packages(runtime.__path__, "lvlm_edge.runtime."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        # a backend's own library may be absent; nothing else may
        if not module.name.startswith("lvlm_edge.runtime.backends.") or "is not on the device" in str(error):
            raise
"""
    modules = probe(every)

    assert not [name for name in modules if name.startswith("lvlm_edge.exporter")]


def test_a_bundle_runs_without_the_exporters_packages(mha, export_once, tmp_path):
    import torch

    from lvlm_edge.exporter import references
    from tests import checkpoints

    bundle = export_once(mha, method="fastv", prune_layer=2, keep_ratio=0.5)
    prompt, said = checkpoints.prompt(12, 4), tmp_path / "said.json"
    model, pixels = references.load(mha), torch.from_numpy(checkpoints.pixels())
    expected = references.module("fastv").run(
        model, {"prune_layer": 2, "keep_ratio": 0.5, "keep_tokens": None}, prompt, pixels, 8
    )
    run = f"""
import json, numpy as np
from lvlm_edge.runtime import Pipeline
pixels = np.random.default_rng(0).standard_normal((1, 3, 56, 56)).astype(np.float32)
tokens = Pipeline.load({str(bundle)!r}).generate_tokens({prompt!r}, pixels, max_new_tokens=8, ignore_eos=True).token_ids
json.dump(tokens, open({str(said)!r}, "w"))
"""
    modules = probe(run)

    assert not [name for name in modules if name.startswith("lvlm_edge.exporter")]
    assert json.loads(said.read_text()) == expected.tokens


# Runs a graph whose answer is its input, as a bundle's graphs are run, and prints what it left in the home folder.
QUIET = """
import onnx, pathlib, sys
from onnx import TensorProto, helper
from lvlm_edge.runtime.backends import ort

ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in "xy"]
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", *ends)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), sys.argv[1])
ort.load(ort.library(), pathlib.Path(sys.argv[1])).run(None, {"x": [1.0]})
"""


@pytest.mark.parametrize("asked", [False, True])
def test_onnx_runtime_leaves_no_device_id(tmp_path, asked):
    home = tmp_path / "home"
    home.mkdir()
    quiet = (
        "CI",
        "GITHUB_ACTIONS",
        "ORT_DISABLE_TELEMETRY",
        "XDG_CACHE_HOME",
    )  # some keep it from writing by themselves
    env = {key: value for key, value in os.environ.items() if key not in quiet} | {"HOME": str(home)}
    env |= {"ORT_DISABLE_TELEMETRY": "0"} if asked else {}

    done = subprocess.run([sys.executable, "-c", QUIET, tmp_path / "g.onnx"], env=env, capture_output=True, check=False)

    assert done.returncode == 0, done.stderr
    left = [path for path in home.rglob("*") if "Microsoft" in path.parts]
    assert bool(left) is asked, left
