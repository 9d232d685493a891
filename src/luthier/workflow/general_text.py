"""What a tuning makes of a text that has nothing to do with its rows: how much of the general is forgotten.

forgetting = loss of a token with the tuning - loss of a token without it        in nats, on one fixed text
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from luthier.surgery import Tuned
from luthier.training.answers import positions_for_rows, standing_still
from luthier.training.precision import Precision

__all__ = ["GENERAL_TEXT", "forgotten"]

GENERAL_TEXT = """\
A river begins where water finds the lowest way out of high ground. Rain falls on the hills, sinks into the soil, \
and comes to light again as a spring; the spring becomes a brook, several brooks become a stream, and after a \
hundred miles the stream carries boats. In spring, when the snow melts, the river leaves its bed and lays fine mud \
over the fields, which is why people settled there in the first place. They built walls against the flood, mills \
that the current turned, and bridges at the places where carts had crossed before.

The town at the bend of the river has a market on Thursdays. Farmers bring potatoes, apples, cheese and eggs; a man \
from the coast sells smoked fish. Prices are written on small boards, and at noon some of them are crossed out and \
lowered. The library stands opposite the church. It was a school once, and the children's initials can still be read \
on the stone beside the door. Most visitors ask for novels, a few for old maps, and in winter many come only because \
it is warm.

If a bottle holds three quarters of a litre, four bottles hold three litres. A train that leaves at ten past nine \
and needs two hours and a half arrives at twenty to twelve. Iron is heavier than wood, but a ship of iron floats, \
because what counts is the weight of the water that it pushes aside. Plants take carbon dioxide from the air and \
give back oxygen as long as there is light; at night they breathe as animals do. The heart of an adult beats about \
seventy times a minute, faster after running and slower in sleep.

"I would rather walk," she said, and looked at the sky. "It will not rain before evening." He was not so sure. He \
had been wrong about the weather before, and so had she, but she had the better shoes. They took the path along the \
water, past the last houses, and talked about the letter that had come that morning and what it might mean for the \
summer.
"""
"""Written for this purpose, so that no model has learnt it by heart."""

_MOST = 512  # tokens


def forgotten(tuned: Tuned, tokenizer: Any, precision: Precision, device: torch.device) -> float:
    """By how much the tuning raises the loss of a token of `GENERAL_TEXT`, in nats; below 0, it lowers it.

    Args:
        tokenizer: of the model, of transformers.
    """
    ids = tokenizer(GENERAL_TEXT)["input_ids"]
    limit = positions_for_rows(tuned)
    given = torch.tensor([ids[: min(_MOST, limit or _MOST)]], device=device)

    def loss() -> float:
        with torch.no_grad(), precision.autocast(device):
            logits = tuned.model(input_ids=given, attention_mask=torch.ones_like(given)).logits
        return float(F.cross_entropy(logits[0, :-1].float(), given[0, 1:]))

    with standing_still(tuned.model):
        after = loss()
        with tuned.base_only():
            return after - loss()
