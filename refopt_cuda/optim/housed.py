"""What optimizers whose states may live in another place do alike: the place's words, and states that are looked at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from refopt_cuda.optim import placing, states, whole_places


class Housed(torch.optim.Optimizer):
    """An optimizer that steps whole tensors; `_home` keeps their states, None where they lie beside the weights."""

    usual_place: ClassVar[str] = "resident"
    _placed: placing.Placed
    _home: Any

    def _house(self, options: dict[str, Any], call: str) -> None:
        """Take the place and its words out of the options."""
        words = {name: options.pop(name, usual) for name, usual in whole_places.OPTIONS.items()}
        self._placed = whole_places.check(call, self.usual_place, **words)
        self._home = whole_places.home(self._placed)

    @property
    def state(self) -> Any:
        """The states by parameter; where they live in another place, the last copies are waited for."""
        if self._home is not None:
            self._home.finish()
            self._home.show(self._state)
        return self._state

    @state.setter
    def state(self, value: Any) -> None:
        self._state = value

    def state_dict(self) -> dict[str, Any]:
        """As torch's: tensors are the optimizer's own, the dictionaries that hold them are not."""
        out = super().state_dict()
        out["state"] = {k: dict(v) if isinstance(v, dict) else v for k, v in out["state"].items()}
        return out

    def _numbers(self) -> dict[int, int]:
        """Of each parameter by id; files name their states by them."""
        return {id(p): k for k, p in enumerate(p for group in self.param_groups for p in group["params"])}

    def _begin(self, call: str) -> dict[int, int]:
        """Tell the place that a step begins; the numbers of the parameters, if it needs them."""
        if self._home is None:
            return {}
        self._home.begin(self._state, (p for group in self.param_groups for p in group["params"]), call)
        return self._numbers()

    def _put_back(
        self, kept: states.Layout, saved: Mapping[str, Any], p: torch.Tensor, before: Mapping[Any, Any]
    ) -> None:
        """A saved entry where the states of `p` live; `before` are the entries that there were."""
        if self._home is None:
            self._state[p] = states.restore(kept, saved, p)
        else:
            self._state[p] = self._home.restore(kept, saved, p, before.get(p))

    def resume(self) -> int:
        """As `Composed.resume`: go on with the states that an optimizer with place="disk" left in `path`."""
        call, numbers = f"{type(self).__name__}.resume", self._numbers()
        every = [(p, group) for group in self.param_groups for p in group["params"]]
        kept = {numbers[id(p)]: (p, self._kept(p, group, call)) for p, group in every}
        found, steps = placing.resume(self._home, self._placed, kept, self._named, call)
        self._forget()
        self._state = defaultdict(dict, found)
        return steps

    @property
    def _named(self) -> str:
        """The rule's stem, by which files know whose states they hold."""
        raise NotImplementedError

    def _kept(self, p: torch.Tensor, group: dict[str, Any], call: str) -> states.Layout:
        """How the states of a parameter are kept."""
        raise NotImplementedError

    def _forget(self) -> None:
        """What steps have found out so far."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "placed": self._placed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "placed" in state or "_placed" not in self.__dict__:  # of a copy; loading a checkpoint comes this way, too
            self._placed = state.pop("placed", placing.Placed("resident"))
            self._home = whole_places.home(self._placed)
        self._state = state.pop("state", defaultdict(dict))
        super().__setstate__(state)
