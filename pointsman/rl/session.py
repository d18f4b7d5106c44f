"""A model that routes as a record says, or whose routing is recorded, for as long as a `with` block lasts.

    from pointsman.rl import replay

    with replay(model, records, attention_mask=mask) as forced:
        logits = model(input_ids, attention_mask=mask).logits
    forced.agreement

A hook on each router changes its choice and nothing else. Weights are computed anew from the router's own scores of the given
experts, so gradients reach the router; a token whose choice was the same set of experts keeps the router's own output, bit for bit.
A row that is not known routes freely.

Gradient checkpointing runs a layer again while gradients flow back, which may be long after the block, or in the block of another
replay. Hugging Face's layers go through a function for that; in the block it is one that remembers its replay, so that what is computed
again is computed alike, and what was computed freely is free again. Who calls `torch.utils.checkpoint` without those layers has to go
backward inside the block.

Shape suffixes: T positions of the flat batch, L layers with experts, E experts, K experts a token, R rows of a record.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pointsman.moe.routing import route
from pointsman.rl.layout import Batch, Layout, layout_of
from pointsman.rl.routers import Router, routers_of
from pointsman.routed_experts import RoutedExperts, decode_record, from_numbers

_CURRENT = "_pointsman_replay"
_CHECKPOINT = "_gradient_checkpointing_func"

Record = RoutedExperts | Mapping[str, Any] | npt.NDArray[Any] | None


def replay(model: nn.Module, records: Sequence[Record], **batch: Unpack[Batch]) -> Replay:
    """A context in which a model's routers choose the experts of records.

    Args:
        model: a Hugging Face model with routers of `pointsman.rl.routers.ROUTERS`, wrapped or not.
        records: one for each sequence of the batch: a record, its JSON object, rows [rows, layers, top_k] from position 0, or None
            for a sequence that routes freely. Positions without a row do too: the last sampled token has none.
        **batch: where the sequences stand (`pointsman.rl.layout.Batch`).

    Raises:
        ValueError: a router is not known, or a record is of other layers, experts or experts a token, or longer than its sequence.
    """
    return Replay(model, records, layout_of(batch))


def record(model: nn.Module, **batch: Unpack[Batch]) -> Recording:
    """A context that records the routing of one forward pass over a batch, told as for `replay`. Raises ValueError as that does."""
    return Recording(model, layout_of(batch))


class Replay:
    """Records laid out over a batch. It may be entered again for another pass over the same batch.

    Attributes:
        num_forced: tokens that a record has a row for.
        num_free: tokens of the sequences that have none, and route freely.
    """

    def __init__(self, model: nn.Module, records: Sequence[Record], layout: Layout) -> None:
        self._model = model
        self._routers = routers_of(model)
        self._num_positions = layout.num_positions
        if len(records) != len(layout.spans):
            raise ValueError(f"{len(records)} records for {len(layout.spans)} sequences; there must be as many")
        spec = self._routers[0].spec
        dtype = np.int16 if spec.num_experts <= 1 << 15 else np.int32
        forced_LTK = np.full((len(self._routers), layout.num_positions, spec.top_k), -1, dtype)
        for index, (entry, span) in enumerate(zip(records, layout.spans, strict=True)):
            if entry is not None:
                _place(forced_LTK, self._checked(index, entry), index, span)
        self.num_forced = int((forced_LTK[0, :, 0] >= 0).sum())
        self.num_free = sum(length for _, length in layout.spans) - self.num_forced
        self._forced_LTK = torch.from_numpy(forced_LTK)
        self._same: dict[int, Tensor] = {}
        self._blocks: list[contextlib.ExitStack] = []
        self._entered = 0
        self._checkpointed = any(hasattr(module, _CHECKPOINT) for module in model.modules())
        self._remembers = False

    def _checked(self, index: int, entry: Record) -> RoutedExperts:
        """A record of a sequence, of the model's own layers and experts. Raises ValueError."""
        spec, layers = self._routers[0].spec, tuple(router.layer for router in self._routers)
        where = f"record {index}"
        try:
            if isinstance(entry, np.ndarray):
                experts = from_numbers(entry, num_experts=spec.num_experts, layers=layers)
            elif isinstance(entry, RoutedExperts):
                experts = entry
                experts.check_ids()
            else:
                experts = decode_record(entry)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if experts.layers != layers:
            raise ValueError(f"{where} is of the layers {list(experts.layers)!r:.80}; the model has routers in {list(layers)!r:.80}")
        if experts.num_experts != spec.num_experts or experts.rows_RLK.shape[2] != spec.top_k:
            chosen = f"{experts.rows_RLK.shape[2]} of {experts.num_experts} experts"
            raise ValueError(f"{where} chooses {chosen}; the model {spec.top_k} of {spec.num_experts}")
        return experts

    @property
    def layer_agreement(self) -> list[float]:
        """Of the latest pass, by layer: the share of forced tokens for which free routing would have chosen the same set.

        Raises:
            RuntimeError: no pass has run, or nothing was forced.
        """
        if len(self._same) < len(self._routers) or not self.num_forced:
            raise RuntimeError("there is no agreement: " + ("no record has a row" if not self.num_forced else "no forward pass has run"))
        return [int(self._same[index]) / self.num_forced for index in range(len(self._routers))]

    @property
    def agreement(self) -> float:
        """Of the latest pass: the share of (token, layer) choices that free routing would have made alike, order left aside."""
        return sum(self.layer_agreement) / len(self._routers)

    def __enter__(self) -> Replay:
        stack = contextlib.ExitStack()
        stack.enter_context(self._installed())
        stack.enter_context(self._remembered())
        self._blocks.append(stack)
        return self

    def __exit__(self, *_: object) -> None:
        self._blocks.pop().close()

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        """While it lasts, this replay and no other has the model's routers."""
        before = getattr(self._model, _CURRENT, None)
        hooks = [
            router.module.register_forward_hook(self._hook(index, router), with_kwargs=True) for index, router in enumerate(self._routers)
        ] if not self._entered else []  # fmt: skip
        self._entered += 1
        setattr(self._model, _CURRENT, self)
        try:
            yield
        finally:
            self._entered -= 1
            setattr(self._model, _CURRENT, before)
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[None]:
        """While it lasts, a layer that is checkpointed is computed again under this replay, whenever that is."""
        before = [(module, getattr(module, _CHECKPOINT)) for module in self._model.modules() if hasattr(module, _CHECKPOINT)]
        for module, checkpoint in before:
            setattr(module, _CHECKPOINT, self._remembering(checkpoint))
        try:
            yield
        finally:
            for module, checkpoint in before:
                setattr(module, _CHECKPOINT, checkpoint)

    def _remembering(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def again(*inputs: Any, **more: Any) -> Any:
                with self._installed():
                    before, self._remembers = self._remembers, True
                    try:
                        return function(*inputs, **more)
                    finally:
                        self._remembers = before

            return checkpoint(again, *args, **kwargs)

        return call

    def _hook(self, index: int, router: Router) -> Callable[..., Any]:
        def force(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            return self._force(index, router, output) if self._is_meant() else None

        return force

    def _is_meant(self) -> bool:
        """Whether what runs now is a pass of this replay, and not one of another, or a free one that is computed again."""
        if getattr(self._model, _CURRENT, None) is not self:
            return False
        going_backward: bool = torch._C._current_graph_task_id() != -1
        return self._remembers or not (self._checkpointed and going_backward)

    def _force(self, index: int, router: Router, output: object) -> tuple[Tensor, Tensor, Tensor]:
        """What a router returns, with the experts of the records in the place of its own where they differ."""
        logits_TE, weights_TK, ids_TK = router.read(output)
        _check_size(router, len(logits_TE), self._num_positions)
        forced_TK = self._forced_LTK[index].to(ids_TK.device, ids_TK.dtype)
        known_T = forced_TK[:, 0] >= 0
        same_T = (forced_TK.sort(dim=-1).values == ids_TK.sort(dim=-1).values).all(dim=-1)
        self._same[index] = (known_T & same_T).sum()
        other_T1 = (known_T & ~same_T).unsqueeze(-1)
        ids_TK = torch.where(other_T1, forced_TK, ids_TK)
        anew_TK = route(logits_TE, router.spec, ids_TK=ids_TK).weights_TK
        return logits_TE, torch.where(other_T1, anew_TK.to(weights_TK.dtype), weights_TK), ids_TK


class Recording:
    """The routing of the latest forward pass over a batch."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._routers = routers_of(model)
        self._layout = layout
        self._ids: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    @property
    def records(self) -> list[RoutedExperts]:
        """A record of each sequence: a row for every token that was fed, experts best first.

        Raises:
            RuntimeError: no forward pass has run.
        """
        if len(self._ids) < len(self._routers):
            raise RuntimeError("there are no records: no forward pass has run")
        ids_TLK = torch.stack([self._ids[index] for index in range(len(self._routers))], dim=1).cpu().numpy()
        told = {"num_experts": self._routers[0].spec.num_experts, "layers": [router.layer for router in self._routers]}
        return [from_numbers(ids_TLK[first : first + length], **told) for first, length in self._layout.spans]  # type: ignore[arg-type]

    def __enter__(self) -> Recording:
        self._hooks = [
            router.module.register_forward_hook(self._hook(index, router), with_kwargs=True) for index, router in enumerate(self._routers)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int, router: Router) -> Callable[..., None]:
        @torch.no_grad()
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
            logits_TE, _, ids_TK = router.read(output)
            _check_size(router, len(logits_TE), self._layout.num_positions)
            scores_TE = logits_TE.float().softmax(-1) if router.spec.score == "softmax" else logits_TE.float().sigmoid()
            bias_E = router.bias(args, kwargs)
            chosen_TK = (scores_TE if bias_E is None else scores_TE + bias_E).gather(-1, ids_TK)
            self._ids[index] = ids_TK.gather(-1, chosen_TK.argsort(dim=-1, descending=True, stable=True))

        return note


def _place(forced_LTK: npt.NDArray[Any], experts: RoutedExperts, index: int, span: tuple[int, int]) -> None:
    """Write a record's rows where its sequence stands. Raises ValueError where they do not fit."""
    first, length = span
    if experts.start + experts.num_rows > length:
        raise ValueError(f"record {index} has rows up to position {experts.start + experts.num_rows}; its sequence has {length} tokens")
    positions = first + experts.start + np.flatnonzero(experts.known_R)
    forced_LTK[:, positions] = experts.rows_RLK[experts.known_R].transpose(1, 0, 2)


def _check_size(router: Router, num_tokens: int, num_positions: int) -> None:
    if num_tokens != num_positions:
        raise ValueError(f"{router.path} routes {num_tokens} tokens; the layout has {num_positions} positions, padding included")
