# ruff: noqa: RUF001 (digits and marks of other scripts are what is tested)
import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdft_ray.core.rows import Row
from sdft_ray.core.selection import Generation, Rules, Selected, is_repetitive, select_response, strip_thoughts
from sdft_ray.data.checkers import CHECKERS, is_correct, read_answer


@pytest.mark.parametrize(
    ("checker", "reference", "given", "answer"),
    [
        ("number", "So 6 it is.\n#### 1,234.50", None, "2469/2"),
        ("number", "a story of 3", "1,234.5", "2469/2"),
        ("number", "none", None, None),
        ("choice", "(B) Paris", None, "B"),
        ("choice", "Paris", "b", "B"),
        ("choice", "Paris", None, None),
        ("math", "Thus $x = 3$ and \\boxed{\\frac32}.", None, "\\frac{3}{2}"),
        ("math", "The answer to the first question is 66, so\n#### 48", None, "48"),
        ("math", "a story", "2x + 1", "2x + 1"),
        ("math", "a story", None, None),
        ("math", "a story", "1e-05", "0.00001"),
        ("math", "a story", "1.5e+22", "15000000000000000000000"),
    ],
)
def test_read_answer_of_a_row(checker, reference, given, answer):
    assert read_answer(checker, reference, given) == answer


@pytest.mark.parametrize(
    "call",
    [
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        '<functioncall> {"name": "f", "arguments": {}}',
        '<|tool_call|>[{"name": "f"}]',
        '[TOOL_CALLS] [{"name": "f"}]',
        "I'll look. <function=f>{}</function>",
        '<|python_tag|>{"name": "f"}',
    ],
)
def test_a_row_that_calls_a_tool_in_its_text_keeps_it(call):
    row = Row(
        "What is the weather?", call, conversation='{"messages":[{"role":"user","content":"What …?"}],"tools":[{}]}'
    )
    rules = Rules(None, dict.fromkeys(("leak", "refusal", "repeated", "too_long"), False))
    for each in (row, row._replace(conversation=None)):
        assert select_response(each, [Generation("It is fine.", "stop")], rules) == Selected(
            call, "reference", "tool_call"
        )


def test_a_row_that_speaks_of_tools_is_rewritten():
    rules = Rules(None, dict.fromkeys(("leak", "refusal", "repeated", "too_long"), False))
    row = Row("What is a tool call?", "A tool call asks a function for something.")
    assert select_response(row, [Generation("It asks a function.", "stop")], rules).reason == "kept"


@pytest.mark.parametrize(
    ("checker", "answer", "text", "correct"),
    [
        ("number", "8", "It is 8.0.", True),
        ("number", "8", "It is 9.", False),
        ("number", "8", "It is eight.", False),
        ("choice", "B", "The answer is (B).", True),
        ("choice", "B", "The answer is (C).", False),
        ("math", "\\frac{1}{2}", "Half of it: \\boxed{0.5}.", True),
        ("math", "(x+1)^2", "So $x^2 + 2x + 1$.", True),
        ("math", "x=3", "We find \\boxed{3}.", True),
        ("math", "\\sqrt{8}", "\\boxed{2\\sqrt2}", True),
        ("math", "2, 3", "\\boxed{3, 2}", True),
        ("math", "50\\%", "That is 50%.", True),
        ("math", "8", "Four and four make 8.", True),
        ("math", "8", "\\boxed{9}", False),
        ("math", "8", "I'm ready to help.", False),
        ("math", "(1, 2)", "\\boxed{(2, 1)}", False),
        ("math", "\\emptyset", "\\boxed{\\varnothing}", True),
        ("math", "\\emptyset", "\\boxed{\u2205}", True),
        ("math", "\\emptyset", "\\boxed{0}", False),
    ],
)
def test_is_correct_by_checker(checker, answer, text, correct):
    assert is_correct(checker, answer, text) is correct


