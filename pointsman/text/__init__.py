"""Between text and token ids: tokenizer, chat template, incremental detokenizer, stop strings."""

from pointsman.text.detokenizer import Detokenizer
from pointsman.text.stops import StopStrings
from pointsman.text.template import ChatTemplate
from pointsman.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "StopStrings", "Tokenizer"]
