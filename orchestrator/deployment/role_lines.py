"""Says who computes prompts and who answers, where replicas differ in that. Pure."""

from collections.abc import Iterator, Sequence

from orchestrator.config.serving import ServingConfig
from orchestrator.event_log import Said
from placement.planning.plan import Plan, Replica, Role
from placement.serving.kv.peers import KvFormat

_MOST_NAMED = 4


def role_events(plan: Plan, serving: ServingConfig) -> Iterator[Said]:
    """Yields a sentence on who computes what, and how keys and values go from one to another."""
    if not plan.has_roles:
        return
    names = {role: [replica.name for replica in plan.replicas if replica.role is role] for role in Role}
    written = "8-bit integers" if serving.kv_format is KvFormat.INT8 else " or ".join(_sent_dtypes(plan))
    faster = "" if serving.disaggregation == "always" else ", where that is expected to be faster"
    yield Said(
        event="roles",
        sentence=f"{', '.join(_clauses(names))}; keys and values go over the network as {written}{faster}.",
        fields={
            **{role.value: ",".join(names[role]) for role in (Role.PREFILL, Role.DECODE, Role.MIXED)},
            "disaggregation": serving.disaggregation,
            "kv_transfer": "int8" if serving.kv_format is KvFormat.INT8 else ",".join(_sent_dtypes(plan)),
        },
    )


def role_word(plan: Plan, replica: Replica) -> str:
    """Returns the role of a replica where some replicas of its plan have one; else nothing."""
    return replica.role.value if plan.has_roles else ""


def own_dtype(plan: Plan, replica: Replica) -> str:
    """Returns the number type of a replica where some replicas of its plan have different ones; else nothing."""
    return replica.dtype.value if len({each.dtype for each in plan.replicas}) > 1 else ""


def _sent_dtypes(plan: Plan) -> list[str]:
    """Lists the number types of the replicas that compute prompts."""
    return sorted({replica.dtype.value for replica in plan.replicas if replica.role is not Role.DECODE})


def _clauses(names: dict[Role, list[str]]) -> Iterator[str]:
    prefill, decode, mixed = names[Role.PREFILL], names[Role.DECODE], names[Role.MIXED]
    if prefill:
        yield f"{_listed(prefill)} {_verb('compute', prefill)} prompts"
    if decode:
        yield f"{_listed(decode)} {_verb('answer', decode)} {'them' if prefill else 'prompts of others'}"
    if mixed:
        yield f"{_listed(mixed)} {_verb('do', mixed, 'does')} both"


def _verb(plural: str, subjects: Sequence[str], singular: str = "") -> str:
    return plural if len(subjects) > 1 else singular or f"{plural}s"


def _listed(names: Sequence[str]) -> str:
    *rest, last = names if len(names) <= _MOST_NAMED else (*names[:_MOST_NAMED], f"{len(names) - _MOST_NAMED} more")
    return f"{', '.join(rest)} and {last}" if rest else last
