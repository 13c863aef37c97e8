"""The reference server: the rewards of its model to the last bit, and a short refusal for whatever else is sent."""

import http.client
import json
import math
import multiprocessing
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from remax.cli import main
from remax.commands import COMMANDS
from remax.errors import UserError
from remax.interfaces import Completion, Prompt
from remax.rewards import CallableReward, RewardModel, score
from remax.rewards.remote import RemoteReward
from remax.rewards.server import RewardServer, parse_request, scorer
from toy_tokenizers import CHATML, EOS, VOCAB_SIZE, say, toy_tokenizer
from toy_training import PROMPTS, policy, read


def completion(prompt: Any, text: str, /, *, truncated: bool = False, **columns: Any) -> Completion:
    return Completion(Prompt(0, prompt, [7, 8], columns), 0, [9, EOS], [-1.0, -1.0], truncated, text)


def lengths(completions: Sequence[Completion]) -> list[float]:
    return [float(len(c.text)) for c in completions]


def reward_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, num_labels=1, pad_token_id=0, initializer_range=0.3, **sizes)
    return AutoModelForSequenceClassification.from_config(config)


def reward_tokenizer() -> Any:
    return toy_tokenizer("<s> $A", bos_token="<s>", chat_template=CHATML)


@contextmanager
def running(score: Any = lengths, **settings: Any) -> Iterator[RewardServer]:
    server = RewardServer(score, settings.pop("host", "127.0.0.1"), 0, **settings)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask(server: RewardServer, body: Any, *, path: str = "/score", method: str = "POST", **headers: str) -> Any:
    """Returns status and content of a reply."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, content, {"Content-Type": "application/json", **names})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    assert response.headers["Server"].strip() == "remax"
    return response.status, json.loads(text)


def client(server: RewardServer, **settings: Any) -> RemoteReward:
    return RemoteReward(server.url, timeout_seconds=10.0, sleep=lambda _: None, **settings)


# Round trip -----------------------------------------------------------------------------------------------------------


def test_rewards_through_the_server_are_those_of_the_model() -> None:
    rows = [completion("ask: ", text, truncated=i == 1) for i, text in enumerate(["yes", "yes", "a longer answer", ""])]
    rows += [completion(say("hi", "there", "again"), text, truncated=i == 1) for i, text in enumerate(["yo", "yo"])]
    direct = RewardModel(reward_model(), reward_tokenizer())
    expected = direct(rows[:4]) + direct(rows[4:])
    assert len(set(expected)) == 6, "whether an answer is finished must show in its score"
    with running(scorer([RewardModel(reward_model(), reward_tokenizer())], [1.0])) as server:
        remote = client(server)
        remote.wait_until_ready()
        assert remote(rows[:4]) + remote(rows[4:]) == expected


def test_functions_get_what_they_would_get_at_home_and_their_logs_are_dropped() -> None:
    def f(prompts: Any, completions: Any, completion_ids: Any, answer: Any, log_metric: Any, log_extra: Any) -> Any:
        log_metric("a", 1)
        log_extra("b", answer)
        assert prompts == ["p", "q", "r"]
        assert completion_ids == [[9, EOS]] * 3
        return [None if a is None else float(c == a) for c, a in zip(completions, answer, strict=True)]

    rows = [completion(p, "x", answer=a) for p, a in (("p", "x"), ("q", "y"), ("r", None))]
    function = CallableReward(f)
    constant = CallableReward(lambda completions: [1.0, math.nan, None], name="constant")
    expected = score([function, constant], [2.0, 0.5], rows).total
    assert repr(expected) == "[2.5, nan, nan]"
    function.pop_metrics(), function.pop_extra()
    with running(scorer([function, constant], [2.0, 0.5])) as server:
        assert repr(client(server)(rows)) == repr(expected)
    assert (function.pop_metrics(), function.pop_extra()) == ({}, {})


def test_one_request_is_scored_at_a_time() -> None:
    inside: list[int] = []

    def slow(completions: Sequence[Completion]) -> list[float]:
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.05)
        inside.pop()
        return lengths(completions)

    with running(slow) as server:
        rewards: list[Any] = []
        threads = [
            threading.Thread(target=lambda: rewards.append(client(server)([completion("p", "abc")]))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert rewards == [[3.0]] * 4


# Refusals -------------------------------------------------------------------------------------------------------------

GOOD = {"version": 1, "prompts": ["p"], "completions": ["c"]}


def test_the_least_request_and_health() -> None:
    with running() as server:
        assert ask(server, GOOD) == (200, {"version": 1, "rewards": [1.0]})
        assert ask(server, {"version": 1, "prompts": [], "completions": []}) == (200, {"version": 1, "rewards": []})
        assert ask(server, None, path="/health", method="GET") == (200, {"status": "ok", "version": 1})


MESSAGE = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is no JSON"),
        (b"{", "the body is no JSON"),
        (b"\xff\xfe", "the body is no JSON"),
        (b"[" * 100000, "the body is no JSON"),
        (b'{"version": NaN}', "the body is no JSON"),
        ([GOOD], "the body is no JSON object"),
        ({}, "the version is None; this server speaks 1"),
        ({**GOOD, "version": 2}, "the version is 2"),
        ({**GOOD, "version": True}, "the version is True"),
        ({**GOOD, "prompt": []}, "prompt is none of version, prompts"),
        ({**GOOD, "prompts": "p"}, "prompts is no list"),
        ({**GOOD, "completions": ["a", "b"]}, "completions is no list of 1, one for each prompt"),
        ({"version": 1, "prompts": ["p"]}, "completions is no list of 1"),
        ({**GOOD, "prompts": [1]}, r"prompts[0] is neither a text nor a list of messages"),
        ({**GOOD, "prompts": [[]]}, r"prompts[0] is neither"),
        ({**GOOD, "prompts": [[{"role": "user"}]]}, r"prompts[0] is neither"),
        ({**GOOD, "completions": [None]}, r"completions[0] is not a text, as its prompt wants"),
        ({**GOOD, "completions": [MESSAGE]}, r"completions[0] is not a text"),
        ({**GOOD, "prompts": [MESSAGE]}, r"completions[0] is not one message"),
        ({**GOOD, "prompts": [MESSAGE], "completions": [MESSAGE * 2]}, r"completions[0] is not one message"),
        ({**GOOD, "finished": [1]}, r"finished[0] is neither true nor false"),
        ({**GOOD, "finished": []}, "finished is no list of 1"),
        ({**GOOD, "completion_ids": [["x"]]}, r"completion_ids[0] is no list of whole numbers"),
        ({**GOOD, "columns": []}, "columns is no object"),
        ({**GOOD, "columns": {"a\x1b": [1, 2]}}, "a\N{REPLACEMENT CHARACTER} is no list of 1"),
    ],
)
def test_a_bad_request_gets_one_line(body: Any, said: str, capsys: Any) -> None:
    with running() as server:
        status, content = ask(server, body)
    assert status == 400
    assert content.keys() == {"error"}
    assert content["error"].startswith(said)
    assert len(content["error"].splitlines()) == 1
    assert "Traceback" not in capsys.readouterr().err


def raw(server: RewardServer, request: bytes, *, close: bool = False) -> bytes:
    """Returns what the server sends for these bytes."""
    with socket.create_connection(server.server_address[:2], timeout=10) as connection:
        connection.sendall(request)
        if close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def test_odd_http_is_refused(capsys: Any) -> None:
    post = b"POST /score HTTP/1.1\r\nContent-Type: application/json\r\n"
    with running(max_request_bytes=1000) as server:
        assert raw(server, post + b"\r\n").startswith(b"HTTP/1.0 411 ")
        assert raw(server, post + b"Transfer-Encoding: chunked\r\n\r\n").startswith(b"HTTP/1.0 411 ")
        for length in (b"-1", b"x", b"1e3", b"9" * 5000, b""):
            assert raw(server, post + b"Content-Length: " + length + b"\r\n\r\n").startswith(b"HTTP/1.0 400 "), length
        answer = raw(server, post + b"Content-Length: 1001\r\n\r\n")
        assert answer.startswith(b"HTTP/1.0 413 ")
        assert b"longer than 1000 bytes" in answer
        assert raw(server, post + b"Content-Length: 9\r\n\r\n{", close=True).startswith(b"HTTP/1.0 408 ")
        assert ask(server, GOOD, Content_Type="text/plain")[0] == 415
        assert ask(server, GOOD, path="/other")[0] == ask(server, None, path="/", method="GET")[0] == 404
        assert ask(server, GOOD, method="DELETE")[0] == 501
        answer = raw(server, b"\x1b]0;title\x07 nonsense\r\n\r\n")
        assert b"\x1b" not in answer
        assert b"Traceback" not in answer
        assert raw(server, b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.0 414 ")
        assert ask(server, GOOD)[0] == 200, "it lives on"
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "Traceback" not in printed.err


def test_slow_clients_are_dropped_however_they_drip() -> None:
    with running(seconds_to_send=0.3) as server:
        for start in (b"", b"POST /score HT", b"POST /score HTTP/1.1\r\nX: "):
            with socket.create_connection(server.server_address[:2], timeout=10) as connection:
                connection.sendall(start)
                started = time.perf_counter()
                with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
                    while time.perf_counter() - started < 5:
                        connection.sendall(b"x")
                        time.sleep(0.02)
                assert time.perf_counter() - started < 3
        assert ask(server, GOOD)[0] == 200


def test_too_many_clients_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remax.rewards.server.MAX_CONNECTIONS", 2)
    with running() as server:
        idle = [socket.create_connection(server.server_address[:2]) for _ in range(2)]
        time.sleep(0.2)
        assert raw(server, b"").startswith(b"HTTP/1.0 503 ")
        for connection in idle:
            connection.close()
        time.sleep(0.2)
        assert ask(server, GOOD)[0] == 200


def test_scoring_that_fails_shows_no_traceback_to_clients(capsys: Any) -> None:
    def broken(completions: Any) -> list[float]:
        raise KeyError("secret of the house")

    def mistaken(completions: Any) -> list[float]:
        raise UserError("the tokenizer has no chat template; set another.")

    for function, said in ((broken, "scoring failed; the server's log says why"), (mistaken, "the tokenizer has no")):
        with running(function) as server:
            status, content = ask(server, GOOD)
        assert status == 500
        assert content["error"].startswith(said)
    assert "secret of the house" in capsys.readouterr().err


# Who may ask ----------------------------------------------------------------------------------------------------------


def test_a_token_is_wanted_once_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMAX_REWARD_TOKEN", "s3cret")
    with running() as server:
        health = {"path": "/health", "method": "GET"}
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "\xe9"}):
            assert ask(server, GOOD, **given) == (401, {"error": "the token is missing or wrong"})
            assert ask(server, None, **health, **given)[0] == 401
        assert ask(server, GOOD, Authorization="Bearer s3cret")[0] == 200
        client(server).wait_until_ready()
        monkeypatch.setenv("REMAX_REWARD_TOKEN", "other")
        with pytest.raises(UserError, match="does not take the token of REMAX_REWARD_TOKEN"):
            client(server).wait_until_ready()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.0.7", "[", ""]
)
def test_a_name_that_was_made_to_lead_here_is_refused_without_a_token(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with running() as server:
        for method, path in (("GET", "/health"), ("POST", "/score")):
            status, content = ask(server, GOOD, method=method, path=path, Host=host)
            assert status == 403
            assert content["error"].startswith("the Host header is neither localhost nor a loopback address")
    assert len(capsys.readouterr().err.splitlines()) == 2
    monkeypatch.setenv("REMAX_REWARD_TOKEN", "s3cret")
    with running() as server:
        assert ask(server, GOOD, Host=host, Authorization="Bearer s3cret")[0] == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.9.9.9:80", "[::1]", "[::1]:8000"])
def test_names_of_this_machine_are_taken(host: str) -> None:
    with running() as server:
        assert ask(server, GOOD, Host=host)[0] == 200


def test_a_long_request_that_is_refused_unread_is_not_sent_again(capsys: Any) -> None:
    waits: list[float] = []
    with running(max_request_bytes=1000) as server:
        reward = RemoteReward(server.url, timeout_seconds=10.0, sleep=waits.append)
        with pytest.warns(UserWarning, match=r"answered 413 \(the request is longer than 1000 bytes\)"):
            assert repr(reward([completion("p", "x" * 30_000_000)])) == "[nan]"
    assert waits == []
    assert capsys.readouterr().err.count("with 413") == 1


def test_other_machines_need_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REMAX_REWARD_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "", "192.0.2.1", "example.org"):
        with pytest.raises(UserError, match=r"^--host is .*: everybody who reaches this machine could use the server"):
            RewardServer(lengths, host, 0)
    for host in ("127.0.0.1", "127.0.0.2", "localhost"):
        with running(host=host) as server:
            assert ask(server, GOOD)[0] == 200
    monkeypatch.setenv("REMAX_REWARD_TOKEN", "hunter2")
    with running(host="0.0.0.0") as server:
        assert server.secret == "hunter2"


def test_a_taken_port_is_a_mistake() -> None:
    with running() as server, pytest.raises(UserError, match=r"--port .*: the server cannot listen there"):
        RewardServer(lengths, "127.0.0.1", server.server_address[1])


# The command ----------------------------------------------------------------------------------------------------------


def test_the_model_may_stand_without_its_flag(capsys: Any) -> None:
    command = COMMANDS["serve-reward"]
    assert command.flags(["R", "--port", "1"]) == ["--model", "R", "--port", "1"]
    assert command.flags(["--port", "1"]) == ["--port", "1"]
    assert COMMANDS["train"].flags(["x"]) == ["x"]
    assert main(["serve-reward", "./nowhere", "--port", "0"]) == 2
    assert "--model is ./nowhere" in capsys.readouterr().err
    assert main(["serve-reward"]) == 2
    assert "neither --model nor --reward_funcs is set" in capsys.readouterr().err
    assert main(["serve-reward", "R", "--port", "70000"]) == 2
    assert "--port is 70000" in capsys.readouterr().err


def test_train_against_a_server_in_another_process(tmp_path: Path) -> None:
    """A run with --reward_url writes what a run with the same --reward_model writes."""
    for name, model in (("policy", policy()), ("reward", reward_model())):
        model.save_pretrained(tmp_path / name)
        reward_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["serve-reward", str(tmp_path / "reward"), "--port", str(port)]
    # Forked, since what it would import is loaded here: only so is this test quick.
    server = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(arguments)))
    server.start()
    try:
        flags = {
            "model": tmp_path / "policy",
            "train_dataset": tmp_path / "prompts.jsonl",
            "max_steps": 2,
            "batch_size": 4,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "report_to": "none",
        }
        common = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        remote, direct = tmp_path / "remote", tmp_path / "direct"
        assert main(["train", *common, "--output_dir", str(remote), "--reward_url", f"http://127.0.0.1:{port}"]) == 0
        assert main(["train", *common, "--output_dir", str(direct), "--reward_model", str(tmp_path / "reward")]) == 0
    finally:
        server.terminate()
        server.join(20)
    assert server.exitcode == 0
    own, others = (read(folder / "completions.jsonl") for folder in (remote, direct))
    assert len(own) == 8
    for name in ("completion", "reward", "greedy_reward", "advantage"):
        assert [record[name] for record in own] == [record[name] for record in others]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_a_server_cleanly(ending: int, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def f(completions, **_): return [float(len(c)) for c in completions]\n")
    arguments = ["serve-reward", "--reward_funcs", f"{tmp_path}/f.py:f", "--reward_weights", "2", "--port", "0"]
    server = subprocess.Popen([sys.executable, "-m", "remax", *arguments], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    found = re.search(r"--reward_url (http://\S+)\. ", server.stdout.readline())
    assert found is not None
    assert RemoteReward(found[1], timeout_seconds=10.0)([completion("p", "abc")]) == [6.0]
    server.send_signal(ending)
    assert server.communicate(timeout=10)[0] == "The server has ended.\n"
    assert server.returncode == 0


def test_a_request_becomes_the_completions_that_it_was_made_of() -> None:
    rows = [completion("p", "a", truncated=True, x=1), completion(say("hi"), "b", x=None)]
    body = RemoteReward("http://127.0.0.1:9", timeout_seconds=1.0)._packed(rows)
    for row, parsed in zip(rows, parse_request(body), strict=True):
        assert (parsed.prompt.content, parsed.content) == (row.prompt.content, row.content)
        assert (parsed.truncated, parsed.token_ids) == (row.truncated, row.token_ids)
        assert parsed.prompt.columns == row.prompt.columns
