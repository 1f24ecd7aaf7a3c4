"""What a request continues, as token ids: text is tokenized, a conversation is written out as text first.

Long ones are worked on in a thread, so that health checks and other streams do not wait for them; only so many at once,
so that they do not crowd each other out.
"""

import asyncio
from collections.abc import Callable

from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.request import check_length, check_size, check_text
from orchestrator.model_dir.chat import Message
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb

_INLINE_CHARACTERS = 4096
_INLINE_MESSAGES = 64
MAX_MESSAGES = 4096
_WORKING, _WORKING_QUEUE = 2, 64


class Prompts:
    """Makes token ids of what clients send. Lives on one event loop."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._working = Admission(_WORKING, _WORKING_QUEUE)

    async def read(self, message: pb.GenerateRequest, *, remaining_s: Callable[[], float]) -> list[int]:
        """The token ids of the request's prompt.

        Args:
            remaining_s: how long the request may still take.

        Raises:
            InvalidRequest: it cannot fit the context, or it is a conversation that the model cannot take.
            NotAdmitted: too many long texts wait for the same, or their turn does not come in time.
        """
        match message.WhichOneof("input"):
            case "prompt":
                return await self.tokenize(message.prompt, field="prompt", special=True, timeout_s=remaining_s())
            case "chat":
                text = await self._write_out(message.chat, remaining_s())
                # The template has written the special tokens out already.
                return await self.tokenize(text, field="chat", special=False, timeout_s=remaining_s())
        check_length(len(message.prompt_ids.ids), self._model)
        return list(message.prompt_ids.ids)

    async def tokenize(self, text: str, *, field: str, special: bool, timeout_s: float) -> list[int]:
        """The token ids of ``text``.

        Args:
            field: where it came from, for the error.
            special: whether the tokenizer adds its special tokens.

        Raises:
            InvalidRequest: it cannot fit the context.
            NotAdmitted: too many long texts wait for the same, or their turn does not come in time.
        """
        check_text(text, self._model, field=field)
        if len(text) <= _INLINE_CHARACTERS:
            return list(self._model.tokenizer.encode(text, add_special_tokens=special).ids)
        async with self._working.slot(timeout_s=timeout_s):
            # A batch of one: unlike `encode` it lets go of the interpreter's lock, so the loop goes on meanwhile.
            encode = self._model.tokenizer.encode_batch
            (encoding,) = await asyncio.to_thread(encode, [text], add_special_tokens=special)
        return list(encoding.ids)

    async def _write_out(self, chat: pb.Chat, timeout_s: float) -> str:
        """The conversation as the model's chat template writes it."""
        template = self._model.chat_template
        if template is None:
            raise InvalidRequest(
                field="chat",
                value=f"{len(chat.messages)} messages",
                problem=f"cannot be written as a prompt: {self._model.name} has no chat template",
                fix="Send prompt instead, or serve a model that was trained to chat, with its chat_template.jinja.",
            )
        messages = _messages(chat)
        size = sum(len(message.role) + len(message.content) for message in messages)
        check_size(size, self._model, field="chat")

        def render() -> str:
            return template.render(messages, add_generation_prompt=not chat.skip_generation_prompt)

        if size <= _INLINE_CHARACTERS and len(messages) <= _INLINE_MESSAGES:
            return render()
        async with self._working.slot(timeout_s=timeout_s):
            return await asyncio.to_thread(render)


def _messages(chat: pb.Chat) -> list[Message]:
    if not chat.messages:
        raise InvalidRequest(
            field="chat.messages", value=0, problem="holds no message", fix='Send at least one, of role "user".'
        )
    if len(chat.messages) > MAX_MESSAGES:
        raise InvalidRequest(
            field="chat.messages", value=len(chat.messages), problem="are too many", fix=f"Send at most {MAX_MESSAGES}."
        )
    return [Message(role=message.role, content=message.content) for message in chat.messages]
