"""What depends on the computer: files written whole, locks, CUDA graphs, the choice of device and dtype.

Nothing here knows a model, an adapter or a file format. May import base alone.
"""
