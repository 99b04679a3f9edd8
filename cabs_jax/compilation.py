"""Compilation ahead of need: the next larger batch is compiled while this one trains."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from cabs_jax._closing import Closing
from cabs_jax.statistics import PyTree

Signature = Hashable


class CompiledStep(Closing):
    """A train step with one executable for each batch size, compiled before it is needed.

    It is called like the step, and computes the same. Whenever it runs a batch size for the first
    time, a background thread begins to compile the next larger of `batch_sizes`, so that a growing
    batch finds its executable ready. Nothing but time depends on the thread: a call whose
    executable is not ready waits for it. At most one executable for each of `batch_sizes` is
    compiled, if the other arguments start out placed as the step returns them.

    Calls are told apart by the shapes, dtypes and shardings of the arguments and by JAX's settings
    of the calling thread, under which their executable is compiled: the mesh of `jax.set_mesh`,
    `jax.default_device`, `jax.enable_x64`, `jax.default_matmul_precision`,
    `jax.default_prng_impl` and `jax.numpy_dtype_promotion`.

    Args:
      step: Function of positional pytrees of arrays, jitted or not.
      batch_sizes: Increasing leading-axis lengths that batches may have, such as
        `buckets(16, 2048)`. Without them, nothing is compiled ahead.
      batch_argnums: Positions of the arguments whose leaves have the leading batch axis.
      donate_argnums: Positions of the arguments whose memory the step may reuse, as in `jax.jit`;
        a step that is jitted already keeps its own.

    Attributes:
      compilations: Number of executables that were compiled, or are being compiled.
      seconds_waited: Wall-clock seconds for which calls waited for a compilation.
      seconds_in_background: Wall-clock seconds of finished compilations ahead of need.

    Raises:
      TypeError: If `step` is not callable.
      ValueError: If `batch_sizes` are not increasing and positive. A call raises it if the
        leaves of its batch differ in length. An error of a compilation in the background is
        raised by the call that needs its executable, and by no other.

    Example:
      >>> import cabs_jax, jax.numpy as jnp, numpy as np
      >>> def step(mean, batch, mask):
      ...     return mean + 0.1 * (jnp.mean(batch, where=mask) - mean)
      >>> sizes = cabs_jax.buckets(16, 64, count=3)
      >>> loader = cabs_jax.BatchLoader(np.ones(100, np.float32), 10, pad_to=sizes)
      >>> with CompiledStep(step, sizes, batch_argnums=(1, 2)) as compiled:
      ...     mean = jnp.zeros(())
      ...     for loader.batch_size in (12, 20, 30):
      ...         mean = compiled(mean, *next(loader))
      >>> print(round(float(mean), 3), compiled.compilations <= len(sizes))
      0.271 True
    """

    def __init__(
        self,
        step: Callable[..., Any],
        batch_sizes: Sequence[int] = (),
        *,
        batch_argnums: int | Sequence[int] = 2,
        donate_argnums: int | Sequence[int] = (),
    ):
        if not callable(step):
            raise TypeError(f"step must be a function of arrays, got {step!r}.")
        if not all(a < b for a, b in itertools.pairwise([0, *batch_sizes])):
            raise ValueError(f"batch_sizes must be increasing and positive, got {batch_sizes}.")
        jitted = isinstance(step, jax.stages.Wrapped) and donate_argnums == ()
        self._jitted: Any = step if jitted else jax.jit(step, donate_argnums=donate_argnums)
        self._batch_sizes = tuple(batch_sizes)
        self._batch_argnums = _as_tuple(batch_argnums)
        self._futures: dict[Signature, Future[jax.stages.Compiled]] = {}
        self._by_batch: dict[Signature, tuple[Signature, jax.stages.Compiled]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cabs_jax compilation")
        self.seconds_waited = 0.0
        self.seconds_in_background = 0.0

    @property
    def compilations(self) -> int:
        """Number of executables that were compiled, or are being compiled."""
        return sum(not future.cancelled() for future in self._futures.values())

    def __call__(self, *args: PyTree) -> Any:
        """Runs the step."""
        # The leaves of a large model would take longer to look at than the step to dispatch: the
        # executable checks them, so that here the batch is enough.
        batch = _quick_signature([args[i] for i in self._batch_argnums])
        if known := self._by_batch.get(batch):
            signature, executable = known
            try:
                return executable(*args)
            except (TypeError, ValueError):  # before it ran: its arguments may be of another kind
                if signature == _signature(args, jax.tree.map(_abstract, args)):
                    raise
        self._by_batch[batch] = _, executable = self._obtain(args)
        self._compile_ahead(args)
        return executable(*args)

    def close(self) -> None:
        """Ends the background thread, after the compilation that it is at, if any.

        Calls remain possible, but nothing is compiled ahead any more.
        """
        self._batch_sizes = ()
        self._thread.shutdown(cancel_futures=True)

    def _obtain(self, args: tuple[PyTree, ...]) -> tuple[Signature, jax.stages.Compiled]:
        """The executable for these arguments; it waits until there is one."""
        started = time.perf_counter()
        abstract = jax.tree.map(_abstract, args)
        signature = _signature(args, abstract)
        try:
            ahead = self._futures.get(signature)
            if ahead is None or ahead.cancel():  # it waits behind another one
                executable = self._jitted.lower(*abstract).compile()
                self._futures[signature] = Future()
                self._futures[signature].set_result(executable)
            else:
                executable = ahead.result()
        except BaseException:
            self._futures.pop(signature, None)
            raise
        finally:
            self.seconds_waited += time.perf_counter() - started
        return signature, executable

    def _compile_ahead(self, args: tuple[PyTree, ...]) -> None:
        """Begins to compile the step for the next larger batch."""
        if not self._batch_sizes:
            return
        lengths = {np.shape(x)[:1] for i in self._batch_argnums for x in jax.tree.leaves(args[i])}
        if len(lengths) != 1 or lengths == {()}:
            raise ValueError(
                f"the leaves of a batch must share their leading axis, got {sorted(lengths)}."
            )
        ((size,),) = lengths
        larger = next((other for other in self._batch_sizes if other > size), None)
        if larger is None:
            return
        abstract = list(jax.tree.map(_abstract, args))
        for i in self._batch_argnums:
            abstract[i] = jax.tree.map(
                lambda x: x.update(shape=(larger, *x.shape[1:])), abstract[i]
            )
        signature = _signature(args, abstract)
        if signature not in self._futures:
            self._futures[signature] = self._thread.submit(self._compile, abstract, _settings())

    def _compile(self, abstract: list[PyTree], settings: _Settings) -> jax.stages.Compiled:
        started = time.perf_counter()
        with settings.applied():
            executable: jax.stages.Compiled = self._jitted.lower(*abstract).compile()
        self.seconds_in_background += time.perf_counter() - started
        return executable


class _Settings(NamedTuple):
    """JAX's settings of a thread, of which every thread has its own."""

    mesh: jax.sharding.Mesh
    default_device: Any
    enable_x64: bool
    default_matmul_precision: str | None
    default_prng_impl: str
    numpy_dtype_promotion: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        with (
            jax.set_mesh(self.mesh),
            jax.default_device(self.default_device),
            jax.enable_x64(self.enable_x64),
            jax.default_matmul_precision(self.default_matmul_precision),
            jax.default_prng_impl(self.default_prng_impl),
            jax.numpy_dtype_promotion(self.numpy_dtype_promotion),
        ):
            yield


