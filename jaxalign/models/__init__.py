"""Floor 4: Flax NNX modules used as trees. Hidden states out; logits only on request, in `ops/`."""
