"""Plain text that the gate reads with and without an adapter. It is in nobody's training data but by chance, and not
what memory keys are calibrated with."""

from __future__ import annotations

PASSAGES = (
    "My grandfather kept bees behind the house, in eleven wooden hives that he painted a different colour every "
    "spring. He said that a bee remembers the colour of its door better than the way to the clover. On warm "
    "evenings we sat on the wall beside them and listened. When the weather was about to change, the sound became "
    "lower, and he would carry the washing inside long before anybody else in the street had looked at the sky. I "
    "have never found out whether he was right or only lucky, but our shirts were always dry.",
    "A lighthouse does not need to be tall to be seen from far away; it needs to stand high above the water. "
    "Because the surface of the sea is curved, a lamp that burns ten metres above it disappears behind the "
    "horizon after about eleven kilometres. If the same lamp is put on a cliff of a hundred metres, a sailor can "
    "see it from more than thirty-five. This is why many of the oldest towers are short and thick, and stand on "
    "the highest rock that the builders were able to reach with their stones.",
    'The clerk looked at the form and shook her head. "You have written the year of the marriage where the year '
    'of the birth should be," she said. "According to this, your daughter is older than you are." The man laughed '
    "and asked for another sheet. Behind him the queue had grown to the door, and somebody was trying to open a "
    'window that had been shut since the war. "Take your time," said the clerk. "We close at four, and after that '
    'it will be even quieter."',
    "Before you clean the chain of a bicycle, shift to the smallest gear at the back, so that it hangs loosely. "
    "Hold a cloth around the lower part and turn the pedals backwards until no more black comes off. Use little "
    "oil: one drop for each link is enough, and what you can see on the outside only collects dust. Wait for ten "
    "minutes, then wipe the chain again. A chain that is cared for in this way every two hundred kilometres lasts "
    "about three times as long as one that is left to the rain.",
)

QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about the sea in winter.",
    "How do I boil an egg?",
    "Name three animals that can fly.",
)
