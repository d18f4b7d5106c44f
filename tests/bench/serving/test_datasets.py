"""Prompts against the tokenizer that a server would count with."""

import itertools
import json
from pathlib import Path
from random import Random

import pytest

from pointsman import tiny
from pointsman.bench.serving.arrivals import Arrivals
from pointsman.bench.serving.datasets import Source
from pointsman.bench.serving.http import Origin
from pointsman.bench.serving.options import ServeOptions
from pointsman.bench.serving.prompts import LocalCounter, ServerCounter
from pointsman.bench.serving.traces import read_azure, read_mooncake
from pointsman.text import Tokenizer
from tests.bench.serving.stub_server import json_answer, running

DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def counter():
    return LocalCounter(Tokenizer.load(tiny.path()))


def queries(counter, seed=3, **options):
    return Source(ServeOptions(**options), counter).queries(Random(seed))


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("backend", ["openai", "openai-chat", "generate"])
def test_random_prompts_have_exactly_their_length(counter, backend, template):
    lengths = {"random_input_len": 100, "random_output_len": 30, "random_range_ratio": 0.8}
    made = queries(counter, num_prompts=200, backend=backend, use_chat_template=template, **lengths)
    for query in made:
        sent = counter.wrap(query.text) if template and backend == "openai-chat" else query.text
        assert len(counter.tokenizer.encode(sent)) == query.input_len
        assert 80 <= query.input_len <= 100
        assert 24 <= query.output_len <= 30
    assert {query.input_len for query in made} == set(range(80, 101))
    assert {query.output_len for query in made} == set(range(24, 31))
    assert len({query.text for query in made}) == len(made)
    assert (counter.wrap("")[:5] == made[0].text[:5]) == (template and backend != "openai-chat")


def test_the_same_seed_makes_the_same_prompts(counter):
    first, second, other = (queries(counter, seed, num_prompts=5, random_input_len=20) for seed in (1, 1, 2))
    assert first == second != other


def test_ids_are_of_the_whole_vocabulary_and_not_special(counter):
    (query,) = queries(counter, num_prompts=1, random_input_len=20000, tokenize_prompt=True)
    assert len(query.ids) == query.input_len == 20000
    assert not set(query.ids) & counter.tokenizer.special_ids
    assert len(set(query.ids)) > 0.9 * counter.tokenizer.vocab_size


def test_a_length_under_the_template_is_refused(counter):
    overhead = len(counter.tokenizer.encode(counter.wrap("")))
    with pytest.raises(ValueError, match=f"its template and beginning tokens alone are {overhead}"):
        queries(counter, num_prompts=1, random_input_len=overhead, use_chat_template=True)
    (query,) = queries(counter, num_prompts=1, random_input_len=overhead + 1, use_chat_template=True)
    assert query.input_len == overhead + 1


def test_groups_share_their_beginning(counter):
    shape = {"gsp_num_groups": 3, "gsp_prompts_per_group": 4, "gsp_system_prompt_len": 50, "gsp_question_len": 10}
    made = queries(counter, dataset_name="shared-prefix", gsp_output_len=7, **shape)
    assert len(made) == 12
    encoded = [counter.tokenizer.encode(query.text) for query in made]
    assert {len(ids) for ids in encoded} == {60}
    starts = [tuple(ids[:50]) for ids in encoded]
    assert sorted(starts.count(start) for start in set(starts)) == [4, 4, 4]
    assert len({tuple(ids) for ids in encoded}) == 12


def test_a_warm_up_has_the_same_lengths_and_another_text(counter):
    source = Source(ServeOptions(num_prompts=1, random_input_len=40), counter)
    (query,) = source.queries(Random(1))
    other = source.like(query, Random(2))
    assert other.text != query.text
    assert len(counter.tokenizer.encode(other.text)) == query.input_len


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_azure(tmp_path, counter):
    path = lines(tmp_path / "a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,374,44",
                 "2023-11-16 18:15:47.1805900,40,0")  # fmt: skip
    made = queries(counter, dataset_name="azure", dataset_path=path, num_prompts=2, trace_slowdown=2.0, trace_length_scale=0.5)
    assert [(query.input_len, query.output_len, query.arrival_s) for query in made] == [(187, 22, 0.0), (20, 1, 1.0)]
    assert [len(counter.tokenizer.encode(query.text)) for query in made] == [187, 20]


def test_mooncake_blocks_with_one_name_are_one_text(tmp_path, counter):
    rows = [{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
            {"timestamp": 1500, "input_length": 1024, "output_length": 6, "hash_ids": [0, 7]}]  # fmt: skip
    made = queries(counter, dataset_name="mooncake", dataset_path=lines(tmp_path / "m.jsonl", *rows), num_prompts=2)
    first, second = (counter.tokenizer.encode(query.text) for query in made)
    assert (len(first), len(second), made[1].arrival_s) == (1100, 1024, 1.5)
    assert first[:512] == second[:512]
    assert first[512:1024] != second[512:1024]


@pytest.mark.skipif(not DATA.is_dir(), reason="there are no traces beside the repository")
def test_the_public_traces_are_read_to_their_end():
    azure = read_azure(str(DATA / "azure_conv_2023.csv"), 19000)
    assert azure[0].at_s == 0 and azure[1].at_s == pytest.approx(4.314579, abs=1e-6)
    assert len(read_mooncake(str(DATA / "mooncake_conversation.jsonl"), 12000)) == 12000


def test_sharegpt_takes_the_first_turn_and_the_length_of_the_second(tmp_path, counter):
    talk = [{"from": "human", "value": "How many apples are there in all?"}, {"from": "gpt", "value": "There are seven apples in all."}]
    short = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"conversations": talk}, {"conversations": short}, {"conversations": talk[:1]}]))
    (query,) = queries(counter, dataset_name="sharegpt", dataset_path=str(path), num_prompts=1)
    assert query.text == talk[0]["value"]
    assert (query.input_len, query.output_len) == tuple(counter.count(turn["value"]) for turn in talk)
    with pytest.raises(ValueError, match="has 1 requests that can be used; --num-prompts is 2"):
        queries(counter, dataset_name="sharegpt", dataset_path=str(path), num_prompts=2)


