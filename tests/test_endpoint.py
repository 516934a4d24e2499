"""An endpoint that fails in every way: each is one line or another try, and no row is lost, doubled or swapped."""

import email.utils
import json
import threading
import time
from collections import Counter

import pytest
from served import NAME, completion, failure, fake_server, page, text_of
from transformers import AutoTokenizer

from sdft_ray import endpoint
from sdft_ray.data.chat import render_prompt
from sdft_ray.endpoint import Client
from sdft_ray.engine import EndpointEngine, Request, VllmEngine, start_engine
from sdft_ray.errors import StageFailed, UserError
from sdft_ray.spec.compute import Endpoint, EngineOptions
from sdft_ray.spec.recipe import Distill
from sdft_ray.spec.sources import KEY_VARIABLE, ServedModel
from sdft_ray.spec.wording import validate


@pytest.fixture
def server():
    with fake_server() as server:
        yield server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(endpoint, "_LONGEST_PAUSE", 0.05)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def make_engine(server, model, requests=4, patience=5.0, timeout=5.0, settings=None, **teacher) -> EndpointEngine:
    teacher = {"endpoint": server.url, "model": NAME, **teacher}
    wanted = validate(Distill, {"teacher": teacher, "max_new_tokens": 16, **(settings or {})})
    options = Endpoint(requests=requests, timeout_seconds=timeout, patience_seconds=patience)
    engine = start_engine(str(model), wanted, options, alone=True)
    assert isinstance(engine, EndpointEngine)
    return engine


def make_requests(count: int) -> list[Request]:
    return [Request(f"row {i}", 0, [5, 6, 7, i + 10], 1000 + i) for i in range(count)]


def body_of(request: Request) -> dict:
    return {"prompt": request.prompt_ids, "seed": request.sampling_seed}


def require_all_right(requests: list[Request], made: list) -> None:
    """Assert that each request has its own text, once."""
    assert Counter(request.id for request, _ in made) == Counter(request.id for request in requests)
    for request, generation in made:
        assert (generation.text, generation.finish_reason) == (text_of(body_of(request)), "stop"), request.id


def test_endpoint_gets_the_tokens_seeds_and_sampling_of_vllm_here(server, tiny_model, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, " PLANTED-key\n")
    engine = make_engine(server, tiny_model, settings={"temperature": 0.5, "top_p": 0.25})
    (asked,) = make_requests(1)
    require_all_right([asked], list(engine.generate([asked])))
    end = AutoTokenizer.from_pretrained(tiny_model).eos_token_id
    assert server.asked == [
        {
            "model": NAME,
            "prompt": asked.prompt_ids,
            "seed": 1000,
            "temperature": 0.5,
            "top_p": 0.25,
            "max_tokens": 16,
            # What vLLM takes for itself where a request is silent: the model's generation_config.json.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,
            "stop_token_ids": [end],
            "return_token_ids": True,
        }
    ]
    assert server.keys == ["Bearer PLANTED-key"]


def test_endpoint_of_the_plain_kind_gets_text_and_only_what_openai_names(server, tiny_model):
    engine = make_engine(server, tiny_model, api="openai", settings={"seeds": "engine"})
    prompt = render_prompt(engine.tokenizer, "2 + 2?")
    ((_, generation),) = engine.generate([Request("row", 0, prompt, None)])
    (asked,) = server.asked
    assert asked["prompt"] == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert asked["stop"] == ["<|im_end|>"] and server.keys == [None]
    assert {*asked} == {"model", "prompt", "temperature", "top_p", "max_tokens", "stop"}
    assert generation.text == text_of(asked)


def test_endpoint_works_on_as_many_requests_at_once_as_allowed(server, tiny_model):
    def slowly(body):
        time.sleep(0.05)
        return completion(body)

    server.answer = slowly
    requests = make_requests(24)
    require_all_right(requests, list(make_engine(server, tiny_model, requests=6).generate(requests)))
    assert server.most_at_once == 6


@pytest.mark.heavy
def test_endpoint_failures_that_pass_are_tried_again_and_no_row_is_lost_doubled_or_swapped(server, tiny_model):
    ways = [
        lambda _: failure(429, "slow down", retry_after="0"),
        lambda _: failure(500),
        lambda _: None,
        lambda _: page(),
        lambda body: completion(body, choices=[]),
        lambda body: completion(body),
    ]
    seen: Counter = Counter()

    def answer(body):
        seen[body["seed"]] += 1
        return ways[(seen[body["seed"]] - 1) % len(ways)](body)

    server.answer = answer
    requests = make_requests(12)
    require_all_right(requests, list(make_engine(server, tiny_model).generate(requests)))
    assert set(seen.values()) == {len(ways)}


