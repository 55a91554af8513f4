"""What a proposal is worth: one definition of every figure.

metrics.py (acceptance by position), intervals.py (how far it can be trusted), simulation.py (tokens
a pass, for chains and trees), tensors.py (the adapter's hits), comparison.py (the adapter beside
both baselines) and evaluation.py (all drafters of the table). To change freely: how a figure is
computed, not what it means.
May import drafting, pairs, token_adapter, machine and base.
"""
