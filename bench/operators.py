"""What a step asks of its device, counted: free of noise, and the same for any image size and on any machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or its size, the host has to know: on a GPU it waits for all the work before them.
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nms", "nonzero", "unique_consecutive"}
WAITING |= {"_unique", "_unique2", "unique_dim", "repeat_interleave"}
READING = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}  # not seen as operators on the CPU
PUT = ("index_put", "index_put_")
Operator = Callable[..., Any]


class Operators(TorchDispatchMode):
    """Counts while it is entered, the backward pass included.

    calls: operators that compute; views, and memory that is only taken, are not counted: nothing is launched
    waits: how often the host waits, by operator
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._reads = _Reads(self.waits)

    @property
    def calls(self) -> int:
        return self.by_name.total()

    def __enter__(self) -> Operators:
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._reads.__exit__(kind, error, trace)

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = operator.overloadpacket.__name__
        if operator.namespace in ("aten", "torchvision"):
            if not operator.is_view and name not in ("empty", "empty_like", "new_empty", "empty_strided"):
                self.by_name[name] += 1
            if name in WAITING or (name == "index" and _by_mask(args[1])) or (name in PUT and _puts_some(args)):
                self.waits[name] += 1
        return operator(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, function: Operator, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in READING:
            self.waits[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def _by_mask(indices: Sequence[torch.Tensor | None]) -> bool:
    """How many elements a mask selects is known only on the device."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _puts_some(args: Sequence[Any]) -> bool:
    """One value for all that a mask selects is filled in without a look at how many there are."""
    return args[2].numel() > 1 and _by_mask(args[1])
