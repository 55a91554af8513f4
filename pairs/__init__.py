"""Tokens of two models: Pairs in memory, the file formats, the journal of an extraction, and the splits.

Imports no torch. May import machine and base.
"""
