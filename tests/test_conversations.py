"""Rows that are conversations: from files to token ids."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import complaint
from tiny import make_tokenizer

from sdft_ray.core.rows import Exchange, Row
from sdft_ray.data import readers
from sdft_ray.data.chat import encode_row, encode_rows, render_prompts, require_writable
from sdft_ray.errors import UserError
from sdft_ray.spec.sources import FileRows
from sdft_ray.spec.wording import validate
from sdft_ray.stages import rows as rows_stage

CHAT = Path("../shared/data/chat")
# ChatML that writes tools and calls, as templates of today's models do.
TOOLS = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 4, "b": 4}}}
TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "4 + 4?"},
    {"role": "assistant", "content": "8"},
]
CALLING = [
    {"role": "user", "content": "4 + 4?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 4, "b": 4}'}}],
    },
    {"role": "tool", "content": "8"},
    {"role": "assistant", "content": "It is 8."},
]


def read(path, records, **options):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"fields": {"messages": "messages"}, "answer": "none", **options}
    return list(readers.read_rows(validate(FileRows, {"path": str(path), **options})))


def refused(path, records, **options):
    return complaint(read, path, records, **options)


def messages(row):
    return [(message.role, message.content) for message in row.exchange.given.messages]


@pytest.fixture
def tool_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOLS
    return tokenizer


# --- from records to rows -----------------------------------------------------------------------------------------


def test_read_conversation_last_turn_keeps_its_true_history(tmp_path):
    (row,) = read(tmp_path / "rows.jsonl", [{"messages": TURNS}])
    assert messages(row) == [(turn["role"], turn["content"]) for turn in TURNS[:-1]]
    assert (row.prompt, row.reference) == ("4 + 4?", "8")


def test_read_conversation_each_turn_gives_a_row(tmp_path):
    first, second = read(tmp_path / "rows.jsonl", [{"messages": TURNS}], turns="each")
    assert (first.reference, second.reference) == ("Hi.", "8")
    assert messages(first) == messages(second)[:2]


def test_read_conversation_of_one_message_is_the_row_of_two_columns(tmp_path):
    turns = [{"role": "user", "content": "4 + 4?"}, {"role": "assistant", "content": "8"}]
    (row,) = read(tmp_path / "rows.jsonl", [{"messages": turns}])
    (columns,) = read(tmp_path / "a.jsonl", [{"q": "4 + 4?", "a": "8"}], fields={"prompt": "q", "response": "a"})
    assert row == columns and row.content_id == columns.content_id
    # As ids have always been made.
    assert row.content_id == "134aa36d0c8f8f9d"


def test_read_conversation_calls_become_objects_and_targets(tmp_path):
    fields = {"messages": "messages", "tools": "tools"}
    records = [{"messages": CALLING, "tools": [ADD["function"]]}]
    call, response = read(tmp_path / "rows.jsonl", records, fields=fields, turns="each")
    assert (call.reference, call.exchange.calls) == ("", [CALL])
    assert response.exchange.given.messages[1].tool_calls == [CALL]
    assert response.exchange.given.tools == call.exchange.given.tools == [ADD]
    assert not call.is_blank and not response.exchange.calls


def test_read_conversation_sharegpt_gives_the_same_rows(tmp_path):
    roles = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    turns = [{"from": roles[turn["role"]], "value": turn["content"]} for turn in CALLING]
    turns[1] = {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 4, "b": 4}})}
    fields = {"messages": "conversations", "tools": "tools", "format": "sharegpt"}
    records = [{"conversations": turns, "tools": json.dumps([ADD["function"]])}]
    ours = read(
        tmp_path / "a.jsonl",
        [{"messages": CALLING, "tools": [ADD]}],
        fields={**fields, "messages": "messages", "format": "messages"},
    )
    assert read(tmp_path / "rows.jsonl", records, fields=fields) == ours


def test_read_conversation_context_is_the_systems_message(tmp_path):
    fields = {"messages": "messages", "context": "system"}
    (row,) = read(tmp_path / "rows.jsonl", [{"messages": TURNS[1:], "system": "Be short."}], fields=fields)
    (with_system,) = read(tmp_path / "a.jsonl", [{"messages": TURNS}])
    assert row == with_system


@pytest.mark.parametrize(
    ("turns", "each", "blank"),
    [
        (TURNS[:-1], 2, 1),  # the user has the last word
        ([*TURNS[:-1], {"role": "assistant", "content": " "}], 2, 1),
        ([*TURNS[:2], {"role": "assistant", "content": ""}, *TURNS[3:]], 2, 2),
        (TURNS[:2], 1, 1),
        (TURNS[2:3], 1, 1),  # no user asks
    ],
)
def test_read_conversation_with_a_turn_that_says_nothing_gives_blank_rows(tmp_path, turns, each, blank):
    rows = read(tmp_path / "rows.jsonl", [{"messages": turns}], turns="each")
    assert (len(rows), sum(row.is_blank for row in rows)) == (each, blank)
    assert read(tmp_path / "rows.jsonl", [{"messages": turns}])[0].is_blank


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"messages": [{"role": "usr", "content": "q"}]}, ", turn 1: has the unknown role usr. Did you mean user?"),
        ({"messages": [{"from": "human", "value": "q"}]}, ", turn 1: has no role. Set rows.fields.format: sharegpt."),
        ({"messages": [{"role": "user", "content": None}]}, ", turn 1: has no text as its content. Fix this row."),
        ({"messages": ["q", "a"]}, ", turn 1: has no role. Write each turn with the keys role and content."),
        (
            {"messages": [{"human": "q", "assistant": "a"}]},
            ", turn 1: has no role. Write each turn with the keys role and content.",
        ),
        (
            {"messages": [{"role": "user", "text": "q"}]},
            ", turn 1: has no content (its keys: role, text). Name its text content.",
        ),
        (
            {"messages": [{"role": ["user"], "content": "q"}]},
            ", turn 1: has the unknown role ['user']. Did you mean user?",
        ),
        ({"messages": "[" * 100000}, ": messages is text, and no JSON list. Fix this row."),
        (
            {
                "messages": [
                    *TURNS[:2],
                    {"role": "assistant", "function_call": {"name": "f", "arguments": "[" * 100000}},
                ]
            },
            ", turn 3: calls f with arguments that are no JSON object. Fix this row.",
        ),
        ({"messages": "q"}, ": messages is text, and no JSON list. Fix this row."),
        ({"messages": None}, ": messages is no list. Fix this row."),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            ", turn 1: has content that is no text. Leave such conversations out.",
        ),
        (
            {"messages": [*TURNS[:2], {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
            ", turn 3: calls a function without a name. Fix this row.",
        ),
        (
            {
                "messages": [
                    *TURNS[:2],
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            ", turn 3: calls f with arguments that are no JSON object. Fix this row.",
        ),
        ({"turns": TURNS}, "rows.fields.messages"),
    ],
)
def test_read_conversation_of_another_form_names_row_and_turn(tmp_path, record, line):
    path = tmp_path / "rows.jsonl"
    said = refused(path, [{"messages": TURNS}, record])
    assert said == f"{path}:2{line}" or "turns is a conversation. Set rows.fields to {messages: turns}." in said


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"fields": {"prompt": "q", "response": "a", "messages": "m"}}, "fields"),
        ({"fields": {"prompt": "q", "response": "a", "tools": "t"}}, "fields"),
        ({"fields": {"prompt": "q"}}, "fields"),
        ({"fields": {"prompt": "q", "response": "q"}}, "response: q is the column of the prompt, too"),
        ({"fields": {"prompt": "q", "response": "a"}, "path": " "}, "path: is empty"),
        ({"fields": {"response": "a"}}, "plain: true"),
        ({"fields": {"prompt": "q", "response": "a"}, "turns": "each"}, "turns"),
        ({"fields": {"prompt": "q", "response": "a"}, "plain": True}, "plain"),
        ({"fields": {"response": "a"}, "plain": True, "answer": "number"}, "plain"),
        ({"fields": {"response": "a", "context": "c"}, "plain": True}, "plain: context has no use. Remove context"),
    ],
)
def test_row_source_with_fields_that_contradict_each_other_is_refused(options, key):
    with pytest.raises(UserError, match=key):
        validate(FileRows, {"path": "rows.jsonl", "answer": "none", **options})


@pytest.mark.parametrize("arguments", [{"a": 5}, {"b": 4}, {"a": True}])
def test_rows_whose_history_calls_with_other_arguments_are_two(tmp_path, arguments):
    calls = [{"name": "add", "arguments": given} for given in ({"a": 4}, arguments)]
    turns = [[USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "done"}] for call in calls]
    first, second = read(tmp_path / "rows.jsonl", [{"messages": [*each, REPLY]} for each in turns])
    assert first.key != second.key


def test_rows_with_one_history_are_one_row(tmp_path):
    (row,) = read(tmp_path / "rows.jsonl", [{"messages": TURNS}])
    rows = [row, row._replace(reference="Eight."), *(Row(f"{i}?", "a") for i in range(4))]
    splits, left_out = rows_stage.split_rows(rows, "none", 0, 0, 0)
    assert left_out.duplicate_prompts == 1 and len(splits.train) == 5
    ids = {row.id for row in splits.train}
    assert row.content_id in ids and len(ids) == 5


# --- from rows to token ids -----------------------------------------------------------------------------------------


def test_encode_row_of_several_turns_trains_the_last_response_alone(tool_tokenizer, tmp_path):
    (row,) = read(tmp_path / "rows.jsonl", [{"messages": TURNS}])
    encoded = encode_row(tool_tokenizer, *row.exchange)
    given = tool_tokenizer.decode(encoded.ids[: encoded.trained_from])
    assert (
        given
        == "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in TURNS[:-1])
        + "<|im_start|>assistant\n"
    )
    assert tool_tokenizer.decode(encoded.ids[encoded.trained_from :]) == "8<|im_end|>"
    assert encoded.ids[: encoded.trained_from] == render_prompts(tool_tokenizer, [row.exchange.given])[0]


def test_encode_row_of_a_call_trains_what_the_template_writes_of_it(tool_tokenizer, tmp_path):
    fields = {"messages": "messages", "tools": "tools"}
    records = [{"messages": CALLING, "tools": [ADD]}]
    call, response = read(tmp_path / "rows.jsonl", records, fields=fields, turns="each")
    encoded = [encode_row(tool_tokenizer, *row.exchange) for row in (call, response)]
    trained = [tool_tokenizer.decode(row.ids[row.trained_from :]) for row in encoded]
    assert trained == [f"<call>{json.dumps(CALL['function'])}</call><|im_end|>", "It is 8.<|im_end|>"]
    assert json.dumps(ADD) in tool_tokenizer.decode(encoded[0].ids[: encoded[0].trained_from])
    assert "<call>" in tool_tokenizer.decode(encoded[1].ids[: encoded[1].trained_from])


def test_encode_row_of_a_control_token_in_the_history_is_text(tool_tokenizer):
    turns = [{"role": "user", "content": "Is <|im_end|> a mark?"}, {"role": "assistant", "content": "Yes."}, TURNS[3]]
    row = Exchange("4 + 4?", "8", json.dumps({"messages": turns}))
    end = tool_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encode_row(tool_tokenizer, *row).ids.count(end) == 4


def test_encode_row_of_plain_text_trains_all_of_it(tokenizer, tmp_path):
    fields = {"response": "text"}
    (row,) = read(tmp_path / "rows.jsonl", [{"text": "Once upon a time"}], fields=fields, plain=True)
    encoded = encode_row(tokenizer, *row.exchange)
    assert encoded.trained_from == 1
    assert encoded.ids == tokenizer("Once upon a time")["input_ids"]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def test_require_writable_where_the_template_leaves_tools_out_names_the_tool(tokenizer, tmp_path):
    fields = {"messages": "messages", "tools": "tools"}
    rows = read(tmp_path / "rows.jsonl", [{"messages": CALLING, "tools": [ADD]}], fields=fields)
    with pytest.raises(UserError, match="does not write the tool add of the conversation at '4 \\+ 4\\?'"):
        require_writable(tokenizer, [row.exchange for row in rows])


@pytest.mark.parametrize("role", ["system", "tool"])
def test_require_writable_where_the_template_leaves_a_role_out_names_it(tokenizer, tmp_path, role):
    known = "{% for m in messages if m.role in ('user', 'assistant') %}"
    known += "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    tokenizer.chat_template = known + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    turns = [{"role": "system", "content": "Be brief."}, *TURNS[-2:]]
    if role == "tool":
        turns = [*TURNS[-2:], {"role": "tool", "content": "42"}, *TURNS[-2:]]
    rows = read(tmp_path / "rows.jsonl", [{"messages": turns}])
    with pytest.raises(UserError, match=f"does not write the message of the {role} of the conversation at"):
        require_writable(tokenizer, [row.exchange for row in rows])


LOOKING = [CALLING[0], {**CALLING[1], "content": "Let me add."}, *CALLING[2:]]


@pytest.mark.parametrize("turns", [LOOKING, LOOKING[:2]], ids=["earlier", "last"])
def test_encode_row_where_the_template_drops_what_is_said_beside_a_call_is_refused(tool_tokenizer, tmp_path, turns):
    # As Llama 3.1.
    tool_tokenizer.chat_template = TOOLS.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}")
    fields = {"messages": "messages", "tools": "tools"}
    (row,) = read(tmp_path / "rows.jsonl", [{"messages": turns, "tools": [ADD]}], fields=fields)
    silent = row.exchange._replace(response="", conversation=row.conversation.replace("Let me add.", ""))
    require_writable(tool_tokenizer, [silent])
    for use in (
        lambda: require_writable(tool_tokenizer, [silent, row.exchange]),
        lambda: encode_row(tool_tokenizer, *row.exchange),
    ):
        with pytest.raises(UserError, match="does not write the message of the assistant of the conversation at"):
            use()


@pytest.mark.parametrize("earlier", ["<think>Hm.</think>Hi.", "Hi.", "<think>Hm."])
def test_encode_row_where_the_template_drops_earlier_thoughts_writes_the_rest(tool_tokenizer, tmp_path, earlier):
    drops = "{{ m.content if loop.last else m.content.split('</think>')[-1].split('<think>')[0] }}"
    tool_tokenizer.chat_template = TOOLS.replace("{{ m.content }}", drops)
    (row,) = read(tmp_path / "rows.jsonl", [{"messages": [*TURNS[:2], {**TURNS[2], "content": earlier}, *TURNS[3:]]}])
    encoded = encode_row(tool_tokenizer, *row.exchange)
    assert tool_tokenizer.decode(encoded.ids[encoded.trained_from :]) == "8<|im_end|>"
    assert "Hm" not in tool_tokenizer.decode(encoded.ids)


def test_require_writable_of_tools_that_only_a_call_names_is_refused(tool_tokenizer, tmp_path):
    tool_tokenizer.chat_template = TOOLS.replace("{%- if tools %}", "{%- if false %}")
    fields = {"messages": "messages", "tools": "tools"}
    rows = read(tmp_path / "rows.jsonl", [{"messages": CALLING, "tools": [ADD]}], fields=fields)
    with pytest.raises(UserError, match="does not write the tools of the conversation at"):
        require_writable(tool_tokenizer, [row.exchange for row in rows])


def test_encode_rows_tries_once_for_each_form_whether_the_template_writes_tools(tool_tokenizer, tmp_path, monkeypatch):
    calling = [{**CALLING[0], "content": f"{i} + 4?"} for i in range(3)]
    turns = [[first, *CALLING[1:]] for first in calling] + [[*TURNS[:1], *CALLING]]
    records, fields = [{"messages": each, "tools": [ADD]} for each in turns], {"messages": "messages", "tools": "tools"}
    exchanges = [row.exchange for row in read(tmp_path / "rows.jsonl", records, fields=fields)]
    encode_row(tool_tokenizer, "2 + 2?", "4")  # which reads what the template writes around a response
    given, write = [], tool_tokenizer.apply_chat_template
    monkeypatch.setattr(
        tool_tokenizer,
        "apply_chat_template",
        lambda *args, **named: given.append(named["tools"]) or write(*args, **named),
    )
    assert len(list(encode_rows(tool_tokenizer, exchanges))) == 4
    assert given.count(None) == 2 and len(given) == 2 * 4 + 2
    tool_tokenizer.chat_template = TOOLS.replace("{%- if tools %}", "{%- if tools and messages[0].role != 'system' %}")
    assert len(list(encode_rows(tool_tokenizer, exchanges[:3]))) == 3
    with pytest.raises(UserError, match="does not write the tools of the conversation at"):
        list(encode_rows(tool_tokenizer, exchanges))


def test_require_writable_takes_results_of_tools_as_json(tokenizer, tmp_path):
    written = "{{ (m.content | tojson) if m.role == 'tool' else m.content }}"
    known = f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{written}<|im_end|>\n"
    tokenizer.chat_template = known + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    turns = [*TURNS[-2:], {"role": "tool", "content": '{"zeit": "früh"}'}, *TURNS[-2:]]
    rows = read(tmp_path / "rows.jsonl", [{"messages": turns}])
    require_writable(tokenizer, [row.exchange for row in rows])


def test_read_conversation_of_a_table_has_no_keys_of_other_rows(tmp_path):
    calls = [{"name": "f", "arguments": {"city": "Rome"}}, {"name": "g", "arguments": {"a": 1, "b": [{"c": 2}]}}]
    records = [
        {"messages": [TURNS[-2], {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}]}
        for call in calls
    ]
    lines = read(tmp_path / "rows.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    source = {"path": str(tmp_path / "rows.parquet"), "fields": {"messages": "messages"}, "answer": "none"}
    table = list(readers.read_rows(validate(FileRows, source)))
    assert [row.content_id for row in table] == [row.content_id for row in lines]
    assert [row.exchange.calls[0]["function"] for row in table] == calls


@pytest.mark.parametrize("content", ["Let me look.", None])
def test_read_conversation_takes_calls_and_roles_as_openai_had_them(tmp_path, content):
    call = {"name": "f", "arguments": '{"city": "Rome"}'}
    turns = [
        {"role": "developer", "content": "Be brief."},
        TURNS[-2],
        {"role": "assistant", "content": content, "function_call": call},
        {"role": "function", "name": "f", "content": "sunny"},
        TURNS[-1],
    ]
    (row,) = read(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert [message.role for message in row.exchange.given.messages] == ["system", "user", "assistant", "tool"]
    assert row.exchange.given.messages[2].tool_calls[0]["function"]["arguments"] == {"city": "Rome"}
    assert row.exchange.given.messages[2].content == (content or "")


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (
            "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}",
            "System role not supported",
        ),
        (
            "{%- if messages | length > 3 %}{{ messages | length }}{% endif -%}",
            "otherwise before its response than with it",
        ),
        # As Mistral 7B v0.3, which writes what the system says with the last message, if that is the user's.
        (
            "{%- if messages[0].role == 'system' %}{{ messages[0].content if messages[-1].role == 'user' }}"
            "{% set messages = messages[1:] %}{% endif %}",
            "leaves out the message of the system of the conversation at '4 . 4\\?' once a response is there",
        ),
    ],
)
def test_require_writable_where_the_template_refuses_a_form_is_one_line(tokenizer, tmp_path, template, line):
    tokenizer.chat_template = template + tokenizer.chat_template
    rows = read(tmp_path / "rows.jsonl", [{"messages": TURNS}])
    with pytest.raises(UserError, match=line) as error:
        require_writable(tokenizer, [row.exchange for row in rows])
    assert "\n" not in str(error.value)


# --- real conversations ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CHAT.is_dir(), reason="shared/data/chat is missing")
@pytest.mark.parametrize(
    ("file", "fields", "rows"),
    [
        ("messages_tools_en.jsonl", {"messages": "messages", "tools": "tools"}, 452),
        ("messages_tools_zh.jsonl", {"messages": "messages", "tools": "tools"}, 189),
        ("sharegpt_tools_en.json", {"messages": "conversations", "tools": "tools", "format": "sharegpt"}, 505),
    ],
)
def test_real_conversations_become_one_row_for_each_response_and_are_encoded(tool_tokenizer, file, fields, rows):
    source = {"path": str(CHAT / file), "fields": fields, "turns": "each", "answer": "none"}
    read = list(readers.read_rows(validate(FileRows, source)))
    assert len(read) == rows and not any(row.is_blank for row in read)
    for row, encoded in zip(read, encode_rows(tool_tokenizer, [row.exchange for row in read]), strict=True):
        trained = tool_tokenizer.decode(encoded.ids[encoded.trained_from :])
        calls = "".join(
            f"<call>{json.dumps(call['function'], ensure_ascii=False)}</call>" for call in row.exchange.calls
        )
        assert trained == f"{row.reference}{calls}<|im_end|>"


USER, REPLY = {"role": "user", "content": "4 + 4?"}, {"role": "assistant", "content": "8"}


def read_turns(tmp_path, turns, which="last", **record):
    options = {"messages": "turns"} | {key: key for key in record}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"turns": turns, **record}))
    return readers.read_rows(
        FileRows.model_validate({"path": str(path), "fields": options, "answer": "none", "turns": which})
    )


@pytest.mark.parametrize(
    "roles",
    [
        ("User", "Assistant"),
        ("human", "gpt"),
        ("user", "model"),
        ("human", "ai"),
        ("prompter", "assistant"),
        (" user", "AI"),
    ],
)
def test_read_conversation_takes_the_usual_names_of_roles(tmp_path, roles):
    turns = [turn | {"role": role} for turn, role in zip((USER, REPLY), roles, strict=True)]
    assert read_turns(tmp_path, turns) == read_turns(tmp_path, [USER, REPLY])


FUNCTION = {"name": "f", "arguments": {"x": 1}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "calls",
    [
        json.dumps([{"function": FUNCTION}]),
        [json.dumps({"function": FUNCTION})],
        [{"function": json.dumps(FUNCTION)}],
        [{"function": FUNCTION | {"arguments": json.dumps(json.dumps(FUNCTION["arguments"]))}}],
    ],
)
@pytest.mark.parametrize(
    "tools",
    [
        json.dumps([TOOL]),
        json.dumps(json.dumps([TOOL])),
        [json.dumps(TOOL)],
        [{"function": json.dumps(TOOL["function"])}],
        [{"name": "f", "parameters": json.dumps({"type": "object"})}],
    ],
)
def test_read_conversation_unpacks_json_in_json(tmp_path, calls, tools):
    called = {"role": "assistant", "content": None, "tool_calls": calls}
    [row] = read_turns(tmp_path, [json.dumps(USER), json.dumps(called)], tools=tools)
    assert row.exchange.calls == [{"type": "function", "function": FUNCTION}]
    assert row.exchange.given.tools == [TOOL]


@pytest.mark.parametrize("tools", ["null", "[]", "", None, []])
def test_read_conversation_without_tools_has_none(tmp_path, tools):
    assert read_turns(tmp_path, [USER, REPLY], tools=tools) == read_turns(tmp_path, [USER, REPLY])


@pytest.mark.parametrize(
    "content",
    [
        ["4 + ", "4?"],
        [{"type": "input_text", "text": "4 + 4?"}],
        [{"text": "4 + 4?"}],
        [{"type": "text", "text": "4 + 4?"}],
    ],
)
def test_read_conversation_joins_parts_of_text(tmp_path, content):
    [row] = read_turns(tmp_path, [{"role": "user", "content": content}, REPLY])
    assert row.prompt == "4 + 4?"


def test_read_conversation_of_a_part_that_is_an_image_and_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="turn 1: has content that is no text"):
        read_turns(tmp_path, [{"role": "user", "content": [{"image": "a.png", "text": "What is it?"}]}, REPLY])


@pytest.mark.parametrize(
    "response", ["8", [{"role": "assistant", "content": "8"}], json.dumps([{"role": "assistant", "content": "8"}])]
)
@pytest.mark.parametrize("packed", [False, True])
def test_read_conversation_takes_a_response_beside_its_history(tmp_path, response, packed):
    history = [{"role": "system", "content": "Be short."}, USER]
    record = {"input": json.dumps(history) if packed else history, "output": response}
    [row] = read(tmp_path / "rows.jsonl", [record], fields={"messages": "input", "response": "output"})
    assert [row] == read_turns(tmp_path, [*history, REPLY])


def test_read_conversation_takes_a_response_of_sharegpt_beside_its_history(tmp_path):
    fields = {"messages": "prompt", "response": "chosen", "format": "sharegpt"}
    record = {"prompt": [{"from": "human", "value": "4 + 4?"}], "chosen": "[1, 2]"}  # no turns, but text
    [row] = read(tmp_path / "rows.jsonl", [record], fields=fields)
    assert (row.prompt, row.reference) == ("4 + 4?", "[1, 2]")


@pytest.mark.parametrize("response", [None, 8, {"text": "8"}])
def test_read_conversation_of_a_response_that_is_no_text_names_its_turn(tmp_path, response):
    fields = {"messages": "input", "response": "output"}
    said = refused(tmp_path / "rows.jsonl", [{"input": [USER], "output": response}], fields=fields)
    assert said == f"{tmp_path / 'rows.jsonl'}:1, turn 2: has no text as its content. Fix this row."


@pytest.mark.parametrize("arguments", ["[1]", "5", '"x"', '{"x": 1, "x": 2}', [1]])
def test_read_conversation_of_arguments_that_are_no_object_is_refused(tmp_path, arguments):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    with pytest.raises(UserError, match="turn 2: calls f with arguments that are no JSON object"):
        read_turns(tmp_path, [USER, call])


@pytest.mark.parametrize(
    "given",
    [
        {"parameters": {"x": 1}},
        {"arguments": {"x": 1}},
        {"arguments": '{"x": 1}'},
        {"arguments": None, "parameters": {"x": 1}, "function": None},  # as tables of several kinds become JSON
    ],
)
def test_read_conversation_arguments_have_several_names(tmp_path, given):
    [row] = read_turns(tmp_path, [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", **given}]}])
    assert row.exchange.calls == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def test_read_conversation_of_arguments_under_another_name_is_refused(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "args": {"x": 1}}]}
    with pytest.raises(UserError, match=r"turn 2: calls f without arguments \(its keys: args\). Name them arguments"):
        read_turns(tmp_path, [USER, call])


@pytest.mark.parametrize("given", [{}, {"arguments": None, "more": 1}, {"arguments": ""}, {"id": "1"}])
def test_read_conversation_of_a_call_without_arguments_has_none(tmp_path, given):
    [row] = read_turns(tmp_path, [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", **given}]}])
    assert row.exchange.calls[0]["function"] == {"name": "f", "arguments": {}}


def test_read_conversation_of_an_empty_message_of_the_system_has_none(tmp_path):
    assert read_turns(tmp_path, [{"role": "system", "content": ""}, USER, REPLY]) == read_turns(tmp_path, [USER, REPLY])


def test_read_conversation_without_the_key_of_tools_has_none(tmp_path):
    records = [{"messages": [USER, REPLY]}, {"messages": [USER, REPLY], "tools": [ADD]}]
    fields = {"messages": "messages", "tools": "tools"}
    rows = read(tmp_path / "rows.jsonl", records, fields=fields)
    assert [row.exchange.given.tools for row in rows] == [None, [ADD]]


def test_read_conversation_a_turn_of_weight_0_is_given_and_not_trained(tmp_path):
    first, second = read_turns(tmp_path, [USER, REPLY | {"weight": 0}, USER, REPLY], "each")
    assert first.is_blank and second.reference == "8" and len(second.exchange.given.messages) == 3


def test_read_conversation_two_messages_of_the_system_are_refused(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    [row] = read_turns(tmp_path, [system, USER, REPLY], context="Be brief.")
    assert len(row.exchange.given.messages) == 2
    with pytest.raises(UserError, match=r"Remove rows\.fields\.context"):
        read_turns(tmp_path, [system, USER, REPLY], context="Be long.")


@pytest.mark.parametrize("key", ["tools", "context"])
def test_read_conversation_of_a_column_that_is_missing_names_that_column(tmp_path, key):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"turns": [USER, REPLY]}))
    fields = {"messages": "turns", key: "other"}
    source = {"path": str(tmp_path / "rows.jsonl"), "fields": fields, "answer": "none"}
    with pytest.raises(UserError, match=rf"rows\.fields\.{key}: .* has no other"):
        readers.read_rows(FileRows.model_validate(source))
