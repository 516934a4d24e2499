import pytest
from tiny import CHAT_TEMPLATE, make_tokenizer

from sdft_ray.core.prompts import CHECKABLE, OPEN, rewrite_instruction
from sdft_ray.core.rows import Exchange
from sdft_ray.data.chat import (
    encode_row,
    encode_rows,
    end_of_turn,
    opened_thought,
    opening_ids,
    read_generated,
    render_prompt,
    require_trainable,
    require_writable,
)
from sdft_ray.errors import UserError

ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
OPENS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# As Gemma 4, which thinks of nothing before it responds where it is asked not to think; conversations do not show it.
EMPTY_THOUGHT = CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
# As Command R7B: marks around the thought and the response, which are closed one after the other.
RESPONSES = (
    "{% for m in messages %}<|START|>{{ m.role }}{% if m.role == 'assistant' %}<|START_RESPONSE|>{{ m.content }}"
    "<|END_RESPONSE|>{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|START|>assistant<|START_THINKING|><|END_THINKING|>{% endif %}"
)
RESPONSE_MARKS = (
    "<|START|>",
    *(f"<|{edge}_{part}|>" for edge in ("START", "END") for part in ("THINKING", "RESPONSE")),
)
# As GLM-Edge: every conversation ends in the beginning of the next turn.
ALWAYS_ASKS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"
# Takes thoughts out of the turns of before, as those of reasoning models do.
DROPS_THOUGHTS = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")


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


def with_template(template, *marks, special=True, merges=()):
    """Return the byte tokenizer with another template, tokens of its own for some marks, and some merged bytes."""
    tokenizer = make_tokenizer(merges)
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(marks), special_tokens=special)
    return tokenizer


