"""How an adapter is trained.

    adapters.py     a new adapter or a checkpoint, checked against the pairs     loss.py          the loss
    loop.py         steps and one pass over the pairs                            phases.py        selection, refit
    checkpoints.py  best_model.pt and resume.pt

The loss and the loop may be changed without looking elsewhere; benchmarks/train.py times them. May import
acceptance and what lies below it; knows nothing of decoding, and no program's configuration.
"""
