"""What a model is shown: the data set folder, event pictures, raw events, videos and DSEC recordings.

The only package that imports av. May import machine and base.
"""
