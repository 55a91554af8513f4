"""What proposes tokens: the table of drafters, memory, adapter and hybrid, simulated over pairs and
live.

May import pairs, token_adapter, machine and base.
"""
