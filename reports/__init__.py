"""Pages and pictures from JSON files alone: RESULTS.md, DECODE.md and their charts.

The only package that imports matplotlib. May import machine and base.
"""
