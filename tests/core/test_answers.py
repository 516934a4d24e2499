"""The final answer of a text, in every spelling that models and data sets use."""
# ruff: noqa: RUF001 (digits and marks of other scripts are what is tested)

import itertools
from fractions import Fraction

import pytest

from sdft_ray.core.answers import final_number
from sdft_ray.core.letters import final_choice
from sdft_ray.core.spelling import final_part
from sdft_ray.data import benchmarks
from sdft_ray.data.checkers import is_correct, read_answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The total is 1,234.50", "1234.5"),
        ("it drops to -3", "-3"),
        ("so \u22127 remains", "-7"),
        ("half of it: 1/2", "1/2"),
        ("that is 50 %", "50"),
        ("that is 50%.", "50"),
        ("she paid $5.00.", "5"),
        ("a loss of -$5", "-5"),
        ("\\boxed{42} is it, see step 3", "42"),
        ("\\boxed{\\frac{3}{4}}", "3/4"),
        ("9 apples\n#### 8", "8"),
        ("#### 1,000\n", "1000"),
        ("12 34", "34"),
        ("10-3", "3"),
        ("5 - 3", "3"),
        ("5 -3", "-3"),
        ("(2) - 4", "4"),
        ("lists 5,1000", "1000"),
        ("1,234,567", "1234567"),
        ("the area is 12 m^2", "12"),
        ("\\boxed{12\\text{ cm}^2}", "12"),
        ("so \\frac{1}{2}", "1/2"),
        ("1.5e3", "1500"),
        ("take 3 eggs", "3"),
        ("pages 3-4", "4"),
        (".5", "0.5"),
        ("007", "7"),
        ("x = 3.", "3"),
        ("1/0", "1"),
    ],
)
def test_final_number_formats(text, number):
    assert final_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text", ["It takes 5 hours and 30 minutes.", "He is 5 feet 6 inches tall.", "It costs 3 dollars and 5 cents."]
)
def test_final_number_of_a_quantity_in_two_units_is_none(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    "text", ["In 5 hours 30 people came.", "5 hours a day are 30 minutes more.", "It is 30 minutes."]
)
def test_final_number_behind_another_quantity_is_read(text):
    assert final_number(text) == 30


