"""Teaching a decoder to answer: prompts and responses, what it says, and how far gates open.

from mmadapt.tasks import instruct

data = instruct.encode(llama.tokenize, examples).padded()
mm.fit(llama, data, loss=instruct.response_loss, lr=8e-2)
instruct.exact_match(llama, held_out)
instruct.stream(llama, "spell abcd backwards = ")
"""

from mmadapt.tasks.instruct.data import Example, Tokens, encode
from mmadapt.tasks.instruct.gates import GateRecord, gate_figure, gates
from mmadapt.tasks.instruct.loss import check_packing, response_loss
from mmadapt.tasks.instruct.score import (
    answers,
    exact_match,
    on_and_off,
    perplexity,
    side_by_side,
)
from mmadapt.tasks.instruct.streaming import stream, stream_both

__all__ = [
    "Example",
    "GateRecord",
    "Tokens",
    "answers",
    "check_packing",
    "encode",
    "exact_match",
    "gate_figure",
    "gates",
    "on_and_off",
    "perplexity",
    "response_loss",
    "side_by_side",
    "stream",
    "stream_both",
]
