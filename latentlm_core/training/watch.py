"""A watch on the modules of a network: where numbers stop being finite, forwards and backwards.

Notable choices:
- a call ends before the one that it was made in, so the first culprit is the innermost; where an
  operation between two calls fails, it is the module around them;
- each call differentiates views of its inputs that are its own, so a gradient that spoils a tensor
  which many modules read is laid at the door of the one that it came from;
- the gradients of parameters are looked at before processes exchange them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from latentlm_core.training.parallel import local
from latentlm_core.training.tasks import Term


@dataclass(slots=True, eq=False)
class Call:
    """One call of a module.

    Attributes:
        module: its name.
        part: number of the batch.
        parent: the call that it was made in.
        takes_finite: whether its inputs are finite.
        bad_output: where its output is not finite.
        gets_finite: whether the gradients that come to its outputs are finite.
        gives_finite: whether the gradients that it hands on, to inputs and parameters, are.
    """

    module: str
    part: int
    parent: "Call | None"
    takes_finite: bool
    bad_output: Tensor | None = None
    gets_finite: bool = True
    gives_finite: bool = True


class Watch:
    """Notes every call of some modules, by hooks.

    Attributes:
        bad_gradients: where the first gradient of an input or an output that is not finite is not,
            by the number of the batch; None where that of a parameter alone is not.
        largest: name of the parameter with the largest finite value in its gradient.
    """

    def __init__(self) -> None:
        self.bad_gradients: dict[int, Tensor | None] = {}
        self.largest: str | None = None
        self._largest_value = 0.0
        self._part: int | None = None
        self._is_listening = False
        self._open: list[Call] = []
        self._calls: list[Call] = []
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def on(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside the block these modules, and all inside them, are watched."""
        for outer, module in modules.items():
            for inner, part in module.named_modules():
                begin = partial(self._begin, f"{outer}.{inner}" if inner else outer)
                before = part.register_forward_pre_hook(begin, with_kwargs=True)
                self._handles += [before, part.register_forward_hook(self._end)]
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()

    @contextmanager
    def calls(self, part: int) -> Iterator[None]:
        """Inside the block calls are noted, as those of batch number ``part``."""
        self._part, self._is_listening = part, True
        try:
            yield
        finally:
            self._is_listening = False

    def follow(self, terms: Iterable[Term], part: int) -> None:
        """Note the gradients that go out from these terms as those of batch number ``part``."""

        def enter(_: Tensor) -> None:
            self._part = part

        for term in terms:
            if term.total.requires_grad:
                self._handles.append(term.total.register_hook(enter))  # type: ignore[no-untyped-call]

    def broken_output(self) -> Call | None:
        """The first call that turned finite inputs into an output that is not finite.

        Where an operation outside of all calls did, the first call whose output shows it.
        """
        bad = [call for call in self._calls if call.bad_output is not None]
        return next((call for call in bad if call.takes_finite), next(iter(bad), None))

    def bad_outputs(self, module: str) -> dict[int, Tensor | None]:
        """Where the outputs of a module are not finite, by the number of the batch."""
        bad = [call for call in self._calls if call.bad_output is not None]
        return {call.part: call.bad_output for call in bad if call.module == module}

    def broken_gradient(self) -> Call | None:
        """The innermost call that broke a finite gradient, the first on the way back.

        It is one of the first bad batch. None where the gradient is broken when it comes to the
        outermost calls.
        """
        around_fault, around_culprit, culprit = set[Call](), set[Call](), None
        for call in self._calls:
            if call.part != next(iter(self.bad_gradients)):
                continue
            breaks = call.gets_finite and (not call.gives_finite or call in around_fault)
            if breaks and call not in around_culprit:
                culprit = call
            if call.parent is not None:
                if call in around_fault or not call.gets_finite:
                    around_fault.add(call.parent)
                if breaks or call in around_culprit:
                    around_culprit.add(call.parent)
        return culprit

    def _begin(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._is_listening:
            return None
        parent = self._open[-1] if self._open else None
        takes_finite = all(map(is_finite, _tensors((args, kwargs))))
        call = Call(name, self._part or 0, parent, takes_finite)
        self._open.append(call)
        for key, parameter in module.named_parameters(recurse=False):
            self._hook(parameter, partial(self._note_parameter, call, f"{name}.{key}"))
        own = partial(self._own, call)
        return tuple(map(own, args)), {key: own(value) for key, value in kwargs.items()}

    def _end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if not self._is_listening:
            return
        call = self._open.pop()
        self._calls.append(call)
        for tensor in _tensors(output):
            if call.bad_output is None and not is_finite(tensor):
                call.bad_output = ~torch.isfinite(tensor.detach())
            self._hook(tensor, partial(self._note_output, call))

    def _own(self, call: Call, value: Any) -> Any:
        """A view of an input that is this call's alone."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        view = value.view_as(value)
        self._hook(view, partial(self._note_input, call))
        return view

    def _hook(self, tensor: Tensor, note: Callable[[Tensor], None]) -> None:
        if tensor.requires_grad:
            self._handles.append(tensor.register_hook(note))  # type: ignore[no-untyped-call]

    def _note_output(self, call: Call, gradient: Tensor) -> None:
        if call.gets_finite and not is_finite(gradient):
            call.gets_finite = False
            self._note_first(call.part, ~torch.isfinite(gradient))

    def _note_input(self, call: Call, gradient: Tensor) -> None:
        if call.gives_finite and not is_finite(gradient):
            call.gives_finite = False
            self._note_first(call.part, ~torch.isfinite(gradient))

    def _note_parameter(self, call: Call, name: str, gradient: Tensor) -> None:
        if call.part != self._part:
            return
        largest = float(gradient.abs().max())
        if not math.isfinite(largest):
            call.gives_finite = False
            self._note_first(call.part, None)
        elif largest > self._largest_value:
            self.largest, self._largest_value = name, largest

    def _note_first(self, part: int, bad: Tensor | None) -> None:
        if self.bad_gradients.get(part) is None:
            self.bad_gradients[part] = bad


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are; this makes the host wait."""
    return bool(torch.isfinite(local(tensor)).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings that may hold a number not finite."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