@pytest.mark.parametrize("text", ["", "none at all", "####", "\\boxed{}", "-", "$"])
def test_final_number_absent_is_none(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. Paris", "B"),
        ("B) Paris", "B"),
        ("(B) Paris", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("answer is **B**", "B"),
        ("The correct answer is (B)", "B"),
        ("The correct answer is B, because plants need light.", "B"),
        ("The correct option is D.", "D"),
        ("So the answer is option C.", "C"),
        ("\\boxed{B}", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("It boils.\n#### C", "C"),
        ("First I thought the answer is A. But the answer is C.", "C"),
        ("A. It is wet. B. It is dry. The answer is A.", "A"),
        ("Plants need light, so (C).", "C"),
    ],
)
def test_final_choice_forms(text, letter):
    assert final_choice(text) == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is a dog.",
        "Answer: A dog barks.",
        "The answer is I think light.",
        "I think so.",
        "A dog.",
        "It is (A) or (B).",
        "A. wet\nB. dry",
        "A: wrong. B: wrong. C: right.",
        "\\boxed{}",
        "$\\square$",
        "\\angle",
        "Plants need light.",
        "The answer is Both.",
        "The answer is B's.",
    ],
)
def test_final_choice_words_are_no_letters(text):
    assert final_choice(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{3\\,\\frac{1}{2}}", "7/2"),
        ("3½ cups", "7/2"),
        ("½", "1/2"),
        ("It takes 1 1/2 cups.", "3/2"),
        ("2 1/2%", "5/2"),
        ("-3 1/2", "-7/2"),
        ("3-1/2 cups", "7/2"),
        ("3 and 1/2 times", "7/2"),
        ("3 5/2", "5/2"),
        ("1.234,56 €", "30864/25"),
        ("1.234.567", "1234567"),
        ("1.234", "617/500"),
        ("3,5", "7/2"),
        ("0,125", "1/8"),
        ("1'000", "1000"),
        ("1’234’567.50", "2469135/2"),
        ("\\boxed{12\\,345}", "12345"),
        ("\\boxed{1\\ 000}", "1000"),
        ("#### 10 000", "10000"),
        ("Das sind 10 000 Euro.", "10000"),
        ("5,00,000", "500000"),
        ("1,23,45,678.50", "24691357/2"),
        ("\\boxed{5{,}00{,}000}", "500000"),
        ("₹5,00,000/-", "500000"),
        ("Rs. 500", "500"),
        ("Rs.500", "500"),
        ("USD 21", "21"),
        ("USD21", "21"),
        ("US$5", "5"),
        ("-\\$5", "-5"),
        ("\\boxed{-\\$1{,}250.50}", "-2501/2"),
        ("5€", "5"),
        ("€5,50", "11/2"),
        ("-€5", "-5"),
        ("２，３４５", "2345"),
        ("３．５", "7/2"),
        ("٣", "3"),
        ("١٬٢٣٤٫٥", "2469/2"),
        ("−7", "-7"),
        ("–9", "-9"),
        ("3–4", "4"),
        ("The sum – 9", "9"),
        ("－9", "-9"),
        ("it is —9", "9"),
        (
            "1e400",
            "10000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000",
        ),
        ("1e-3", "1/1000"),
        ("2 \\times 10^5", "200000"),
        ("2 × 10⁵", "200000"),
        ("1.5*10^{-2}", "3/200"),
        ("2^{10}", "1024"),
        ("10^6", "1000000"),
        ("12 m²", "12"),
        ("12 m2", "12"),
        ("\\boxed{12\\text{ cm}^2}", "12"),
        ("\\boxed{12\\,\\mathrm{cm}^3}", "12"),
        ("\\boxed{\\text{21 apples}}", "21"),
        ("\\boxed{90^\\circ}", "90"),
        ("21 kg of CO2", "21"),
        ("50\\%", "50"),
        ("５０％", "50"),
        ("\\boxed{x_1 = 5}", "5"),
        ("\\boxed{5 * 4 = 20}", "20"),
        ("#### 21 (= 3 * 7)", "21"),
        ("10:30", "10:30"),
        ("09:30", "9:30"),
        ("12:05 pm", "12:05"),
        ("12:05 a.m.", "0:05"),
        ("10:30 PM", "22:30"),
        ("at 10h30", "10:30"),
        ("10点30分", "10:30"),
        ("10：30", "10:30"),
        ("1:02:03", "1:02:03"),
        ("ratio 3:4", "3:4"),
        ("Week 3:210 pages", "210"),
        ("Answer:30", "30"),
        ("Answer: 30", "30"),
        ("#### 2031-07-09", "2031-07-09"),
        ("2031/7/9", "2031-07-09"),
        ("3/4/2021", "2021-03-04"),
        ("13/4/2021", "2021-04-13"),
        ("9.7.2031", "2031-07-09"),
        ("July 9, 2031", "2031-07-09"),
        ("9 July 2031", "2031-07-09"),
        ("the 9th of July, 2031", "2031-07-09"),
        ("on July 9.", "07-09"),
        ("It was May 2021.", "2021-05"),
        ("2031年7月9日", "2031-07-09"),
        ("In May 24 people came", "24"),
        ("She gave June 5 apples", "5"),
        ("3/4/21", "21-03-04"),
        ("1.2.3", "1.2.3"),
        ("#### 21\n\nHint: 4", "21"),
        ("#### Step 3: Add\n4 + 4 = 8", "8"),
        ("#### 3. Add\n4+4=8", "8"),
        ("#### Final Answer\n21", "21"),
        ("#### **21**\n\nHint 4", "21"),
        ("#### $21 per 3 hours", "21"),
        ("#### The answer is 21.\n\nThe 4 were free", "21"),
        ("#### -5\nsee 3", "-5"),
        ("**Answer: 21**\n\nNote: 4 were free.", "21"),
        ("The final answer is 21. The first 4 were free.", "21"),
        ("The answer is 3 + 4 = 7", "7"),
        ("The answer is 10 times 2, which is 20", "20"),
        ("<answer>21</answer> 4 left", "21"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{5", "5"),
        ("\\boxed{\\frac{1}{2}", "1/2"),
        ("\\boxed 5 and 3", "5"),
        ("\\fbox{5} 3", "5"),
        ("\\boxed{} 5", "5"),
        ("\\frac25", "2/5"),
        ("\\dfrac{2}{5}", "2/5"),
        ("\\frac 2 5", "2/5"),
        ("\\frac2{5}", "2/5"),
        ("-\\frac{3}{4}", "-3/4"),
        ("\\frac{-3}{4}", "-3/4"),
        ("\\frac{3}{-4}", "-3/4"),
        ("\\frac{2\\,000}{7}", "2000/7"),
        ("\\frac{2{,}000}{7}", "2000/7"),
        ("\\frac{1.5}{2}", "3/4"),
        ("10/2.5", "4"),
        ("1/0", "1"),
        ("1,000/7", "1000/7"),
        ("1,5 und 2,5", "5/2"),
        ("lists 5,1000", "1000"),
        ("1,2,3", "3"),
        ("(3,5)", "7/2"),
        ("007", "7"),
        ("5.", "5"),
        ("$5.00.", "5"),
        ("Total:21", "21"),
        ("x=-3", "-3"),
        ("共21元", "21"),
        ("It is 21st", "21"),
        ("5'10\"", "10"),
        ("1,234,567.", "1234567"),
        ("I have 3 1 2", "2"),
        ("3/ 4", "3/4"),
        ("21 %", "21"),
        ("≈ 3.14", "157/50"),
        ("~5", "5"),
        ("21‰", "21"),
        ("100 000 000", "100000000"),
        ("A. 12", "12"),
        ("$1,234.5 million", "1234500000"),
        ("12\u202f345 \u20ac", "12345"),
        ("12\xa0345", "12345"),
        ("12\u2009345", "12345"),
        ("12 345", "345"),
        ("#### 12 345", "12345"),
        ("答案是21。前4个免费。", "21"),
        ("Antwort: 21\nDie ersten 4 waren frei", "21"),
        ("共 2，345 元", "2345"),
        ("30,\\!000", "30000"),
        ("\\boxed{2{,}345{,}678}", "2345678"),
        ("\\boxed{\\$7{,}250}", "7250"),
        ("\\boxed{\\cfrac{2}{5}}", "2/5"),
        ("\\boxed{\\frac{2,000}{7}}", "2000/7"),
        ("\\boxed{2{,}5}", "5/2"),
        ("$x = 0{,}125$", "1/8"),
        ("3{,}14", "157/50"),
        ("7{.}5", "15/2"),
        ("The answer is 1 234 567.", "1234567"),
        ("1 234,50 \u20ac", "2469/2"),
        ("Es war am 3. M\u00e4rz 2024.", "2024-03-03"),
        ("7. Mai 2024", "2024-05-07"),
        ("le 1er ao\u00fbt 2020", "2020-08-01"),
        ("el 3 de marzo de 2024", "2024-03-03"),
        ("\\boxed{10:30\\text{ PM}}", "22:30"),
        ("21 h 05", "21:05"),
        ("#### 3 : 4", "3:4"),
        ("30^{\\circ}", "30"),
        # Which currency it is does not matter, nor what turns the direction of writing.
        *((text, "-50") for text in ("-₺50", "-₱50", "-USD 50", "-\u206650\u2069", "negative 50", "It is minus 50.")),
        ("10 minus 3", "3"),
        ("⑫", "12"),
        ("3\u22154", "3/4"),
        ("{3}/{4}", "3/4"),
        ("\\boxed{1~\\frac12}", "3/2"),
        ("\\boxed{1\\text{ }\\frac12}", "3/2"),
        ("\\boxed{\\frac{\\text{3}}{4}}", "3/4"),
        ("\\boxed{\\text{-}42}", "-42"),
        ("3 · 10^5", "300000"),
        ("42 ft.²", "42"),
        # An equation is read by the side that is a number.
        ("\\boxed{6 \\times 7 = 42}", "42"),
        ("\\boxed{42 = x}", "42"),
        ("\\boxed{f(2) = 42}", "42"),
        ("\\boxed{a_5 = 9}", "9"),
        ("#### 42, since 6 times 7", "42"),
        ("#### <b>42</b>", "42"),
        # Words for powers of ten.
        ("5 million people", "5000000"),
        ("2,5 Millionen", "2500000"),
        ("1.5 billion", "1500000000"),
        ("3 lakh", "300000"),
        ("共3万元", "30000"),
        ("3万5千人", "35000"),
        ("1億2000万円", "120000000"),
        ("1.5万", "15000"),
        ("rund 5 Mio. Euro", "5000000"),
        ("5 mln zł", "5000000"),
        ("3 Mrd.", "3000000000"),
        ("2,5 bilhões de reais", "2500000000"),
        ("3 mil millones", "3000000000"),
        ("3 млрд рублей", "3000000000"),
        ("2兆円", "2000000000000"),
        ("10 tys. zł", "10000"),
        # More decimals than a group of thousands has.
        ("π ≈ 3,14159", "314159/100000"),
        ("Antwort: 2,7183", "27183/10000"),
        # Another base, dates and times are compared as a whole.
        ("1010\u2082", "1010_2"),
        ("1F is 31, or 0x1F", "0x1f"),
        ("\\boxed{12{:}30}", "12:30"),
        ("um 17.30 Uhr", "17:30"),
        ("7 mei 2024", "2024-05-07"),
        ("den 7 maj 2024", "2024-05-07"),
        ("7. desember 2024", "2024-12-07"),
        ("7 maja 2024 r.", "2024-05-07"),
        ("7 Mayıs 2024", "2024-05-07"),
        ("7 Agustus 2024", "2024-08-07"),
        ("ngày 7 tháng 5 năm 2024", "2024-05-07"),
        ("17 mart", "17"),
        ("\\boxed{1010_2}", "1010_2"),
        ("123_{10}", "123_10"),
        ("JANUARY 5, 2024", "2024-01-05"),
        ("05-Jan-2024", "2024-01-05"),
        ("2024년 1월 5일", "2024-01-05"),
        ("1月5日", "01-05"),
        ("5. Januar", "01-05"),
        ("5 января 2024 года", "2024-01-05"),
        ("2024-01-05T10:30", "2024-01-05 10:30"),
        ("January 5, 2024 at 10:30 PM", "2024-01-05 22:30"),
        ("10 p.m.", "22:00"),
        ("10 am", "10:00"),
        ("下午10点30分", "22:30"),
        ("午前10時", "10:00"),
        ("22시 30분", "22:30"),
        # What stands behind the answer is why, or what it is not.
        ("Answer: 42 (that is 40 + 2)", "42"),
        ("The answer is 42 since 40 and 2 make that.", "42"),
        ("The answer is 3 + 4 = 7. The first 2 were free.", "7"),
        ("There are 42 apples left. (We started with 50.)", "42"),
        ("The total is 42 dollars (21 + 21).", "42"),
        ("The answer is three (3).", "3"),
        ("He has 42 apples, not 50.", "42"),
        ("He has 42 apples instead of 50.", "42"),
    ],
)
def test_final_number_other_spellings(text, answer):
    assert str(final_number(text)) == answer


@pytest.mark.parametrize(
    "text",
    [
        *(f"\\boxed{{{formula}}}" for formula in (
            r"\sqrt{2}", r"10\sqrt{2}", r"\sqrt[3]{8}", r"\log_2 8", r"\frac{\pi}{4}", r"2\pi", r"\binom{5}{2}",
            "x^2+1", "3x", "2e", "2 + 3", "[1,5]", "(1,5)", r"\{1,2,3\}",
            "1/2 + 1/3", r"4 \pm 1", r"5.\overline{6}", "1, 2", r"\{1, 2\}", "[1, 2)",
            r"\left(1, 2\right)", "5/x",
            "n = 42, m = 3", "x = 2, x = 3", r"x=2 \text{ or } x=3", r"2 \text{ and } 3", r"\text{1 to 2}",
            r"6 \cdot 7", r"6 \times 7", r"3 \div 4", "3÷4", "5!", "2^n", "2^{n+1}", "2^{1/2}", "2^{0.5}", "4^{3/2}",
            r"\left(\frac{1}{2}\right)^3", r"\frac{x}{3}", r"\frac{3}{x}", r"\frac{3 \cdot 2}{4}", r"\frac{2^3}{4}",
            r"\frac{3!}{4}", r"3 \over 4", "2i", "2k", "2ab", "3(x+1)", "2(a+b)", "3x+2y=5", "2x = 6", "y = 2x + 3",
            "x > 2", r"x \geq 2", r"2 \le x \le 3", r"x \neq 2", r"\begin{pmatrix}1\\2\end{pmatrix}",
            r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", "2 hours 30 minutes", "5 feet 3 inches", "$3 and 50 cents",
            "5'10\"",
            "2小时30分钟", "42k",
        )),
        "10^{10^{10}}", "9^9^9^9",
        r"The answer is $10\sqrt{2}$.", "The area is 2π.", "It is 5√2 long", r"So it is 0.\overline{3}",
        r"So it is $\frac{3 \cdot 2}{4}$.", "The answer is $2x + 3$.", "So f(x) = x^2 + 3.", r"$\sqrt{16 - 4 \cdot 3}$",
        "The answer is (2, 3).", r"The set is $\{1,2,3\}$.", r"$x \in [2, 5]$", "x ∈ (2, ∞)", "It is 2^n.",
        "It is log_2(8).",
    ],
)  # fmt: skip
def test_final_number_of_a_formula_or_a_list_is_none(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [(r"As \sqrt{4} = 2", 2), (r"\sqrt{16}\approx 4", 4), ("Its root is √9, and the rest 5.", 5), ("1_000 m", 1000)],
)
def test_final_number_beside_a_formula(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "Die Lösung ist 42. Die ersten 5 waren frei.",
        "Het antwoord is 42. De eerste 5 waren gratis.",
        "Odpowiedź: 42. Pierwsze 5 były darmowe.",
        "Cevap: 42. İlk 5 ücretsizdi.",
        "Jawaban: 42. 5 pertama gratis.",
        "Svar: 42. De första 5 var gratis.",
        "Đáp án là 42. 5 cái đầu miễn phí.",
        "Απάντηση: 42. Τα 5 ήταν δωρεάν.",
        "الجواب: 42. أول 5 مجانية.",
        "الإجابة هي ٤٢. أول ٥ مجانية.",
        "उत्तर ४२ है। पहले ५ मुफ़्त थे।",
        "答：42。前5个免费。",
        "답: 42. 처음 5개는 무료입니다.",
        "Answer - 42\nThe first 5 were free.",
    ],
)
def test_final_number_that_is_announced_in_other_languages(text):
    assert final_number(text) == 42


