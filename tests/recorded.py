"""What a CUDA graph does, on a CPU: kernels are recorded once and run again on the same tensors.

A replay knows no Python: numbers of the host and the choice of kernels are as they were, and a
tensor that took another's place since is not seen.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Recording(TorchDispatchMode):
    """Operators that ran while this was entered, to be run again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        """Run them: what they made is made anew, what was there before is read and written."""
        anew: dict[int, Tensor] = {}

        def current(tensor: Tensor) -> Tensor:
            return anew.get(id(tensor), tensor)

        for func, args, kwargs, made in self._calls:
            given = tree_map_only(Tensor, current, (args, kwargs))
            for before, now in zip(
                tree_leaves(made), tree_leaves(func(*given[0], **given[1])), strict=True
            ):
                if isinstance(before, Tensor):
                    anew[id(before)] = now


def capture(step: Any, work: Callable[[], None]) -> Callable[[], None]:
    """``DecodeStep._capture`` without a GPU: the work runs twice, and once to be recorded."""
    state = step.state.clone()
    for _ in range(2):
        work()
        step._restore(state)
    recording = Recording()
    with recording:
        work()
    return recording.replay
