"""Says which family's form of calls a chat template asks for, and reads calls that a grammar forces. Pure."""

from orchestrator.gateway.http.tools.hermes import BEGIN, HERMES
from orchestrator.gateway.http.tools.llama3 import LLAMA3, TAG
from orchestrator.gateway.http.tools.mistral import MARKER, MISTRAL
from orchestrator.gateway.http.tools.reading import Begin, Family, Item, Place, ToolCall, call_of, json_of

# Llama 3 templates describe the form in words.
_SIGNS = (
    (MARKER, MISTRAL),
    (BEGIN, HERMES),
    (TAG, LLAMA3),
    ('"parameters": dictionary of argument name', LLAMA3),
)


def family_of(template: str) -> Family | None:
    """Returns the family whose form a template asks for; None where it is not known."""
    return next((family for sign, family in _SIGNS if sign in template), None)


def forced(name: str | None, family: Family) -> Family:
    """Returns how an answer is read that a grammar forces to be calls.

    Args:
        name: the function whose arguments the whole answer is; None: it is a list of calls.
        family: says how long ids are.
    """

    def take(text: str, is_end: bool) -> tuple[tuple[Item, ...], int] | None:
        if not is_end:
            return None
        if name is not None:
            return (ToolCall(name, text),), len(text)  # cut short it is what there is of the arguments
        value = json_of(text)
        calls = [call_of(item) for item in value] if isinstance(value, list) else []
        found = tuple(call for call in calls if call is not None)
        return found or (text,), len(text)

    def begin(place: Place, text: str) -> Begin:
        return Begin(0, True)

    return Family(name="forced", markers=(), begin=begin, take=take, id_characters=family.id_characters)