@pytest.mark.parametrize(
    ("reference", "text", "correct"),
    [
        ("\\boxed{\\sqrt{3/m}}", "\\boxed{\\frac{\\sqrt3}{\\sqrt m}}", True),
        ("\\boxed{|x|}", "\\boxed{x}", False),
        ("\\boxed{|x|}", "\\boxed{\\sqrt{x^2}}", True),
        ("\\boxed{\\sqrt{x^2}}", "\\boxed{x}", False),
        ("\\boxed{\\sqrt{xy}}", "\\boxed{\\sqrt{x}\\sqrt{y}}", True),
        ("#### 2 - 3/e", "#### 2 + 3/e", False),
        ("So it is 2 - 3/e.", "So it is 2 + 3/e.", False),
        ("So it is 2 - 3/e.", "\\boxed{2-\\frac{3}{\\mathrm{e}}}", True),
        ("\\boxed{2-\\frac{3}{e}}", "\\boxed{2-\\frac{3}{\\mathrm{e}}}", True),
        ("\\boxed{2-\\frac{3}{{\\rm e}}}", "\\boxed{2+\\frac{3}{{\\rm e}}}", False),
        ("\\boxed{\\frac{30\\text{ km}}{2\\text{ h}}}", "\\boxed{\\frac{30\\text{ km}}{3\\text{ h}}}", False),
        ("\\boxed{\\mathrm{ln}2}", "\\boxed{\\ln 2}", True),
        ("#### 3 1/2", "It takes 8 1/2 hours.", False),
        ("#### 3 1/2", "\\boxed{3.5}", True),
        ("#### 3 1/2", "It takes 3 1/2 hours.", True),
        ("\\boxed{3\\frac12}", "It takes 15.5 hours.", False),
        ("#### 2031-07-09", "It was 1987-01-09.", False),
        ("#### 2031-07-09", "\\boxed{2031-09-07}", False),
        ("#### 10:30", "at 10:45", False),
        ("#### 10:30", "at 10:30", True),
        ("\\boxed{7{,}250}", "It is \\boxed{3{,}250}.", False),
        ("\\boxed{5,00,000}", "500000", True),
        ("\\boxed{\\frac{2,000}{7}}", "\\boxed{\\frac{2000}{7}}", True),
        ("共 2，345 元", "2345", True),
        ("#### 21\n\nHint: the first 4 were free.", "21", True),
        ("#### 2x + 1", "2x + 2", False),
        ("#### 2x + 1", "\\boxed{1+2x}", True),
        ("So 2x + 1.", "So 3x + 1.", False),
        ("#### 48 apples", "48", True),
        ("\\boxed{x=3 \\text{ or } x=4}", "\\boxed{x=4 \\text{ or } x=3}", True),
        ("\\boxed{\\frac{a}{b}", "\\boxed{\\frac{a}{b}}", True),
        ("–9", "-9", True),
        ("\\boxed{\\frac{1}{3}}", "\\boxed{0.333333}", True),
        ("$x=1$ and $x=2$", "$x=1$ and $x=3$", False),
        ("\\boxed{1}, \\boxed{2}", "\\boxed{1}, \\boxed{3}", False),
        ("\\boxed{1'000}", "1000", True),
        ("#### (1, 2)", "(2, 1)", False),
        ("#### 1,234", "1234", True),
        ("\\boxed{5 \\text{ m}}", "5", True),
        ("The speed is 5 m/s.", "5", True),
        ("#### 50%", "50", True),
        ("\\boxed{\\pi}", "\\boxed{3.14159265}", True),
        ("\\boxed{2\\mathrm{i}+1}", "\\boxed{1+2i}", True),
        ("#### $\\frac{3}{4}$ hours", "0.75", True),
        ("#### x^2", "#### x^3", False),
        ("answer: 12", "\\boxed{12}", True),
        ("<answer>2x</answer>", "\\boxed{2x}", True),
        ("\\boxed{\\text{even}}", "\\boxed{\\text{odd}}", False),
        ("\\boxed{x + a b}", "\\boxed{x + a c}", False),
        ("\\boxed{2 + t}", "\\boxed{2 + h}", False),
        ("\\boxed{5 sq cm}", "5", True),
        # Units in letters that formulas have, points and sets in plain text, signs of Unicode, another base.
        ("\\boxed{2ab}", "\\boxed{2ba}", True),
        ("\\boxed{2ab}", "\\boxed{2}", False),
        ("\\boxed{3t}", "\\boxed{3}", False),
        ("Answer: (1, 2)", "$(1,2)$", True),
        ("Answer: (1, 2)", "Answer: (5, 2)", False),
        ("The set is {1, 2}.", "$\\{2,1\\}$", True),
        ("\\boxed{2√3}", "$2\\sqrt{3}$", True),
        ("So it is 3√2.", "$2\\sqrt{2}$", False),
        ("So it is 2π.", "$2\\pi$", True),
        ("So it is 2π.", "2", False),
        ("x + √2", "y + √2", False),
        ("It is sqrt(x+1).", "$\\sqrt{x+1}$", True),
        ("\\boxed{∞}", "$\\infty$", True),
        ("\\boxed{1010_2}", "\\boxed{1010}", False),
    ],
)
def test_is_correct_of_mathematics_in_other_spellings(reference, text, correct):
    assert is_correct("math", read_answer("math", reference, None), text) is correct


