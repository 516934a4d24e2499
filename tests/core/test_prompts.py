import pytest
from tiny import make_tokenizer

from sdft_ray.core.prompts import CHECKABLE, OPEN, encode_row, end_of_turn, render_prompt, rewrite_instruction


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_render_prompt_is_templated_and_tokenised_once(tokenizer):
    ids = render_prompt(tokenizer, "2 + 2?")
    assert tokenizer.decode(ids) == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(tokenizer.bos_token_id) == 2  # one a turn, none added in front


@pytest.mark.parametrize("response", ["4", "", "It is 4.\n#### 4", "  leading and trailing  ", "{braces} and é"])
def test_encode_row_labels_decode_to_response_and_end_of_turn(tokenizer, response):
    row = encode_row(tokenizer, "2 + 2?", response)
    assert tokenizer.decode(row.ids[row.trained_from :]) == f"{response}<|im_end|>"
    assert row.ids[: row.trained_from] == render_prompt(tokenizer, "2 + 2?")


def test_end_of_turn_falls_back_to_eos_without_a_closing_mark(tokenizer):
    plain = make_tokenizer()
    plain.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(plain) == plain.eos_token_id
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_render_prompt_neither_thinks_nor_knows_the_date():
    odd = make_tokenizer()
    odd.chat_template = "{{ strftime_now('%d') }} {{ date_string }} {% if enable_thinking %}<think>{% endif %}"
    assert odd.decode(render_prompt(odd, "2 + 2?")) == "26 Jul 2024 26 Jul 2024 "
    assert odd.decode(render_prompt(odd, "2 + 2?", {"enable_thinking": True})) == "26 Jul 2024 26 Jul 2024 <think>"


@pytest.mark.parametrize("template", [CHECKABLE, OPEN], ids=["checkable", "open"])
def test_rewrite_instruction_holds_prompt_and_reference_verbatim(template):
    text = rewrite_instruction("Is {this} a {prompt}?", "Yes: {reference} \\1", template)
    assert "Is {this} a {prompt}?" in text
    assert "Yes: {reference} \\1" in text


def test_rewrite_instruction_own_template_may_name_the_reference_first():
    assert rewrite_instruction("Q", "R", "{reference} <- {prompt}") == "R <- Q"
