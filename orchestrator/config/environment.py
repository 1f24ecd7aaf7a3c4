"""Finds mistakes in environment variables that were meant for Heterodyne: unknown names, and a wrong value. Pure."""

import difflib
import re
from collections.abc import Collection, Mapping

from placement.errors import InvalidConfig
from placement.measured.targets import CPU_TARGETS, TARGET_VARIABLE

ENV_PREFIX = "HETERODYNE_"
OTHER_VARIABLES = ("HETERODYNE_ADDRESS", "HETERODYNE_CHECK_STATE", TARGET_VARIABLE)
"""Variables that are read and hold no value of the cluster file."""

_BETWEEN = "__"
# Kubernetes sets these in every pod for a service whose name begins with "heterodyne".
_KUBERNETES = re.compile(r".*_SERVICE_(HOST|PORT(_\w+)?)|.*_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://.*")


def variable_of(section: str, key: str) -> str:
    """Returns the variable that stands for ``section.key``."""
    return f"{ENV_PREFIX}{section}{_BETWEEN}{key}".upper()


def is_setting(name: str) -> bool:
    """Tells whether a variable's name has the form of one that stands for a key; the key may not exist."""
    return name.startswith(ENV_PREFIX) and _BETWEEN in name


def unknown_variables(environ: Mapping[str, str], settings: Collection[str]) -> list[InvalidConfig]:
    """Returns a refusal for each variable that begins as Heterodyne's do and has a name that nothing reads.

    Args:
        settings: the variables that stand for keys, see :func:`variable_of`.
    """
    return [
        _unknown(name, [*settings, *OTHER_VARIABLES])
        for name, value in sorted(environ.items())
        if name.startswith(ENV_PREFIX)
        and name not in OTHER_VARIABLES
        and not is_setting(name)
        and not _is_of_kubernetes(name, value)
    ]


def wrong_target(environ: Mapping[str, str]) -> InvalidConfig | None:
    """Returns a refusal where the environment names a CPU target that there is not. This CPU need not have it."""
    named = environ.get(TARGET_VARIABLE, "")
    if not named or named in CPU_TARGETS:
        return None
    return InvalidConfig(
        field=f"environment variable {TARGET_VARIABLE}",
        value=named,
        problem="is not a CPU target",
        fix=f"Set it to one of {', '.join(CPU_TARGETS)}, or unset it.",
    )


def _is_of_kubernetes(name: str, value: str) -> bool:
    is_port = name.endswith("_PORT") and _KUBERNETES_PORT.fullmatch(value) is not None
    return is_port or _KUBERNETES.fullmatch(name) is not None


def _unknown(name: str, known: Collection[str]) -> InvalidConfig:
    same = [candidate for candidate in known if candidate.replace(_BETWEEN, "_") == name]
    near = same or difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    form = f"{ENV_PREFIX}SECTION{_BETWEEN}KEY, with two underscores between section and key"
    fix = f"Write {near[0]}, or unset it." if near else f"Write it as {form}, or unset it."
    # Its value may be a secret, such as a token.
    return InvalidConfig(field=f"environment variable {name}", problem="is not known", fix=fix)
