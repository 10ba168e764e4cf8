"""The driver's side of a group, the same for every backend: start the ranks, run requests on them, watch them.

While a request runs, each rank is sent a pulse every half second. A rank that dies, leaves a pulse unanswered, or stays
silent past the deadline ends the request, and the group with it, with an error that names the rank and the cause.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import psutil

from lib.cluster.group import Deadlines, Event, OnEvents, Worker, declaration_of, merge_results, split_args
from lib.cluster.host import BUG, PEERS_LOST
from lib.cluster.stop import Stop
from lib.core import errors
from lib.core.errors import PostflyteError, PreemptedError, UserError, WorkerDiedError

PULSE_EVERY_SECONDS = 0.5
POLL_SECONDS = 0.25
SETTLE_SECONDS = 3.0
"""After a failure, how long to listen for the one that caused it (one rank's death fails the collectives of others)."""
PEERS_SETTLE_SECONDS = 20.0
"""The same when a rank only reports that its peers are gone: a machine's death takes that long to be noticed."""


@dataclass(frozen=True)
class Message:
    """What a backend hears from a rank."""

    rank: int
    kind: Literal["outcome", "pulse", "died"]
    body: dict[str, Any]
    """`Host.request`'s or `Host.pulse`'s answer; for "died" {"message": cause}."""


class Transport(Protocol):
    """What a backend provides: N processes, each with a `Host`."""

    def request(self, rank: int, kind: str, args: list[Any]) -> None: ...

    def pulse(self, rank: int, *, stop: bool) -> None: ...

    def poll(self, timeout_seconds: float) -> list[Message]:
        """Wait until something is heard. Of one rank, messages come in the order in which they were sent."""
        ...

    def close(self) -> None:
        """End all processes, stopped ones too, and give back what they held."""
        ...


_USER_ERROR, _DEATH, _INFRA_ERROR, _BUG, _PEERS = range(5)


@dataclass(frozen=True)
class _Failure:
    """Why a request failed; the lowest order is the cause, the others are its consequences."""

    order: int
    """_USER_ERROR to _PEERS."""
    error: Exception


@dataclass
class _Wait:
    """A request under way."""

    kind: str
    requests: dict[int, list[Any]]
    deadline_seconds: float
    on_events: OnEvents | None = None
    rank0_events_only: bool = True
    stop: Stop = field(default_factory=Stop)
    values: dict[int, Any] = field(default_factory=dict)
    answered_at: dict[int, float] = field(default_factory=dict)
    failures: list[_Failure] = field(default_factory=list)
    settled_at: float = float("inf")
    heard_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.unfinished = set(self.requests)

    def pass_on(self, rank: int, events: list[Event]) -> None:
        if events:
            self.heard_at = time.monotonic()
            if self.on_events and (rank == 0 or not self.rank0_events_only):
                self.on_events([{**event, "rank": rank} for event in events])

    def add(self, failure: _Failure, deadlines: Deadlines) -> None:
        self.failures.append(failure)
        patience = max(PEERS_SETTLE_SECONDS, deadlines.heartbeat_seconds) if failure.order == _PEERS else SETTLE_SECONDS
        self.settled_at = min(self.settled_at, time.monotonic() + patience)

    def raise_cause(self) -> None:
        """Raise the cause once it is known: at once when it can't be a consequence, else when the time to settle is over."""
        if self.failures:
            cause = min(self.failures, key=lambda failure: failure.order)
            all_heard = len(self.failures) + len(self.answered_at) >= len(self.requests)
            if cause.order <= _DEATH or all_heard or time.monotonic() >= self.settled_at:
                raise cause.error


class Watch:
    """A started group over a transport."""

    def __init__(self, transport: Transport, worker_class: type[Worker], num_ranks: int, deadlines: Deadlines) -> None:
        self._transport = transport
        self._worker_class = worker_class
        self.num_ranks = num_ranks
        self._deadlines = deadlines
        self._pulse_sent: list[float | None] = [None] * num_ranks
        self._next_pulse = [0.0] * num_ranks
        self._identity: list[dict[str, Any]] = [{} for _ in range(num_ranks)]
        self._closed = False

    def start(self, address: str | None) -> None:
        """Build all workers; then, with an address of rank 0's node, join them in a process group."""
        start_seconds = self._deadlines.start_seconds
        self._guarded(_Wait("build", {rank: [] for rank in range(self.num_ranks)}, start_seconds))
        if address is not None:
            port = self._guarded(_Wait("open_store", {0: [address, start_seconds]}, start_seconds))[0]
            join = [address, port, start_seconds, self._deadlines.collective_seconds]
            self._guarded(_Wait("join", dict.fromkeys(range(self.num_ranks), join), start_seconds))

    def call(self, method: str, args: Sequence[Any], deadline_seconds: float, on_events: OnEvents | None, stop: Stop) -> Any:
        declared = declaration_of(self._worker_class, method)
        per_rank = split_args(declared, args, self.num_ranks)
        requests = {rank: [method, rank_args] for rank, rank_args in enumerate(per_rank)}
        rank0_only = declared.events == "rank0"
        wait = _Wait("call", requests, deadline_seconds, on_events, rank0_events_only=rank0_only, stop=stop)
        results = self._guarded(wait)
        return merge_results(declared, [results[rank] for rank in range(self.num_ranks)])

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._transport.close()

    def _guarded(self, wait: "_Wait") -> dict[int, Any]:
        """The value of each rank that was asked; any failure, the driver's own too, ends the group."""
        if self._closed:
            raise WorkerDiedError("the group was closed; start a new one")
        try:
            for rank, args in wait.requests.items():
                self._transport.request(rank, wait.kind, args)
            while wait.unfinished:
                self._send_pulses(stop=wait.stop.requested)
                for message in self._transport.poll(POLL_SECONDS):
                    self._hear(message, wait)
                wait.failures += self._silent(wait)
                wait.raise_cause()
                if wait.stop.overdue:
                    raise PreemptedError("the ranks were asked to stop and didn't end in the time that was left")
            return wait.values
        except BaseException:
            self.close()
            raise

    def _hear(self, message: Message, wait: "_Wait") -> None:
        """A result counts as complete once a pulse sent after it is answered: that one brings the last events."""
        rank = message.rank
        if message.kind == "pulse":
            sent_at = self._pulse_sent[rank]
            assert sent_at is not None
            self._pulse_sent[rank] = None
            self._identity[rank] = message.body
            wait.pass_on(rank, message.body["events"])
            if sent_at >= wait.answered_at.get(rank, float("inf")):
                wait.unfinished.discard(rank)
        elif message.kind == "outcome" and "error" not in message.body:
            wait.values[rank] = message.body["value"]
            wait.heard_at = wait.answered_at[rank] = time.monotonic()
            self._next_pulse[rank] = 0.0
        else:
            wait.add(self._failure(message), self._deadlines)

    def _send_pulses(self, *, stop: bool) -> None:
        now = time.monotonic()
        for rank in range(self.num_ranks):
            if self._pulse_sent[rank] is None and now >= self._next_pulse[rank]:
                self._pulse_sent[rank], self._next_pulse[rank] = now, now + PULSE_EVERY_SECONDS
                self._transport.pulse(rank, stop=stop)

    def _silent(self, wait: "_Wait") -> list[_Failure]:
        """Ranks that leave a pulse unanswered; or, past the deadline, those that owe a result."""
        now = time.monotonic()
        for rank, sent_at in enumerate(self._pulse_sent):
            starting = not self._identity[rank]  # its process is still on its way: the start deadline applies
            if sent_at is not None and now - sent_at > self._deadlines.heartbeat_seconds and not starting:
                cause = f"has not answered for {now - sent_at:.0f} s{_process_state(self._identity[rank])}"
                return [_Failure(_DEATH, WorkerDiedError(f"{self._name(rank)} {cause}"))]
        owing = wait.unfinished - wait.answered_at.keys()
        if owing and now > wait.heard_at + wait.deadline_seconds:
            names = ", ".join(self._name(rank) for rank in sorted(owing))
            return [_Failure(_DEATH, WorkerDiedError(f"{names}: no event and no result within {wait.deadline_seconds:.0f} s"))]
        return []

    def _failure(self, message: Message) -> _Failure:
        name, text = self._name(message.rank), message.body["message"]
        if message.kind == "died":
            return _Failure(_DEATH, WorkerDiedError(f"{name} died: {text}"))
        if message.body["error"] == PEERS_LOST:
            return _Failure(
                _PEERS, WorkerDiedError(f"{name} lost its connection to the other ranks, all of which answer:\n{text}")
            )
        if message.body["error"] == BUG:
            return _Failure(_BUG, RuntimeError(f"{name} failed:\n{text}"))
        error_class: type[PostflyteError] = getattr(errors, message.body["error"])
        error = error_class(f"{text} [{name}]")
        return _Failure(_USER_ERROR if isinstance(error, UserError) else _INFRA_ERROR, error)

    def _name(self, rank: int) -> str:
        identity = self._identity[rank]
        place = f" (pid {identity['pid']} on {identity['hostname']})" if identity else ""
        return f"rank {rank} of {self.num_ranks}{place}"


def _process_state(identity: dict[str, Any]) -> str:
    """What the system says of a rank's process, where it runs on this machine."""
    try:
        process = psutil.Process(identity["pid"])
        if process.create_time() == identity["created"]:
            return f" (its process is {process.status()})"
    except (psutil.Error, KeyError):
        pass
    return ""
