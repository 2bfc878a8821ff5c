"""Texts that a decoder's likelihood is measured on where it is quantized: what rounding costs a base that has no probes of its own.

They were written for this, so that no base has learned them by heart: plain English of several kinds, about a thousand tokens in all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PASSAGE_TOKENS = 128
"""Of one passage at most: a tokenizer of letters makes more of it."""

PASSAGES = (
    "The ferry left the harbor at six, an hour before the sun came over the hills. Anna stood at the rail with her collar turned up "
    "and counted the lights on the shore until there were none. She had packed one bag, two books and the letter, which she had read "
    "so often that it had begun to come apart at the folds. Behind her a child asked whether whales sleep, and nobody seemed to "
    "know. By noon the island was a grey line, then a green one, and at last a row of houses with smoke above them.",
    "To repair a wooden chair that wobbles, turn it over and look at the joints first. A joint that moves has lost its glue, and new "
    "glue will not hold on top of the old. Pull the joint apart, scrape both surfaces clean, and put a thin layer of wood glue on "
    "each. Press them together, wipe away what comes out with a damp cloth, and tie a strong cord around the legs so that they "
    "cannot shift. Leave the chair alone for a day. If one leg is shorter than the others, do not cut the long ones; glue a thin "
    "disc of cork under the short one.",
    "The city council voted on Tuesday to close two of the four bridges to cars at weekends, starting in April. Supporters said that "
    "the trial, which will last six months, would make the old town quieter and bring more visitors to its shops. Owners of three "
    "garages on the east bank disagreed, and asked who would pay for the customers that they expect to lose. The mayor promised a "
    "report by October, with figures on traffic, noise and sales, before anything is decided for good.",
    "Water is unusual in that it expands when it freezes. Most liquids shrink as they turn solid, because their molecules pack more "
    "closely together. In ice, however, each molecule is held at a fixed distance from four others, and the open structure that "
    "results takes up about nine percent more space than the liquid did. This is why ice floats, why pipes burst in winter, and why "
    "a lake freezes from the top down while fish survive in the warmer water below.",
    '"Did you lock the door?" he asked for the second time. "I did," she said, "and then I went back and looked, because I knew that '
    'you would ask." He laughed, but he kept his hand on the key in his pocket. They walked down to the corner without speaking. The '
    'bakery was already open, and through the window they could see the owner arguing with a man about the price of a cake. "Let us '
    'have coffee first," she said. "The train will be late anyway. It is always late when it rains."',
    "A list of numbers is sorted when no number is smaller than the one before it. The simplest way to sort a list is to look "
    "through it for the smallest number, put that first, and do the same with what is left. For a list of ten numbers this takes "
    "forty-five comparisons; for a thousand it takes almost half a million. Better methods split the list into two halves, sort each "
    "of them in the same way, and merge the results. Then a thousand numbers need about ten thousand comparisons, which a computer "
    "makes in no time.",
    "Dear Mr. Okafor, thank you for your message of 3 March. We are sorry that the lamp arrived with a broken shade. A new one was "
    "sent to you this morning and should reach you within five days; you do not need to return the old one. We have also taken ten "
    "percent off your next order, which you can use at any time before the end of the year. If there is anything else that we can do "
    "for you, please write to us again or call the number below between nine and five. With kind regards, the customer service team.",
    "In the autumn of that year the harvest failed for the third time, and the people of the valley began to leave. Some went south "
    "to the mines, others across the sea, and those who stayed lived on chestnuts and on what they could sell. The old records give "
    "no number, but of the forty farms that paid taxes in 1816 only eleven are named ten years later. What brought the others back, "
    "after a generation, was neither rain nor peace but the railway, which reached the market town in 1851.",
)


def passage_rows(tokenizer: PreTrainedTokenizerBase | None, context: int) -> list[list[int]]:
    """Tokens of each passage, as many as ``context`` and PASSAGE_TOKENS hold; none for a base without tokenizer, to which no text says
    anything, and none of a passage that is no two tokens."""
    if tokenizer is None:
        return []
    rows = [list(tokenizer(text, verbose=False)["input_ids"])[: min(context, PASSAGE_TOKENS)] for text in PASSAGES]
    return [row for row in rows if len(row) > 1]
