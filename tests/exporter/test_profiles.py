"""Profiles: every shipped file loads, every figure has a source, a wrong key is named, boards are found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lvlm_edge.exporter.devices import profiles
from lvlm_edge.exporter.devices.profiles import Figure, Profile
from lvlm_edge.runtime.errors import UnsupportedError
from tests.tiny import cli, refused

FOR_ALL = {
    "name": 'name = "toy"',
    "description": 'description = "A toy"',
    "kind": 'kind = "cpu"',
    "backend": 'backend = "ort"',
    "lowering": 'lowering = "modern"',
    "dtypes": 'dtypes = ["float32"]',
    "default_dtype": 'default_dtype = "float32"',
    "unified_memory": "unified_memory = true",
    "quantised": 'quantised = {value = ["int8"], source = "unverified"}',
    "usable_share": 'usable_share = {value = 0.9, source = "unverified"}',
}
JETSON = {
    **FOR_ALL,
    "kind": 'kind = "jetson"',
    "backend": 'backend = "trt"',
    "lowering": 'lowering = "legacy"',
    "model": 'model = "Toy"',
    "jetpack": 'jetpack = "6.2"',
    "compute_capability": 'compute_capability = {value = "8.7", source = "https://example.org"}',
    "memory_gb": 'memory_gb = {value = 8, source = "computed: 2 x 4", note = "soldered"}',
    "bandwidth_gb_s": 'bandwidth_gb_s = {value = 102.4, source = "unverified"}',
    "power_modes": 'power_modes = {value = ["7W"], source = "unverified"}',
    "tflops": 'tflops.float16 = {value = 10, source = "unverified"}',
    "jetpacks": '[jetpacks]\n"7.2" = {l4t = "39.2", tensorrt = "10.16", cuda = "13.2", python = "3.12", source = '
    '"https://example.org"}\n"6.2" = {l4t = "36.4.3", tensorrt = "10.3", cuda = "12.6", python = "3.10", source = '
    '"unverified"}',
}


def text(lines: dict[str, str] = FOR_ALL, **changed: str) -> str:
    return "\n".join({**lines, **changed}.values())


def figures(profile: Profile) -> dict[str, Figure]:
    found = {f.name: getattr(profile, f.name) for f in dataclasses.fields(profile)}
    return {k: v for k, v in found.items() if isinstance(v, Figure)} | dict(profile.tflops or {})


JETSONS = [name for name in profiles.names() if profiles.load(name).kind == "jetson"]


def test_the_devices_of_the_project_are_all_there():
    assert set(profiles.names()) == {
        "orin-nano-4gb", "orin-nano-8gb", "orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb",
        "thor-t4000", "thor-t5000", "dgx-spark", "rtx-3060", "rtx-4070", "rtx-4090", "rtx-5090", "rtx-pro-6000",
        "l4", "l40s", "a100", "h100", "cpu",
    }  # fmt: skip


def test_onnx_runtime_runs_on_the_gpus_that_its_wheels_have_code_for():
    runs = {name for name in profiles.names() if "ort-cuda" in profiles.load(name).backends}

    cards = {"a100", "h100", "l4", "l40s", "rtx-3060", "rtx-4070", "rtx-4090", "rtx-5090", "rtx-pro-6000", "dgx-spark"}
    assert runs == cards  # no Jetson: 8.7 and 11.0 are not among what PyPI's wheels have
    assert {profiles.load(name).backend for name in ("a100", "h100", "l40s")} == {"ort-cuda"}


def test_cpu_is_a_known_profile():
    profile = profiles.load("cpu")

    assert (profile.backend, profile.lowering) == ("ort", "modern")
    assert (profile.dtypes, profile.default_dtype) == (("float32", "float16"), "float32")
    assert profile.memory_gb is None


@pytest.mark.parametrize("name", profiles.names())
def test_every_shipped_profile_loads_under_its_own_name_and_with_underscores(name):
    assert profiles.load(name).name == name
    assert profiles.load(name.replace("-", "_")) == profiles.load(name)
    assert hash(profiles.load(name)) == hash(profiles.load(name))


@pytest.mark.parametrize("name", profiles.names())
def test_every_figure_names_a_public_source_or_says_that_it_is_not_verified(name):
    profile = profiles.load(name)

    found = figures(profile)
    assert len(found) >= (2 if profile.kind == "cpu" else 7)
    for source in [f.source for f in found.values()] + [r.source for r in profile.jetpacks]:
        assert source == "unverified" or source.startswith(("https://", "computed: ", "measured: "))


def test_a_jetpack_release_brings_the_same_on_every_board():
    rows: dict[str, set] = {}
    for name in JETSONS:
        for row in profiles.load(name).jetpacks:
            rows.setdefault(row.version, set()).add(row)

    assert {"6.2", "7.1", "7.2"} <= set(rows)
    assert all(len(found) == 1 for found in rows.values())


@pytest.mark.parametrize("name", JETSONS)
def test_the_lowering_of_a_jetson_follows_from_its_tensorrt(name):
    profile = profiles.load(name)

    assert (profile.lowering, profile.lowerings) == ("legacy", ("legacy",))  # 10.3 or 10.13
    newer = profiles.load(f"{name}@7.2")  # 10.16
    assert (newer.lowering, set(newer.lowerings)) == ("modern", {"modern", "legacy"})
    assert newer.release is not None and newer.release.tensorrt == "10.16"


def test_tensorrt_8_parses_neither_lowering():
    assert profiles.load("orin-nano-8gb@6.0").lowerings == ()


@pytest.mark.parametrize(("name", "said"), [("orin-nano-8gb@5.1", "known: 6.0, 6.1"), ("l4@6.2", "no Jetson")])
def test_a_release_that_a_device_does_not_have_is_refused(name, said):
    with pytest.raises(UnsupportedError, match=said):
        profiles.load(name)


def test_an_unknown_profile_names_the_nearest_and_exits_with_3():
    with pytest.raises(UnsupportedError, match="did you mean cpu") as caught:
        profiles.load("cpuu")

    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["../pyproject", "cpu.toml", "", "/etc/passwd", "@", "@6.2"])
def test_a_profile_is_a_name_and_never_a_path(name):
    with pytest.raises(UnsupportedError):
        profiles.load(name)


def test_complete_files_are_accepted():
    assert profiles.parse("toy", text()).description == "A toy"
    board = profiles.parse("toy", text(JETSON))
    assert board.memory_gb == Figure(8.0, "computed: 2 x 4", "soldered")
    assert board.tflops == {"float16": Figure(10.0, "unverified")}
    assert [row.version for row in board.jetpacks] == ["6.2", "7.2"]  # oldest first, whatever the file's order


@pytest.mark.parametrize(("lines", "key"), [(lines, key) for lines in (FOR_ALL, JETSON) for key in lines])
def test_a_missing_key_is_named_with_its_file(lines, key):
    with pytest.raises(profiles.ProfileError, match=rf"profiles/toy\.toml: key '{key}' is missing"):
        profiles.parse("toy", text(lines, **{key: ""}))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"backend": 'backnd = "ort"'}, "key 'backnd' .*did you mean backend"),
        ({"memory_gb": 'memory_gb = {value = 8, sauce = "unverified"}'}, r"key 'memory_gb\.sauce' .*mean source"),
        ({"tflops": 'tflops.half = {value = 8, source = "unverified"}'}, r"key 'tflops\.half' is not known"),
        ({"jetpacks": '[jetpacks]\n"6.2" = {l4t = "36.4", trt = "10.3"}'}, r"key 'jetpacks\.6\.2\.trt' is not known"),
        ({"jetpacks": '[jetpacks]\n"6.2" = {l4t = "36.4"}'}, r"key 'jetpacks\.6\.2\.tensorrt' is missing"),
    ],
)
def test_an_unknown_or_missing_key_is_named_with_its_place(changed, said):
    with pytest.raises(profiles.ProfileError, match=rf"profiles/toy\.toml: {said}"):
        profiles.parse("toy", text(JETSON, **changed))


def test_a_key_of_another_kind_of_device_is_refused():
    with pytest.raises(profiles.ProfileError, match="key 'memory_gb' is not known"):
        profiles.parse("toy", text(FOR_ALL, memory_gb=JETSON["memory_gb"]))


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("name", 'name = "other"'),
        ("description", "description = 1"),
        ("kind", 'kind = "phone"'),
        ("backend", 'backend = "tflite"'),
        ("backend", 'backend = "ort"'),
        ("lowering", 'lowering = "newest"'),
        ("lowering", 'lowering = "modern"'),
        ("dtypes", 'dtypes = "float32"'),
        ("dtypes", "dtypes = []"),
        ("dtypes", 'dtypes = ["float32", "float8"]'),
        ("default_dtype", 'default_dtype = "float16"'),
        ("unified_memory", "unified_memory = 1"),
        ("quantised", 'quantised = {value = ["int2"], source = "unverified"}'),
        ("quantised", 'quantised = {value = ["fp8"], source = "unverified"}'),
        ("usable_share", "usable_share = 0.9"),
        ("usable_share", 'usable_share = {value = 1.1, source = "unverified"}'),
        ("jetpack", 'jetpack = "6.9"'),
        ("compute_capability", 'compute_capability = {value = "sm87", source = "unverified"}'),
        ("memory_gb", 'memory_gb = {value = "8", source = "unverified"}'),
        ("memory_gb", 'memory_gb = {value = true, source = "unverified"}'),
        ("memory_gb", 'memory_gb = {value = 0, source = "unverified"}'),
        ("memory_gb", 'memory_gb = {value = nan, source = "unverified"}'),
        ("memory_gb", 'memory_gb = {value = 8, source = "a friend"}'),
        ("memory_gb", 'memory_gb = {value = 8, source = ""}'),
        ("power_modes", 'power_modes = {value = "7W", source = "unverified"}'),
        ("tflops", "tflops = 3"),
        ("tflops", "tflops = {}"),
        ("jetpacks", "jetpacks = []"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(key, line):
    with pytest.raises(profiles.ProfileError, match=rf"profiles/toy\.toml: key '{key}"):
        profiles.parse("toy", text(JETSON, **{key: line}))


def test_a_dtype_that_the_hardware_cannot_have_is_refused():
    turing = 'compute_capability = {value = "7.5", source = "unverified"}'

    with pytest.raises(profiles.ProfileError, match=r"'bfloat16', which comes with compute capability 8\.0"):
        profiles.parse("toy", text(JETSON, compute_capability=turing, dtypes='dtypes = ["float32", "bfloat16"]'))


def test_a_file_that_is_not_toml_is_named():
    with pytest.raises(profiles.ProfileError, match=r"profiles/toy\.toml: is not TOML"):
        profiles.parse("toy", "name = cpu")


@pytest.fixture
def machine(tmp_path) -> Callable[..., Path]:
    """The root of a machine with these files; kibibytes of memory."""

    def made(model: str | None = None, l4t: str | None = None, memory: int | None = None) -> Path:
        for file, content in {
            "proc/device-tree/model": model and model + "\0",
            "etc/nv_tegra_release": l4t,
            "proc/meminfo": memory and f"MemTotal:       {memory} kB\nMemFree:          1 kB\n",
        }.items():
            if content:
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).write_text(content)
        return tmp_path

    return made


RELEASE = "# R{} (release), REVISION: {}, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
AGX = "NVIDIA Jetson AGX Orin Developer Kit"


@pytest.mark.parametrize(
    ("model", "l4t", "memory", "name", "release", "lowering"),
    [
        (NANO, RELEASE.format(36, "4.3"), 7_800_000, "orin-nano-8gb", "6.2", "legacy"),
        (NANO, RELEASE.format(36, "4.7"), 3_500_000, "orin-nano-4gb", "6.2.1", "legacy"),
        (NANO, RELEASE.format(39, "2.0"), 7_800_000, "orin-nano-8gb", "7.2", "modern"),
        ("NVIDIA Jetson Orin NX 16GB", RELEASE.format(36, "3.0"), 15_800_000, "orin-nx-16gb", "6.0", "legacy"),
        (AGX, RELEASE.format(36, "5.0"), 64_300_000, "agx-orin-64gb", "6.2.2", "legacy"),
        (AGX, None, 31_000_000, "agx-orin-32gb", "6.2", "legacy"),
        ("NVIDIA Jetson AGX Thor Developer Kit", RELEASE.format(38, "4.0"), 128_000_000, "thor-t5000", "7.1", "legacy"),
    ],
)  # fmt: skip
def test_a_jetson_is_known_by_model_memory_and_release(machine, model, l4t, memory, name, release, lowering):
    found = profiles.detect(machine(model, l4t, memory))

    assert (found.name, found.jetpack, found.lowering) == (name, release, lowering)


@pytest.mark.parametrize("model", [None, "Raspberry Pi 5 Model B Rev 1.0"])
def test_anything_but_a_jetson_is_the_cpu(machine, model):
    assert profiles.detect(machine(model, None, 8_000_000)).name == "cpu"


@pytest.mark.parametrize(
    ("model", "l4t", "said"),
    [
        ("Jetson-AGX", RELEASE.format(32, "7.1"), "'Jetson-AGX', not known"),
        (NANO, RELEASE.format(35, "4.1"), r"L4T 35\.4\.1, expected 36\.3 \(JetPack 6\.0\) or a later one"),
    ],
)
def test_a_jetson_that_is_not_supported_is_said_to_be(machine, model, l4t, said):
    with pytest.raises(UnsupportedError, match=said):
        profiles.detect(machine(model, l4t, 7_800_000))


def test_the_devices_are_listed_one_a_line():
    done = cli("devices")

    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert set(profiles.names()) <= set(rows)
    assert rows["orin-nano-8gb"] == ["orin-nano-8gb", "8", "102", "16.7", "8.7", "trt", "legacy", "6.2", "10.3"]
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[:-1])


@pytest.mark.parametrize("name", profiles.names())
def test_one_device_is_explained_with_every_source(name):
    done, profile = cli("devices", name), profiles.load(name)

    assert done.exit_code == 0, done.output
    for figure in figures(profile).values():
        assert f"[{figure.source}" in done.stdout and figure.note in done.stdout
    for row in profile.jetpacks:
        assert f"L4T {row.l4t}, TensorRT {row.tensorrt}, CUDA {row.cuda}, Python {row.python}" in done.stdout


def test_devices_are_one_json_document():
    every = json.loads(cli("devices", "--json").stdout)
    one = json.loads(cli("devices", "orin_nano_8gb@7.2", "--json").stdout)

    assert [row["name"] for row in every] == list(profiles.names())
    assert (one["jetpack"], one["lowering"]) == ("7.2", "modern")
    assert one["memory_gb"]["value"] == 8 and one["memory_gb"]["source"].startswith("https://")


def test_an_unknown_device_exits_with_3():
    assert "did you mean rtx-4090?" in refused(3, "devices", "rtx-4091")