def _settings() -> _Settings:
    config: Any = jax.config
    return _Settings(
        jax.sharding.get_mesh(),
        config.jax_default_device,
        config.jax_enable_x64,
        config.jax_default_matmul_precision,
        config.jax_default_prng_impl,
        config.jax_numpy_dtype_promotion,
    )


def _quick_signature(tree: PyTree) -> Signature:
    """What tells batches apart, leaving their structure to the executable to check."""
    return _settings(), tuple(
        (np.shape(x), getattr(x, "dtype", type(x)), getattr(x, "sharding", None))
        for x in jax.tree.leaves(tree)
    )


def _signature(args: PyTree, abstract: PyTree) -> Signature:
    """Everything that an executable for `abstract` depends on, `args` being placed as they are."""
    leaves, structure = jax.tree.flatten(args)
    kinds = zip(leaves, jax.tree.leaves(abstract), strict=True)
    placed = tuple((a.shape, a.dtype, getattr(x, "sharding", None)) for x, a in kinds)
    return structure, placed, _settings()


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and, where it is not JAX's choice, sharding of an array."""
    kind = jax.typeof(x)
    sharding = x.sharding if getattr(x, "committed", False) else None
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=sharding, weak_type=kind.weak_type)


def _as_tuple(numbers: int | Sequence[int]) -> tuple[int, ...]:
    return (numbers,) if isinstance(numbers, int) else tuple(numbers)
