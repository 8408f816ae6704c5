"""Pickles of published nets, evaluated without running anything that they say.

A pickle is a program: `pickle` looks up what it names, calls it, and sets attributes. Here its opcodes, taken apart by
`pickletools`, are evaluated to dicts, strings, numbers and the records below. A name stays a name, each of the few
known calls has one meaning, and anything else is refused. (A `pickle.Unpickler` with a list of admitted names
would still set attributes of whatever stands for them, and take as much memory as an opcode says.)
"""

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

FLOATS = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
}
MODULES = {
    "torch.nn.modules.container.Sequential": "Sequential",
    "torch.nn.modules.linear.Linear": "Linear",
    "torch.nn.modules.activation.Tanh": "Tanh",
}


class RefusedError(ValueError):
    """Why a file is not read, without the file's name."""


@dataclass(frozen=True)
class Limits:
    """What a file may take: set by what is expected, not by what the file says.

    Attributes:
        nbytes: Of the file.
        opcodes: Of its pickles; one takes at most some 100 bytes of memory, beside its text.
        numbers: In all its storages.
    """

    nbytes: int
    opcodes: int
    numbers: int


@dataclass(frozen=True)
class Global:
    """A name that a pickle asks for, such as "torch.nn.modules.linear.Linear"; it is never looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    """Numbers that lie elsewhere in the file."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """What they take there."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorRecord:
    """A view of a storage, as the file describes it: nothing of it is checked."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


@dataclass(eq=False)
class ModuleRecord:
    """A module of one of the kinds in `MODULES`, and its attributes."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


def shown(text: str) -> str:
    """A text out of a file for a message: short, on one line, in plain characters."""
    return ascii(text[:80])[1:-1][:80]


