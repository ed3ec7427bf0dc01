"""Cuts a bundle behind its first decoder layers, so that parity at true width fits in small memory.

The graphs stay those that were exported: layers behind are taken out, and norm and head, from the last decoder, are put
behind the first ones. Weights are hard-linked. What comes out is a bundle like any other.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import onnx_ir as ir

from tokprune.export.bundle import describe_files
from tokprune.export.memory import bundle_weights
from tokprune.export.trace import segment_facts
from tokprune.runtime import names
from tokprune.runtime.bundle import Bundle, open_bundle
from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import SegmentFacts
from tokprune.runtime.plan import Plan

_HEAD = "head."  # in front of the names of values that come with the head


def truncate(bundle: Bundle, layers: int, out: Path) -> Bundle:
    """``bundle``'s first ``layers`` decoder layers with its head, written to the empty directory ``out``.

    Stages at layers that are not there are left out. Raises UserError if the bundle has not more layers than that, or
    ``out`` is on another file system.
    """
    manifest = bundle.manifest
    whole = manifest.model.layers
    if not 1 <= layers < whole:
        raise UserError(f"the first {layers} layers were asked for, the bundle has {whole}: give 1 to {whole - 1}")
    stages = tuple(stage for stage in manifest.plan.stages if stage.layer < layers)
    plan = dataclasses.replace(manifest.plan, stages=stages) if stages else Plan("none")
    cut = {names.decoder(index): (first, stop) for index, first, stop in plan.segments(layers)}
    left_out = {names.select(index) for index in range(len(stages), len(manifest.plan.stages))}
    segments: list[SegmentFacts] = []
    for segment in manifest.segments:
        if segment.name in cut:
            first, stop = cut[segment.name]
            graph = _first_layers(bundle, segment, first, stop, with_head=stop == layers)
            ir.save(graph, out / segment.file)
            segments.append(segment_facts(graph, segment.name, (first, stop)))
        elif segment.layers is None and segment.name not in left_out:
            segments.append(segment)
    graphs = {segment.file for segment in manifest.segments}
    shared = [file.path for file in manifest.files if file.path not in graphs]
    shared += [segment.file for segment in segments if segment.name not in cut]
    for path in shared:
        try:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(bundle.file(path).resolve(), out / path)
        except OSError as error:
            raise UserError(
                f"{bundle.file(path)} cannot be linked to {out} ({error.strerror}): "
                "copy the bundle to a directory whose owner you are"
            ) from None
    facts = {file.path: file for file in manifest.files}
    fresh = describe_files(out, [out / segment.file for segment in segments if segment.name in cut])
    result = dataclasses.replace(
        manifest,
        model=dataclasses.replace(manifest.model, layers=layers),
        plan=plan,
        segments=tuple(segments),
        files=tuple(sorted([*(facts[path] for path in shared), *fresh], key=lambda file: file.path)),
        memory=bundle_weights(out, segments),
    )
    (out / names.MANIFEST_FILE).write_text(result.to_json(), encoding="utf-8")
    return open_bundle(out)


def _first_layers(bundle: Bundle, segment: SegmentFacts, first: int, stop: int, *, with_head: bool) -> ir.Model:
    """The graph of the decoder ``segment``, up to layer ``stop`` if it has more, with the head if it is to have it."""
    model = ir.load(bundle.file(segment.file))
    assert segment.layers is not None
    had_head = segment.outputs[0].name == names.LOGITS
    if segment.layers == (first, stop) and had_head == with_head:
        return model
    caches = [(layer, which) for layer in range(first, stop) for which in ("key", "value")]
    ends_here = segment.layers[1] == stop and not had_head
    state = names.LAST_HIDDEN_STATE if ends_here else names.state(stop)
    inputs = [segment.inputs[0].name, names.POSITION_IDS, names.ATTENTION_MASK]
    inputs += [names.past(*cache) for cache in caches]
    held = {value.name: value for value in model.graph.inputs}
    for layer in range(stop, segment.layers[1]):  # the length of the past may be read off any cache
        for which in ("key", "value"):
            held[names.past(layer, which)].replace_all_uses_with(held[names.past(first, which)])
    graph = ir.convenience.extract(model.graph, inputs, [state, *(names.present(*cache) for cache in caches)])
    output = graph.outputs[0]
    if with_head:
        index, logits = _append_head(graph, bundle, output)
        graph.inputs.insert(3, index)
        graph.outputs[0] = logits
    elif not ends_here:
        output.name = names.LAST_HIDDEN_STATE
    graph.sort()
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)


def _append_head(graph: ir.Graph, bundle: Bundle, state: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Put norm and head of the last decoder behind ``state``: (their index of rows, their logits)."""
    whole = bundle.manifest.model.layers
    last = next(segment for segment in bundle.manifest.segments if segment.outputs[0].name == names.LOGITS)
    model = ir.load(bundle.file(last.file))
    head = ir.convenience.extract(model.graph, [names.state(whole), names.LOGITS_INDEX], [names.LOGITS])
    entry, index = head.inputs
    logits = head.outputs[0]
    entry.replace_all_uses_with(state)
    nodes, constants = list(head), list(head.initializers.values())
    head.inputs.clear()
    head.outputs.clear()
    head.initializers.clear()
    head.remove(nodes)
    for value in [*constants, *(value for node in nodes for value in node.outputs)]:
        if value is not logits and value.name in ir.convenience.create_value_mapping(graph):
            value.name = _HEAD + str(value.name)
    for node in nodes:
        node.name = _HEAD + str(node.name)
    for value in constants:
        graph.register_initializer(value)
    graph.extend(nodes)
    return index, logits
