"""The models: roles, the contract they keep, loading, EventGPT, Video-LLaVA, and the layers that
both decode through.

The only package, with machine, that imports transformers, bitsandbytes or accelerate. Knows no
adapter and no pair file. May import clips, machine and base.
"""
