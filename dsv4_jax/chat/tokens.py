"""Special tokens and fixed texts of the release's prompts (model.md 8.1, 8.2).

Both are data of the trained format: every byte counts.
"""

from typing import Any

from tokenizers import Tokenizer

__all__ = [
    "ASSISTANT",
    "BOS",
    "DSML",
    "EOS",
    "LATEST_REMINDER",
    "MAXIMUM_EFFORT",
    "RESPONSE_FORMAT",
    "TASKS",
    "THINK",
    "THINK_END",
    "TOOLS",
    "USER",
    "check_tokenizer",
]

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"

TASKS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
"""Tokens that ask for a one-shot classification instead of an answer."""

MAXIMUM_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)

RESPONSE_FORMAT = (
    "## Response Format:\n\n"
    "You MUST strictly adhere to the following schema to reply:\n"
)  # fmt: skip
"""Followed by the schema as JSON."""

TOOLS = (
    f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, \
booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside \
{THINK}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

""",
    """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
""",
)
"""What stands before and after the schemas, one JSON object per line."""

_NEEDED = (BOS, EOS, USER, ASSISTANT, THINK, THINK_END, DSML)


def check_tokenizer(tokenizer: Tokenizer, config: Any, source: str) -> None:
    """Whether chat prompts can be tokenised for a model.

    Fewer tokens than the embedding has rows are fine: the release pads its embedding.

    Args:
        tokenizer: the checkpoint's.
        config: has ``vocab_size``, ``bos_token_id`` and ``eos_token_id``.
        source: names the checkpoint in messages.

    Raises:
        ValueError: the tokenizer has ids that the model has not, lacks a token that every chat
            prompt needs, or has BOS or EOS at another id.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{source}: chat: the tokenizer's ids must be below the model's vocab_size "
            f"{config.vocab_size}, its largest is {largest}"
        )
    missing = [
        token
        for token in _NEEDED
        if tokenizer.encode(token, add_special_tokens=False).ids != [tokenizer.token_to_id(token)]
    ]
    if missing:
        raise ValueError(
            f"{source}: chat: tokenizer.json must have every token of the chat format, it lacks "
            f"{', '.join(missing)}"
        )
    for name, token in (("bos_token_id", BOS), ("eos_token_id", EOS)):
        found, wanted = tokenizer.token_to_id(token), getattr(config, name)
        if found != wanted:
            raise ValueError(
                f"{source}: chat: {token} must have the id that config.json gives as {name}, "
                f"{wanted}, got {found}"
            )
