"""A stand-in for LLM that answers with given texts, through the real tokenizer and chat template of the bundled checkpoint."""

from types import SimpleNamespace

from pointsman import tiny
from pointsman.engine.llm import merge
from pointsman.request import ChoiceDelta, CompletionOutput, FinishReason, RequestOutput
from pointsman.text import Tokenizer


class ScriptedLLM:
    """Answers the prompts in the order of `texts`; `prompts` and `params` are what it was asked."""

    def __init__(self, *texts, finish=FinishReason.STOP, error=None, template=True):
        self.texts, self.finish, self.error = list(texts), finish, error
        self.prompts, self.params = [], []
        self.closed = False
        tokenizer = Tokenizer.load(tiny.path())
        self.engine = SimpleNamespace(
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template if template else None,
            generation_defaults={"temperature": 0.6, "top_k": 20},
            model_name="scripted",
        )

    def __call__(self, **config):
        self.config = config
        return self

    def render(self, messages, *, tools=None):
        return self.engine.tokenizer.encode(self.engine.chat_template.render(messages, tools=tools))

    def stream(self, prompt, params):
        self.prompts.append(self.engine.tokenizer.decode(prompt, skip_special_tokens=False))
        self.params.append(params)
        text = self.texts.pop(0)
        for piece in text:
            yield ChoiceDelta(rid="0", index=0, text=piece, token_ids=[ord(piece)])
        yield ChoiceDelta(rid="0", index=0, finish_reason=self.finish, error=self.error)

    def generate(self, prompts, params):
        results = []
        for prompt in prompts:
            outputs = [CompletionOutput(index=index) for index in range(params.n)]
            result = RequestOutput(request_id="0", prompt=None, prompt_token_ids=list(prompt), outputs=outputs)
            for index in range(params.n):
                for delta in self.stream(prompt, params):
                    delta.index = index
                    merge(result, delta)
            results.append(result)
        return results

    def close(self):
        self.closed = True
