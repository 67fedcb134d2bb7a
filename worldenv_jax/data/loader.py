# SPDX-License-Identifier: Apache-2.0
"""Batches read ahead by grain: threads or worker processes, a share per host, exact resume."""

import functools
from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

from worldenv_jax.data.windows import BatchSampler

_LAST_STEP = 1 << 40


def load_batches(
    sampler: BatchSampler,
    first_step: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int = 4,
    ahead: int = 4,
) -> Iterator[dict[str, Any]]:
    """Batches `first_step`, `first_step` + 1, ... without end, as `sampler.batch` makes them.

    A batch is a function of its step, so a run resumes by passing the step that it has reached; the number of
    workers, threads and hosts may change in between.

    Args:
        sampler: with a batch size that `hosts` divides; sent to the workers, so its episodes must be picklable
            (`open_episodes` is: each worker maps the files itself).
        first_step: number of the first batch.
        host, hosts: this host's number and how many there are; host h gets rows h * B / hosts and on.
        workers: processes that make batches (0: threads of this process).
        threads: batches made at the same time in a process.
        ahead: batches that are kept ready.

    Raises:
        ValueError: the hosts do not divide the batch.
    """
    rows, rest = divmod(sampler.batch_size, hosts)
    if rest:
        raise ValueError(f"got a batch of {sampler.batch_size} for {hosts} hosts, expected a multiple")
    make = functools.partial(sampler.batch, rows=slice(host * rows, (host + 1) * rows))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    batches = grain.MapDataset.range(first_step, _LAST_STEP).map(make).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl flags; a notebook has not parsed any
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead))
    return iter(batches)
