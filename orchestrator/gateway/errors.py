"""Defines the errors that refuse or end a request. :mod:`orchestrator.gateway.status` says how each travels."""

from placement.errors import HeterodyneError, InvalidRequest


class UnknownModel(InvalidRequest):
    """The request names a model that is not served."""


class ContextExceeded(InvalidRequest):
    """The prompt, or the prompt and its answer, are longer than the context."""


class NotAdmitted(HeterodyneError):
    """A request did not get a slot."""


class Overloaded(NotAdmitted):
    """The queue is full.

    Attributes:
        retry_after_s: about how long what waits now will take to get slots.
    """

    def __init__(self, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"the service is at its limit; try again in {retry_after_s:.0f} s")


class QueueTimeout(NotAdmitted):
    """The request's deadline passed while it waited."""


class Draining(NotAdmitted):
    """The service is about to stop and takes nothing new."""


class ReplicaUnavailable(HeterodyneError):
    """No replica can take the request, or the one that had it is gone."""


class DeadlineExceeded(HeterodyneError):
    """The request's time was up."""


class ReplicaFault(HeterodyneError):
    """The replica failed the request without going down."""


class ClientTooSlow(HeterodyneError):
    """The client reads so slowly that its answer piles up."""
