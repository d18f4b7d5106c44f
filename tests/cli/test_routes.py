"""`pointsman routes`: counts and agreement against loops written out, every form of a record, pages, servers, and rubbish."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import io
import json
import math
import re
import threading

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pointsman.cli import main
from pointsman.cli.routes.agreement import compare
from pointsman.cli.routes.load import Load, balances, load_of
from pointsman.cli.routes.page import page
from pointsman.routed_experts import RoutedExperts, encode
from tests.server.browser import start_browser
from tests.test_routed_experts import example, records

SETTINGS = settings(deadline=None, max_examples=60)


def known_rows(experts):
    """Position to row, as a reader of the record would have it."""
    gone = {row for first, last in experts.missing for row in range(first, last)}
    return {experts.start + row: experts.rows_RLK[row] for row in range(experts.num_rows) if row not in gone}


@SETTINGS
@given(records())
def test_load_is_counted_one_by_one(experts):
    rows = known_rows(experts)
    assume(rows)
    counts = np.zeros((len(experts.layers), experts.num_experts), int)
    for row in rows.values():
        for layer, chosen in enumerate(row):
            for expert in chosen:
                counts[layer, expert] += 1
    load = load_of([experts, experts], "twice")
    assert np.array_equal(load.counts_LE, 2 * counts)
    assert (load.num_tokens, load.num_missing) == (2 * len(rows), 2 * (experts.num_rows - len(rows)))
    assert load.top_k == experts.rows_RLK.shape[2]
    for layer, found in enumerate(balances(load)):
        used = counts[layer] / counts[layer].sum()
        entropy = -sum(share * math.log(share) for share in used if share)
        assert found.layer == experts.layers[layer]
        assert found.dead == tuple(expert for expert in range(experts.num_experts) if not counts[layer, expert])
        assert math.isclose(found.max_over_mean, counts[layer].max() * experts.num_experts / counts[layer].sum())
        assert math.isclose(found.effective, math.exp(entropy))
        assert math.isclose(found.entropy, entropy / math.log(experts.num_experts) if experts.num_experts > 1 else 1, abs_tol=1e-12)


@SETTINGS
@given(records(), st.data())
def test_agreement_is_compared_one_by_one(left, data):
    rows = left.rows_RLK.copy()
    for row, layer in data.draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), max_size=5)):
        if row < rows.shape[0] and layer < rows.shape[1]:
            other = data.draw(st.permutations(range(left.num_experts))) if left.num_experts <= 16 else range(rows.shape[2])
            rows[row, layer] = list(other)[: rows.shape[2]]
    cut = data.draw(st.integers(0, max(left.num_rows - 1, 0)))
    right = RoutedExperts(rows_RLK=rows[cut:], num_experts=left.num_experts, start=left.start + cut, layers=left.layers)
    mine, theirs = known_rows(left), known_rows(right)
    common = sorted(mine.keys() & theirs.keys())
    assume(common)
    found = compare(left, right)
    same = [[set(a) == set(b) for a, b in zip(mine[at].tolist(), theirs[at].tolist(), strict=True)] for at in common]
    ordered = [[a == b for a, b in zip(mine[at].tolist(), theirs[at].tolist(), strict=True)] for at in common]
    assert found.num_tokens == len(common)
    assert found.sets == pytest.approx([sum(column) / len(common) for column in zip(*same, strict=True)])
    assert found.orders == pytest.approx([sum(column) / len(common) for column in zip(*ordered, strict=True)])
    assert found.tokens == pytest.approx(sum(map(all, same)) / len(common))
    parted = [(at, left.layers[layer]) for at, row in zip(common, same, strict=True) for layer, alike in enumerate(row) if not alike]
    assert (found.first[:2] if found.first else None) == (parted[0] if parted else None)
    for layer, position in zip(left.layers, found.by_layer, strict=True):
        assert position == next((at for at, where in parted if where == layer), None)


def run(capsys, *words):
    code = main(["routes", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def forms():
    experts = example()
    record = encode(experts)
    npy, flat = encode(experts, "npy"), encode(experts, "int32")
    return {
        "record.json": json.dumps(record).encode(),
        "chat.json": json.dumps({"id": "x", "choices": [{"message": {"content": "hi"}, "routed_experts": record}]}).encode(),
        "vllm.json": json.dumps({"choices": [{"routed_experts": npy}]}).encode(),
        "generate.json": json.dumps({"text": "hi", "meta_info": {"routed_experts": flat}}).encode(),
        "lines.jsonl": b"\n".join([json.dumps({"routed_experts": record}).encode()] * 1 + [b"{}", b""]),
        "rows.npy": base64.b64decode(npy),
    }


@pytest.mark.parametrize("name", forms())
def test_every_form_of_a_record_is_read(name, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(forms()[name])
    shape = ["--num-layers", 3, "--top-k", 4] if name == "generate.json" else []
    code, out, _ = run(capsys, path, "--json", "--num-experts", 16, *shape)
    assert code == 0
    found = json.loads(out)
    assert found["counts"] == load_of([example()], "").counts_LE.tolist()
    assert (found["num_tokens"], found["top_k"], found["num_experts"]) == (5, 4, 16)


def test_several_files_and_lines_are_counted_together(tmp_path, capsys):
    line = json.dumps(encode(example()))
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}\n")
    (tmp_path / "b.json").write_text(line)
    code, out, _ = run(capsys, tmp_path / "a.jsonl", tmp_path / "b.json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["num_tokens"] == 15
    assert "2 files: 15 tokens, 4 of 16 experts a token" in out


def test_the_table_says_what_the_json_says(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(encode(example(missing=((1, 2),)))))
    _, out, _ = run(capsys, tmp_path / "r.json")
    *table, last = out.splitlines()
    figures = json.loads(last)
    assert "1 more are missing" in table[0]
    for entry in figures["layers"]:
        [line] = [line for line in table if line.split()[:1] == [str(entry["layer"])]]
        assert f"{entry['busiest']} {entry['max_over_mean']:.2f}×" in line
        assert f"{entry['entropy']:.3f}" in line


def test_two_records_are_compared(tmp_path, capsys):
    left = example()
    rows = left.rows_RLK.copy()
    rows[:, 0] = rows[:, 0, ::-1]
    rows[3, 2] = [0, 1, 2, 3]
    right = RoutedExperts(rows_RLK=rows, num_experts=16, layers=left.layers)
    for name, experts in (("a", left), ("b", right)):
        (tmp_path / name).write_text(json.dumps(encode(experts)))
    code, out, _ = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 0
    figures = json.loads(out.splitlines()[-1])
    assert figures["first_divergence"] == {"position": 3, "layer": 2, "left": left.rows_RLK[3, 2].tolist(), "right": [0, 1, 2, 3]}
    assert [entry["agreement"] for entry in figures["layers"]] == [1, 1, 0.8]
    assert [entry["ordered_agreement"] for entry in figures["layers"]] == [0, 1, 0.8]
    assert "They part at position 3, layer 2" in out
    code, out, _ = run(capsys, "diff", tmp_path / "a", tmp_path / "a", "--json")
    assert code == 0
    assert json.loads(out)["first_divergence"] is None


def test_pictures_and_pages_are_written(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(encode(example())))
    code, _, _ = run(capsys, tmp_path / "r.json", "--png", tmp_path / "r.png", "--html", tmp_path / "r.html")
    assert code == 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "How often each expert was used" in (tmp_path / "r.html").read_text()


def load(source="here"):
    return Load(counts_LE=np.arange(24).reshape(3, 8), layers=(0, 1, 5), num_tokens=100, source=source)


def test_the_page_is_whole_and_lets_nothing_in():
    text = page(load(), "A & B", "</script><script>alert(1)</script>")
    assert "A &amp; B" in text
    assert text.count("<script") == 1
    assert not re.search(r"""(src|href)=|url\(|@import|https?://""", text)
    policy = re.search(r'content="(default-src[^"]*)"', text)[1]
    for tag in ("script", "style"):
        inner = re.search(f"<{tag}>(.*)</{tag}>", text, re.DOTALL)[1]
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'" in policy
    data = json.loads(re.search(r"const LOAD = (.*);\n", text)[1])
    assert data["counts"] == load().counts_LE.tolist()
    assert not re.search(r"/\*[A-Z]+\*/", text)


def test_the_page_can_be_pointed_at(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page(load(), "Title", "text"))
    with start_browser() as window:
        for dark in (False, True):
            window.open(path.as_uri(), dark=dark)
            window.wait("document.querySelector('#map canvas')")
            window.run("document.querySelector('#map canvas').focus()")
            window.press("\ue014", "\ue015", "\ue015", "\ue007")  # right, down, down, enter
            window.wait("document.querySelector('#layer-title').textContent === 'Layer 5'")
            assert window.find(".note").text == "Layer 5, expert 0: 16 tokens (16.0 % of the tokens), 0.82× an even share"
            assert len(window.all("#bars div")) == 8
            assert len(window.all("#rows tr")) == 3
            assert window.complaints() == []


@contextlib.contextmanager
def serving(status, body):
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()


def test_a_server_is_asked(capsys):
    answer = {"layers": [1, 3], "num_experts": 4, "num_tokens": 6, "counts": [[3, 3, 3, 3], [6, 6, 0, 0]]}
    with serving(200, json.dumps(answer).encode()) as (url, seen):
        code, out, _ = run(capsys, "--url", url + "/", "--api-key", "secret")
    assert code == 0
    assert seen == [("/routing_load", "Bearer secret")]
    figures = json.loads(out.splitlines()[-1])
    assert (figures["num_tokens"], figures["top_k"], figures["num_dead"]) == (6, 2, 2)
    assert [(entry["layer"], entry["effective"]) for entry in figures["layers"]] == [(1, 4), (3, 2)]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b'{"error": "key"}', '401: {"error": "key"}'),
        (200, b"<html>", "cannot be read"),
        (200, b"[1]", "must have counts"),
        (200, b'{"counts": [[1], [1, 2]]}', "must have counts"),
        (200, b'{"counts": [[-1]]}', "must have counts"),
        (200, b'{"counts": "many"}', "must have counts"),
        (200, b'{"counts": [[1, 0]], "layers": [0, 1], "num_tokens": 1}', "must name each"),
        (200, b'{"counts": [[0, 0]], "num_tokens": 0}', "counted nothing"),
        (200, b'{"counts": [[1, 0]], "num_tokens": "x"}', "must have counts"),
    ],
)
def test_other_answers_are_refused(status, body, message, capsys):
    with serving(status, body) as (url, _):
        code, out, err = run(capsys, "--url", url)
    assert code == 1
    assert out == ""
    assert message in err


