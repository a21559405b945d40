"""Element types: every name a type goes by leads to it, what does not travel is refused with its reason."""

from __future__ import annotations

import builtins
import re
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from devmem_tcp.arrays.dtypes import ARRAY_TYPES, ArrayType, array_type, check_shape, of_dlpack
from devmem_tcp.errors import DevmemError

TYPES = list(ARRAY_TYPES.values())
EXPECTED = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", "bfloat16"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]


class StandInDtype:
    """What a torch.dtype is to us: a class called torch.dtype, whose text is torch.NAME."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __str__(self) -> str:
        return f"torch.{self._name}"


StandInDtype.__name__ = "dtype"
StandInDtype.__module__ = "torch"


class TestTable:
    def test_all_are_there(self) -> None:
        assert list(ARRAY_TYPES) == EXPECTED

    @pytest.mark.parametrize("type_", TYPES, ids=EXPECTED)
    def test_sizes_and_names(self, type_: ArrayType) -> None:
        assert re.fullmatch(r"[a-z0-9_.-]{1,32}", type_.name)  # the wire's word
        dtype = type_.numpy()
        assert (dtype.name, dtype.itemsize) == (type_.name, type_.itemsize)
        assert type_.dlpack[1] == 8 * type_.itemsize
        assert np.dtype(type_.typestr).itemsize == type_.itemsize
        assert (np.dtype(type_.typestr) == dtype) is type_.in_numpy

    def test_dlpack_codes(self) -> None:
        """The numbers of dlpack.h's DLDataTypeCode, for types that NumPy does not export."""
        codes = {name: type_.dlpack[0] for name, type_ in ARRAY_TYPES.items() if not type_.in_numpy}
        assert codes == {
            "bfloat16": 4,
            "float8_e4m3fn": 10,
            "float8_e4m3fnuz": 11,
            "float8_e5m2": 12,
            "float8_e5m2fnuz": 13,
            "float8_e8m0fnu": 14,
        }
        assert all(of_dlpack(*type_.dlpack, 1) is type_ for type_ in TYPES)

    def test_safetensors_names_are_distinct(self) -> None:
        names = [type_.safetensors for type_ in TYPES if type_.safetensors]
        assert len(set(names)) == len(names) == len(TYPES) - 1
        assert ARRAY_TYPES["complex128"].safetensors == ""
        assert ARRAY_TYPES["bfloat16"].safetensors == "BF16"
        assert ARRAY_TYPES["float8_e4m3fn"].safetensors == "F8_E4M3"

    def test_the_table_cannot_be_changed(self) -> None:
        with pytest.raises(TypeError):
            ARRAY_TYPES["x"] = TYPES[0]  # type: ignore[index]
        with pytest.raises(AttributeError):
            TYPES[0].itemsize = 2  # type: ignore[misc]