@pytest.mark.parametrize("checker", ["number", "math"])
def test_read_answer_of_thousands_of_digits_is_no_error(checker):
    answer = read_answer(checker, "#### " + "1" * 4400, None)
    assert answer is None or not is_correct(checker, answer, "It is 5.")


@pytest.mark.heavy
def test_is_correct_of_an_endless_expression_is_false_and_the_next_one_is_judged():
    assert not is_correct("math", "5", "\\boxed{9^{9^{9^9}}}")
    assert is_correct("math", "5", "\\boxed{5}")


def test_is_correct_of_mathematics_works_in_any_thread():
    with ThreadPoolExecutor(4) as threads:
        texts = [f"\\boxed{{{n}}}" for n in range(20)]
        assert list(threads.map(lambda text: is_correct("math", "7", text), texts)) == [n == 7 for n in range(20)]


ROW = Row("What is 4 + 4?", "4 + 4 = 8\n#### 8", "8")
OPEN_ROW = Row("How are you?", "Fine.", None)
FILTERS = {"leak": True, "refusal": True, "repeated": True, "too_long": 4.0}
LOOP = "so it is 8 and " * 20


def select(row, *generations, **changes):
    made = [Generation(*each) for each in generations]
    return select_response(row, made, Rules(None if row.answer is None else CHECKERS["number"], FILTERS | changes))


@pytest.mark.parametrize(
    ("text", "finish_reason", "row", "reason"),
    [
        ("Four and four make 8.", "stop", ROW, "kept"),
        ("Four and four make 8.0", "stop", ROW, "kept"),
        ("Four and four make 9.", "stop", ROW, "wrong_answer"),
        ("Four and four make eight.", "stop", ROW, "no_answer"),
        ("Four and four make 8.", "length", ROW, "truncated"),
        ("  \n ", "stop", ROW, "empty"),
        ("The answer to this question is:", "stop", ROW, "empty"),
        ("**The answer is:**", "stop", ROW, "empty"),
        ("答案是：", "stop", ROW, "empty"),
        ("\u200b", "stop", ROW, "empty"),
        ("```\n```", "stop", ROW, "empty"),
        ("These are the steps:\n4 + 4 = 8", "stop", ROW, "kept"),
        ("for i in x:", "stop", OPEN_ROW._replace(reference="for x in y:"), "kept"),
        ("engine broke", "error", ROW, "error"),
        ("It is 8", "abort", ROW, "error"),
        ("The reference answer says 8", "stop", ROW, "leak"),
        ("In my own words: 8", "stop", ROW, "leak"),
        (LOOP, "stop", ROW, "repeated"),
        ("I cannot help with 8.", "stop", ROW, "refusal"),
        (" ".join(f"{i} apples" for i in range(100)) + " 8", "stop", ROW, "kept"),
        (" ".join(f"{i} apples" for i in range(200)) + " 8", "stop", ROW, "too_long"),
        ("Anything goes here.", "stop", OPEN_ROW, "kept"),
        ("Your response is good.", "stop", OPEN_ROW, "leak"),
        ("According to the reference, fine.", "stop", OPEN_ROW, "leak"),
        ("The answer provided is fine.", "stop", OPEN_ROW, "leak"),
        ("For your reference: fine.", "stop", OPEN_ROW, "kept"),
        ("<think>4, 4, hm</think>\n\nFour and four make 8.", "stop", ROW, "kept"),
        ("<think>It is 8.</think>", "stop", ROW, "empty"),
        ("<think>It is 8.", "stop", ROW, "truncated"),
        ("<think>Is it 8?</think>It is 9.", "stop", ROW, "wrong_answer"),
    ],
)
def test_select_response_table(text, finish_reason, row, reason):
    selected = select(row, (text, finish_reason))
    if reason == "kept":
        assert selected == Selected(text.rpartition("</think>")[2].strip(), "distilled", "kept")
    else:
        assert selected == Selected(row.reference, "reference", reason)


