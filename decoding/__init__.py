"""Speculative decoding: the loop and its rules, costs, verdicts, the trained task, and the stages of a whole decoding.

The loop (contracts.py, rules.py, loop.py) knows targets and drafters by their Protocols alone; a rule, a cost or a
stage may be changed without looking elsewhere. What decode.json holds is read by reports/decode_report.py.
May import drafting, acceptance, vlm and what lies below them; knows nothing of training.
"""
