"""Between text and token ids: tokenizer, chat template, incremental detokenizer, stop strings."""

from pointsman.text.chat_prompt import ChatPrompt, chat_prompt
from pointsman.text.detokenizer import Detokenizer
from pointsman.text.stops import StopStrings
from pointsman.text.template import ChatTemplate
from pointsman.text.tokenizer import Tokenizer, TooManyTokens

__all__ = ["ChatPrompt", "ChatTemplate", "Detokenizer", "StopStrings", "Tokenizer", "TooManyTokens", "chat_prompt"]