@pytest.mark.parametrize(
    ("text", "off"),
    [
        ("The reference answer says 8", {"leak": False}),
        ("I cannot help with 8.", {"refusal": False}),
        (LOOP, {"repeated": False}),
        ("8 " + "and more " * 200 + "8", {"too_long": None, "repeated": False}),
    ],
)
def test_select_response_a_filter_that_is_off_keeps_the_rewrite(text, off):
    assert select(ROW, (text, "stop")).reason in FILTERS
    assert select(ROW, (text, "stop"), **off).reason == "kept"


def test_select_response_keeps_the_first_sample_that_passes():
    samples = [("It is 9.", "stop"), ("It is", "length"), ("It is 8.", "stop"), ("8 it is.", "stop")]
    assert select(ROW, *samples) == Selected("It is 8.", "distilled", "kept", 2)
    assert select(ROW, *samples[:2]) == Selected(ROW.reference, "reference", "wrong_answer")


ANALYSIS = "<|channel|>analysis<|message|>6<|end|>"
COMMENTARY = "<|start|>assistant<|channel|>commentary<|message|>x<|end|>"


@pytest.mark.parametrize(
    ("text", "response"),
    [
        ("<seed:think>6</seed:think>It is 12.", "It is 12."),
        ("[THINK]6[/THINK]It is 12.", "It is 12."),
        ("[THINK]6", None),
        ("<thought>6</thought>\n\nIt is 12.", "It is 12."),
        ("<reasoning>\n6\n</reasoning>\nIt is 12.", "It is 12."),
        ("<Think>6</Think>It is 12.", "It is 12."),
        ("◁think▷6◁/think▷It is 12.", "It is 12."),
        ("<|begin_of_thought|>6<|end_of_thought|>\n\nIt is 12.", "It is 12."),
        ("<|START_THINKING|>6<|END_THINKING|>It is 12.", "It is 12."),
        ("<|channel>thought\n6<channel|>It is 12.", "It is 12."),
        ("<think> hm </think> It is 12.", "It is 12."),
        ("hm, 6 and 6.\n</think>\n\nIt is 12.", "It is 12."),
        ("hm</think>It is 12.", "It is 12."),
        ("hm. </think>\n\nIt is 12.", "It is 12."),
        ("</think>\n\nIt is 12.", "It is 12."),
        ("<think>\n\n</think>\n\nIt is 12.", "It is 12."),
        ("It is 12.<think>or 13", None),
        ("It is 12. <think>or 13?</think> It is 12.", "It is 12.\nIt is 12."),
        ("<think>a</think> <think>b</think> It is 12.", "It is 12."),
        ("<think>a<think>b</think>c</think>It is 12.", "It is 12."),
        ("hm\n</think>", ""),
        ("<think>6</think>", ""),
        ("<think>", None),
        ("<think>6 ends with </think> tag</think>It is 12.", "It is 12."),
        (
            "<|channel|>analysis<|message|>6<|end|><|start|>assistant<|channel|>final<|message|>It is 12.<|return|>",
            "It is 12.",
        ),
        ("<|channel|>analysis<|message|>6", None),
        ("<|channel|>final<|message|>It is 12.", "It is 12."),
        (
            f"{ANALYSIS}{COMMENTARY}<|start|>assistant<|channel|>final <|constrain|>json<|message|>12",
            "12",
        ),
        ("analysisAsked is 6+6. 12.assistantfinalIt is 12.", "It is 12."),
        ("analysiswe need 12.assistantfinalIt is 12.", "It is 12."),
        ("analysisAsked is", None),
        ("analysisAsked.assistantcommentaryhmassistantfinalIt is 12.", "It is 12."),
        ("finalIt is 12.", "It is 12."),
        ("Here is my thought process: 6. Here is my response: It is 12.", "It is 12."),
        ("Here is my thought process: 6.", None),
        ("I think so. [THINK] no", None),
        ("", ""),
        ("<think>a</think>It is 12.<think>or 13?</think>It is 12.", "It is 12.\nIt is 12."),
        ("<scratchpad>6 and 6</scratchpad>\nIt is 12.", "It is 12."),
        (
            "<|begin_of_thought|>6<|end_of_thought|>\n\n<|begin_of_solution|>\nIt is 12.\n<|end_of_solution|>",
            "It is 12.",
        ),
        ("<think >6</think >It is 12.", "It is 12."),
        ("<|think|>6<|/think|>It is 12.", "It is 12."),
        ("<|thought_start|>6<|thought_end|>It is 12.", "It is 12."),
        ("<|begin_thought|>6", None),
        ("<unused94>thought\n6<unused95>It is 12.", "It is 12."),
        ("<analysis>6</analysis>\nIt is 12.", "It is 12."),
        ("<inner_monologue>6</inner_monologue>It is 12.", "It is 12."),
        ("<chain_of_thought>6</chain_of_thought>It is 12.", "It is 12."),
        ("<thought_process>6</thought_process>It is 12.", "It is 12."),
        ("hm, 6 and 6. </think>\nIt is 12.", "It is 12."),
        ("assistantanalysiswe need 12.assistantfinalIt is 12.", "It is 12."),
        ("assistantfinalIt is 12.", "It is 12."),
        ("<|START_THINKING|>6<|END_THINKING|><|START_RESPONSE|>It is 12.<|END_RESPONSE|>", "It is 12."),
    ],
)
def test_strip_thoughts_of_every_kind(text, response):
    assert strip_thoughts(text) == response


