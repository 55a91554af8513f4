"""The demo's world (scenes, filmed and described), its data sets, and how its models are trained
and checked.

demo/models holds the models. May import vlm, clips and everything below them.
"""
