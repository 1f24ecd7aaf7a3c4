"""Puts what ``serve`` says into words: each event has its name, its sentence and its fields. Pure."""

import ipaddress
from collections.abc import Sequence

from orchestrator.deployment.plan_lines import context_fields
from orchestrator.deployment.preflight import Checked
from orchestrator.event_log import LogLevel, Said
from protos.heterodyne.control.v1 import control_pb2


def connecting(ray_address: str) -> Said:
    """A Ray is started, or joined."""
    local = ray_address == "local"
    sentence = "Starting Ray on this machine." if local else f"Joining the Ray cluster at {ray_address}."
    return Said(event="connect", sentence=sentence, fields={"ray_address": ray_address})


def without_authentication(ray_address: str) -> Said:
    """The Ray that was joined asks nobody for a token."""
    risk = "whoever reaches this cluster runs code on it"
    fix = "start its nodes and serve with RAY_AUTH_MODE=token and the token of `ray get-auth-token --generate`"
    return Said(
        event="ray_without_authentication",
        sentence=f"The Ray cluster at {ray_address} has no authentication: {risk}. To mend that, {fix}.",
        fields={"ray_address": ray_address, "risk": risk, "fix": fix},
        level=LogLevel.WARNING,
    )


def without_hosts() -> Said:
    """No machine could be chosen for each worker."""
    cause = "no room for all workers was found; Ray places them"
    sentence = "No room for all workers was found, so Ray places them, wherever they fit first."
    return Said(event="hosts", sentence=sentence, fields={"cause": cause}, level=LogLevel.WARNING)


def crowded(used: str, idle: Sequence[str]) -> Said:
    """All workers of a replica found room on one machine, and others have none of them."""
    fix = "give each worker a node to spread them"
    return Said(
        event="machines_not_used",
        sentence=f"All workers of a replica are on {used}; not used: {', '.join(idle)}. If that is not wanted, {fix}.",
        fields={"used": used, "idle": ",".join(idle), "fix": fix},
        level=LogLevel.WARNING,
    )


def measuring(num_workers: int, *, splits: bool = True) -> Said:
    """The speed of workers is measured before the model is cut, or before it is decided who holds its KV."""
    purpose = "the model is split" if splits else "it is decided whether attention is offloaded, and how"
    sentence = f"Measuring the speed of {num_workers} workers, by which {purpose}."
    return Said(event="measure", sentence=sentence, fields={"workers": num_workers})


def ready(checked: Checked, address: str, http_address: str = "") -> Said:
    """The service takes requests: what is served, where, and how to try it. ``http_address`` is empty without HTTP."""
    name, served, most = checked.config.model.name, checked.context_tokens, checked.model_context_tokens
    here = _reached_here(address)
    where = address if here == address else f"{address}, which is every interface"
    http = f" and http://{_reached_here(http_address)}/v1 (OpenAI API)" if http_address else ""
    return Said(
        event="serving",
        sentence=f"Ready: {name} at {where} (gRPC){http}, context {served} of {most} tokens; "
        f'try: heterodyne generate "Hello" --address {here}',
        fields={
            "model": name,
            "address": address,
            **({"http_address": http_address} if http_address else {}),
            **context_fields(checked),
        },
    )


def _reached_here(address: str) -> str:
    """Returns where this machine reaches what listens on ``address``: a wildcard is no address to connect to."""
    host, _, port = address.rpartition(":")
    try:
        wildcard = ipaddress.ip_address(host.strip("[]"))
    except ValueError:  # a name
        return address
    if not wildcard.is_unspecified:
        return address
    return f"127.0.0.1:{port}" if wildcard.version == 4 else f"[::1]:{port}"


def replica_changed(replica: control_pb2.Replica) -> Said:
    """A replica is in another phase than before."""
    phase = control_pb2.Phase.Name(replica.phase).removeprefix("PHASE_").lower()
    failed = replica.phase == control_pb2.PHASE_FAILED
    return Said(
        event="replica",
        sentence=f"{replica.name} failed: {replica.cause}" if failed else f"{replica.name} is {phase}.",
        fields={"replica": replica.name, "phase": phase, "cause": replica.cause},
        level=LogLevel.ERROR if failed else LogLevel.INFO,
    )


def controller_lost(cause: object) -> Said:
    """The controller's stream ended while the service runs."""
    return Said(
        event="controller_lost",
        sentence=f"The controller was lost ({cause}), and most likely its workers with it. What still serves goes on.",
        fields={"cause": cause},
        level=LogLevel.WARNING,
    )


def draining(grace_s: float, num_requests: int | None) -> Said:
    """The service takes nothing new, and finishes what it has: so many requests, where that is known."""
    count = {None: "requests in progress", 1: "1 request"}.get(num_requests, f"{num_requests} requests")
    if num_requests == 0:
        sentence = "Stopping: no request is in progress."
    else:
        sentence = f"Stopping: waiting up to {grace_s:g} s for {count}; Ctrl-C again to stop now."
    requests = {} if num_requests is None else {"requests": num_requests}
    return Said(event="draining", sentence=sentence, fields={"grace_s": grace_s, **requests})


def drained() -> Said:
    """Everything that was accepted was finished."""
    return Said(event="drained", sentence="Stopped; every request was finished.")


def gateway_killed() -> Said:
    """The gateway had to be ended by force, with whatever it had not finished."""
    sentence = "Stopped: the gateway did not end by itself, and was killed."
    return Said(event="drain_cut", sentence=sentence, level=LogLevel.WARNING)


def stopped_before_ready() -> Said:
    """It was told to stop while it started."""
    return Said(event="stopped_before_ready", sentence="Stopped before the service was ready.")