class TestLookUp:
    @pytest.mark.parametrize("type_", TYPES, ids=EXPECTED)
    def test_every_spelling(self, type_: ArrayType) -> None:
        dtype = type_.numpy()
        for spelling in (type_, type_.name, dtype, dtype.type, StandInDtype(type_.name)):
            assert array_type(spelling) is type_

    @pytest.mark.parametrize(
        ("what", "name"),
        [
            (bool, "bool"),
            (int, "int64"),
            (float, "float64"),
            (complex, "complex128"),
            ("<f4", "float32"),
            ("u1", "uint8"),
            (np.longlong, "int64"),
            (ml_dtypes.bfloat16, "bfloat16"),
        ],
    )
    def test_what_numpy_understands(self, what: object, name: str) -> None:
        assert array_type(what).name == name

    @pytest.mark.parametrize(
        ("what", "reason"),
        [
            (">f4", r"other byte order: \.astype\('float32'\) first"),
            (np.dtype(">u8"), "other byte order"),
            (object, "Python objects"),
            ([("a", object)], "Python objects"),
            ([("a", "f4"), ("b", "f4")], "record"),
            ("3f4", "record"),
            (str, "text"),
            ("S5", "text"),
            ("datetime64[ns]", r"\.view\('int64'\)"),
            (np.timedelta64, "time"),
            ("V8", "supported: bool, int8"),
            (np.longdouble, "supported"),
            (ml_dtypes.int4, "dtype int4 does not travel"),
            (StandInDtype("qint8"), r"torch\.qint8 does not travel"),
            ("flaot32", "'flaot32' is not a dtype; supported: bool"),
            ("(1,", "not a dtype"),
            ("", "not a dtype"),
        ],
    )
    def test_what_does_not_travel(self, what: object, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            array_type(what)

    @pytest.mark.parametrize("what", [None, 4, 1.5, b"x", object(), np.zeros(3)])
    def test_what_is_no_type(self, what: object) -> None:
        with pytest.raises(TypeError, match="is not a dtype; supported: bool"):
            array_type(what)

    @pytest.mark.parametrize("dlpack", [(3, 64, 1), (2, 128, 1), (2, 32, 4), (17, 4, 1), (10, 16, 1)])
    def test_dlpack_types_that_do_not_travel(self, dlpack: tuple[int, int, int]) -> None:
        with pytest.raises(ValueError, match=f"code {dlpack[0]}, {dlpack[1]} bits, {dlpack[2]} lanes"):
            of_dlpack(*dlpack)


class TestWithoutMlDtypes:
    def test_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # makes its import fail
        with pytest.raises(DevmemError, match="hint: pip install -U ml-dtypes"):
            ARRAY_TYPES["bfloat16"].numpy()
        assert ARRAY_TYPES["float32"].numpy() == np.float32
        assert ARRAY_TYPES["bfloat16"].typestr == "<u2"

    def test_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(ml_dtypes, "float8_e8m0fnu")
        with pytest.raises(DevmemError, match="float8_e8m0fnu"):
            ARRAY_TYPES["float8_e8m0fnu"].numpy()

    def test_torch_is_not_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def watched(name: str, *args: Any, **options: Any) -> Any:
            assert not name.startswith("torch")
            return real(name, *args, **options)

        monkeypatch.setattr(builtins, "__import__", watched)
        assert array_type(StandInDtype("float8_e5m2")).name == "float8_e5m2"
        assert "torch" not in sys.modules


class TestShapes:
    @pytest.mark.parametrize(
        ("shape", "nbytes"),
        [((), 4), ((0,), 0), ((3, 0, 5), 0), ((3, 4), 48), ([2, np.int64(3)], 24), ((1,) * 32, 4)],
    )
    def test_nbytes(self, shape: tuple[int, ...], nbytes: int) -> None:
        assert ARRAY_TYPES["float32"].nbytes(shape) == nbytes

    def test_as_plain_ints(self) -> None:
        numbers: list[Any] = [np.int32(2), 3]
        shape = check_shape(numbers)
        assert shape == (2, 3)
        assert [type(dimension) for dimension in shape] == [int, int]

    @pytest.mark.parametrize(
        ("shape", "reason"),
        [
            ((-1,), "negative"),
            ((2, -3, 0), "negative"),
            ((1,) * 33, "33 dimensions"),
            ((1 << 46,), "the limit is 2"),
            ((1 << 30, 1 << 30), "the limit is 2"),
            ((0, 1 << 46), "the limit is 2"),  # NumPy refuses it, too, from 2**63 on
        ],
    )
    def test_refused(self, shape: tuple[int, ...], reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            ARRAY_TYPES["float32"].nbytes(shape)

    def test_largest(self) -> None:
        assert ARRAY_TYPES["uint8"].nbytes(((1 << 48) - 1,)) == (1 << 48) - 1

    @pytest.mark.parametrize("shape", [3, None, (1.5,), ("2",), "ab"])
    def test_no_shape(self, shape: Any) -> None:
        with pytest.raises(TypeError, match="a shape is a sequence of integers"):
            ARRAY_TYPES["float32"].nbytes(shape)