@pytest.mark.parametrize(
    "text", ["1" * 4400, "5 and " + "1" * 4400, "1/" + "1" * 4400, "0." + "1" * 4400, "1e4000", "9^999999"]
)
def test_final_number_too_large_to_spell_out_is_none(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("\\boxed{7{,}250}", "It is \\boxed{3{,}250}."),
        ("#### 3 1/2", "It takes 8 1/2 hours."),
        ("\\boxed{3\\frac{1}{2}}", "It takes 15.5 hours."),
        ("\\boxed{\\frac25}", "The answer is 25."),
        ("#### 2031-07-09", "It was on 1987-01-09."),
        ("#### July 9", "It was on May 9."),
        ("#### 10:30", "At 9:30."),
        ("#### 10:30 am", "At 10:30 pm."),
        ("#### 3:4", "The ratio is 5:4."),
        ("#### 5,00,000", "It is 6,00,000."),
        ("#### 1.234,56", "It is 2.234,56."),
        ("#### 3,5", "It is 2,5."),
        ("#### 5 million", "It is 5 billion."),
        ("#### 10 am", "It is at 10 pm."),
        ("#### 2024-01-05 10:30", "On 2024-01-06 10:30."),
        ("\\boxed{1010_2}", "\\boxed{1010}"),
        ("#### 7月9日", "5月9日"),
    ],
)
def test_numbers_that_end_alike_are_not_equal(reference, text):
    answer = read_answer("number", reference, None)
    assert is_correct("number", answer, reference)
    assert not is_correct("number", answer, text)


