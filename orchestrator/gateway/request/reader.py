"""Reads what a client asks: everything about a request is checked here, before anything is computed for it."""

import asyncio
import secrets
import uuid
from dataclasses import replace

from orchestrator.gateway.client import Client
from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.prompts import Prompts
from orchestrator.gateway.request.request import Request, check_model, check_request
from orchestrator.gateway.request.structured import check_structured
from orchestrator.gateway.request.structured_probe import GrammarProbe
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2


class RequestReader:
    """Makes checked requests of messages. Lives on one event loop.

    Args:
        admission: says how many choices the service computes at once.
    """

    def __init__(self, *, model: ServedModel, admission: Admission) -> None:
        self._model = model
        self._admission = admission
        self._prompts = Prompts(model)
        self._grammars = GrammarProbe(model)

    async def read(self, message: pb.GenerateRequest, client: Client) -> Request:
        """Returns the request, its prompt tokenized and its defaults filled in.

        Raises:
            InvalidRequest: names the field, the value and the fix.
            NotAdmitted: too many long prompts, or grammars, wait.
            DeadlineExceeded: the request's time was up before all of it was checked.
        """
        check_model(message.model, self._model)
        request = check_request(
            message,
            self._model,
            prompt_ids=await self._prompts.read(message, remaining_s=client.remaining_s),
            new_seed=lambda: secrets.randbits(63),
            new_id=lambda: uuid.uuid4().hex,
        )
        if request.num_choices > self._admission.max_in_flight:
            raise InvalidRequest(
                field="num_choices",
                value=request.num_choices,
                problem="is more than the service computes at once",
                fix=f"Ask for at most {self._admission.max_in_flight}.",
            )
        # Last, because it is the most work.
        grammar = await self._grammar(message.structured_output, client)
        return request if grammar is None else replace(request, grammar=grammar)

    async def _grammar(self, message: pb.StructuredOutput, client: Client) -> worker_pb2.Grammar | None:
        grammar = check_structured(message, self._model)
        if grammar is not None:
            try:
                async with asyncio.timeout(client.remaining_s()):
                    await self._grammars.check(grammar)
            except TimeoutError:
                raise client.overdue() from None
        return grammar

    async def close(self) -> None:
        """Ends the process that tries grammars. Called once no request is read any more."""
        await self._grammars.close()
