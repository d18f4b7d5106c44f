"""The next token of each lane from the model's logits, and log-probabilities."""

from pointsman.sampling.lane import LaneSampling, check_vocabulary
from pointsman.sampling.logprobs import prompt_logprobs
from pointsman.sampling.sampler import NO_TOKEN, Drawn, sample

__all__ = ["NO_TOKEN", "Drawn", "LaneSampling", "check_vocabulary", "prompt_logprobs", "sample"]
