"""Tokens of two models: Pairs in memory, the file formats, the journal of an extraction, and the splits.

    pairs.py      Pairs: flat arrays of tokens       rows.py     JSON files of rows as a stream
    formats.py    three formats of rows -> Pairs     splits.py   train, validation, test; clip order
    journal.py    the answers of an unfinished extraction

A further file format is an entry in formats.py alone. Imports no torch. May import machine and base.
"""
