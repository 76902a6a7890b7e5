"""A group of slots: requests that are completed by one program, and its arrays on the device."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from grpocem_jax.adapters.base import Offsets
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.serving import slots as device
from grpocem_jax.serving.requests import Ticket

MOST_STEPS = 32
"""Tokens of each slot that one call of the device makes at most."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Settings:
    """What all groups of an engine have in common.

    Attributes:
      policy: the policy.
      start: the adapter of requests that name none.
      own: whether each slot has an adapter of its own.
      slots: of a group.
      lengths: tokens that a slot may have room for, ascending.
      top_k: as in `models.sampling.sample`, as are the following.
      min_p: at least so probable a token is drawn.
      repetition_penalty: 1 for none.
    """

    policy: Policy
    start: Offsets
    own: bool
    slots: int
    lengths: Sequence[int]
    top_k: int
    min_p: float
    repetition_penalty: float

    @property
    def penalized(self) -> bool:
        """Whether repetition is penalised."""
        return self.repetition_penalty != 1.0


class Group:
    """Slots and the tickets in them; None where one is free.

    Attributes:
      tickets: of each slot.
    """

    def __init__(self, settings: Settings):
        """Makes room on the device."""
        self._settings = settings
        self.tickets: list[Ticket | None] = [None] * settings.slots
        self.clear()

    def clear(self) -> None:
        """Makes the arrays on the device anew."""
        settings = self._settings
        self._slots = device.empty(
            settings.policy.params,
            settings.start,
            model=settings.policy.model,
            slots=settings.slots,
            length=settings.lengths[0],
            own=settings.own,
            penalized=settings.penalized,
        )

    @property
    def length(self) -> int:
        """Tokens that each slot has room for now."""
        return self._slots.cache.keys[0].shape[2]

    @property
    def free(self) -> list[int]:
        """Slots that are free."""
        return [slot for slot, ticket in enumerate(self.tickets) if ticket is None]

    @property
    def active(self) -> bool:
        """Whether a slot is taken."""
        return any(ticket is not None for ticket in self.tickets)

    def resize(self, length: int) -> None:
        """Gives each slot room for ``length`` tokens."""
        if length != self.length:
            self._slots = device.resize(self._slots, length=length)

    def place(self, prompts: device.Prefilled, sources: Mapping[Ticket, int]) -> None:
        """Puts tickets into free slots, with their prompts.

        Args:
          prompts: processed prompts.
          sources: tickets, no more than slots are free, each with the row of its prompt.
        """
        admitted = self._admitted(len(sources))
        for place, (slot, (ticket, source)) in enumerate(
            zip(self.free, sources.items(), strict=False)
        ):
            self.tickets[slot], request = ticket, ticket.request
            admitted.source[place] = source
            admitted.slot[place] = slot
            admitted.limit[place] = request.max_new_tokens
            admitted.temperature[place] = request.temperature
            admitted.top_p[place] = request.top_p
            admitted.seed[place] = request.seed
        # The least that holds what is in the slots: attention reads all of it.
        need = max(ticket._need for ticket in self.tickets if ticket is not None)
        self.resize(next(length for length in self._settings.lengths if length >= need))
        self._slots = device.place(self._slots, prompts, admitted)

    def _admitted(self, number: int) -> device.Admitted:
        count = self._settings.slots
        return device.Admitted(
            source=np.zeros(count, np.int32),
            slot=np.zeros(count, np.int32),
            limit=np.zeros(count, np.int32),
            temperature=np.zeros(count, np.float32),
            top_p=np.ones(count, np.float32),
            seed=np.zeros(count, np.uint32),
            number=np.int32(number),
        )

    def decode(self, steps: int, *, until: int) -> list[list[int]]:
        """The next tokens of each slot, ``steps`` of them at most; fewer once ``until`` end."""
        settings = self._settings
        self._slots, tokens = device.decode(
            settings.policy.params,
            settings.start,
            self._slots,
            settings.policy.end_ids,
            np.array([ticket is not None for ticket in self.tickets]),
            np.int32(steps),
            np.int32(until),
            model=settings.policy.model,
            most=MOST_STEPS,
            top_k=settings.top_k,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
        )
        made = np.asarray(tokens)
        done = int(np.sum(np.any(made != device.NOTHING, -1)))
        return made[:done].T.tolist()

    def wipe(self, slot: int) -> None:
        """Takes numbers that are not finite out of a slot."""
        self._slots = device.wipe(self._slots, np.int32(slot))

    def warm_up(self, prompts: Sequence[device.Prefilled]) -> None:
        """Runs every program once, with no tickets.

        Args:
          prompts: of each bucket.
        """
        lengths = self._settings.lengths
        for length in lengths:
            for other in lengths:
                self.resize(length)
                self.resize(other)
            self.resize(length)
            for some in prompts:
                if some.cache.keys[0].shape[2] <= length:
                    self._slots = device.place(self._slots, some, self._admitted(0))
            self.wipe(0)
            self.decode(0, until=1)
        self.resize(lengths[0])
        jax.block_until_ready(self._slots)