def make_sentencepiece(kind, template, **marks):
    """Return a tokenizer that puts a piece before a text, as those of Llama 2 (legacy), Mistral and T5 do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(i) for i in range(33, 127)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "▁", "▁I", "▁It"]
    if kind == "unigram":
        tokenizer = Tokenizer(
            models.Unigram([(piece, 0.0 if piece[0] == "<" else -len(piece)) for piece in pieces], 0, True)
        )
    else:
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        merges = [("▁", "I"), ("▁I", "t")]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(mark, rstrip=True, normalized=False) for mark in marks.pop("rstrip", [])]
    tokenizer.add_special_tokens([*special, AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


@pytest.mark.parametrize("kind", ["legacy", "metaspace", "unigram"])
@pytest.mark.parametrize(
    ("template", "conversation", "trained"),
    [
        (ZEPHYR, "<|user|>\n2 + 2?</s>\n<|assistant|>\nIt is 4.</s>", ["I", "t", "▁", "i", "s", "▁", "4", ".", "</s>"]),
        (LLAMA_2, "<s>[INST] 2 + 2? [/INST] It is 4. </s>", ["▁It", "▁", "i", "s", "▁", "4", ".", "▁", "</s>"]),
    ],
    ids=["zephyr", "llama_2"],
)
def test_encode_row_of_sentencepiece_is_the_whole_conversation_without_a_piece_of_its_own(
    kind, template, conversation, trained
):
    tokenizer = make_sentencepiece(kind, template)
    row = encode_row(tokenizer, "2 + 2?", "It is 4.")
    assert row.ids == tokenizer(conversation, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(row.ids[row.trained_from :]) == trained
    assert row.ids[: row.trained_from] == render_prompt(tokenizer, "2 + 2?")


def test_encode_row_of_a_mark_that_eats_the_line_break_behind_it_is_the_whole_conversation():
    tokenizer = make_sentencepiece("legacy", PHI_3, rstrip=["<|user|>", "<|assistant|>", "<|end|>"])
    row = encode_row(tokenizer, "2 + 2?", "It is 4.")
    conversation = "<|user|>\n2 + 2?<|end|>\n<|assistant|>\nIt is 4.<|end|>"
    assert row.ids == tokenizer(conversation, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(row.ids[row.trained_from :]) == [
        "▁It", "▁", "i", "s", "▁", "4", ".", "<|end|>"
    ]  # fmt: skip


@pytest.mark.parametrize("merges", [(), [("Ċ", "Ċ")]], ids=["bytes", "merged"])
@pytest.mark.parametrize("marks", [(), ("<think>", "</think>")], ids=["text", "tokens"])
def test_encode_row_of_a_template_that_opens_a_thought_trains_its_end_before_the_response(marks, merges):
    tokenizer = with_template(OPENS_THOUGHTS, *marks, special=False, merges=merges)
    row = encode_row(tokenizer, "2 + 2?", "It is 4.")
    assert row.ids[: row.trained_from] == render_prompt(tokenizer, "2 + 2?")
    assert tokenizer.decode(row.ids[: row.trained_from]).endswith("<|im_start|>assistant\n<think>\n")
    assert tokenizer.decode(row.ids[row.trained_from :]) == "\n</think>\n\nIt is 4.<|im_end|>"
    assert tokenizer.decode(opening_ids(tokenizer)) == "\n</think>\n\n"


def test_encode_row_of_channels_trains_the_final_channel_and_its_own_end():
    tokenizer = with_template(CHANNELS, "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
    row = encode_row(tokenizer, "2 + 2?", "It is 4.")
    assert tokenizer.decode(row.ids[: row.trained_from]) == "<|start|>user<|message|>2 + 2?<|end|><|start|>assistant"
    assert tokenizer.decode(row.ids[row.trained_from :]) == "<|channel|>final<|message|>It is 4.<|return|>"
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|return|>")


@pytest.mark.parametrize(
    ("template", "generated", "expected"),
    [
        (CHAT_TEMPLATE, "It is 4.", "It is 4."),
        (OPENS_THOUGHTS, "\n</think>\n\nIt is 4.", "It is 4."),
        (OPENS_THOUGHTS, "2 and 2.\n</think>\n\nIt is 4.", "<think>\n2 and 2.\n</think>\n\nIt is 4."),
        (OPENS_THOUGHTS, "2 and 2, so 4", "<think>\n2 and 2, so 4"),
        (CHANNELS, "<|channel|>final<|message|>It is 4.", "It is 4."),
        (CHANNELS, "<|channel|>analysis<|message|>2 and 2", "analysis2 and 2"),
    ],
)
def test_read_generated_tells_the_response_from_what_a_template_has_before_it(template, generated, expected):
    tokenizer = with_template(template, "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
    ids = tokenizer(generated, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert read_generated(tokenizer, ids, text, opened_thought(tokenizer)) == expected


@pytest.mark.parametrize(
    ("template", "marks", "given", "trained"),
    [
        (EMPTY_THOUGHT, (), "<|im_start|>assistant\n<think>\n\n</think>\n\n", "It is 4.<|im_end|>"),
        (EMPTY_THOUGHT, ("<think>", "</think>"), "assistant\n<think>\n\n</think>\n\n", "It is 4.<|im_end|>"),
        (
            RESPONSES,
            RESPONSE_MARKS,
            "<|START|>assistant<|START_THINKING|><|END_THINKING|>",
            "<|START_RESPONSE|>It is 4.<|END_RESPONSE|><|im_end|>",
        ),
        (ALWAYS_ASKS, ("<|user|>", "<|assistant|>"), "<|user|>\n2 + 2?<|assistant|>", "\nIt is 4.<|im_end|>"),
    ],
    ids=["empty_thought", "empty_thought_of_tokens", "responses", "always_asks"],
)
def test_encode_row_is_given_the_generation_prompt_and_ends_the_turn(template, marks, given, trained):
    tokenizer = with_template(template, *marks)
    row = encode_row(tokenizer, "2 + 2?", "It is 4.")
    assert row.ids[: row.trained_from] == render_prompt(tokenizer, "2 + 2?")
    assert tokenizer.decode(row.ids[: row.trained_from]).endswith(given)
    assert tokenizer.decode(row.ids[row.trained_from :]) == trained
    assert row.ids[-1] == end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_encode_row_of_a_template_that_strips_gives_the_stripped_response():
    tokenizer = with_template(CHAT_TEMPLATE.replace("['content']", "['content'] | trim"))
    row = encode_row(tokenizer, " 2 + 2? ", " It is 4.\n")
    assert tokenizer.decode(row.ids[row.trained_from :]) == "It is 4.<|im_end|>"


def test_encode_row_of_marks_that_the_tokenizer_does_not_call_special_ends_at_the_templates_own():
    tokenizer = with_template(CHAT_TEMPLATE.replace("im_", "turn_"), "<|turn_start|>", "<|turn_end|>", special=False)
    row = encode_row(tokenizer, "Is <|turn_end|> a mark?", "Yes, <|turn_end|> is.")
    end = tokenizer.convert_tokens_to_ids("<|turn_end|>")
    assert end_of_turn(tokenizer) == end == row.ids[-1]
    assert row.ids.count(end) == 2


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Thoughts are opened for generation only, so that no conversation shows where a response would stand.
        (CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n"), r"generation prompt ends in .*<think>\\n'"),
        (CHAT_TEMPLATE.replace("assistant\n", "assistant: "), "generation prompt ends in .*assistant: '"),
        (CHAT_TEMPLATE.replace("assistant\n", "assistant\n\n"), "generation prompt ends in .*assistant.n.n'"),
        # The thought that ends in a conversation begins nowhere.
        (
            EMPTY_THOUGHT.replace("message['content']", "message['content'].replace('RESP', '</think>RESP')"),
            "generation prompt ends in .*</think>",
        ),
        (OPENS_THOUGHTS.replace("\n</think>\n\n", ""), "inside a thought that does not end"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write both messages"),
        ("{{ raise_exception('no roles') }}", "cannot write a conversation of a user and an assistant .no roles."),
        (None, "cannot write a conversation"),
    ],
    ids=["thoughts", "other_prompt", "blank", "ends_nothing", "unended", "no_content", "raises", "none"],
)
def test_require_trainable_refuses_a_template_without_a_training_sequence(template, expected):
    with pytest.raises(UserError, match=f"^model: its chat template.*{expected}"):
        require_trainable(with_template(template))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, ZEPHYR, LLAMA_2, OPENS_THOUGHTS, CHANNELS, DROPS_THOUGHTS])
def test_require_trainable_takes_a_template_that_writes_conversations(template):
    require_trainable(with_template(template))


def test_encode_row_of_a_response_that_the_template_changes_is_refused_by_name():
    tokenizer = with_template(DROPS_THOUGHTS)
    assert encode_row(tokenizer, "2 + 2?", "It is 4.") == encode_row(make_tokenizer(), "2 + 2?", "It is 4.")
    with pytest.raises(
        UserError, match=r"^model: its chat template changes the response '<think>.* of the prompt '2 \+"
    ):
        encode_row(tokenizer, "2 + 2?", "<think>2, 2</think>It is 4.")


# As Qwen 3, which writes the thoughts of a response in place of the empty one of its generation prompt.
OWN_THOUGHTS = EMPTY_THOUGHT.replace(
    "message['content']",
    "(('<think>\\n\\n</think>\\n\\n' if message.role == 'assistant' and loop.last and '</think>' not in"
    " message['content'] else '') + message['content'])",
)


@pytest.mark.parametrize("template", [DROPS_THOUGHTS, OWN_THOUGHTS])
@pytest.mark.parametrize("response", ["<think>2, 2</think>It is 4.", "It ends at </think>, and is 4."])
def test_require_writable_of_a_response_whose_thoughts_the_template_reads_names_it(template, response):
    rows = [Exchange("2 + 2?", "It is 4."), Exchange("2 + 2?", response)]
    require_writable(make_tokenizer(), rows)
    tokenizer = with_template(template)
    require_writable(tokenizer, rows[:1])
    with pytest.raises(UserError) as error:
        require_writable(tokenizer, rows)
    what = f"its chat template changes the response {response!r} of the prompt '2 + 2?'"
    assert error.value.problems == (f"model: {what}. Remove such rows.",)


# The second of each pair spells two marks at once, the third is at both ends.
SPELLED = ["What is {} for?", "{}{}", "{} begins, {} ends {}"]


@pytest.mark.parametrize("text", SPELLED)
@pytest.mark.parametrize(
    ("make", "end"),
    [
        (make_tokenizer, "<|im_end|>"),
        (lambda: make_sentencepiece("legacy", ZEPHYR), "</s>"),
        (lambda: make_sentencepiece("metaspace", ZEPHYR), "</s>"),
        (lambda: make_sentencepiece("unigram", ZEPHYR), "</s>"),
        (lambda: make_sentencepiece("legacy", PHI_3, rstrip=["<|user|>", "<|assistant|>", "<|end|>"]), "<|end|>"),
    ],
    ids=["bytes", "legacy", "metaspace", "unigram", "rstrip"],
)
def test_control_tokens_spelled_out_in_a_row_are_text(make, end, text):
    tokenizer = make()
    text = text.replace("{}", end)
    row = encode_row(tokenizer, text, f"It ends a turn: {text} and nothing follows.")
    mark = tokenizer.convert_tokens_to_ids(end)
    assert row.ids.count(mark) == 2 and row.ids[-1] == mark
    assert render_prompt(tokenizer, text).count(mark) == 1
    # But for the marks it is the sequence of a row that spells none.
    plain = encode_row(
        tokenizer, text.replace(end, "MARK"), f"It ends a turn: {text.replace(end, 'MARK')} and nothing follows."
    )
    shown = tokenizer.decode(plain.ids), tokenizer.decode(plain.ids[plain.trained_from :])
    assert tokenizer.decode(row.ids) == shown[0].replace("MARK", end)
    assert tokenizer.decode(row.ids[row.trained_from :]) == shown[1].replace("MARK", end)


def test_control_tokens_spelled_out_in_a_row_leave_the_rest_of_a_batch_alone(tokenizer):
    rows = [Exchange("2 + 2?", "4"), Exchange("And <|im_start|>?", "<|endoftext|>"), Exchange("3 + 3?", "6")]
    assert list(encode_rows(tokenizer, rows)) == [encode_row(tokenizer, *row) for row in rows]
    assert encode_row(tokenizer, *rows[1]).ids.count(tokenizer.pad_token_id) == 0


@pytest.mark.parametrize("template", [CHECKABLE, OPEN], ids=["checkable", "open"])
def test_rewrite_instruction_holds_prompt_and_reference_verbatim(template):
    text = rewrite_instruction("Is {this} a {prompt}?", "Yes: {reference} \\1", template)
    assert "Is {this} a {prompt}?" in text
    assert "Yes: {reference} \\1" in text


def test_rewrite_instruction_own_template_may_name_the_reference_first():
    assert rewrite_instruction("Q", "R", "{reference} <- {prompt}") == "R <- Q"
