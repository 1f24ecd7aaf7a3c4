"""Makes tokens of a text and back over HTTP, and describes the tokenizer, in the forms of vLLM."""

import time
from collections.abc import Mapping
from typing import Any

from orchestrator.gateway.http.asking.body import read_body
from orchestrator.gateway.http.asking.names import DETOKENIZE, TOKENIZE, renamed
from orchestrator.gateway.http.asking.tokens import DetokenizeBody, TokenizeBody, conversation
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.prompts import Prompts
from orchestrator.gateway.request.request import check_ids, check_model
from orchestrator.gateway.request.text_work import TextWork
from placement.errors import FieldError
from protos.heterodyne.v1 import inference_pb2 as pb

# How long a call may wait and take.
CONVERSION_S = 30.0
_CLASS = "PreTrainedTokenizerFast"


class TokenCalls:
    """Answers for one model. Lives on one event loop. Texts have threads and a queue of their own, as over gRPC."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._work = TextWork(model)
        self._prompts = Prompts(model)

    async def tokenize(self, data: bytes) -> Mapping[str, Any]:
        """Returns the tokens of a text, or of a conversation. Raises HeterodyneError."""
        body = read_body(TokenizeBody, data)
        try:
            check_model(body.model or "", self._model)
            ids = await self._ids(body)
        except FieldError as error:
            raise renamed(error, TOKENIZE) from None
        texts = [self._model.tokenizer.id_to_token(token_id) for token_id in ids] if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": self._model.max_context_tokens,
            "tokens": ids,
            "token_strs": texts,
        }

    async def _ids(self, body: TokenizeBody) -> list[int]:
        chat = conversation(body)
        if chat is None:
            special = body.add_special_tokens is not False
            text = body.prompt or ""
            return await self._work.tokenize(text, field="prompt", special=special, timeout_s=CONVERSION_S)
        end_s = time.monotonic() + CONVERSION_S
        message = pb.GenerateRequest(chat=chat)
        return await self._prompts.read(message, remaining_s=lambda: max(0.0, end_s - time.monotonic()))

    async def detokenize(self, data: bytes) -> Mapping[str, Any]:
        """Returns the text of tokens, special ones too. Raises HeterodyneError."""
        body = read_body(DetokenizeBody, data)
        try:
            check_model(body.model or "", self._model)
            check_ids(body.tokens, self._model)
            text = await self._work.detokenize(body.tokens, skip_special=False, timeout_s=CONVERSION_S)
        except FieldError as error:
            raise renamed(error, DETOKENIZE) from None
        return {"prompt": text}

    def info(self) -> Mapping[str, Any]:
        """Returns what tokenizer_config.json says, special tokens as texts, with the chat template in use."""
        config = {name: _plain(value) for name, value in self._model.tokenizer_config.items()}
        template = self._model.chat_template
        chat_template = {} if template is None else {"chat_template": template.source}
        return {"tokenizer_class": _CLASS, **config, **chat_template}


def _plain(value: Any) -> Any:
    """Returns the text of a token that is written as an object."""
    is_token = isinstance(value, dict) and isinstance(value.get("content"), str)
    return value["content"] if is_token else value
