"""Prompts for models that were taught to converse, and prompts that begin with solved examples.

    "Is it so?" + " Yes"  ->  <|user|>Is it so?<|assistant|> + "Yes"                            chat
                          ->  demonstration \\n\\n demonstration \\n\\n "Is it so?" + " Yes"        with_shots

A chat template writes the special tokens itself, so what comes from one is to be encoded with
`add_special_tokens=False`; otherwise many a tokenizer puts a second token of beginning in front.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zotuner.errors import ZotunerError
from zotuner.tasks import Example

Turns = list[dict[str, str]]


def chat(examples: Sequence[Example], tokenizer: Any) -> list[Example]:
    """The same examples under the tokenizer's chat template: the prompt is the user's turn, the candidate the answer.

    A template ends where the answer begins, so candidates and answers lose the white space at their beginning.

    Args:
        examples: For causal models.
        tokenizer: Of transformers; its template may add a system's turn.

    Raises:
        ZotunerError: The tokenizer has no chat template, the template refuses a turn, or an example is for masked
            models.
    """
    return with_shots(examples, (), tokenizer)[1]


def with_shots(
    examples: Sequence[Example], shots: Sequence[Example], tokenizer: Any = None
) -> tuple[str, list[Example]]:
    """Examples whose prompts begin with demonstrations: prompts with their right candidates (MeZO, arXiv:2305.17333).

    Args:
        examples: For causal models.
        shots: Solved examples of the same task, in order; they should be none of `examples`.
        tokenizer: Writes each demonstration as a turn of the user's and one of the assistant's, under its chat
            template; None: plain text, with an empty line between.

    Returns:
        (text that all prompts begin with, the examples). Its tokens need not be the first ones of a prompt: a
        tokenizer may join what stands at the seam.

    Raises:
        ZotunerError: As of `chat`.
    """
    if any(example.suffix for example in (*examples, *shots)):
        raise ZotunerError("demonstrations and chat templates are for causal models: masked ones read one sentence")
    if tokenizer is None:
        shared = "".join((shot.prompt + shot.candidates[shot.label]).strip() + "\n\n" for shot in shots)
        return shared, [replace(example, prompt=shared + example.prompt) for example in examples]
    turns = [turn for shot in shots for turn in _turns(shot.prompt, shot.candidates[shot.label])]
    made = [_answering(example, _rendered(tokenizer, [*turns, *_turns(example.prompt)])) for example in examples]
    if not turns:
        return "", made
    # a template may write an earlier turn otherwise once another follows: what is shared is what all have
    return _common([_rendered(tokenizer, turns, prompt=False), *(example.prompt for example in made)]), made


def _common(texts: list[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)  # in the order of the alphabet: what these two share, all between them do
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _turns(prompt: str, answer: str | None = None) -> Turns:
    user = {"role": "user", "content": prompt.strip()}
    return [user] if answer is None else [user, {"role": "assistant", "content": answer.strip()}]


def _answering(example: Example, prompt: str) -> Example:
    """The example with another prompt, behind which an answer begins with no space."""
    candidates, answers = (tuple(map(str.lstrip, texts)) for texts in (example.candidates, example.answers))
    return replace(example, prompt=prompt, candidates=candidates, answers=answers)


def _rendered(tokenizer: Any, turns: Turns, *, prompt: bool = True) -> str:
    """The text of a conversation, up to where the assistant is to speak."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ZotunerError(
            "--chat: this model's tokenizer has no chat template (chat_template); leave out --chat, or take a model "
            "that was tuned to converse"
        )
    try:
        text: str = tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=False)
    except (TemplateError, ValueError) as error:
        raise ZotunerError(f"--chat: this model's chat template refuses the prompt: {error}") from None
    return text
