"""Which types of ``devmem_tcp.arrays`` a safetensors file holds, by the format's words and by the wire's."""

from __future__ import annotations

from typing import Final

from devmem_tcp.arrays.dtypes import ARRAY_TYPES, ArrayType
from devmem_tcp.safetensors.naming import shown

_BY_WORD: Final = {each.safetensors: each for each in ARRAY_TYPES.values() if each.safetensors}
_SMALLER_THAN_A_BYTE: Final = frozenset({"F4", "F6_E2M3", "F6_E3M2"})  # safetensors/src/tensor.rs, Dtype::bitsize


def by_word(word: str) -> ArrayType:
    """Return the type that the format calls so, for instance ``BF16``.

    Raises:
        ValueError: there is none, or its elements are smaller than a byte.
    """
    if word in _SMALLER_THAN_A_BYTE:
        raise ValueError(f"elements of {word} are smaller than a byte, which no message can carry")
    if word not in _BY_WORD:
        raise ValueError(f"dtype {shown(word)} is unknown")
    return _BY_WORD[word]


def by_wire(name: str) -> ArrayType:
    """Return the type that the wire calls so, for instance ``bfloat16``.

    Raises:
        ValueError: there is none, or no safetensors file can hold it.
    """
    found = ARRAY_TYPES.get(name)
    if found is None or not found.safetensors:
        raise ValueError(f"no safetensors file holds dtype {shown(name)}")
    return found
