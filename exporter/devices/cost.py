"""Cost: time to first token and per decoded token of a plan on a device, predicted. From config.json and the profile.

A roofline. Each stage takes as long as its FLOPs at the rate that the device reaches, or its bytes of weights and
caches at the bandwidth that it reaches, whichever is longer, and a fixed time per layer beside that. FLOPs are the
plan's, which are those of the graphs' nodes.

Peaks are the profile's. What is reached of them, and the time per layer, are constants of a class of GPUs, fitted by
`samples/cost/fit.py` on half of the times that TensorRT Edge-LLM publishes for Jetsons; `cost.json` holds them with
the errors on the other half. They speak of that runtime's kernels: no engine of this project's has been timed on a
Jetson. A float16 decoder is given the efficiency of the float16 vision encoders, since no published row has one. For a
machine whose rates were measured (`lvlm-edge bench --json`), the prediction is by these: products by the format of
their weights and by whether they have many rows or one, attention, and all other operators (`planning.rates`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from lvlm_edge.exporter import planning
from lvlm_edge.exporter.devices import fit
from lvlm_edge.exporter.devices.profiles import Profile, numbers
from lvlm_edge.exporter.planning import BYTES, Plan, loads
from lvlm_edge.exporter.planning import rates as measuring
from lvlm_edge.runtime.errors import UnsupportedError, UsageError

PAYS_FROM = 0.05  # share of the time to first token that a method has to save
# Formats whose matrices are unpacked and multiplied in the graph's dtype; the others have a rate of their own.
UNPACKED = {"int8": "int4", "int4": "int4"}
# The class of constants by the major compute capability from which it holds; fitted on boards of 8.7 and 11.0.
CLASSES = {8: "orin", 10: "thor"}


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What a class of GPUs reaches.

    Attributes:
        efficiency: of the peak rate, by format of the weights: float16, int4 and, where there is one, fp4.
        bandwidth: of the peak bandwidth.
        prompt_layer: seconds per layer of a stage that runs once per prompt, beside its work.
        decode_layer: the same for a decoded token.
    """

    efficiency: Mapping[str, float]
    bandwidth: float
    prompt_layer: float
    decode_layer: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one device reaches.

    Attributes:
        vision: FLOPs per second of the vision encoder and projector.
        decoder: FLOPs per second of the decoder, in its weights' format.
        bandwidth: bytes per second.
        prompt_layer: seconds, see `Constants`.
        decode_layer: seconds.
        rates: that were measured, see `planning.rates`; all else is unused then.
    """

    vision: float = 0.0
    decoder: float = 0.0
    bandwidth: float = 0.0
    prompt_layer: float = 0.0
    decode_layer: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """What a stage does.

    Attributes:
        flops: 2 x multiply-accumulate.
        bytes: of weights and caches, read once.
        layers: that have a fixed time each.
        decode: of a decoded token, not of a prompt.
        vision: at the rate of the vision encoder.
        load: the same work by the rates of a machine that was measured.
    """

    name: str
    flops: float
    bytes: float
    layers: int
    decode: bool = False
    vision: bool = False
    load: Mapping[str, float] = field(default_factory=dict)

    def compute(self, machine: Machine) -> float:
        """Seconds of the FLOPs alone."""
        if machine.rates:
            return measuring.compute(self.load, machine.rates)
        return self.flops / (machine.vision if self.vision else machine.decoder)

    def memory(self, machine: Machine) -> float:
        """Seconds of the bytes alone."""
        return measuring.memory(self.load, machine.rates) if machine.rates else self.bytes / machine.bandwidth

    def without(self, *parts: str) -> StageWork:
        """The same but for some of `flops`, `bytes` and `layers`."""
        gone = {name for part in parts for name in measuring.PARTS[part]}
        load = {name: amount for name, amount in self.load.items() if name not in gone}
        flops, size, layers = (
            0 if part in parts else amount
            for part, amount in (("flops", self.flops), ("bytes", self.bytes), ("layers", self.layers))
        )
        return replace(self, flops=flops, bytes=size, layers=int(layers), load=load)

    def seconds(self, machine: Machine) -> float:
        """Predicted time."""
        if machine.rates:
            return measuring.predicted(self.load, machine.rates)
        fixed = self.layers * (machine.decode_layer if self.decode else machine.prompt_layer)
        return max(self.compute(machine), self.memory(machine)) + fixed


# What a stage would be without a floor, by the floor's name.
FLOORS: dict[str, Callable[[StageWork], StageWork]] = {
    "the choice of tokens": lambda w: w.without("flops", "bytes", "layers") if w.name == "select" else w,
    "reading the weights": lambda w: w if w.vision else w.without("bytes"),
    "the fixed time of the layers": lambda w: w if w.vision else w.without("layers"),
    "the vision encoder": lambda w: w.without("flops", "bytes", "layers") if w.vision else w,
}


def constants() -> dict[str, Any]:
    """`cost.json`: the constants of each class, how they were fitted, and the errors."""
    found: dict[str, Any] = json.loads(
        resources.files("lvlm_edge.exporter.devices").joinpath("cost.json").read_text("utf-8")
    )
    return found


def class_of(profile: Profile) -> str:
    """The class of constants of a device.

    Raises:
        UnsupportedError: there is none, for a processor or an older GPU.
    """
    capability = profile.compute_capability
    found = [name for since, name in CLASSES.items() if capability and numbers(capability.value)[0] >= since]
    if not found:
        advice = "measure it there: lvlm-edge bench BUNDLE --json > FILE, then --rates FILE"
        raise UnsupportedError(f"cost: no constants are fitted for {profile.name}; {advice}")
    return found[-1]


def machine(profile: Profile, constants: Constants, *, dtype: str = "float16", weights: str = "as-is") -> Machine:
    """What a device reaches with a graph's dtype and a format of the decoder's weights.

    Raises:
        UnsupportedError: the profile does not say its bandwidth or a rate, or the constants do not have the format.
    """
    if profile.bandwidth_gb_s is None:
        raise UnsupportedError(f"cost: the profile of {profile.name} has no bandwidth; add it with its source")
    own = "float16" if weights == "as-is" else UNPACKED.get(weights, weights)
    if own not in constants.efficiency:
        known = ", ".join(constants.efficiency)
        raise UnsupportedError(f"cost: no published time to fit {weights} weights on; there are some for {known}")
    return Machine(
        vision=_peak(profile, dtype) * constants.efficiency["float16"],
        decoder=_peak(profile, dtype if weights in ("as-is", *UNPACKED) else weights) * constants.efficiency[own],
        bandwidth=profile.bandwidth_gb_s.value * 1e9 * constants.bandwidth,
        prompt_layer=constants.prompt_layer,
        decode_layer=constants.decode_layer,
    )


def _peak(profile: Profile, number_format: str) -> float:
    figure = (profile.tflops or {}).get(number_format)
    if figure is None:
        raise UnsupportedError(
            f"cost: the profile of {profile.name} has no rate of {number_format}; choose another --dtype or --weights, "
            "or add it with its source"
        )
    return figure.value * 1e12


def measured(path: Path) -> Machine:
    """The machine that `lvlm-edge bench --json` has measured.

    Raises:
        UsageError: the file cannot be read, holds no rates, or those of another version.
    """
    again = "make it with lvlm-edge bench BUNDLE --json"
    try:
        found = json.loads(path.read_text("utf-8"))["rates"]
        version = found.get("version", 1)
        rates = {name: float(found["median"][name]) for name in measuring.UNITS} if version == measuring.VERSION else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: holds no measured rates ({type(error).__name__} {error}); {again}") from error
    if not rates:
        raise UsageError(f"{path}: rates are of version {version}, expected {measuring.VERSION}; {again}")
    for name, rate in rates.items():
        if not 0 < rate < float("inf"):
            raise UsageError(f"{path}: the rate {name!r} is {rate:g}, expected a number above 0; {again}")
    return Machine(rates=rates)


def prompt_work(plan: Plan, *, weights: str = "as-is") -> tuple[StageWork, ...]:
    """The stages before the first token, in order; preprocessing is not among them.

    `select` is the choice of the kept tokens between two stages: their rows are read and written.
    """
    spec, width = plan.spec, BYTES[plan.dtype]
    count, seen = planning.decoder_weights(spec.decoder), planning.vision_work(plan)
    found = [
        StageWork(
            name="vision",
            flops=planning.vision_flops(plan),
            bytes=sum(views * encoder.weights for views, encoder, _ in seen) * BYTES[plan.vision_dtype],
            layers=sum(views * encoder.layers for views, encoder, _ in seen),
            vision=True,
            load=loads.vision(plan),
        )
    ]
    if any(projector.steps for _, _, projector in seen):
        found.append(
            StageWork(
                name="projector",
                flops=planning.projector_flops(plan),
                bytes=sum(p.layers * p.weights for _, _, p in seen) * BYTES[plan.vision_dtype],
                layers=sum(p.layers for _, _, p in seen),
                vision=True,
                load=loads.projector(plan),
            )
        )
    layer = _layer_bytes(plan, weights)
    for i, stage in enumerate(plan.stages):
        last = i == len(plan.stages) - 1
        end = (count.norm + count.head + plan.method.own_weights(plan)) * width if last else 0
        found.append(
            StageWork(
                name="prefill" if len(plan.stages) == 1 else f"prefill {stage.layers.start}..{stage.layers.stop - 1}",
                flops=planning.stage_flops(spec.decoder, stage) + (planning.head_flops(spec.decoder) if last else 0),
                bytes=len(stage.layers) * layer + end,
                layers=len(stage.layers),
                load=loads.stage(plan, stage, last=last),
            )
        )
        if stage.scored and not last:
            moved = 2 * plan.stages[i + 1].queries * spec.decoder.hidden * width
            load = measuring.elements(moved / width, 1)
            found.append(StageWork(name="select", flops=0, bytes=moved, layers=1, load=load))
    return tuple(found)


def decode_work(plan: Plan, *, weights: str = "as-is") -> StageWork:
    """One decoded token, reading every weight of the decoder and caches that are full."""
    count, layers = planning.decoder_weights(plan.spec.decoder), plan.spec.decoder.layers
    read = layers * _layer_bytes(plan, weights) + (count.norm + count.head) * BYTES[plan.dtype]
    return StageWork(
        name="decode",
        flops=planning.decode_flops(plan),
        bytes=read + plan.kv_cache_bytes(),
        layers=layers,
        decode=True,
        load=loads.decode(plan),
    )


def _layer_bytes(plan: Plan, weights: str) -> float:
    count, width = planning.decoder_weights(plan.spec.decoder), BYTES[plan.dtype]
    return count.matrices * (fit.WEIGHTS[weights] or width) + count.vectors * width


def first_token(works: tuple[StageWork, ...], machine: Machine) -> float:
    """Seconds of the stages, one after the other."""
    return sum(work.seconds(machine) for work in works)


def verdict(plan: Plan, machine: Machine, *, weights: str = "as-is") -> tuple[bool, str]:
    """Whether a method pays: it saves 5 % of the time to first token or more. With the reason where it does not.

    The reason is the first floor without which it would pay (the choice of tokens, the reading of weights, the time per
    layer, the vision encoder), or all of them; where it would not even then, too few FLOPs are saved.
    """
    ours, dense = (prompt_work(p, weights=weights) for p in (plan, planning.dense(plan)))
    if _saves(ours, dense, machine):
        return True, ""
    for floor, without in FLOORS.items():
        if _saves(tuple(map(without, ours)), tuple(map(without, dense)), machine):
            return False, f"{floor} {_costs(ours, without, machine)}"
    for without in FLOORS.values():
        ours, dense = tuple(map(without, ours)), tuple(map(without, dense))
    if _saves(ours, dense, machine):
        return False, f"{', '.join(FLOORS)} together leave too little to save"
    flops = planning.prefill_flops(plan) / planning.prefill_flops(planning.dense(plan))
    kept = f"{plan.kept_tokens} of {plan.visual_tokens} visual tokens kept"
    where = f", from layer {plan.stages[-1].layers.start} of {plan.spec.decoder.layers} on" if plan.stages[1:] else ""
    rows = f"{plan.visual_tokens} of {plan.visual_tokens + plan.text_tokens + plan.prompt.separators} rows are visual"
    return False, f"the decoder is left with {flops:.1%} of its FLOPs ({kept}{where}; {rows})"


def _saves(ours: tuple[StageWork, ...], dense: tuple[StageWork, ...], machine: Machine) -> bool:
    before = first_token(dense, machine)
    return before - first_token(ours, machine) >= PAYS_FROM * before


def _costs(works: tuple[StageWork, ...], without: Callable[[StageWork], StageWork], machine: Machine) -> str:
    """What a floor costs of a prompt, in words."""
    whole = first_token(works, machine)
    rest = first_token(tuple(map(without, works)), machine)
    return f"costs {_ms(whole - rest)} of {_ms(whole)} that the method leaves"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.{2 if seconds < 0.01 else 0}f} ms"


def report(plan: Plan, profile: Profile, *, weights: str = "as-is", rates: Path | None = None) -> dict[str, Any]:
    """The prediction as `plan --json` prints it under `prediction`; ms, bytes.

    Args:
        rates: file of `lvlm-edge bench --json` to take the machine's rates from, instead of the fitted constants.

    Raises:
        UsageError: the file holds no rates.
    """
    stored = constants()
    try:
        if rates is None:
            name = class_of(profile)
            found = machine(profile, of_class(stored, name), dtype=plan.dtype, weights=weights)
            compared = profile.name in stored["devices"]
            basis = f"constants of {name}, fitted on {stored['fitted_on']}"
        else:
            found, compared = _measured_for(plan, weights, rates), False
            basis = f"rates measured in {rates}"
    except UnsupportedError as error:
        return {"available": False, "reason": str(error)}
    dense = planning.dense(plan)
    ours, none = (_times(p, profile, found, weights) for p in (plan, dense))
    pays, why = (None, "") if plan.method.name == "none" else verdict(plan, found, weights=weights)
    return {
        "available": True,
        "basis": basis,
        "held_out_error": stored["held_out"]["all"] if rates is None else None,
        "held_out_error_of_this_device": stored["held_out_of"][profile.name] if compared else None,
        **ours,
        "none": none,
        "speed_up": none["first_token_ms"] / ours["first_token_ms"],
        "pays": pays,
        "why_not": why,
    }


def of_class(stored: Mapping[str, Any], name: str) -> Constants:
    """The constants of a class in `cost.json`."""
    return Constants(**stored["classes"][name])


def _measured_for(plan: Plan, weights: str, rates: Path) -> Machine:
    found = measured(rates)
    if {plan.dtype, plan.vision_dtype} != {"float32"} or weights not in measuring.WEIGHTS:
        raise UnsupportedError(
            f"cost: {rates} has the rates of float32 graphs and their float32, int8 and int4 weights, the plan is "
            f"{plan.dtype} with {weights} weights, vision {plan.vision_dtype}; choose --dtype float32"
        )
    return found


def _times(plan: Plan, profile: Profile, machine: Machine, weights: str) -> dict[str, Any]:
    works, token = prompt_work(plan, weights=weights), decode_work(plan, weights=weights).seconds(machine)
    return {
        "stages": [
            {
                "name": work.name,
                "ms": work.seconds(machine) * 1e3,
                "bound": "FLOPs" if work.compute(machine) > work.memory(machine) else "bytes",
                "flops": work.flops,
                "bytes": round(work.bytes),
            }
            for work in works
        ],
        "first_token_ms": first_token(works, machine) * 1e3,
        "decode_ms": token * 1e3,
        "tokens_per_second": 1 / token,
        "memory_bytes": fit.predict(plan, profile, weights=weights).run,
    }
