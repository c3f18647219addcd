"""Some tensors of a mapping, under other names."""

from collections.abc import Iterator, Mapping

import numpy as np


class Chosen(Mapping[str, np.ndarray]):
    """Some tensors of a mapping, under other names where `names` says so; read on access."""

    def __init__(self, stored: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
        """names: {name here: name in `stored`}."""
        self._stored, self._names = stored, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._stored[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
