"""The trial of an ONNX file, in a process of its own with limits: `python -m models.training.onnx_trial REQUEST`.

The process writes the files of the net to a directory, and prints what it found as JSON. An endless loop, an array of
2^40 numbers or a fault of a library ends this process, and no other. No torch.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto
from onnx.shape_inference import infer_shapes
from safetensors.numpy import save as save_tensors

from models.registry.checkpoint import GRAPH_FILE, WEIGHTS_FILE, BadCheckpoint
from models.runtimes.onnx import open_session
from models.training import onnx_batch, onnx_checks, onnx_graph
from models.training.onnx_graph import INPUT, OUTPUT, Arrays, shown
from models.vectors import Floats, normalise

# Contexts that run alone, and then together.
ROWS = 7
BATCHES = (1, 2, ROWS)
# Then batches of these sizes run, as long as one takes no longer than `MAX_BATCH_S` seconds of CPU time.
LARGE_BATCHES = (32, 128, 256)
MAX_BATCH_S = 5.0
# in length, between an answer alone and in a batch, both of length one
MAX_DIFFERENCE = 1e-3
# by which the length of a unit vector may differ from one
MAX_OFF_UNIT = 1e-4
MAX_CONTEXT = 4096
_GIB = 1 << 30
_CPU_S_PER_GIB = 120
# of address space, beside six times the size of the files
_BASE_BYTES = 3 * _GIB
_COPIES = 6
_MAX_REASON = 500


@dataclass(frozen=True)
class Request:
    """What is asked of a trial: the file, where its net goes, T and D if they are known, and limits.

    `cpu_s` are the seconds of CPU time for a small file. `output` is the name of the output to keep.
    """

    file: str
    out: str
    context_length: int | None = None
    dim: int | None = None
    output: str | None = None
    cpu_s: int = 60


@dataclass
class Facts:
    """What a trial found: sizes, the number of parameters, what the card says of the file, and remarks for a reader."""

    dim: int
    context_length: int
    parameters: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def main(request: Request) -> dict[str, Any]:
    """Try a file under limits; return its facts, or the reason against it as `error`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path = Path(request.file)
    try:
        _limit(request, path.stat().st_size)
        return asdict(examine(path, Path(request.out), request, partial(_limit, request)))
    except BadCheckpoint as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it needs more memory than a net of its size may use"}
    except RecursionError:
        return {"error": "its nodes depend on each other in a circle, or are nested too deeply"}


def _limit(request: Request, size: int) -> None:
    """Limit time and memory of this process by the size of the files in bytes."""
    seconds = request.cpu_s + _CPU_S_PER_GIB * size // _GIB
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    # not every system has the limit
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_BASE_BYTES + _COPIES * size, resource.RLIM_INFINITY))


def examine(path: Path, out: Path, request: Request, set_limits: Callable[[int], None] = lambda size: None) -> Facts:
    """Write the net of an ONNX file to the directory `out`, and return what is known of it.

    `set_limits` is called with the size of the file and its external data in bytes before the data are read.

    Raises:
        BadCheckpoint: the file is no net that maps contexts to next vectors, row by row; the message says why.
    """
    model = onnx_graph.decode(path)
    set_limits(path.stat().st_size + onnx_graph.external_bytes(model, path.parent))
    model = onnx_graph.load_tensors(model, path.parent)
    onnx_checks.check_operators(model)
    source, target = _find_values(model, request.output)
    rows, length, dim = _find_shape(model, source, target, request)
    facts = Facts(dim, length, config=_origin(model, source.name, target.name))
    onnx_graph.lift_constants(model.graph)
    onnx_graph.standardise(model, source.name, target.name, (rows, length, dim))
    onnx_checks.check_sizes(model.graph, INPUT)
    weights = onnx_graph.split_weights(model, onnx_checks.size_inputs(model.graph))
    model, fixed = _with_free_batch(model, weights, rows, facts)
    _finish(model, weights, fixed, facts)
    _write(model, weights, out, facts)
    return facts