def test_endpoint_that_ends_a_text_as_it_shuts_down_is_asked_again(server, tiny_model):
    server.answer = lambda body: completion(
        body,
        choices=[{"text": "half a", "finish_reason": "abort"}]
        if len(server.asked) == 1
        else [{"text": text_of(body), "finish_reason": "stop"}],
    )
    requests = make_requests(1)
    require_all_right(requests, list(make_engine(server, tiny_model).generate(requests)))


@pytest.mark.heavy
@pytest.mark.parametrize("as_date", [False, True])
def test_endpoint_is_left_alone_for_as_long_as_it_asks(server, tiny_model, as_date):
    until = int(time.time()) + 2
    wait = email.utils.formatdate(until, usegmt=True) if as_date else "1"
    server.answer = lambda body: failure(429, retry_after=wait) if len(server.asked) == 1 else completion(body)
    requests = make_requests(1)
    require_all_right(requests, list(make_engine(server, tiny_model).generate(requests)))
    assert time.time() > until if as_date else server.times[1] - server.times[0] > 0.99


def test_endpoint_a_row_that_always_fails_is_an_error_and_the_others_are_served(server, tiny_model):
    bad = make_requests(8)[3]
    for reply, times, message in (
        (failure(500, "CUDA error"), endpoint.TRIES, f"answers 500: CUDA error ({endpoint.TRIES} times)"),
        (failure(400, "The model's maximum context length is 8."), 1, "The model's maximum context length is 8 (400)"),
    ):
        server.asked.clear()
        server.answer = lambda body, reply=reply: reply if body["prompt"] == bad.prompt_ids else completion(body)
        made = list(make_engine(server, tiny_model).generate(make_requests(8)))
        ((request, generation),) = [pair for pair in made if pair[1].finish_reason == "error"]
        assert request == bad and generation.text == message
        require_all_right([each for each in make_requests(8) if each != bad], [p for p in made if p[0] != bad])
        assert [body["prompt"] for body in server.asked].count(bad.prompt_ids) == times


@pytest.mark.heavy
def test_endpoint_that_fails_every_row_stops_the_work_instead_of_failing_each(server, tiny_model):
    server.answer = lambda _: failure(500, "no more memory")
    with pytest.raises(StageFailed, match=r"^distill.teacher.endpoint: .* answers 500: no more memory \(16 requests"):
        list(make_engine(server, tiny_model).generate(make_requests(1000)))
    assert len(server.asked) < 200, "of 1000"


def test_endpoint_that_cuts_a_text_by_its_own_limit_gives_an_error_not_a_truncated_rewrite(server, tiny_model):
    server.answer = lambda body: completion(body, choices=[{"text": "a", "finish_reason": "length"}])
    ((_, generation),) = make_engine(server, tiny_model).generate(make_requests(1))
    assert generation.finish_reason == "error" and "leaves too little of the endpoint's context" in generation.text
    server.answer = lambda body: completion(
        body,
        choices=[{"text": "a", "finish_reason": "length"}],
        usage={"prompt_tokens": 4, "completion_tokens": 16},
    )
    ((_, generation),) = make_engine(server, tiny_model).generate(make_requests(1))
    assert (generation.finish_reason, generation.tokens, generation.prompt_tokens) == ("length", 16, 4)


@pytest.mark.heavy
def test_endpoint_killed_in_the_middle_and_started_again_loses_nothing(server, tiny_model):
    requests, made = make_requests(60), []

    def answer(body):
        time.sleep(0.01)
        return completion(body)

    server.answer = answer
    threads: list[threading.Timer] = []
    for pair in make_engine(server, tiny_model, patience=20).generate(requests):
        made.append(pair)
        if len(made) in (10, 30):
            server.stop()
            threads.append(threading.Timer(0.5, server.start))
            threads[-1].start()
    require_all_right(requests, made)


def test_endpoint_that_does_not_come_back_stops_the_work_in_one_line(server, tiny_model):
    engine = make_engine(server, tiny_model, patience=0.3)
    server.stop()
    with pytest.raises(StageFailed, match=r"^distill.teacher.endpoint: \S+ drops the connection or is not there"):
        list(engine.generate(make_requests(4)))


