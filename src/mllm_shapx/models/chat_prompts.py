"""Converts conversations to token ids, equal to those of the tokenizer's `apply_chat_template`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mllm_shap import ConversationSnapshot
from mllm_shap.backends._chat import snapshot_to_chat_messages

from mllm_shapx.config.chat_templates import template_variables
from mllm_shapx.config.model_settings import ModelSettings
from mllm_shapx.errors import ModelError, RowError
from mllm_shapx.models.control_tokens import control_tokens, matcher

Messages = list[dict[str, str]]

_LONGEST_MESSAGE = 300
_NOT_READ_BY_TEMPLATES = frozenset({"sanitize_control_tokens"})
"""Keys of `chat_template_kwargs` that `apply_chat_template` reads itself."""
_TEMPLATE_HELPS = "give a template that takes it in connector_kwargs.chat_template"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A template's refusal of a conversation."""

    message: str


class ChatPrompts:
    """Renders and tokenizes conversations with the tokenizer's chat template.

    The ids are those of `apply_chat_template(messages, add_generation_prompt=True, **template_kwargs)`. An
    assistant prefill is appended to the rendered text before tokenizing. Where the template refuses a system
    message, the first user message begins with it. Without a template, prompts are lines `role: text`, as in
    mllm_shap's own backend, with the tokenizer's special tokens.

    Not thread-safe, as fast tokenizers are not.

    Args:
        tokenizer: The model's tokenizer.
        settings: The study's settings of prompts.
        names_control_tokens: Whether the first prompt that holds a control token gives a note.

    Raises:
        ModelError: When the template refuses even a system prompt and a user message.
    """

    def __init__(self, tokenizer: Any, settings: ModelSettings, *, names_control_tokens: bool = True) -> None:
        self._notes: list[str] = []
        self._tokenizer = tokenizer
        self._model_id = settings.model_id
        self._named = f"the chat template of model {settings.model_id!r}"
        self._is_own = _overrides_template(tokenizer)
        self._template = settings.kwargs.chat_template
        self._variables = settings.kwargs.chat_template_kwargs or {}
        self._options: dict[str, Any] = dict(self._variables)
        if self._template is not None:
            self._options["chat_template"] = self._template
        self._has_template = bool(self._template or tokenizer.chat_template or self._is_own)
        self._merges_system = False
        self._trial(settings.chat.system_prompt)
        watches = names_control_tokens and not self._options.get("sanitize_control_tokens")
        self._control = matcher(control_tokens(tokenizer, self._template)) if watches else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes for the user on how prompts are made, one sentence each."""
        return tuple(self._notes)

    def encode_all(self, snapshots: Sequence[ConversationSnapshot], prefill: str = "") -> list[list[int]]:
        """Return the token ids of each conversation, with `prefill` as the beginning of the answer.

        Raises:
            RowError: `chat_template` when the template refuses a conversation, `bad_text` when the tokenizer
                cannot encode it.
        """
        conversations = [self._messages(snapshot) for snapshot in snapshots]
        self._look_for_control_tokens(conversations)
        try:
            return self._ids(conversations, prefill)
        except MemoryError:
            raise
        except Exception as error:
            raise self._row_error(conversations, error) from error

    def generation_prompt(self) -> str:
        """Return a rendered prompt. It ends with the text that the template writes before every answer."""
        return self._render([_user("Good morning.")]) if self._has_template else ""

    def _messages(self, snapshot: ConversationSnapshot) -> Messages:
        messages = snapshot_to_chat_messages(snapshot)
        return _merged(messages) if self._merges_system else messages

    def _ids(self, conversations: Sequence[Messages], prefill: str) -> list[list[int]]:
        if not self._has_template:
            return self._tokenized([_lines(each) + prefill for each in conversations], special=True)
        if prefill:
            return self._tokenized([self._render(each) + prefill for each in conversations], special=False)
        if self._is_own:
            # A custom `apply_chat_template` may not support batches.
            return [list(self._apply(each, tokenize=True, return_dict=False)) for each in conversations]
        ids: list[list[int]] = self._apply(
            list(conversations),
            tokenize=True,
            return_dict=False,
            tokenizer_kwargs={"return_attention_mask": False},
        )
        return ids

    def _tokenized(self, texts: list[str], *, special: bool) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False
        )["input_ids"]
        return ids

    def _render(self, messages: Messages, **more: Any) -> str:
        return str(self._apply(messages, tokenize=False, **more))

    def _apply(self, conversation: Any, **options: Any) -> Any:
        given = {key: value for key, value in self._options.items() if key not in options}
        if options["tokenize"] is False:
            given.pop("sanitize_control_tokens", None)  # concerns tokenizing only
        return self._tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, **given, **options
        )

    # --- at load

    def _trial(self, system_prompt: str) -> None:
        """Test whether the template accepts the study's system prompt."""
        if not self._has_template:
            self._notes.append(
                f"model {self._model_id!r} has no chat template: its prompts are the lines 'system: ...' and "
                "'user: ...' without a cue for the answer; connector_kwargs.chat_template gives it one"
            )
            self._note_unread(frozenset())
            return
        system = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
        whole = [*system, _user("Good morning.")]
        refusal = self._refusal(whole)
        if refusal is not None and system:
            self._merges_system = True
            refused, refusal = refusal, self._refusal(_merged(whole))
            if refusal is None:
                self._notes.append(
                    f"{self._named} takes no system message ({refused}): the "
                    "system prompt stands at the beginning of the first user message, before an empty line"
                )
        taken = _merged if self._merges_system else list
        refusal = refusal or self._refusal(taken([*system, _user("")]))
        if refusal is not None:
            raise ModelError(
                f"{self._named} cannot be used, with {refusal}; "
                f"correct connector_kwargs.chat_template_kwargs, or {_TEMPLATE_HELPS}"
            )
        self._look_at(taken(whole), taken([*system, _user("Where is it?")]))

    def _look_at(self, whole: Messages, other: Messages) -> None:
        """Find expected parts that are missing from a rendered prompt."""
        text = self._render(whole)
        if self._rendered(other) == text:
            raise ModelError(f"{self._named} leaves the user's text out of the prompt; {_TEMPLATE_HELPS}")
        another = [{"role": "system", "content": "Answer in verse."}, *whole[1:]]
        if whole[0]["role"] == "system" and self._rendered(another) == text:
            self._notes.append(
                f"{self._named} leaves the system prompt out of the prompt; put it into the rows' texts, or "
                "give a template in connector_kwargs.chat_template"
            )
        if self._is_own and self._template is None:
            return
        template = self._tokenizer.get_chat_template(self._template)
        self._note_unread(template_variables(template))
        if "strftime_now" in template and self._rendered(whole, strftime_now=None) != text:
            self._notes.append(
                f"{self._named} writes today's date into each prompt, so that "
                "answers of different days differ; fix it with the template's own variable in "
                "connector_kwargs.chat_template_kwargs (such as date_string)"
            )

    def _note_unread(self, read: frozenset[str]) -> None:
        unread = sorted(set(self._variables) - read - _NOT_READ_BY_TEMPLATES)
        if unread:
            self._notes.append(
                f"connector_kwargs.chat_template_kwargs: {self._named} does not read {', '.join(unread)}"
            )

    def _rendered(self, messages: Messages, **more: Any) -> str | Refusal:
        """Return the prompt, or the template's reason for refusing the conversation."""
        try:
            return self._render(messages, **more)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 -- a template may raise anything
            return Refusal(_in_words(error))

    def _refusal(self, messages: Messages) -> str | None:
        found = self._rendered(messages)
        return found.message if isinstance(found, Refusal) else None

    # --- with a row

    def _row_error(self, conversations: Sequence[Messages], error: Exception) -> RowError:
        refused = next(
            (found for each in conversations if self._has_template and (found := self._refusal(each))), None
        )
        if refused is None:
            return RowError(
                "bad_text", f"the tokenizer of model {self._model_id!r} cannot encode it: {_in_words(error)}"
            )
        count = sum(message["role"] == "user" for message in conversations[0])
        return RowError(
            "chat_template",
            f"{self._named} refuses this conversation of {count} user "
            f"message(s): {refused}; {_TEMPLATE_HELPS}",
        )

    def _look_for_control_tokens(self, conversations: Sequence[Messages]) -> None:
        if self._control is None:
            return
        texts = ["\n".join(each["content"] for each in messages) for messages in conversations]
        # Coalitions are parts of one text: the longest contains every control token of the others.
        found = self._control.search(max(texts, key=len))
        if found is not None:
            self._control = None
            self._notes.append(
                f"prompts hold special tokens of model {self._model_id!r} as text (the first is "
                f"{found.group()!r}); they become control tokens, as in the tokenizer's own "
                "apply_chat_template"
            )


def _overrides_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer overrides `apply_chat_template`."""
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _lines(messages: Messages) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _merged(messages: Messages) -> Messages:
    """Return the conversation with its system prompt at the beginning of the first user message."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    if not system or not rest:
        return messages
    first, *others = rest
    return [{**first, "content": "\n\n".join([*system, first["content"]])}, *others]


def _in_words(error: Exception) -> str:
    """Return the first line of an error's message; prefixed with the type unless the template raised it."""
    from jinja2 import TemplateError

    line = next(iter(str(error).strip().splitlines()), "")[:_LONGEST_MESSAGE]
    if type(error) is TemplateError and line:
        return f"{line!r}"
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
