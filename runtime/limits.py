"""How large a call may be: the manifest's limits against the model, and calls against the limits.

Engines are built for sizes; the runtime holds every call against the same limits, on every engine. Knows
numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import Limits, Manifest

DEFAULT_BATCH = 4


def make_limits(
    context: int,
    *,
    max_batch: int | None = None,
    max_input_length: int | None = None,
    max_kv_capacity: int | None = None,
) -> Limits:
    """Limits for a model of ``context`` positions; what is not given is as large as the model allows, the batch 4.

    Raises UserError if they contradict one another or the model.
    """
    capacity = context if max_kv_capacity is None else max_kv_capacity
    limits = Limits(
        max_batch=DEFAULT_BATCH if max_batch is None else max_batch,
        max_input_length=min(capacity, context) if max_input_length is None else max_input_length,
        max_kv_capacity=capacity,
    )
    for fault in limit_faults(limits, context):
        raise UserError(f"{fault}: give others with --max-batch-size, --max-input-len and --max-kv-cache-capacity")
    return limits


def limit_faults(limits: Limits, context: int) -> Iterator[str]:
    """What is wrong with ``limits`` for a model of ``context`` positions."""
    for what, value in (
        ("batch", limits.max_batch),
        ("input length", limits.max_input_length),
        ("KV cache capacity", limits.max_kv_capacity),
    ):
        if value < 1:
            yield f"the largest {what} is {value}"
    if limits.max_input_length > limits.max_kv_capacity:
        yield f"inputs of {limits.max_input_length} tokens do not fit a KV cache of {limits.max_kv_capacity}"
    if limits.max_kv_capacity > context:
        yield f"a KV cache of {limits.max_kv_capacity} is longer than the model's context of {context}"


def check_batch(limits: Limits, size: int) -> None:
    """Raise UserError if ``size`` sequences are none, or more than an engine is made for."""
    if size < 1:
        raise UserError("a batch of no prompts was given: give at least one")
    if size > limits.max_batch:
        raise UserError(
            f"a batch of {size} prompts was given, the bundle was exported for {limits.max_batch} at most: "
            "give fewer at a time, or export with a greater --max-batch-size"
        )


def check_rows(manifest: Manifest, cached: int, count: int, *, room: int = 0) -> None:
    """Raise UserError if ``count`` rows behind ``cached`` are too many, or leave no ``room`` for further ones.

    Rows are those of the longest sequence of a batch, counted as if nothing were pruned.
    """
    limits, context, rows = manifest.limits, manifest.model.context, cached + count
    if rows + room > limits.max_kv_capacity:
        full = limits.max_kv_capacity == context
        where = f"the model's context is {context}" if full else f"the bundle's KV cache holds {limits.max_kv_capacity}"
        more = "" if full else ", or export with a greater --max-kv-cache-capacity"
        raise UserError(
            f"the prompt has {rows} tokens with its images and earlier turns, {where}: give a shorter prompt{more}"
        )
    if count > limits.max_input_length:
        raise UserError(
            f"the prompt has {count} tokens with its images, the bundle was exported for {limits.max_input_length} "
            "at most: give a shorter prompt, or export with a greater --max-input-len"
        )
