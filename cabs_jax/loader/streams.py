"""Sources that can only be read from their beginning on: any iterable of records, or of batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from cabs_jax.loader.collation import ARRAYS, MIN_BLOCK, RECORDS, Batch, is_list, plain
from cabs_jax.loader.read_ahead import Block

PARTS = ("sampler", "dataset")  # of torch's DataLoader, which may want to know the epoch
METHODS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))


class Place(NamedTuple):
    """Where a stream stands.

    Attributes:
      epoch: Number of whole passes before it.
      offset: Number of examples before it in its pass.
      state: What the source says of it; None at the beginning of a pass, which needs no words.
    """

    epoch: int
    offset: int
    state: Any = None


class Stream:
    """Passes over an iterable, one after the other.

    Every item is copied as it is read, since many iterables give the same buffer again. An error is
    kept and raised again: a generator that failed would otherwise look like one that ended.

    Args:
      source: The iterable. What is its own iterator is passed over once.
      batched: Whether its items are batches.
      epochs: Number of passes; None for as many as are asked for.
      place: Where to begin.
      skip: Number of examples from there on that are not to be given.

    Attributes:
      once: Whether only one pass can be made.
      epochs: Number of passes, or None.

    Raises:
      ValueError: If more than one pass is asked of an iterator.
    """

    length = None
    in_memory = False

    def __init__(
        self,
        source: Any,
        *,
        batched: bool = False,
        epochs: int | None = None,
        place: Place | None = None,
        skip: int = 0,
    ):
        self.source = source
        self.once = isinstance(source, Iterator)
        if self.once and epochs not in (None, 1):
            raise ValueError(
                f"{self.name} is an iterator, which can be read once, and "
                f"epochs={epochs}: pass what gives a new iterator each time, such as the data set."
            )
        self.epochs = 1 if self.once else epochs
        self.form = ARRAYS if batched else RECORDS
        self.batched = batched
        self._keeper: Any = source  # of the state, until there is an iterator
        if place is None:
            place = Place(0, 0, self._state() if self.once and self.resumable else None)
        self.place = place
        self.skip = skip
        self._begun = False
        self._iterator: Iterator[Any] | None = None
        self._rest: Batch | None = None  # of the batch that a state cuts
        self._epoch, self._offset = place.epoch, place.offset + skip
        self._error: BaseException | None = None

    @property
    def name(self) -> str:
        """What the source is, for messages."""
        return type(self.source).__name__

    @property
    def resumable(self) -> bool:
        """Whether the source, or its iterator, is known to say where it stands and to go there."""
        return _methods(self._keeper) is not None

    def at(self, place: Place, skip: int) -> Stream:
        """The same stream, to be read from another place on."""
        return Stream(self.source, batched=self.batched, epochs=self.epochs, place=place, skip=skip)

    def first(self) -> Batch:
        """A batch of the first example of a pass of its own."""
        item = self._copied(next(iter(self.source)))
        return self.form.collate([self.form.cut(item if self.batched else [item], 0, 1)], 1)

    def block_size(self, batch_size: int) -> int:
        """A fraction of a batch, and not so few that asking the source for its state would cost."""
        return max(MIN_BLOCK, batch_size // 8)

    def read(self, _: int, count: int) -> Block:
        """The next `count` examples, fewer at the end of a pass or before an error; or a batch."""
        if self._error is not None:
            raise self._error
        items: list[Any] = []
        ended = False
        try:
            while len(items) < (1 if self.batched else count):
                items.append(self._next_item())
        except StopIteration:
            ended = True
        except BaseException as error:
            self._error = error
            if not items:
                raise
        try:
            return self._block(items, ended)
        except BaseException as error:
            self._error = error
            raise

    def _block(self, items: list[Any], ended: bool) -> Block:
        length = _length(items[0]) if self.batched and items else len(items)
        self._offset += length
        place = None
        if not ended:
            if self.resumable and self._error is None:  # what failed may be behind it already
                place = Place(self._epoch, self._offset, self._state())
        elif not self._is_over:
            if not self._offset:
                raise ValueError(
                    f"source holds no examples: pass {self._epoch} over it gave none. What can be "
                    "passed over once needs epochs=1."
                )
            self._epoch, self._offset, self._iterator = self._epoch + 1, 0, None
            place = Place(self._epoch, 0)
        examples = items[0] if self.batched and items else items
        return Block(examples, length, place, last=self._is_over)

    @property
    def _is_over(self) -> bool:
        """Whether all passes were made; a state may stand after more of them."""
        return self.epochs is not None and self._epoch >= self.epochs

    def _next_item(self) -> Any:
        if self._is_over:
            raise StopIteration
        if self._iterator is None:
            self._iterator = self._begin()
        if self._rest is not None:
            rest, self._rest = self._rest, None
            return rest
        return self._copied(next(self._iterator))

    def _copied(self, item: Any) -> Any:
        if self.batched:
            return _arrays_of_batch(item)
        return jax.tree.map(lambda value: np.array(plain(value)), item, is_leaf=is_list)

    def _begin(self) -> Iterator[Any]:
        """An iterator over the next pass, or over what is left of the first one."""
        for owner in (self.source, *(getattr(self.source, part, None) for part in PARTS)):
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(self._epoch)
        state = None if self._begun else self.place.state
        if state is not None and _methods(self.source):
            _restore(self.source, state)
        iterator: Iterator[Any] = iter(self.source)
        if not _methods(self.source):
            self._keeper = iterator
            if state is not None:
                _restore(iterator, state)
        if not self._begun:
            self._begun = True
            self._pass_over(iterator)
        return iterator

    def _pass_over(self, iterator: Iterator[Any]) -> None:
        left = self.skip
        while left > 0:
            try:
                item = self._copied(next(iterator))
            except StopIteration:
                raise ValueError(
                    f"source ended {left} examples before the one that the state stands at."
                ) from None
            length = _length(item) if self.batched else 1
            if length > left:
                self._rest = ARRAYS.cut(item, left, length)
            left -= length

    def _state(self) -> Any:
        get, _ = _methods(self._keeper) or ("", "")
        return copy.deepcopy(getattr(self._keeper, get)())  # it may be the source's own


def _methods(owner: Any) -> tuple[str, str] | None:
    """The names of the methods that give and take the state of an iterable or iterator."""
    return next((pair for pair in METHODS if all(hasattr(owner, name) for name in pair)), None)


def _restore(owner: Any, state: Any) -> None:
    methods = _methods(owner)
    if methods is None:
        raise TypeError(
            f"the state of a stream was given to {type(owner).__name__}, which has none."
        )
    getattr(owner, methods[1])(copy.deepcopy(state))


def _length(batch: Batch) -> int:
    return len(jax.tree.leaves(batch)[0])


def _arrays_of_batch(batch: Any) -> Batch:
    """A batch as a pytree of arrays of its own.

    A list is a subtree if it holds nothing but arrays, as in torch's batches of pairs, else a
    column, as in those of Hugging Face.
    """

    def is_column(node: Any) -> bool:
        return is_list(node) and not all(
            getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(node)
        )

    arrays = jax.tree.map(lambda leaf: np.array(plain(leaf)), batch, is_leaf=is_column)
    lengths = {array.shape[:1] for array in jax.tree.leaves(arrays)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "with batched=True, items must be pytrees of arrays that share their leading axis, got "
            f"lengths {sorted(lengths)}; items that are single records need batched=False."
        )
    return arrays
