"""What proposes tokens. table.py lists every drafter; its simulated and live class share a file.

To change freely: how a drafter finds its proposals, as long as both classes propose the same
tokens. A wrong proposal costs time and never changes an answer. Other rooms rely on contract.py
(the Protocols), parts.py (what drafters are made from) and tree.py (trees of proposals); they and
table.py import no torch. May import pairs, token_adapter, machine and base.
"""
