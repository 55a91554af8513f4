"""How one loaded model answers all questions about all clips, and where the answers go.

A room of its own beside decoding and training, because the program and its benchmark both run
`Answering`, and a program should be flags and steps. Free to change without looking elsewhere: how
clips are batched, how a lack of memory is met, what the output holds beside its rows. May import
vlm, pairs, clips, machine and base; knows no adapter.
"""