RUBBISH = {
    "empty": (b"", "neither JSON nor"),
    "binary": (b"\xff\xfe\x00", "neither JSON nor"),
    "text": (b"hello", "neither JSON nor"),
    "no record": (b'{"choices": []}', "no record in it"),
    "another npy": (io.BytesIO, "npy has the dtype"),
    "damaged": (json.dumps(encode(example()) | {"crc32": 5}).encode(), "crc32 is 5"),
    "int32 without shape": (forms()["generate.json"], "--num-layers"),
    "not base64": (b'{"routed_experts": "?"}', "not base64"),
    "deep": (b"[" * 500 + b"]" * 500, "nested"),
    "deeper": (b"[" * 100_000, "neither JSON nor"),
    "nothing known": (json.dumps(encode(example(missing=((0, 5),)))).encode(), "no row is known"),
    "two models": (json.dumps([encode(example()), encode(example(layers=(0, 1, 3)))]).encode(), "of one model"),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_is_refused_by_name(name, tmp_path, capsys):
    data, message = RUBBISH[name]
    if data is io.BytesIO:
        file = io.BytesIO()
        np.save(file, np.zeros((2, 3, 4)))
        data = file.getvalue()
    path = tmp_path / "file"
    path.write_bytes(data)
    code, out, err = run(capsys, path)
    assert code == 1
    assert out == ""
    assert message in err
    assert str(path) in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give files with records, or --url"),
        (["a", "--url", "http://x"], "not both"),
        (["a", "--api-key", "x"], "--api-key goes with --url"),
        (["diff", "a"], "pointsman routes diff: give two files with a record each; 1 are given"),
        (["a", "--pong", "x"], "--png"),
        (["a", "--top-k", "0"], "--top-k"),
    ],
)
def test_what_was_typed_wrong_is_told(words, message, capsys):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err


def test_addresses_and_files_that_are_none(tmp_path, capsys):
    assert run(capsys, "--url", "file:///etc/passwd")[0] == 1
    code, _, err = run(capsys, tmp_path / "none.json")
    assert code == 1
    assert "none.json" in err
    (tmp_path / "two.jsonl").write_text(2 * (json.dumps(encode(example())) + "\n"))
    code, _, err = run(capsys, "diff", tmp_path / "two.jsonl", tmp_path / "two.jsonl")
    assert code == 1
    assert "it has 2 records" in err
    (tmp_path / "far.json").write_text(json.dumps(encode(example(start=9))))
    (tmp_path / "near.json").write_text(json.dumps(encode(example())))
    code, _, err = run(capsys, "diff", tmp_path / "near.json", tmp_path / "far.json")
    assert code == 1
    assert "none in common" in err