def test_endpoint_without_credit_stops_the_work_in_one_line(server, tiny_model):
    server.answer = lambda _: failure(402, "no credits")
    with pytest.raises(
        StageFailed, match=r"answers 402: no credits\. .* run the same command again: what was generated"
    ):
        list(make_engine(server, tiny_model).generate(make_requests(100)))
    assert len(server.asked) < 20, "of 100"


def test_endpoint_that_lists_models_barely_and_tells_an_end_of_text_apart_is_understood(server, tiny_model):
    """As Together's API does."""
    server.models = lambda: (200, {}, json.dumps([{"id": NAME}]))
    server.answer = lambda body: completion(body, choices=[{"text": "four", "finish_reason": "eos"}])
    engine = make_engine(server, tiny_model, api="openai")
    engine.client.require_model()
    ((_, generation),) = engine.generate(make_requests(1))
    assert (generation.text, generation.finish_reason) == ("four", "stop")


def test_endpoint_that_is_busy_for_too_long_stops_the_work_in_one_line(server, tiny_model):
    server.answer = lambda _: failure(429, "quota is used up")
    with pytest.raises(StageFailed, match="answers 429: quota is used up"):
        list(make_engine(server, tiny_model, patience=0.3).generate(make_requests(4)))


def test_endpoint_too_slow_an_answer_is_asked_for_again(server, tiny_model):
    def answer(body):
        if len(server.asked) == 1:
            time.sleep(1)
        return completion(body)

    server.answer = answer
    requests = make_requests(1)
    require_all_right(requests, list(make_engine(server, tiny_model, timeout=0.3).generate(requests)))


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (
            lambda body: completion(body, model="another/model"),
            r"model: \S+ was asked for some/teacher and answers as a",
        ),
        (lambda body: completion(body, model=f"{NAME}-v2"), r"model: .* answers as some/teacher-v2"),
        (lambda _: failure(401), rf"endpoint: \S+ asks for a key\. Set {KEY_VARIABLE}"),
        (lambda _: failure(404, "no such model"), r"endpoint: \S+ answers 404 to /completions: no such model"),
        (lambda _: (302, {"location": "/login"}, ""), r"endpoint: \S+ answers 302"),
    ],
)
def test_endpoint_that_cannot_be_used_ends_the_work_at_once(server, tiny_model, reply, line):
    server.answer = reply
    with pytest.raises(UserError, match=f"^distill.teacher.{line}"):
        list(make_engine(server, tiny_model).generate(make_requests(1000)))
    assert len(server.asked) < 200, "of 1000"


def test_endpoint_of_the_plain_kind_may_add_a_version_to_its_name(server, tiny_model):
    server.answer = lambda body: completion(body, model=f"{NAME}:2026-11")
    ((_, generation),) = make_engine(server, tiny_model, api="openai").generate(make_requests(1))
    assert generation.finish_reason == "stop"


def test_endpoint_key_is_in_no_message_though_the_server_repeats_it(server, tiny_model, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "PLANTED-key")
    server.answer = lambda _: failure(400, "wrong: Bearer PLANTED-key")
    ((_, generation),) = make_engine(server, tiny_model).generate(make_requests(1))
    assert generation.text == "wrong: Bearer *** (400)"
    server.answer = lambda _: failure(403, "PLANTED-key is not valid")
    with pytest.raises(UserError, match=f"refuses the key in {KEY_VARIABLE}") as error:
        list(make_engine(server, tiny_model).generate(make_requests(1)))
    assert "PLANTED" not in str(error.value)
    server.answer = lambda _: failure(400, f"{'x' * 190} PLANTED-key is not valid")
    ((_, generation),) = make_engine(server, tiny_model).generate(make_requests(1))
    assert generation.text == f"{'x' * 190} *** is no (400)", "the key is not cut in two"


@pytest.mark.parametrize("key", ["PLANTED\nkey", "\u201cPLANTED\u201d", "PLANTED\N{NO-BREAK SPACE}key"])
def test_endpoint_key_that_no_header_takes_is_one_line_without_it(server, monkeypatch, key):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(UserError, match=f"^{KEY_VARIABLE}: holds a character that no key has") as error:
        Client(ServedModel(endpoint=server.url, model=NAME)).require_model()
    assert "PLANTED" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None, "completion_tokens": None}])
