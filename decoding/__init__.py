"""Speculative decoding: the loop, its rules, costs, verdicts, the trained task and the stages of a
run.

The loop (contracts.py, rules.py, limits.py, loop.py) knows targets and drafters by their Protocols
alone; a rule, a cost or a stage may be changed without looking elsewhere. What decode.json holds is
read by reports/decode_figures.py, what a journal holds by journal.py alone.
May import drafting, acceptance, vlm and what lies below them; knows nothing of training.
"""
