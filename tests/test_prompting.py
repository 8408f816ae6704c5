"""Prompts under a chat template, and prompts that begin with demonstrations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from zotuner.errors import ZotunerError
from zotuner.models import load_tokenizer
from zotuner.objective import Objective
from zotuner.prompting import _common, chat, with_shots
from zotuner.tasks import Example, get_task

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
DROPS_THE_LAST = (  # as templates that leave the reasoning of all turns but the last out
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ ' (last)' if loop.last }}\n{% endfor %}"
)
REFUSES = "{{ raise_exception('users may not speak first') }}"

ASKED = Example("Is it warm?\n", (" Yes", " No\n"), 0)
SAID = Example(" It is cold. It was", (" terrible", " great"), 1)
FREE = Example("Capital of Bolivia:", (" Sucre\n",), 0, answers=("Sucre", " La Paz"))


@pytest.fixture
def talking(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a template that writes the token of beginning."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


def test_a_chat_is_the_users_turn_and_an_answer_without_a_space_in_front(talking: Any) -> None:
    assert chat([ASKED, SAID, FREE], talking) == [
        Example("<s>[user]Is it warm?\n[assistant]", ("Yes", "No\n"), 0),
        Example("<s>[user]It is cold. It was\n[assistant]", ("terrible", "great"), 1),
        Example("<s>[user]Capital of Bolivia:\n[assistant]", ("Sucre\n",), 0, answers=("Sucre", "La Paz")),
    ]


def test_demonstrations_are_prompts_with_their_right_candidates_an_empty_line_between() -> None:
    shared, (made,) = with_shots([ASKED], [SAID, FREE])
    assert shared == "It is cold. It was great\n\nCapital of Bolivia: Sucre\n\n"
    assert made == Example(shared + ASKED.prompt, ASKED.candidates, ASKED.label)


def test_demonstrations_of_a_chat_are_turns(talking: Any) -> None:
    shared, (made,) = with_shots([ASKED], [SAID, FREE], talking)
    assert shared == ("<s>[user]It is cold. It was\n[assistant]great\n[user]Capital of Bolivia:\n[assistant]Sucre\n")
    assert made == Example(f"{shared}[user]Is it warm?\n[assistant]", ("Yes", "No\n"), 0)


def test_what_is_shared_is_shared_although_a_template_writes_the_last_turn_otherwise(talking: Any) -> None:
    talking.chat_template = DROPS_THE_LAST
    shared, made = with_shots([ASKED, SAID], [FREE], talking)
    assert shared == "[user]Capital of Bolivia:\n[assistant]Sucre"
    assert all(example.prompt.startswith(shared) for example in made)


def test_no_demonstrations_leave_plain_examples_as_they_are() -> None:
    assert with_shots([ASKED, FREE], []) == ("", [ASKED, FREE])


def test_no_demonstrations_share_nothing_in_a_chat(talking: Any) -> None:
    assert with_shots([ASKED, SAID], [], talking) == ("", chat([ASKED, SAID], talking))


@pytest.mark.parametrize("shots", [(), (SAID,)], ids=["none", "one"])
def test_a_tokenizer_without_a_template_is_refused(tokenizer: Any, shots: Sequence[Example]) -> None:
    with pytest.raises(ZotunerError, match="--chat: this model's tokenizer has no chat template"):
        with_shots([ASKED], shots, tokenizer)


def test_what_a_template_raises_is_one_line(talking: Any) -> None:
    talking.chat_template = REFUSES
    with pytest.raises(ZotunerError, match=r"^--chat: .* refuses the prompt: users may not speak first$"):
        chat([ASKED], talking)


def test_examples_for_masked_models_are_refused(talking: Any) -> None:
    masked = Example("It was", (" terrible", " great"), 1, suffix=".")
    with pytest.raises(ZotunerError, match="causal models"):
        chat([masked], talking)
    with pytest.raises(ZotunerError, match="causal models"):
        with_shots([ASKED], [masked])


@given(st.lists(st.text("ab", max_size=4), min_size=1, max_size=5))
def test_what_texts_have_in_common_is_the_longest_they_all_begin_with(texts: list[str]) -> None:
    shared = _common(texts)
    assert all(text.startswith(shared) for text in texts)
    longer = {text[: len(shared) + 1] for text in texts}
    assert len(longer) > 1 or longer == {shared}


@pytest.mark.slow
def test_the_real_template_ends_where_the_answer_begins_and_no_token_is_joined_across() -> None:
    """A candidate has the tokens that it has alone: the prompt ends in a newline of the template."""
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    shared, made = with_shots([ASKED, SAID], [FREE], tokenizer)
    assert shared.startswith("<|im_start|>system\n")
    assert shared.endswith("<|im_start|>assistant\nSucre<|im_end|>\n")
    for example, prompt in zip(made, (ASKED.prompt, SAID.prompt), strict=True):
        assert example.prompt == f"{shared}<|im_start|>user\n{prompt.strip()}<|im_end|>\n<|im_start|>assistant\n"
        objective = Objective(get_task("demo-sentiment"), tokenizer)
        counts = objective.batch([example]).counts.tolist()
        assert counts == [len(tokenizer(text)["input_ids"]) for text in example.candidates]
        ids = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 5
