"""Owns the options of ``replay``: how each is written, and what they mean together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.replay.slo import Slo

# In place of 0, which is refused.
_LEAST = 1e-6
_MOST_S = 1e9  # so that infinity is refused
_INT32, _UINT63 = 2**31 - 1, 2**63 - 1

Trace = Annotated[Path, typer.Argument(metavar="TRACE", help="CSV as of the Azure traces, or Mooncake's JSON lines")]
Rate = Annotated[float, typer.Option(min=_LEAST, max=1e6, help="how many times as fast as recorded")]
Scale = Annotated[float, typer.Option(min=_LEAST, max=1e3, help="factor on the lengths of prompts and answers")]
DurationS = Annotated[
    float | None,
    typer.Option("--duration", metavar="SECONDS", min=_LEAST, max=_MOST_S, help="only the trace's first seconds"),
]
Limit = Annotated[int | None, typer.Option(min=1, help="only so many requests")]
SloTtftS = Annotated[
    float | None,
    typer.Option("--slo-ttft", metavar="SECONDS", min=_LEAST, max=_MOST_S, help="goodput: longest time to first token"),
]
SloTbtS = Annotated[
    float | None,
    typer.Option(
        "--slo-tbt", metavar="SECONDS", min=_LEAST, max=_MOST_S, help="goodput: longest mean time between tokens"
    ),
]
Slowdowns = Annotated[
    bool, typer.Option("--slo", help="judge by Splitwise's multiples of an idle service, which is measured first")
]
AsJson = Annotated[bool, typer.Option("--json", help="one line of JSON with stable names")]
Png = Annotated[Path | None, typer.Option("--png", metavar="FILE", help="also draw the curves (needs matplotlib)")]
TimeoutS = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.001, max=86400.0, help="deadline of each request")
]
MaxInFlight = Annotated[int, typer.Option(min=1, max=2**20, help="most requests at once; the next one waits")]
Seed = Annotated[int, typer.Option(min=0, max=_UINT63, help="draws the same prompts again")]
VocabSize = Annotated[
    int | None, typer.Option(min=1, max=_INT32, help="draw token ids below this; default: all of the model's")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """Holds what ``replay`` was asked for.

    Attributes:
        rate: how many times as fast as recorded.
        scale: the factor on the lengths of prompts and answers.
        duration_s: how many of the trace's first seconds; None: all.
        limit: how many requests at the most; None: all.
        slo_ttft_s: the bound on the time to the first token; None: none.
        slo_tbt_s: the bound on the mean time between the tokens of a request; None: none.
        slowdowns: whether an idle service is measured first, and requests are judged against it.
        as_json: whether the report is one line of JSON.
        png: the picture to draw.
        timeout_s: the deadline of each request.
        max_in_flight: the most requests at once.
        vocab_size: token ids are drawn below it; None: all of the model's.
    """

    trace: Path
    address: str
    rate: float = 1.0
    scale: float = 1.0
    duration_s: float | None = None
    limit: int | None = None
    slo_ttft_s: float | None = None
    slo_tbt_s: float | None = None
    slowdowns: bool = False
    as_json: bool = False
    png: Path | None = None
    timeout_s: float = 600.0
    max_in_flight: int = 4096
    seed: int = 0
    vocab_size: int | None = None

    @property
    def slo(self) -> Slo | None:
        """The bounds of the goodput; None where there are none."""
        if self.slo_ttft_s is None and self.slo_tbt_s is None:
            return None
        return Slo(ttft_s=self.slo_ttft_s, tbt_s=self.slo_tbt_s)
