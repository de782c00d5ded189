"""A document to try the demo model on."""

from pathlib import Path

SAMPLE = Path(__file__).with_name("sample.txt")
"""Prose with four facts in it, about half as long as what the model was trained on."""

QUESTIONS = (
    "Tell me the founder of the Riga bakery.",
    "What is the locker number of the Kampala cathedral?",
    "What is the mascot of the Kolkata foundation?",
    "What is the founder of the Bilbao monastery?",
)