def test_final_number_of_all_gsm8k_answers_is_what_stands_behind_the_marks():
    rows = list(benchmarks.read_documents(benchmarks.offline_items_file("gsm8k")))
    assert len(rows) == 1319
    for row in rows:
        body, _, number = row["answer"].rpartition("####")
        for text in (row["answer"], f"{body}\nSo the answer is {number.strip()}.", f"{body}\n\\boxed{{{number}}}"):
            assert final_number(text) == Fraction(number.replace(",", "")), text
    read = [read_answer("number", row["answer"], None) for row in rows]
    agree = [is_correct("number", mine, other["answer"]) for mine, other in zip(read, rows[1:], strict=False)]
    assert agree == [mine == other for mine, other in itertools.pairwise(read)]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("I choose C", "C"),
        ("Die Antwort ist C.", "C"),
        ("Antwort C ist richtig", "C"),
        ("Richtig ist C.", "C"),
        ("Die richtige Antwort lautet (C).", "C"),
        ("La réponse est C.", "C"),
        ("Réponse : C", "C"),
        ("La bonne réponse est la lettre C", "C"),
        ("La respuesta es C", "C"),
        ("La respuesta correcta es la C", "C"),
        ("La respuesta correcta es la opción C.", "C"),
        ("答えはCです", "C"),
        ("正解はCです。", "C"),
        ("正解：C", "C"),
        ("정답은 C입니다", "C"),
        ("정답: C", "C"),
        ("Ответ: C", "C"),
        ("Правильный ответ — C", "C"),
        ("Ответ C, потому что", "C"),
        ("答案是 C", "C"),
        ("答案：C", "C"),
        ("答案是A，因为", "A"),
        ("答案是A因为冰", "A"),
        ("选C", "C"),
        ("选项C正确", "C"),
        ("应该选择C", "C"),
        ("故选：C。", "C"),
        ("C is correct", "C"),
        ("C is the right answer.", "C"),
        ("Ｃ", "C"),
        ("答案是（Ｃ）", "C"),
        ("**C**", "C"),
        ("C) Paris", "C"),
        ("C、巴黎", "C"),
        ("A resposta é C", "C"),
        ("La risposta è A.", "A"),
        ("Het antwoord is C", "C"),
        ("Cevap: C", "C"),
        ("answer: c", "C"),
        ("the answer is c.", "C"),
        ("answer: (c)", "C"),
        ("Answer: a dog", None),
        ("The answer is a dog.", None),
        ("The answer is A or B", None),
        ("The answer is B or C", None),
        ("Option C is not right.", None),
        ("Option A is wrong. Option B is right.", "B"),
        ("The answer is not B.", None),
        ("<answer>C</answer>", "C"),
        ("<answer>\n(c)\n</answer>", "C"),
        ("\\boxed{\\textbf{(B)}}", "B"),
        ("\\boxed{\\mathrm{B}}", "B"),
        ("#### C\n\nHint: (A) is wrong, (B) too.", "C"),
        ("Plants need light.\nC", "C"),
        ("The answer is (A) because", "A"),
        ("The answer is C++", None),
        ("The answer is C-14", None),
        ("answer: e.g. ice", None),
        ("C'est la vie", None),
        ("Antwort: Die Sonne", None),
        ("A", "A"),
        ("I", "I"),
        ("i think", None),
        ("The answer is: **B) Paris**", "B"),
        ("The correct answer is option A: ice", "A"),
        ("Answer:\n\nB", "B"),
        ("Therefore, the answer is $\\boxed{C}$", "C"),
        ("The answer is 'C'", "C"),
        ("The answer is \u201cC\u201d.", "C"),
        ("{'answer': 'C'}", "C"),
        ("So I take option C.", "C"),
        ("I pick B", "B"),
        ("I'd go with it", None),
        ("The best choice is D", "D"),
        ("The answer is clearly B.", "B"),
        ("Câu trả lời là C", "C"),
        ("Đáp án: C", "C"),
        ("คำตอบคือ C", "C"),
        ("الإجابة هي C", "C"),
        ("उत्तर C है", "C"),
        ("Option A", "A"),
        ("option b", "B"),
        ("B und C", None),
        ("Weder A noch B", None),
        ("The answer is I think light.", None),
        ("Final Answer: D", "D"),
        ("Correct: B", "B"),
        ("(b)", "B"),
        ("b) Paris", "B"),
        ("B: Paris", "B"),
        ("Dés que", None),
        *(
            (text, "A")
            for text in (
                "正确选项是A",
                "答案是【A】",
                "正しいのはAです",
                "A번이 정답",
                "option a",
                "The answer is `A`.",
                "Letra A",
                "A is the answer.",
                "\\boxed{\\text{A. Paris}}",
                "My choice is A.",
                "I'll go with A.",
                "Therefore, A.",
                "It must be A.",
                "Select A",
                "La opción correcta es la A.",
                "A alternativa correta é A.",
                "L'opzione corretta è A",
                "A — Paris",
                "A, Paris",
                "Prawidłowa odpowiedź to A.",
                "Jawaban yang benar adalah A.",
                "Đáp án đúng là A.",
                "सही उत्तर A है",
                "ข้อ A",
                "คำตอบที่ถูกต้องคือ A",
                "Svar: A",
                "Vastaus: A",
                "Απάντηση: A",
                "תשובה: A",
                "الإجابة الصحيحة هي A",
                "Cevap A'dır.",
            )
        ),
        *(
            (text, "B")
            for text in (
                "B, not A",
                "B (not A)",
                "B because A is wrong.",
                "B, since A and C are wrong",
                "A is incorrect, it is cold. So B.",
                "**B**\n\nExplanation: A) is wrong. C) is wrong.",
                "The answer isn't A, it's B.",
                "The answer is not A, it is B.",
                "It is not A, so it must be B.",
                "答案不是A，是B",
                "答えはAではなくBです",
                "정답은 A가 아니라 B입니다.",
                "选B，不选A。",
                "Die Antwort ist nicht A, sondern B.",
                "La réponse n'est pas A mais B.",
                "La respuesta no es A, sino B.",
                "(A) no (B) yes (C) no. So (B).",
                "A: false. B: true. Therefore B is the answer.",
                "B。因为A错。",
                "答：B",
                "应该是B",
                "我认为是B",
                "答えは「B」です",
                "Bです。",
                "B입니다",
                "보기 B",
                "I think it's B",
                "Ans: B",
                "Solution: B",
                "The answer is most likely B.",
                "The answer to the question is B.",
                "The correct statement is B.",
                "(b) paris",
                "b is correct",
                "option b is right",
                "The answer is B. C is wrong.",
                "which is B",
            )
        ),
        *(
            (text, None)
            for text in (
                "The answer is A, B.",
                "The answer is A, B, and C.",
                "Answer: A, B",
                "答案是A或B",
                "答案：A、B",
                "选A、B",
                "The answer is B,C",
                "The answer is J. K. Rowling.",
                "(A) is wrong",
                "The answer is not (A).",
                "不选A",
                "정답은 A가 아닙니다",
                "答えはAではありません",
                "Is the answer A?",
                "A+",
                "A-",
                "C++",
                "C#",
                "f(A)",
                "P(A) = 1/2",
                "a) x b) y",
                "A.B.C.",
            )
        ),
        ("I'd say B", "B"),
        ("Let's go with B.", "B"),
        ("The letter is B", "B"),
        ("B is my final answer", "B"),
        ("The answer is \\(B\\).", "B"),
        ("The answer is <b>B</b>", "B"),
        ("<B>", "B"),
        ("<b>", "B"),
        ("The answer is «B».", "B"),
        ("Answer → B", "B"),
        ("【答案】B", "B"),
        ("Answers: A; C", None),
        ("Answer: A; B is too large.", "A"),
        ("Alternativa B", "B"),
        ("Správná odpověď je B.", "B"),
        ("Răspunsul corect este B.", "B"),
        ("Helyes válasz: B", "B"),
        ("Doğru yanıt: B", "B"),
        ("Točan odgovor je B", "B"),
        ("پاسخ صحیح: B", "B"),
        ("সঠিক উত্তর: B", "B"),
    ],
)
def test_final_choice_in_several_languages(text, letter):
    assert final_choice(text) == letter


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\frac{a}{b}\nand more", "\\frac{a}{b}"),
        ("<answer>5</answer> <answer>6", "6"),
        ("#### 5\n\n#### 6\n\nHint: 4", "6"),
        ("#### x = 5\nHint: 4", "x = 5"),
    ],
)
def test_final_part_that_is_marked(text, part):
    assert final_part(text) == (part, True)


def test_final_part_of_a_text_with_headings_is_not_marked():
    assert final_part("#### Step 2: Add\n4 + 4 = 8") == ("Step 2: Add\n4 + 4 = 8", False)


@pytest.mark.parametrize("given", ["", " ", "-", "?", "N/A", "nan", "None"])
@pytest.mark.parametrize("checker", ["number", "math", "choice"])
def test_read_answer_of_a_column_that_gives_none_reads_the_reference(checker, given):
    assert read_answer(checker, r"So \boxed{B}." if checker == "choice" else "#### 5", given) in ("B", "5")
