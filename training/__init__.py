"""How an adapter is trained.

    adapters.py     a new adapter or a checkpoint, checked against the pairs
    loss.py         output layer and loss, a chunk of logits at a time
    loop.py         the steps of a phase, one pass over the pairs
    phases.py       the phases, selection on validation, the second training on all pairs
    checkpoints.py  best_model.pt and resume.pt
    evaluation.py   metrics on train, validation and test pairs

The loss and the loop may be changed without looking elsewhere; benchmarks/train.py times them. May
import acceptance and what lies below it; knows nothing of decoding or of a program's configuration.
"""
