"""Reads what a request continues as token ids: text is tokenized, a conversation is written out as text first."""

from collections.abc import Callable

from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.conversation import num_characters, read_messages, read_tools, read_values
from orchestrator.gateway.request.request import check_length, check_size
from orchestrator.gateway.request.text_work import INLINE_CHARACTERS, TextWork
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb

_INLINE_MESSAGES = 64


class Prompts:
    """Reads the prompts of Generate. Lives on one event loop."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._work = TextWork(model)

    async def read(self, message: pb.GenerateRequest, *, remaining_s: Callable[[], float]) -> list[int]:
        """Returns the token ids of the request's prompt.

        Args:
            remaining_s: says how long the request may still take.

        Raises:
            InvalidRequest: the prompt cannot fit the context, or is a conversation that the model cannot take.
            NotAdmitted: too many long prompts wait, or no thread came free in time.
            DeadlineExceeded: the request's time was up before its prompt was read.
        """
        match message.WhichOneof("input"):
            case "prompt":
                return await self._work.tokenize(message.prompt, field="prompt", special=True, timeout_s=remaining_s())
            case "chat":
                text = await self._write_out(message.chat, remaining_s())
                # The template has written the special tokens out already.
                return await self._work.tokenize(text, field="chat", special=False, timeout_s=remaining_s())
        check_length(len(message.prompt_ids.ids), self._model)
        return list(message.prompt_ids.ids)

    async def _write_out(self, chat: pb.Chat, timeout_s: float) -> str:
        """Returns the conversation as the model's chat template writes it."""
        template = self._model.chat_template
        if template is None:
            raise InvalidRequest(
                field="chat",
                value=f"{len(chat.messages)} messages",
                problem=f"cannot be written as a prompt: {self._model.name} has no chat template",
                fix="Send prompt instead, or serve a model that was trained to chat, with its chat_template.jinja.",
            )
        messages, tools, values = read_messages(chat), read_tools(chat), read_values(chat)
        size = num_characters(chat)
        check_size(size, self._model, field="chat")
        if tools and not template.takes_tools:
            raise InvalidRequest(
                field="chat.tools",
                value=f"{len(tools)} tools",
                problem=f"cannot be told to the model: the chat template of {self._model.name} takes none",
                fix="Leave them out, or serve a model that was trained to call tools.",
            )

        def render() -> str:
            return template.render(
                messages, add_generation_prompt=not chat.skip_generation_prompt, tools=tools or None, values=values
            )

        if size <= INLINE_CHARACTERS and len(messages) <= _INLINE_MESSAGES:
            return render()
        return await self._work.run(render, timeout_s=timeout_s)