class Evaluation:
    """Evaluates the pickles of one file, with the opcodes that `torch.save` writes for nets and no others.

    Args:
        limits: Opcodes and numbers that all its pickles together may take.

    Attributes:
        storages: Those that the pickles have named, by key.
    """

    def __init__(self, limits: Limits) -> None:
        self.storages: dict[str, Storage] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._marks: list[int] = []
        self._opcodes, self._numbers = limits.opcodes, limits.numbers

    def run(self, file: io.BytesIO) -> Any:
        """The object of one pickle; the file is left where the pickle ends.

        Raises:
            RefusedError: The pickle asks for more than nets.
            ValueError, TypeError, LookupError: It is damaged.
        """
        self.stack, self.memo, self._marks = [], {}, []
        for opcode, argument, _ in pickletools.genops(file):
            self._opcodes -= 1
            if self._opcodes < 0:
                raise RefusedError("its pickle is longer than the parameters of the base model explain")
            if opcode.name in ARGUMENTS:
                self.stack.append(argument)
            elif opcode.name in CONSTANTS:
                self.stack.append(CONSTANTS[opcode.name])
            elif opcode.name in STEPS:
                STEPS[opcode.name](self, argument)
            elif opcode.name not in IGNORED:
                raise RefusedError(f"its pickle uses {opcode.name}, which no dict of nets needs")
        return self.stack.pop()

    def mark(self) -> None:
        """Notes the height of the stack."""
        self._marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        """Takes off the stack what lies above the last mark."""
        at = self._marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def popped(self, count: int) -> list[Any]:
        """Takes values off the stack; the last is the topmost."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def remember(self, index: int | None) -> None:
        """The topmost value, under a number or the next free one."""
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        """Keys and values into the dict beneath; a key is a string."""
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str) for key in items[::2]):
            raise RefusedError("its pickle has other things than strings for keys of dicts")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        """Values to the list beneath."""
        if not isinstance(self.stack[-1], list):
            raise TypeError("something is appended to what is no list")
        self.stack[-1].extend(items)

    def name(self, words: str) -> None:
        """A name: "module name", as opcodes have it."""
        if words not in KNOWN:
            asked = shown(".".join(words.split(" ", 1)))
            raise RefusedError(
                f"its pickle asks for {asked}, but a dict of nets needs torch's Sequential, Linear and Tanh alone"
            )
        self.stack.append(Global(KNOWN[words]))

    def call(self) -> None:
        """What one of `CALLS` makes of its arguments."""
        function, arguments = self.popped(2)
        if not isinstance(function, Global) or function.name not in CALLS:
            raise RefusedError("its pickle calls what is not to be called")
        self.stack.append(CALLS[function.name](*arguments))

    def new(self) -> None:
        """A module without attributes."""
        found, arguments = self.popped(2)
        if not isinstance(found, Global) or found.name not in MODULES or arguments != ():
            raise RefusedError("its pickle makes an object that is no net")
        self.stack.append(ModuleRecord(MODULES[found.name]))

    def build(self) -> None:
        """Attributes of the module beneath."""
        (state,) = self.popped(1)
        if not isinstance(self.stack[-1], ModuleRecord) or not isinstance(state, dict):
            raise RefusedError("its pickle sets attributes of an object that is no net")
        self.stack[-1].state = state

    def persistent(self) -> None:
        """A storage; or, in the legacy container, a class with its source code, which is passed over."""
        match self.stack.pop():
            case ("module", Global() as found, _, _):
                self.stack.append(found)
            case ("storage", Global(name), str(key), str(), int(numel), *view) if view in ([], [None]):
                if name not in FLOATS or numel < 0:
                    raise RefusedError(f"storage {shown(key)}: expected 16- or 32-bit floats, got {name} of {numel}")
                self.stack.append(self._storage(Storage(key, FLOATS[name], numel)))
            case _:
                raise RefusedError("its pickle refers to something that is no storage of floats")

    def _storage(self, storage: Storage) -> Storage:
        known = self.storages.setdefault(storage.key, storage)
        if known != storage:
            raise RefusedError(f"storage {shown(storage.key)}: named twice, with different sizes or types")
        if known is storage:
            self._numbers -= storage.numel
            if self._numbers < 0:
                raise RefusedError("it has more numbers than the nets of this base model: is it for another?")
        return storage


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> TensorRecord:
    return TensorRecord(storage, offset, size, stride)


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "builtins.set": lambda items: frozenset(),  # of buffers' names, which nobody asks for
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
}
# From a name as opcodes have it to what it is called here; protocol 2 calls builtins as Python 2 did.
KNOWN = {" ".join(name.rsplit(".", 1)): name for name in (*CALLS, *MODULES, *FLOATS)}
KNOWN["__builtin__ set"] = "builtins.set"

ARGUMENTS = frozenset({"NONE", "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"})
CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "EMPTY_SET": frozenset()}
IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
STEPS: dict[str, Callable[[Evaluation, Any], Any]] = {
    "MARK": lambda e, _: e.mark(),
    "EMPTY_DICT": lambda e, _: e.stack.append({}),
    "EMPTY_LIST": lambda e, _: e.stack.append([]),
    "TUPLE": lambda e, _: e.stack.append(tuple(e.since_mark())),
    "TUPLE1": lambda e, _: e.stack.append(tuple(e.popped(1))),
    "TUPLE2": lambda e, _: e.stack.append(tuple(e.popped(2))),
    "TUPLE3": lambda e, _: e.stack.append(tuple(e.popped(3))),
    "APPEND": lambda e, _: e.append(e.popped(1)),
    "APPENDS": lambda e, _: e.append(e.since_mark()),
    "ADDITEMS": lambda e, _: e.since_mark(),
    "SETITEM": lambda e, _: e.set_items(e.popped(2)),
    "SETITEMS": lambda e, _: e.set_items(e.since_mark()),
    "BINPUT": Evaluation.remember,
    "LONG_BINPUT": Evaluation.remember,
    "MEMOIZE": Evaluation.remember,
    "BINGET": lambda e, index: e.stack.append(e.memo[index]),
    "LONG_BINGET": lambda e, index: e.stack.append(e.memo[index]),
    "GLOBAL": Evaluation.name,
    "STACK_GLOBAL": lambda e, _: e.name(" ".join(e.popped(2))),
    "REDUCE": lambda e, _: e.call(),
    "NEWOBJ": lambda e, _: e.new(),
    "BUILD": lambda e, _: e.build(),
    "BINPERSID": lambda e, _: e.persistent(),
}
