"""Responses of a model's folder to prompts, for tests that compare them."""

from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import load_model, respond


def answers(folder, prompts, *, adapter=None, n=1, batch_size=16, seed=0, **sampling):
    """(text, finished) of each, in float32."""
    model = load_model(str(folder), adapter=adapter, dtype="float32")
    return respond(model, prompts, Sampling(**sampling), n=n, batch_size=batch_size, seed=seed)
