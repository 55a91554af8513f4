"""Speculative decoding: the loop, the rules that verify, costs, the verdict, and the task that is decoded with.

Knows targets and drafters by their Protocols alone. May import drafting, acceptance, vlm and what lies below them;
knows nothing of training.
"""