@pytest.mark.parametrize(
    "text",
    [
        "It wraps thoughts in <think> and </think> tags.",
        "The tag `</think>` ends it.",
        "Write <think>, then </think>.",
        "A model ends its thoughts with </think>.",
        'It says "</think>" then.',
        "analysis of the data shows 12.",
        "analysis: it is 12.",
        "Analysis of it: 12.",
        "final answer: 12",
        "finally 12",
        "Final: 12",
        "analyses show 12",
        "The <thought> of it",
        "I [think] so [/think] ok",
        "It is 12.",
        "if a<think and b>think: x",
        "It is 12. A model ends its thoughts with </think> and answers 12.",
        "[Thoughts](notes.html) on it",
    ],
)
def test_strip_thoughts_of_a_text_that_only_speaks_of_them_changes_nothing(text):
    assert strip_thoughts(text) == text


def test_select_response_thoughts_stay_where_the_recipe_says_so():
    text = "<think>4, 4</think>It is 8."
    assert select_response(ROW, [Generation(text, "stop")], Rules(CHECKERS["number"], FILTERS, False)).response == text


def test_select_response_two_texts_without_numbers_are_not_equal():
    assert select(ROW._replace(answer="yes"), ("yes", "stop")).reason == "no_answer"


def test_select_response_a_phrase_of_the_row_itself_is_no_leak():
    generation = ("Check your answer twice.", "stop")
    assert select(OPEN_ROW._replace(prompt="How do I check your answer?"), generation).reason == "kept"
    assert select(OPEN_ROW._replace(reference="Check your answer."), generation).reason == "kept"
    assert select(OPEN_ROW, generation).reason == "leak"