def test_a_file_that_has_fewer_requests_is_asked_whole_unless_more_are_wanted(tmp_path, counter):
    rows = [{"timestamp": 0, "input_length": 3, "output_length": 5, "hash_ids": [number]} for number in range(3)]
    files = {
        "custom": lines(tmp_path / "c.jsonl", *[{"prompt": "a"}] * 3),
        "mooncake": lines(tmp_path / "m.jsonl", *rows),
        "azure": lines(tmp_path / "a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens", *["2023-11-16 18:15:46,3,4"] * 3),
    }
    for dataset, path in files.items():
        assert len(queries(counter, dataset_name=dataset, dataset_path=path)) == 3
        assert len(queries(counter, dataset_name=dataset, dataset_path=path, num_prompts=2)) == 2
        with pytest.raises(ValueError, match=r"has 3 requests that can be used; --num-prompts is 4"):
            queries(counter, dataset_name=dataset, dataset_path=path, num_prompts=4)


def test_custom_files(tmp_path, counter):
    rows = [{"prompt": "a b", "output_len": 3, "timestamp": 1.5}, {"messages": [{"role": "user", "content": "a"}]}]
    path = lines(tmp_path / "c.jsonl", *rows)
    first, second = queries(counter, dataset_name="custom", dataset_path=path, num_prompts=2, backend="openai-chat")
    assert (first.text, first.input_len, first.output_len, first.arrival_s) == ("a b", counter.count("a b"), 3, 1.5)
    assert (second.messages, second.input_len, second.output_len, second.arrival_s) == (rows[1]["messages"], None, 256, None)


@pytest.mark.parametrize(
    ("dataset", "content", "message"),
    [
        ("custom", '{"prompt": "a", "x": 1}', "line 1 of .* is not what it should be: .*x"),
        ("custom", "{}", "line 1 of .* must have prompt or messages"),
        ("custom", '{"prompt": "a", "output_len": -1}', "output_len must be at least 1"),
        ("sharegpt", "{}", "is not what it should be"),
        ("azure", "a,b\n1,2", r"has the columns \['a', 'b'\]"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2", "line 2 of .*now"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,0,2", "request 1 has 0 tokens in"),
        ("mooncake", '{"timestamp": 0}', "line 1 of"),
        ("mooncake", '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}', "600 tokens in, 1 out, 1 blocks"),
        ("mooncake", "", "has no requests that can be used"),
        ("sharegpt", "[]", "has no requests that can be used"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else_is_named(dataset, content, message, tmp_path, counter):
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        queries(counter, dataset_name=dataset, dataset_path=str(path), num_prompts=1)


@pytest.mark.parametrize("field", ["prompt", "content"])
def test_a_server_counts_where_there_is_no_tokenizer(field, counter):
    def tokenize(body):
        if field not in body:
            return json_answer({"error": "no"}, "400 Bad Request")
        return json_answer({"tokens": counter.tokenizer.encode(body[field])})

    with running({"/tokenize": tokenize}) as stub:
        asked = ServerCounter(Origin("127.0.0.1", stub.port), "m", {})
        made = queries(asked, num_prompts=3, random_input_len=30)
        assert [len(counter.tokenizer.encode(query.text)) for query in made] == [30] * 3
        with pytest.raises(ValueError, match="pass --tokenizer, its folder"):
            queries(asked, num_prompts=1, random_input_len=30, use_chat_template=True)


def test_a_server_that_does_not_count_is_told():
    with running({}) as stub, pytest.raises(ValueError, match="does not count tokens at /tokenize; pass --tokenizer"):
        ServerCounter(Origin("127.0.0.1", stub.port), None, {})


def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness():
    """A gamma of shape b has the mean 1/rate and the variance mean^2 / b; 4000 draws know both to a few percent."""
    for rate, burstiness in ((2.0, 1.0), (50.0, 0.25), (10.0, 100.0)):
        moments = Arrivals(rate=rate, burstiness=burstiness).offsets_s(4001, Random(0))
        gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
        mean = sum(gaps) / len(gaps)
        assert mean == pytest.approx(1 / rate, rel=0.1)
        assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean * mean / burstiness, rel=0.25)
    assert Arrivals().offsets_s(3, Random(0)) == [0.0, 0.0, 0.0]


def test_a_ramp_goes_from_one_rate_to_the_other():
    linear, exponential = (Arrivals(rate=1, end_rate=100, exponential=kind) for kind in (False, True))
    assert (linear.rate_at(0), linear.rate_at(0.5), linear.rate_at(1)) == (1, 50.5, 100)
    assert [exponential.rate_at(share) for share in (0, 0.5, 1)] == pytest.approx([1, 10, 100])
    moments = Arrivals(rate=1, end_rate=100, burstiness=1e6).offsets_s(200, Random(0))
    assert moments[1] == pytest.approx(1, rel=0.02)
    assert moments[-1] - moments[-2] == pytest.approx(1 / 100, rel=0.05)
