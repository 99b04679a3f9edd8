"""What holds a background thread, and ends it at the end of a `with` block."""

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """A context manager that gives itself, and is closed at the end of the block."""

    @abstractmethod
    def close(self) -> None:
        """Ends what runs in the background."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
