"""What the sampler remembers of one sequence, and how that changes its logits.

A lane's state is a function of its `LaneStart` and the tokens drawn since, so a sequence that was preempted comes back to the same state;
what keeps it to a grammar is another such state beside it (`constraint`).
Edits are sparse: each touches the tokens it is about (those seen, biased or suppressed) in a copy of the row, never the whole vocabulary.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pointsman.request import SamplingParams
from pointsman.sampling.constraint import Constraint
from pointsman.sampling.filters import Floats
from pointsman.sampling.philox import round_keys, uniform
from pointsman.step import LaneStart


def check_vocabulary(sampling: SamplingParams, vocab_size: int) -> None:
    """Refuse token ids that the vocabulary does not have.

    Raises:
        ValueError: names the parameter and the token.
    """
    for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        for token in tokens:
            if token >= vocab_size:
                raise ValueError(f"{name} names token {token}; the vocabulary has tokens 0 to {vocab_size - 1}")


class LaneSampling:
    """The sampling state of one sequence.

    Attributes:
        sampling: how its tokens are chosen.
        seed: of its random numbers.
        num_output: tokens of output so far; the position of the next one.
        constraint: what keeps it to its grammar, if it has one.
        simple: every token is the likeliest of the model's own logits, and to be counted is all that becomes of it.
    """

    __slots__ = (
        "_bias",
        "_biased",
        "_edited",
        "_keys",
        "_seen",
        "_suppressed",
        "constraint",
        "greedy",
        "num_output",
        "sampling",
        "seed",
        "simple",
    )

    def __init__(self, start: LaneStart, vocab_size: int, eos_ids: Sequence[int], constraint: Constraint | None = None) -> None:
        sampling = start.sampling
        check_vocabulary(sampling, vocab_size)
        self.sampling = sampling
        self.greedy = sampling.greedy
        self.constraint = constraint
        self.num_output = len(start.output)
        self.seed = start.seed
        self._keys = round_keys(start.seed)
        self._biased = np.fromiter(sampling.logit_bias.keys(), np.intp)
        self._bias = np.fromiter(sampling.logit_bias.values(), np.float32)
        ending = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_ids)}
        self._suppressed = np.array(sorted(token for token in ending if token < vocab_size), np.intp)
        penalised = bool(sampling.presence_penalty or sampling.frequency_penalty) or sampling.repetition_penalty != 1.0
        self._seen = _SeenTokens(start.prompt, start.output) if penalised else None
        self._edited = penalised or len(self._biased) > 0
        plain = self.greedy and not self._edited and constraint is None and not sampling.min_tokens
        self.simple = plain and sampling.logprobs is None

    @property
    def plain(self) -> bool:
        """The likeliest token of the model's own logits is the one to take."""
        return self.greedy and not self.edited

    @property
    def edited(self) -> bool:
        """The model's logits are not taken as they are."""
        constrained = self.constraint is not None and not self.constraint.ended
        return self._edited or constrained or self.num_output < self.sampling.min_tokens

    @property
    def alone(self) -> bool:
        """Logits and parameters are all that the next token takes: it can be drawn where nothing else is known.

        Every rank says the same of it, also those that are not told of grammars.
        """
        return not self.edited and self.sampling.grammar is None

    @property
    def ended(self) -> bool:
        """The text is complete by its grammar, and its end was drawn."""
        return self.constraint is not None and self.constraint.ended

    def edit(self, logits_V: Floats) -> Floats:
        """A copy of the row after bias, penalties, the suppression of what would end the text too early, and last the grammar.

        Raises:
            ConstraintFault: the grammar cannot be kept to.
        """
        sampling, edited_V = self.sampling, logits_V.copy()
        if len(self._biased):
            edited_V[self._biased] += self._bias
        if self._seen is not None:
            tokens, counts = self._seen.tokens, self._seen.counts
            values = edited_V[tokens]
            if sampling.repetition_penalty != 1.0:
                penalty = np.float32(sampling.repetition_penalty)
                with np.errstate(over="ignore"):  # the sampler refuses a row without a finite largest logit
                    values = np.where(values > 0, values / penalty, values * penalty)
            values -= np.float32(sampling.presence_penalty) * (counts > 0)
            values -= np.float32(sampling.frequency_penalty) * counts
            edited_V[tokens] = values
        if self.constraint is not None and not self.constraint.ended:
            self.constraint.restrict(edited_V)
        if self.num_output < sampling.min_tokens:
            self._suppress(edited_V)
        return edited_V

    def _suppress(self, edited_V: Floats) -> None:
        """Make what would end the text impossible, unless a grammar leaves nothing else."""
        values = edited_V[self._suppressed]
        edited_V[self._suppressed] = -np.inf
        if self.constraint is not None and edited_V.max() == -np.inf:
            edited_V[self._suppressed] = values

    def uniform(self) -> float:
        """The random number of the next token."""
        return uniform(self._keys, self.num_output)

    def count(self) -> None:
        """The next token of the output is being drawn elsewhere; which it is will not be asked here."""
        assert self.alone
        self.num_output += 1

    def commit(self, token: int) -> None:
        """The next token of the output was this one."""
        self.num_output += 1
        if self._seen is not None:
            self._seen.add(token)
        if self.constraint is not None:
            self.constraint.commit(token)


class _SeenTokens:
    """The distinct tokens of prompt and output, and how often each is in the output, as arrays that grow."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        self._index = {token: index for index, token in enumerate(dict.fromkeys(prompt))}
        self._tokens: NDArray[np.intp] = np.fromiter(self._index, np.intp)
        self._counts = np.zeros(len(self._index), np.float32)
        for token in output:
            self.add(token)

    @property
    def tokens(self) -> NDArray[np.intp]:
        return self._tokens[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._index)]

    def add(self, token: int) -> None:
        index = self._index.setdefault(token, len(self._index))
        if index == len(self._tokens):
            room = max(64, len(self._tokens))
            self._tokens = np.concatenate((self._tokens, np.zeros(room, np.intp)))
            self._counts = np.concatenate((self._counts, np.zeros(room, np.float32)))
        self._tokens[index] = token
        self._counts[index] += 1
