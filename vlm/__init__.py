"""The models: who plays which role, how they are checked and loaded, and how they decode.

    roles, contract                     who plays draft and target; what a model offers (no torch)
    checkpoints, hub, fingerprint       a model's folder or hub id without its weights (no torch)
    tokenizers, fits                    whether tokenizer and language model can be used here
    loading, model                      weights into memory; what both models do alike
    eventgpt, video_llava               the two models
    llama, attention, kernels           the layers that both decode through
    steps, batches                      one clip step by step; many clips and questions at once
    peers                               random models, transformers' ways to decode: for benchmarks

A model's own file may be changed without looking elsewhere as long as it keeps vlm/contract.py.
The only package, with machine, that imports transformers, bitsandbytes or accelerate. Knows no
adapter and no pair file. May import clips, machine and base.
"""
