"""The models: who plays which role, how they are checked and loaded, and how they decode.

    roles, contract                     who plays draft and target; what a model offers (no torch)
    checkpoints, hub, fingerprint       a model's folder or hub id without its weights (no torch)
    tokenizers, vocabulary, fits        whether tokenizers and language models can be used here
    loading, model                      weights into memory; what all models do alike
    eventgpt, video_llava               the two models with files of their own
    any_model, processing, embedded     all others: by transformers' processor and forward
    llama, attention, kernels           the layers that they decode through
    steps, batches                      one clip step by step; many clips and questions at once
    generic, greedy                     the same through transformers' forward; its generate
    peers                               random models, transformers' ways to decode: for benchmarks

A model's own file may be changed without looking elsewhere as long as it keeps vlm/contract.py.
The only package, with machine, that imports transformers, bitsandbytes or accelerate. Knows no
adapter and no pair file. May import clips, machine and base.
"""
