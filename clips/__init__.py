"""What a model is shown, from files: data set folders, event pictures, raw events, videos, DSEC recordings.

Each kind of file has one reader (pictures, event_files, videos, dsec), which raises MediaError
(limits.py) when that file can't be used; dataset.py finds the files of a clip, pixels.py makes a
CLIP tower's input of pictures. windows.py and prepared.py make a data set folder from recordings. A
reader may change freely as long as the arrays that it documents stay the same. The only package
that imports av. May import machine and base.
"""
