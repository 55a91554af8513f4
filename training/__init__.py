"""How an adapter is trained: config, loss, loop, phases and checkpoints.

May import drafting, acceptance and what lies below them; knows nothing of decoding.
"""
