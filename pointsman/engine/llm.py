"""The Python front door: prompts in, results out.

    from pointsman import LLM, SamplingParams
    llm = LLM()
    llm.generate(["..."], SamplingParams(max_tokens=64))[0].outputs[0].text

It drives one engine in the caller's thread. Keywords are the flags of `pointsman serve` with underscores.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from pointsman.config import engine_config
from pointsman.engine.control import Control
from pointsman.engine.engine import Engine
from pointsman.replay import replay_of
from pointsman.request import (
    ChoiceDelta,
    CompletionOutput,
    MemoryTag,
    PauseMode,
    Replay,
    Request,
    RequestFailed,
    RequestOutput,
    SamplingParams,
)
from pointsman.routed_experts import RoutedExperts
from pointsman.text import chat_prompt
from pointsman.update import Update

Prompt = str | Sequence[int]
GROUP_NAME = "weight_update_group"


class LLM:
    """A model to generate with.

    Args:
        model: folder or Hugging Face id of the checkpoint; None is the bundled one.
        progress: show bars on stderr while loading and generating; None shows them on a terminal.
        **config: the flags of `pointsman serve`, with underscores.

    Raises:
        ValueError: an option or the checkpoint cannot be used; the message says what would work.
    """

    def __init__(self, model: str | None = None, *, progress: bool | None = None, **config: Any) -> None:
        self._engine = Engine(engine_config(model_path=model, **config), progress=progress)
        self._control = Control(self._engine)
        self._progress = progress
        self._names = itertools.count()

    @property
    def engine(self) -> Engine:
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        replay_routed_experts: Any = None,
    ) -> list[RequestOutput]:
        """Answer each prompt (a text, or token ids); results come in the order of the prompts.

        Args:
            replay_routed_experts: the experts that tokens shall use, for a single prompt, or a list with as many, or None, for each prompt:
                a routing record, a `pointsman.routed_experts.RoutedExperts`, or an array of integers [rows, layers, top_k] for
                positions from 0 on, in which rows of -1 route freely. Positions count prompt and output together.

        Raises:
            ValueError: a prompt is empty or too long, a replay is not of this model or too long, or there are not as many sampling
                parameters or replays as prompts.
        """
        many = _as_list(prompts)
        params = _params_for(many, sampling_params)
        replays = self._replays(many, replay_routed_experts)
        requests = [self._request(*each) for each in zip(many, params, replays, strict=True)]
        texts = [prompt if isinstance(prompt, str) else None for prompt in many]
        return self._run(requests, texts)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        replay_routed_experts: Any = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, through the checkpoint's chat template.

        Args:
            messages: one conversation or a list of them.
            tools: OpenAI function descriptions, the same for all conversations.
            replay_routed_experts: as in `generate`.
            **template: passed on to the chat template.

        Raises:
            ValueError: the checkpoint has no chat template, or the template refuses the messages.
        """
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
        prompts = [self.render(conversation, tools=tools, **template) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, replay_routed_experts=replay_routed_experts)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None, **template: Any
    ) -> list[int]:
        """The token ids of a conversation that asks for the next assistant turn; only the template writes control tokens."""
        if self._engine.chat_template is None or self._engine.tokenizer is None:
            raise ValueError(f"{self._engine.model_name} has no chat template; use generate with a text or token ids")
        return chat_prompt(self._engine.tokenizer, messages, tools, **template).ids

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, replay_routed_experts: Any = None
    ) -> Generator[ChoiceDelta, None, None]:
        """Yield what each step adds to the answer. Closing the iterator aborts the request. Arguments are as in `generate`."""
        [replay] = self._replays([prompt], replay_routed_experts)
        request = self._request(prompt, sampling_params or SamplingParams(), replay)
        self._engine.add(request)
        left = request.sampling.n
        try:
            while left:
                self._check_running()
                for delta in self._engine.step():
                    left -= delta.finish_reason is not None
                    yield delta
        finally:
            if left:
                self._engine.abort(request.rid)

    @property
    def weight_version(self) -> str:
        """What the weights in force are called."""
        return self._engine.weight_version

    def pause_generation(self, mode: PauseMode = "abort") -> None:
        """Let no step run until `continue_generation`; see `Control.pause` for the modes."""
        self._control.pause(mode)

    def continue_generation(self) -> None:
        """Let steps run again."""
        self._control.resume()

    def release_memory_occupation(self, tags: Sequence[MemoryTag] | None = None) -> None:
        """Free the memory of "weights", "kv_cache" or both; see `Control.release_memory`."""
        self._control.release_memory(tags)

    def resume_memory_occupation(self, tags: Sequence[MemoryTag] | None = None) -> None:
        """Have it again; see `Control.resume_memory`."""
        self._control.resume_memory(tags)

    def update_weights_from_disk(
        self, model_path: str, *, flush_cache: bool = True, abort_all_requests: bool = False, weight_version: str | None = None
    ) -> str:
        """Replace all weights by a checkpoint's, or change nothing and raise ValueError; see `Control`. Returns the version in force."""
        update = Update(flush_cache=flush_cache, abort_all_requests=abort_all_requests, weight_version=weight_version)
        return self._control.update_weights_from_disk(model_path, update)

    def update_weights_from_tensor(self, tensors: Mapping[str, Tensor], **update: Any) -> str:
        """Replace the weights of these names, or change nothing and raise ValueError. Returns the version in force.

        Args:
            update: begin, final, quantize, flush_cache, abort_all_requests, weight_version: see `pointsman.update.Update`.
        """
        return self._control.update_weights_from_tensor(tensors, Update(**update))

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        *,
        world_size: int = 2,
        rank_offset: int = 1,
        group_name: str = GROUP_NAME,
        backend: str = "nccl",
        timeout: float = 60.0,
    ) -> None:
        """Join a trainer's process group, in which it is rank 0 and this engine `rank_offset`; waits for all of them.

        Args:
            timeout: seconds that joining, and the broadcasts of one update, may take.

        Raises:
            ValueError: they do not come together, or the engine is in a group already.
        """
        where = {"master_address": master_address, "master_port": master_port, "rank": rank_offset, "world_size": world_size}
        self._control.join_group(**where, name=group_name, backend=backend, timeout=timeout)  # type: ignore[arg-type]

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        group_name: str = GROUP_NAME,
        **update: Any,
    ) -> str:
        """Replace weights by what rank 0 of the group broadcasts, or change nothing and raise ValueError. Returns the version in force.

        Args:
            names, dtypes, shapes: of each tensor, in the order of the broadcasts; types as torch or safetensors call them.
            update: as for tensors.
        """
        if not len(names) == len(dtypes) == len(shapes) > 0:
            raise ValueError(f"{len(names)} names, {len(dtypes)} dtypes, {len(shapes)} shapes; there must be one of each for every tensor")
        types = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        announced = list(zip(names, types, map(tuple, shapes), strict=True))
        return self._control.update_weights_from_group(announced, group_name, Update(**update))

    def destroy_weights_update_group(self, group_name: str = GROUP_NAME) -> None:
        """Leave it. Raises ValueError where the engine is in no such group."""
        self._control.leave_group(group_name)

    def close(self) -> None:
        """End the engine's threads."""
        self._engine.close()

    def record(self, choice: CompletionOutput | ChoiceDelta, *, start: int = 0) -> RoutedExperts:
        """The routing record of a finished choice: its rows with what is missing of them and which weights chose.

        `pointsman.routed_experts.encode` and the adapters take it, and so does a replay.

        Args:
            start: the `routed_experts_start` that was asked for.

        Raises:
            ValueError: it was not asked to return its rows.
        """
        if choice.routed_experts is None:
            raise ValueError("this choice has no rows; ask with return_routed_experts=True, and give its last piece where it streams")
        return RoutedExperts(
            rows_RLK=choice.routed_experts,
            num_experts=self._engine.architecture.num_experts,
            start=start,
            layers=self._engine.architecture.expert_layers,
            missing=tuple(choice.routed_experts_missing),
            weight_versions=tuple(choice.weight_versions),
        )

    def _check_running(self) -> None:
        if not self._engine.halted or self._engine.has_work:
            return
        if released := self._engine.weights.released:
            raise RuntimeError(f"nothing would come: {' and '.join(released)} released; call resume_memory_occupation first")
        raise RuntimeError("generation is paused, and nothing would come; call continue_generation first")

    def _replays(self, prompts: Sequence[Prompt], given: Any) -> list[Replay | None]:
        """A replay, or None, for each prompt."""
        if given is None:
            return [None] * len(prompts)
        many = list(given) if isinstance(given, (list, tuple)) else [given]
        if len(many) != len(prompts):
            raise ValueError(f"replay_routed_experts has {len(many)} entries for {len(prompts)} prompts; give one, or None, for each")
        return [None if each is None else replay_of(each, **self._engine.routing_sizes) for each in many]

    def _request(self, prompt: Prompt, sampling: SamplingParams, replay: Replay | None) -> Request:
        if isinstance(prompt, str):
            if self._engine.tokenizer is None:
                raise ValueError("this checkpoint has no tokenizer.json; pass token ids")
            prompt = self._engine.tokenizer.encode(prompt)
        ids = tuple(int(token) for token in prompt)
        return Request(rid=f"llm-{next(self._names)}", prompt_token_ids=ids, sampling=sampling, replay=replay)

    def _run(self, requests: list[Request], texts: list[str | None]) -> list[RequestOutput]:
        results = {
            request.rid: RequestOutput(
                request_id=request.rid,
                prompt=text,
                prompt_token_ids=list(request.prompt_token_ids),
                outputs=[_blank(index, request.sampling) for index in range(request.sampling.n)],
            )
            for request, text in zip(requests, texts, strict=True)
        }
        waiting = iter(requests)
        left = 0
        try:
            with self._bar() as bar:
                task = bar.add_task("generate", total=sum(request.sampling.n for request in requests))
                while True:
                    left += self._top_up(waiting)
                    if not left:
                        break
                    self._check_running()
                    for delta in self._engine.step():
                        merge(results[delta.rid], delta)
                        if delta.finish_reason is not None:
                            left -= 1
                            bar.advance(task)
        finally:
            for request in requests:
                if not results[request.rid].finished:
                    self._engine.abort(request.rid)
        return list(results.values())

    def _top_up(self, waiting: Iterator[Request]) -> int:
        """Hand over as many requests as the queue takes, and return how many choices that adds."""
        room = self._engine.config.scheduler.max_queued_requests - self._engine.num_waiting
        added = 0
        for request in itertools.islice(waiting, max(room // 2, 0)):
            self._engine.add(request)
            added += request.sampling.n
        return added

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = Progress(*columns, transient=True, refresh_per_second=4)
        bar.console.stderr = True
        bar.disable = self._progress is False or (self._progress is None and not bar.console.is_terminal)
        return bar


def merge(result: RequestOutput, delta: ChoiceDelta) -> None:
    """Add what a step brought to a result. Raises RequestFailed where the engine gave up on the choice, ValueError where it refused."""
    if delta.refused:
        raise ValueError(delta.error)
    if delta.error is not None:
        raise RequestFailed(f"request {delta.rid} failed: {delta.error}")
    output = result.outputs[delta.index]
    output.text += delta.text
    output.token_ids.extend(delta.token_ids)
    if delta.logprobs is not None and output.logprobs is not None:
        output.logprobs.extend(delta.logprobs)
    if delta.prompt_logprobs is not None:
        result.prompt_logprobs = delta.prompt_logprobs
    if delta.index == 0:
        result.num_cached_tokens = delta.num_cached_tokens
    if delta.finish_reason is not None:
        output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
        output.routed_experts, output.routed_experts_missing = delta.routed_experts, list(delta.routed_experts_missing)
        output.routing_agreement = delta.routing_agreement
        output.weight_version, output.weight_versions = delta.weight_version, list(delta.weight_versions)
        result.finished = all(choice.finish_reason is not None for choice in result.outputs)


def _blank(index: int, sampling: SamplingParams) -> CompletionOutput:
    return CompletionOutput(index=index, logprobs=None if sampling.logprobs is None else [])


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params_for(prompts: list[Prompt], given: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * len(prompts)
    if len(given) != len(prompts):
        raise ValueError(f"{len(given)} sampling parameters for {len(prompts)} prompts; pass one for all, or one for each")
    return list(given)
