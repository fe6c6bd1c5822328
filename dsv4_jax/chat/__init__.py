"""The chat format of the release: messages to prompt text, and answers back to messages.

`encode` is what the model was trained on; `StreamParser` and `parse` read what it writes.
"""

from dsv4_jax.chat.prompt import Effort as Effort
from dsv4_jax.chat.prompt import encode as encode
from dsv4_jax.chat.stream import AssistantMessage as AssistantMessage
from dsv4_jax.chat.stream import ContentDelta as ContentDelta
from dsv4_jax.chat.stream import Event as Event
from dsv4_jax.chat.stream import ParseError as ParseError
from dsv4_jax.chat.stream import ReasoningDelta as ReasoningDelta
from dsv4_jax.chat.stream import StreamParser as StreamParser
from dsv4_jax.chat.stream import ToolCall as ToolCall
from dsv4_jax.chat.stream import parse as parse
from dsv4_jax.chat.tokens import check_tokenizer as check_tokenizer