@pytest.mark.parametrize(
    "text",
    [
        "I cannot help with that.",
        "I can\u2019t assist with this request.",
        "I'm sorry, but I can't say.",
        "Sorry, I cannot do it.",
        "Unfortunately, I am unable to see pictures.",
        "I'm not able to browse.",
        "As an AI language model, I have no feelings.",
        "Well, as a large language model I have none.",
        "I am just an AI, so no.",
        "I apologize, but I will not.",
        "I'm afraid I can't do that.",
        "My apologies, but I cannot help.",
        "I must decline.",
        "I don't have access to it.",
        "We cannot help with that.",
        "抱歉，我无法帮助您。",
        "作为一个人工智能语言模型，我没有感情。",
        "申し訳ありませんが、お手伝いできません。",
        "죄송합니다. 그 질문에는 답변할 수 없습니다.",
        "ขออภัย ฉันไม่สามารถช่วยได้",
        "عذرًا، لا أستطيع مساعدتك في ذلك.",
        "क्षमा करें, मैं यह नहीं कर सकता।",
        "Es tut mir leid, aber ich kann dabei nicht helfen.",
        "Je suis désolé, mais je ne peux pas vous aider.",
        "Lo siento, pero no puedo ayudarte.",
        "Desculpe, mas não posso ajudar.",
        "Mi dispiace, ma non posso aiutarti.",
        "Извините, но я не могу помочь.",
    ],
)
def test_select_response_refusal_forms(text):
    assert select(OPEN_ROW, (text, "stop")).reason == "refusal"
    assert select(OPEN_ROW._replace(reference="I'm sorry, but I cannot say."), (text, "stop")).reason == "kept"


@pytest.mark.parametrize(
    "text",
    [
        "I can help with that.",
        "She said: I cannot help you.",
        "I cannot believe how well I am.",
        "Sorry is the hardest word.",
        "He works as an AI researcher.",
        "Unfortunately, the bridge is closed.",
        "Leider regnet es heute nicht mehr als gestern.",
        "作为AI领域的专家，他很忙。",
        "Es usado en campos como modelo de lenguaje o robot.",
    ],
)
def test_select_response_words_that_refuse_nothing(text):
    assert select(OPEN_ROW, (text, "stop")).reason == "kept"


def test_select_response_takes_phrases_of_other_languages():
    refusal, leak = ("Przykro mi, nie pomogę.", "stop"), ("Die Musterl\u00f6sung sagt 4.", "stop")
    phrases = {"refusal_phrases": ["NIE pomogę"], "leak_phrases": ["Musterl\u00f6sung"]}
    assert select(OPEN_ROW, refusal).reason == select(OPEN_ROW, leak).reason == "kept"
    assert select(OPEN_ROW, refusal, **phrases).reason == "refusal"
    assert select(OPEN_ROW, leak, **phrases).reason == "leak"
    assert select(OPEN_ROW._replace(reference="Nie pomogę."), refusal, **phrases).reason == "kept"
    assert select(OPEN_ROW._replace(prompt="Wo ist die Musterl\u00f6sung?"), leak, **phrases).reason == "kept"


def test_select_response_a_reference_that_repeats_itself_allows_it():
    row = OPEN_ROW._replace(reference="row, row, row your boat " * 8)
    assert select(row, ("row, row, row the boat " * 8, "stop")).reason == "kept"


def test_is_repetitive_lists_and_short_texts_are_not():
    assert not is_repetitive("")
    assert not is_repetitive("yes yes yes")
    assert not is_repetitive(hashlib.sha512(b"1").hexdigest() + hashlib.sha512(b"2").hexdigest())
    assert not is_repetitive("\n".join(f"{i}. item {i} of the list" for i in range(30)))


@pytest.mark.parametrize(
    "loop",
    [
        "所以答案是四，",
        "答えは四です。",
        "ดังนั้นคำตอบคือสี่",
        "因此，",
        "그래서 답은 4이고 ",
        "그래서답은넷입니다.",
        "abcabc",
    ],
)
def test_is_repetitive_of_loops_without_spaces(loop):
    assert is_repetitive(loop * 20)


def test_is_repetitive_of_plain_chinese_is_false():
    assert not is_repetitive(
        "植物在白天吸收二氧化碳，用它和水制造糖和淀粉，同时放出氧气；到了夜里，它们和动物一样呼吸。"
    )
