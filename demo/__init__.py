"""The demo's world, what is told of it, and how its two tiny models are trained. May import vlm, clips and below."""
