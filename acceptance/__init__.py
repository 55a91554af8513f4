"""What a proposal is worth: metrics, simulated decoding, intervals and baselines. One definition of
every figure.

May import drafting, pairs, token_adapter, machine and base.
"""