def _origin(model: ModelProto, source: str, target: str) -> dict[str, Any]:
    producer = f"{model.producer_name} {model.producer_version}".strip()
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), None)
    if opset is None:
        raise BadCheckpoint("it has no operator set of the domain ai.onnx")
    return {"opset": opset, "producer": producer[:100], "input": source[:100], "output": target[:100]}


def _find_values(model: ModelProto, wanted: str | None) -> tuple[Any, Any]:
    """Return the input and the output of a net: one each, of float32."""
    inputs, outputs = onnx_graph.true_inputs(model.graph), list(model.graph.output)
    found = f"found {_listed('input', inputs)}, and {_listed('output', outputs)}"
    chosen = [value for value in outputs if wanted is None or value.name == wanted]
    if len(inputs) != 1 or len(chosen) != 1:
        hint = "; --output NAME chooses one" if len(inputs) == 1 and len(outputs) > 1 else ""
        raise BadCheckpoint(f"expected one input (B, T, D) and one output (B, D); {found}{hint}")
    if any(value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT for value in (*inputs, *chosen)):
        raise BadCheckpoint(f"expected an input and an output of float32; {found}")
    return inputs[0], chosen[0]


def _listed(what: str, values: Sequence[Any]) -> str:
    texts = [_described(value) for value in values[:8]]
    more = f" and {len(values) - 8} more" if len(values) > 8 else ""
    return f"{len(values)} {what}{'' if len(values) == 1 else 's'}: {', '.join(texts)}{more}" if texts else f"no {what}"


def _described(value: Any) -> str:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return f"{shown(value.name)} ({kind})"
    dims = value.type.tensor_type.shape.dim
    sizes = [str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param[:20] or "?" for dim in dims[:8]]
    return f"{shown(value.name)} {onnx_graph.type_name(value.type.tensor_type.elem_type)} ({', '.join(sizes)})"


def _find_shape(model: ModelProto, source: Any, target: Any, request: Request) -> tuple[int | None, int, int]:
    """Return the batch size, None if it is free, and T and D."""
    given, answered = onnx_graph.shape_of(source), onnx_graph.shape_of(target)
    if (given and len(given) != 3) or (answered and len(answered) != 2):
        found = f"{_described(source)} and {_described(target)}"
        raise BadCheckpoint(f"expected an input (B, T, D) and an output (B, D); found {found}")
    rows, length, dim = given or (None, None, None)
    answer_dim = answered[1] if answered else None
    dim = dim or answer_dim or _inferred_dim(model, target.name) or request.dim
    if dim is None:
        raise BadCheckpoint("D is free in the graph; --data DIR says it, with vectors that the net reads")
    if answer_dim not in (None, dim):
        raise BadCheckpoint(f"the input has D = {dim}, the output has D = {answer_dim}; expected the same")
    if length and request.context_length not in (None, length):
        raise BadCheckpoint(f"the graph has T = {length}; --context-length is {request.context_length}")
    length = length or request.context_length or 5
    if length > MAX_CONTEXT:
        raise BadCheckpoint(f"the graph has T = {length}; expected at most {MAX_CONTEXT}")
    return rows, length, dim


def _inferred_dim(model: ModelProto, name: str) -> int | None:
    bare = ModelProto()
    bare.CopyFrom(model)
    value = next(value for value in bare.graph.output if value.name == name)
    value.type.tensor_type.ClearField("shape")
    try:
        inferred = infer_shapes(bare, data_prop=True)
    except Exception:
        # of any class; D is then unknown
        return None
    shape = onnx_graph.shape_of(next(value for value in inferred.graph.output if value.name == name))
    return shape[1] if shape and len(shape) == 2 else None


