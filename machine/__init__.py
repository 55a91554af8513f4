"""What depends on the computer: how a program runs and stops, files and locks, device, CUDA graphs.

Nothing here knows a model, an adapter or a file format. May import base alone, and torch only in
device.py and graphs.py, which no program needs for --help.
"""
