"""Interprets the few pickle instructions that fitted estimators need, over inert values.

A pickle is a program for a small stack machine. Here no class is imported and nothing that a file names is called:
names become `Name`, objects become `Instance`, arrays become views of the file's own bytes. What lies outside the
allow-list is refused by its name. Arrays may lie in the stream (joblib) or be pickled by numpy itself.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from code_worker.errors import ArtifactError, UnsafeArtifactError

_MAX_DIMENSIONS: Final = 4
# So that products of sides stay small numbers, no matter what a file claims.
_MAX_SIDE: Final = 2**40
# Numbers alone: arrays of objects would be pickles within the pickle.
_DTYPE = re.compile(r"[biuf][1248]")
_DAMAGE: Final = (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error)

_OPCODES: Final = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Final[dict[str, Callable[[], object]]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_IGNORED: Final = frozenset({"PROTO", "FRAME"})
_LITERALS: Final = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, slots=True)
class Name:
    """A name that the file asked for and may have; stands for the thing, never is it."""

    module: str
    qualname: str

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}"


@dataclass(slots=True, eq=False, repr=False)
class Instance:
    """An object of an allowed class: its name and its state, and no behaviour."""

    name: Name
    state: dict[Any, object] | None = None


@dataclass(slots=True, eq=False, repr=False)
class Array:
    """An array; `value` (a read-only view) is there once the stream has described it."""

    value: NDArray[Any] | None = None


@dataclass(slots=True, eq=False, repr=False)
class _DType:
    value: np.dtype[Any]


_NDARRAY: Final = Name("numpy", "ndarray")
_WRAPPER: Final = Name("joblib.numpy_pickle", "NumpyArrayWrapper")


# numpy 2 renamed `numpy.core`; estimators of both are about.
def _numpy_names(module: str, qualname: str) -> frozenset[Name]:
    return frozenset({Name(f"numpy.core.{module}", qualname), Name(f"numpy._core.{module}", qualname)})


_MAKE_DTYPE: Final = frozenset({Name("numpy", "dtype")})
_RECONSTRUCT: Final = _numpy_names("multiarray", "_reconstruct")
_SCALAR: Final = _numpy_names("multiarray", "scalar")
_FROM_BUFFER: Final = _numpy_names("numeric", "_frombuffer")
_ALWAYS_ALLOWED: Final = _MAKE_DTYPE | _RECONSTRUCT | _SCALAR | _FROM_BUFFER | {_NDARRAY, _WRAPPER}


def read_pickle(data: bytes, classes: Collection[Name]) -> object:
    """Returns what the pickle describes, as plain values, `Instance`s of `classes` and `Array`s.

    Time and memory are linear in the size of `data`: an array that claims more than the file holds is refused, and
    arrays are views.

    Raises:
        UnsafeArtifactError: it names a class, function or instruction outside the allow-list.
        ArtifactError: it is damaged, or holds an array of a kind that no estimator needs.
    """
    machine = _Machine(data, frozenset(classes))
    try:
        return machine.run()
    except _DAMAGE as error:
        raise ArtifactError(f"damaged pickle near byte {machine.position}: {type(error).__name__}") from error


class _Machine:
    """The stack machine; anything odd in a stream shows as one of `_DAMAGE`."""

    def __init__(self, data: bytes, classes: frozenset[Name]) -> None:
        self.data = data
        self.classes = classes
        self.stream = io.BytesIO(data)
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, object] = {}

    @property
    def position(self) -> int:
        return self.stream.tell()

    def run(self) -> object:
        while True:
            code = self.stream.read(1)
            # The table of the standard library tells how long each argument is; its interpreter is never asked.
            opcode = _OPCODES.get(code)
            if opcode is None:
                raise ValueError("no such instruction")
            if opcode.name == "STOP":
                return self._finish()
            if opcode.name not in _ALLOWED:
                raise UnsafeArtifactError(f"pickle instruction {opcode.name} is not allowed in an estimator file")
            # pickletools would interpret backslashes in the two lines of a GLOBAL; the unpickler does not.
            described = None if opcode.name == "GLOBAL" else opcode.arg
            self.step(opcode.name, described.reader(self.stream) if described else None)

    def _finish(self) -> object:
        (value,) = self.stack
        # What follows the STOP would be read by nobody here, and perhaps by another program.
        if self.marked or self.position != len(self.data):
            raise ValueError("something is left over")
        return value

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _IGNORED:
            return
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            self.stack.append(_EMPTY[opcode]())
        elif opcode in _TUPLES:
            self.stack.append(tuple(self._pop_many(_TUPLES[opcode])))
        else:
            _ACTIONS[opcode](self, argument)

    def _pop_many(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("stack is empty")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def _pop_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marked.pop()
        return values

    def mark(self, _: object) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def tuple_(self, _: object) -> None:
        values = tuple(self._pop_mark())
        self.stack.append(values)

    def append(self, _: object) -> None:
        self._extend([self.stack.pop()])

    def appends(self, _: object) -> None:
        self._extend(self._pop_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError("append to something that is no list")
        target.extend(values)

    def setitem(self, _: object) -> None:
        self._update(self._pop_many(2))

    def setitems(self, _: object) -> None:
        self._update(self._pop_mark())

    def _update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise TypeError("items set on something that is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Hashing a tuple of tuples of tuples … takes time exponential in the size of the file.
            if type(key) not in (str, int):
                raise TypeError("key of an unexpected type")
            target[key] = value

    def memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def global_(self, _: object) -> None:
        module, qualname = self.stream.readline(), self.stream.readline()
        if not module.endswith(b"\n") or not qualname.endswith(b"\n"):
            raise ValueError("a name without an end")
        self._push_name(module[:-1].decode(), qualname[:-1].decode())

    def stack_global(self, _: object) -> None:
        module, qualname = self._pop_many(2)
        if type(module) is not str or type(qualname) is not str:
            raise TypeError("a name must be text")
        self._push_name(module, qualname)

    def _push_name(self, module: str, qualname: str) -> None:
        name = Name(module, qualname)
        # An allow-list by exact name: there is no end to what a pickle can call by other ones.
        if name not in self.classes and name not in _ALWAYS_ALLOWED:
            raise UnsafeArtifactError(
                f"the file asks for {f'{module}.{qualname}'[:200]!r}, which no published estimator needs; "
                "nothing of it was executed"
            )
        self.stack.append(name)

    def reduce(self, _: object) -> None:
        name, arguments = self._pop_call()
        # The few calls that numpy's own pickles make, done by hand; a class of the allow-list is never called.
        if name in _MAKE_DTYPE:
            self.stack.append(_DType(_plain_dtype(arguments[0])))
        elif name in _RECONSTRUCT:
            if arguments[0] != _NDARRAY:
                raise TypeError("only plain arrays are rebuilt")
            self.stack.append(Array())
        elif name in _SCALAR:
            dtype, content = arguments
            self.stack.append(_view(content, 0, dtype, (), "C").item())
        elif name in _FROM_BUFFER:
            content, dtype, shape, order = arguments
            self.stack.append(Array(_view(content, 0, dtype, shape, order)))
        else:
            raise UnsafeArtifactError(f"the file asks to call '{name}'; nothing of it was executed")

    def newobj(self, _: object) -> None:
        name, arguments = self._pop_call()
        if name == _WRAPPER and arguments == ():
            self.stack.append(Array())
        elif name in self.classes and arguments == ():
            self.stack.append(Instance(name))
        else:
            raise UnsafeArtifactError(f"the file asks to make a '{name}' in an unexpected way")

    def _pop_call(self) -> tuple[Name, tuple[Any, ...]]:
        name, arguments = self._pop_many(2)
        if type(name) is not Name or type(arguments) is not tuple:
            raise UnsafeArtifactError("the file asks to call something that is not a name")
        return name, arguments

    def build(self, _: object) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _DType):
            target.value = target.value.newbyteorder(_byte_order(state[1]))
        # Once only: a second state would replace what was checked.
        elif isinstance(target, Array) and target.value is None:
            target.value = self._inline_array(state) if type(state) is dict else _pickled_array(state)
        elif isinstance(target, Instance) and target.state is None and type(state) is dict:
            target.state = state
        else:
            raise TypeError("state given to something that takes none")

    def _inline_array(self, state: dict[Any, Any]) -> NDArray[Any]:
        """The array whose bytes follow the wrapper, behind one byte that tells the length of the padding."""
        if state["subclass"] != _NDARRAY:
            raise TypeError("only plain arrays are read")
        if state.get("numpy_array_alignment_bytes") is not None:
            (padding,) = self.stream.read(1)
            self.stream.seek(padding, io.SEEK_CUR)
        array = _view(self.data, self.position, state["dtype"], state["shape"], state["order"])
        self.stream.seek(array.nbytes, io.SEEK_CUR)
        return array


def _plain_dtype(code: object) -> np.dtype[Any]:
    if not isinstance(code, str) or _DTYPE.fullmatch(code) is None:
        shown = code[:20] if isinstance(code, str) else type(code).__name__
        if shown.startswith("O"):
            raise UnsafeArtifactError("the file holds an array of Python objects, which would need unpickling")
        raise ArtifactError(f"the file holds an array of dtype {shown!r}; only numbers are read")
    return np.dtype(code)


def _byte_order(code: object) -> Any:
    if code not in ("<", ">", "=", "|"):
        raise ValueError("no such byte order")
    return code


def _pickled_array(state: Any) -> NDArray[Any]:
    _version, shape, dtype, fortran, content = state
    if type(content) is not bytes:
        raise TypeError("array content must be bytes")
    return _view(content, 0, dtype, shape, "F" if fortran else "C")


def _view(content: Any, offset: int, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    if type(shape) is not tuple or len(shape) > _MAX_DIMENSIONS or order not in ("C", "F"):
        raise TypeError("shape or order of an array")
    if not all(type(side) is int and 0 <= side <= _MAX_SIDE for side in shape):
        raise ValueError("shape of an array")
    count = math.prod(shape)
    if not isinstance(dtype, _DType) or count * dtype.value.itemsize > len(content) - offset:
        raise ValueError("array larger than the file")
    # `frombuffer` refuses an empty buffer.
    if count == 0:
        return np.empty(shape, dtype.value)
    array = np.frombuffer(content, dtype.value, count=count, offset=offset).reshape(shape, order=order)
    # A view of the file's bytes, which others may share.
    array.flags.writeable = False
    return array


_ACTIONS: Final[dict[str, Callable[[_Machine, Any], None]]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "MEMOIZE": _Machine.memoize,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.newobj,
    "BUILD": _Machine.build,
}
_ALLOWED: Final = _IGNORED | _LITERALS | _CONSTANTS.keys() | _EMPTY.keys() | _TUPLES.keys() | _ACTIONS.keys()