class _Tried:
    """A graph in a session, run on contexts; wrong shapes raise `BadCheckpoint`, as a session that fails does."""

    def __init__(self, model: ModelProto, weights: Arrays) -> None:
        names = {tensor.name for tensor in model.graph.initializer}
        used = {name: array for name, array in weights.items() if name in names}
        try:
            self._session = open_session(model.SerializeToString(), used)
        except Exception as error:
            # onnxruntime's exceptions have no other common base
            raise BadCheckpoint(f"onnxruntime rejects the graph: {_reason(error)}") from error

    def run(self, contexts: Floats) -> Floats:
        """Return the answers `(B, D)` to contexts `(B, T, D)`."""
        try:
            answers: Floats = self._session.run([OUTPUT], {INPUT: contexts})[0]
        except Exception as error:
            raise BadCheckpoint(f"onnxruntime fails on {len(contexts)} contexts: {_reason(error)}") from error
        expected = len(contexts), contexts.shape[2]
        if answers.shape != expected:
            raise BadCheckpoint(
                f"the answer to {len(contexts)} contexts has shape {answers.shape}; expected {expected}"
            )
        return answers

    def rows(self, contexts: Floats, repeat: int) -> Floats:
        """Return the answers to contexts that run alone, each `repeat` times in its batch."""
        answers = [self.run(np.repeat(context[None], repeat, axis=0))[:1] for context in contexts]
        return np.concatenate(answers)


def _reason(error: Exception) -> str:
    """Return an error of onnxruntime as one line, without the lines of its source."""
    line = " ".join(str(error).split())
    line = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/.*\) ", "", line)
    return line[:_MAX_REASON]


def _contexts(count: int, length: int, dim: int) -> Floats:
    """Return seeded random contexts `(count, T, D)` of unit vectors."""
    noise = np.random.default_rng(0).standard_normal((count, length, dim))
    return normalise(noise + noise.mean(axis=1, keepdims=True))


def _with_free_batch(
    model: ModelProto, weights: Arrays, rows: int | None, facts: Facts
) -> tuple[ModelProto, int | None]:
    """Return the graph for any number of contexts and None, else the file's graph and its batch."""
    fixed = rows or 1
    as_it_is = _Tried(model, weights)
    contexts = _contexts(ROWS, facts.context_length, facts.dim)
    alone = as_it_is.rows(contexts, fixed)
    _check_answers(alone, as_it_is.rows(contexts, fixed))
    if rows is None:
        try:
            difference = _difference(as_it_is, contexts, alone)
        except BadCheckpoint as error:
            facts.remarks.append(
                f"It says that its batch is free, but it answers one context at a time only ({error})."
            )
        else:
            _check_difference(difference, "in a batch of others")
            return model, None
    freed = _freed(model, weights, fixed, contexts, alone)
    if freed is not None:
        facts.remarks.append(f"Its batch was fixed at {fixed} and was freed; batches answer as single contexts do.")
        return freed, None
    _check_difference(_difference_when_fixed(as_it_is, contexts, alone, fixed), "beside other contexts")
    facts.remarks.append(
        f"Its batch is fixed at {fixed} and could not be freed; contexts run {fixed} at a time, which is slower."
    )
    return _fix(model, fixed), fixed


def _check_answers(first: Floats, second: Floats) -> None:
    if not np.isfinite(first).all():
        raise BadCheckpoint(f"{np.sum(~np.isfinite(first).all(axis=1))} of {len(first)} answers are not finite")
    if np.abs(first - second).max() > MAX_OFF_UNIT * max(1.0, np.abs(first).max()):
        raise BadCheckpoint(f"answers to one context differ by {np.abs(first - second).max():.3g}; expected the same")
    if not np.linalg.norm(first, axis=1).all():
        raise BadCheckpoint("an answer has the length 0; expected a direction")


def _difference(tried: _Tried, contexts: Floats, alone: Floats) -> float:
    """Return the largest distance between the direction of an answer in a batch and that of the answer alone."""
    return max(_distance(tried.run(contexts[:size]), alone[:size]) for size in BATCHES)


def _difference_when_fixed(tried: _Tried, contexts: Floats, alone: Floats, fixed: int) -> float:
    order = np.arange(fixed) % len(contexts)
    return _distance(tried.run(contexts[order]), alone[order])


