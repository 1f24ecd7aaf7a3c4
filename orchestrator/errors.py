"""Owns the errors that only the orchestrator raises, such as many refusals at once, or a service that said no."""

from collections.abc import Sequence

from placement.errors import FieldError, HeterodyneError, InvalidConfig


class InvalidConfigs(InvalidConfig):
    """Several values of one configuration were refused.

    Attributes:
        errors: each refusal, in the order of the file.
    """

    def __init__(self, source: str, errors: Sequence[InvalidConfig]) -> None:
        self.errors = tuple(errors)
        problem = f"has {len(self.errors)} problems"
        super().__init__(field=source, value=len(self.errors), problem=problem, fix="Mend each of them.")
        self.args = ("\n".join([f"{source} {problem}:", *(f"  {error}" for error in self.errors)]),)


def refuse(source: str, errors: Sequence[InvalidConfig]) -> None:
    """Raises the one error there is, or all of them together; returns when there is none.

    Raises:
        InvalidConfig: as given; :class:`InvalidConfigs` where there are several.
    """
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InvalidConfigs(source, errors)


class ServiceError(HeterodyneError):
    """The service refused a call, failed it, or could not be reached. Its text is one line for the user.

    Attributes:
        code: name of the gRPC status, for instance ``RESOURCE_EXHAUSTED``.
        violations: (field, description) of each field that was refused.
        retry_after_s: when the service said to try again; None where it said nothing.
    """

    def __init__(
        self,
        *,
        code: str,
        message: str,
        violations: tuple[tuple[str, str], ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        self.code = code
        self.message = message
        self.violations = violations
        self.retry_after_s = retry_after_s
        # Our own service names the field in its message already; others may not.
        more = [f"{field}: {text}" for field, text in violations if not message.startswith(f"{field}:")]
        parts = [f"{code}: {message}", *more]
        if retry_after_s is not None:
            parts.append(f"try again in {retry_after_s:g} s")
        super().__init__("; ".join(" ".join(part.split()) for part in parts))


class LaunchFailed(HeterodyneError):
    """The deployment did not come up; the text is the first failing rank's cause."""


class ServiceEnded(HeterodyneError):
    """Something that must live as long as the service ended by itself."""


class InvalidTrace(FieldError):
    """A recorded trace of requests holds something that cannot be replayed; the field names its file and line."""