def test_endpoint_that_does_not_count_tokens_gives_texts_and_truncated_ones(server, tiny_model, usage):
    (asked,) = make_requests(1)
    for choice, tokens in (
        ({"text": "four is 4", "finish_reason": "stop"}, None),
        ({"text": "four is", "finish_reason": "stop", "token_ids": [5, 6]}, 2),
        ({"text": "four is", "finish_reason": "length"}, 16),
    ):
        server.answer = lambda body, choice=choice: completion(body, choices=[choice], usage=usage)
        engine = make_engine(server, tiny_model)
        ((_, made),) = engine.generate([asked])
        assert (made.text, made.finish_reason, made.prompt_tokens) == (choice["text"], choice["finish_reason"], 4)
        assert made.tokens == tokens or (tokens is None and made.tokens == len(engine.tokenizer.encode("four is 4")))


@pytest.mark.parametrize(
    ("models", "line"),
    [
        (lambda: (200, {}, '{"data": [{"id": "some/teachers"}]}'), r"model: some/teacher is not .* Did you mean s"),
        (lambda: failure(401), r"endpoint: \S+ asks for a key"),
        (lambda: failure(404, "Not Found"), r"endpoint: .* answers 404 to /models: Not Found\. .* ends in /v1"),
        (lambda: failure(503, "loading"), r"endpoint: \S+ answers 503: loading\. Start the server"),
        (page, r"endpoint: \S+ answers with something in HTML, not JSON"),
        (lambda: (200, {}, "{}"), r"endpoint: \S+ answers with something without what it should hold \(data: "),
        (lambda: (200, {}, "hello"), r"endpoint: \S+ answers with something that is no JSON"),
        (lambda: (200, *failure(402, "no credits")[1:]), r"endpoint: \S+ answers with 200: no credits"),
        (lambda: None, r"endpoint: \S+ drops the connection or is not there"),
    ],
)
def test_endpoint_check_names_the_obstacle_in_one_line(server, models, line):
    served = ServedModel(endpoint=server.url, model=NAME)
    Client(served).require_model()
    server.models = models
    with pytest.raises(UserError, match=f"^distill.teacher.{line}") as error:
        Client(served).require_model()
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("context", [9, None])
def test_endpoint_check_minds_the_context_where_the_server_says_it(server, context):
    own = {"id": NAME, "max_model_len": context} if context else {"id": NAME}
    data = [{"id": "another/model", "max_model_len": 1}, own]
    server.models = lambda: (200, {}, json.dumps({"data": data}))
    client = Client(ServedModel(endpoint=server.url, model=NAME))
    client.require_model(8)
    if context is None:
        client.require_model(10**6)
        return
    line = "9 is more than the context of 9 holds that some/teacher is served with. Lower distill.max_new_tokens to 8 "
    with pytest.raises(UserError, match=f"^distill.max_new_tokens: {line}"):
        client.require_model(9)


def test_endpoint_check_of_nobody_is_one_line(server):
    served = ServedModel(endpoint=server.url, model=NAME)
    server.stop()
    with pytest.raises(UserError, match=r"^distill.teacher.endpoint: \S+ drops the connection or is not there"):
        Client(served).require_model()


def test_endpoint_with_another_tokenizer_is_refused_where_it_says_so(server, tiny_model):
    tokenizer, served = AutoTokenizer.from_pretrained(tiny_model), ServedModel(endpoint=server.url, model=NAME)
    Client(served).require_tokenizer(tokenizer)  # it does not say
    ids = lambda body: tokenizer.encode(body["prompt"], add_special_tokens=False)  # noqa: E731
    server.tokenize = lambda body: (200, {}, f'{{"tokens": {ids(body)}}}')
    Client(served).require_tokenizer(tokenizer)
    server.tokenize = lambda body: (200, {}, f'{{"tokens": {ids(body)[1:]}}}')
    with pytest.raises(UserError, match=r"^distill.teacher.tokenizer: some/teacher has another tokenizer"):
        Client(served).require_tokenizer(tokenizer)
    server.tokenize = lambda _: (200, {}, '{"tokens": []}')  # llama.cpp's server reads `content`, not `prompt`
    Client(served).require_tokenizer(tokenizer)


def test_start_engine_takes_vllm_where_no_endpoint_teaches(monkeypatch):
    monkeypatch.setattr(VllmEngine, "__init__", lambda self, *_: None)
    assert isinstance(start_engine("somewhere", Distill(), EngineOptions(), alone=True), VllmEngine)