def _distance(some: Floats, others: Floats) -> float:
    return float(np.linalg.norm(normalise(some) - normalise(others), axis=1).max())


def _check_difference(difference: float, when: str) -> None:
    if not difference <= MAX_DIFFERENCE:
        raise BadCheckpoint(
            f"contexts influence each other's answers: an answer differs by {difference:.3g} {when}; "
            f"expected at most {MAX_DIFFERENCE:g}, in vectors of length one"
        )


def _freed(model: ModelProto, weights: Arrays, fixed: int, contexts: Floats, alone: Floats) -> ModelProto | None:
    """Return the graph with a free batch, None if none is found that answers as the file does."""
    zeros = {name for name, array in weights.items() if not array.any()}
    try:
        freed = onnx_batch.free_batch(_fix(model, None), fixed, zeros)
        difference = _difference(_Tried(freed, weights), contexts, alone)
    except Exception:
        # Inference of shapes raises errors of many classes. The file is then served with its own batch.
        return None
    return freed if difference <= MAX_DIFFERENCE else None


def _fix(model: ModelProto, rows: int | None) -> ModelProto:
    """Return a copy of a standardised graph for `rows` contexts; None: for any number."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for value in (copy.graph.input[0], copy.graph.output[0]):
        dim = value.type.tensor_type.shape.dim[0]
        dim.CopyFrom(type(dim)(dim_value=rows) if rows else type(dim)(dim_param="batch"))
    return copy


def _finish(model: ModelProto, weights: Arrays, fixed: int | None, facts: Facts) -> None:
    """Normalise the output if it needs that, and find the largest batch that may run at once."""
    contexts = _contexts(max(LARGE_BATCHES), facts.context_length, facts.dim)
    lengths = np.linalg.norm(_Tried(model, weights).rows(contexts[:ROWS], fixed or 1), axis=1)
    if np.abs(lengths - 1).max() > MAX_OFF_UNIT:
        onnx_graph.normalise_output(model)
        least, most = lengths.min(), lengths.max()
        facts.remarks.append(
            f"The file does not end in unit vectors (lengths of {least:.3g} to {most:.3g} in a trial); "
            "this version divides each answer by its length."
        )
    tried = _Tried(model, weights)
    alone = tried.rows(contexts[:ROWS], fixed or 1)
    facts.config["max_rows"] = _largest_batch(tried, contexts, alone, fixed)
    if fixed:
        facts.config["fixed_rows"] = True


def _largest_batch(tried: _Tried, contexts: Floats, alone: Floats, fixed: int | None) -> int:
    largest = 0
    for rows in (fixed,) if fixed else (*BATCHES, *LARGE_BATCHES):
        began = process_time()
        answers = tried.run(np.resize(contexts, (rows, *contexts.shape[1:])))
        seconds = process_time() - began
        if seconds > MAX_BATCH_S:
            break
        known = min(rows, len(alone))
        _check_difference(_distance(answers[:known], alone[:known]), f"in a batch of {rows}")
        largest = rows
    if not largest:
        raise BadCheckpoint(f"{rows} contexts take {seconds:.1f} s of CPU time; expected at most {MAX_BATCH_S:g}")
    return largest


def _write(model: ModelProto, weights: Arrays, out: Path, facts: Facts) -> None:
    names = {tensor.name for tensor in model.graph.initializer}
    kept = {name: array for name, array in weights.items() if name in names}
    data = save_tensors(kept)
    onnx_graph.refer_to_weights(model, data)
    (out / WEIGHTS_FILE).write_bytes(data)
    (out / GRAPH_FILE).write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(out / GRAPH_FILE))
    except Exception as error:
        # of several classes
        raise BadCheckpoint(f"the graph breaks the rules of ONNX: {_reason(error)}") from error
    facts.parameters = onnx_graph.count_parameters(kept)


if __name__ == "__main__":
    print(json.dumps(main(Request(**json.loads(sys.argv[1])))))
