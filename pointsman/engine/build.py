"""Everything that is decided once, at start-up.

From a configuration to the parts of an engine: which checkpoint, which kernels, how much cache. Each choice is logged with its
reason, and a wish that cannot be granted ends here with what would work instead.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointsman import tiny
from pointsman.cache.pages import PagePool
from pointsman.cache.radix import RadixCache
from pointsman.config import EngineConfig
from pointsman.engine.batch import Lanes
from pointsman.engine.compiled import choose_step
from pointsman.engine.memory import CacheSize, memory_bytes, size_cache
from pointsman.engine.model_runner import ModelRunner
from pointsman.layers.attention import PagedKV
from pointsman.models.architecture import Architecture
from pointsman.models.loader import Loaded, load_model
from pointsman.moe.capture import RouteStore
from pointsman.scheduler import Scheduler
from pointsman.text import ChatTemplate, Tokenizer
