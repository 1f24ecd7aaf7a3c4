"""Makes the requests of a replay: prompts of drawn token ids, as long as the schedule says. Pure."""

from functools import lru_cache

import numpy as np

from orchestrator.cli.replay.schedule import PlannedRequest
from protos.heterodyne.v1 import inference_pb2 as pb

# What tells the draws of a block from those of a prompt that shares nothing.
_OF_BLOCK, _OF_REQUEST = 0, 1
_KEPT_BLOCKS = 4096


class Prompts:
    """Draws the same token ids for the same seed, and for equal blocks equal ones.

    Args:
        seed: from 0.
        vocab_size: ids are drawn below it.
    """

    def __init__(self, *, seed: int, vocab_size: int) -> None:
        self._seed = seed
        self._vocab_size = vocab_size
        self._block = lru_cache(_KEPT_BLOCKS)(self._draw_block)

    def token_ids(self, request: PlannedRequest) -> list[int]:
        """Returns the prompt's token ids."""
        if request.parts is None:
            return self._draw(_OF_REQUEST, request.index, request.prompt_tokens)
        ids: list[int] = []
        for part in request.parts:
            ids += self._block(part.block, _room(part.num_tokens))[: part.num_tokens]
        return ids

    def _draw_block(self, block: int, num_tokens: int) -> list[int]:
        return self._draw(_OF_BLOCK, block, num_tokens)

    def _draw(self, kind: int, number: int, num_tokens: int) -> list[int]:
        drawn = np.random.default_rng((self._seed, kind, number)).integers(self._vocab_size, size=num_tokens)
        ids: list[int] = drawn.tolist()
        return ids


def _room(num_tokens: int) -> int:
    """Returns how many tokens of a block are drawn, so that blocks which differ in size by rounding are kept once."""
    return 1 << (num_tokens - 1).bit_length()


def make_request(request: PlannedRequest, prompts: Prompts, *, cache_salt: str) -> pb.GenerateRequest:
    """Returns what is sent: greedy, and as long as planned, past any end of sequence.

    Args:
        cache_salt: prompts share cached prefixes with those of the same salt only.
    """
    return pb.GenerateRequest(
        prompt_ids=pb.TokenIds(ids=prompts.token_ids(request)),
        sampling=pb.SamplingParams(temperature=0.0),
        max_tokens=request.answer_tokens,
        ignore_eos=True,
        cache_salt=cache_salt,
    )
