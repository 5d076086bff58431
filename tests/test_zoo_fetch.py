"""Downloads over real sockets, from a server that fails in every way the table of behaviours names."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from downloads import COST, FILES, LICENCE, WEIGHTS, entry, sha256
from hub import BLOCK, Hub, git_blob, wait_until

from mmadapt.errors import (
    ChecksumError,
    DownloadError,
    GatedError,
    OfflineError,
    StorageError,
    ZooError,
)
from mmadapt.zoo import Entry, File, download, fetch, get, obtain, places, transfer
from mmadapt.zoo.keeping import rm


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing waits between tries; how long it would have."""
    waited: list[float] = []
    monkeypatch.setattr(download, "pause", waited.append)
    return waited


@pytest.fixture
def net(hub: Hub, empty_home: Path) -> Entry:
    """A pinned entry of one file."""
    hub.plain["/net.pth"] = WEIGHTS
    return entry(f"{hub.url}/net.pth")


def part_of(home: Path) -> Path:
    return next(home.rglob("*.part"))


# -- what arrives and stays --------------------------------------------------------------------------


def test_a_file_arrives_whole_once_and_is_found_without_a_request(net: Entry, hub: Hub) -> None:
    folder = get(net, **COST)
    assert (folder / "net.pth").read_bytes() == WEIGHTS
    assert not list(folder.rglob("*.part"))
    hub.requests.clear()
    assert get(net, **COST) == folder and get(net, offline=True) == folder
    assert hub.requests == []


def test_a_pinned_hub_entry_needs_no_question_to_the_api(hub: Hub, empty_home: Path) -> None:
    commit = hub.add("org/model", FILES)
    files = tuple(File(n, "weights", len(c), sha256(c)) for n, c in FILES.items())
    item = Entry("a/b", "", "folder", {"hf": "org/model"}, files, LICENCE, revision=commit)
    folder = get(item, **COST)
    assert {path.name for path in folder.iterdir()} >= set(FILES)
    assert [r.path for r in hub.requests if "/api/" in r.path] == []


def test_a_hub_id_takes_what_a_backbone_needs_and_remembers_the_commit(
    hub: Hub, empty_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"pytorch_model.bin": b"x" * 9000, "tf_model.h5": b"y", "runs/events": b"z"}
    commit = hub.add("org/model", {**FILES, **more})
    folder = get("hf:org/model")
    assert {path.name for path in folder.iterdir()} == {*FILES, places.RECORD, ".lock"}
    said = capsys.readouterr().err
    assert f"hf:org/model@{commit}" in said and "licence mit" in said
    newer = hub.add("org/model", {"model.safetensors": WEIGHTS[::-1]})
    hub.requests.clear()
    assert get("hf:org/model", **COST) == folder and not hub.requests
    assert get(f"hf:org/model@{commit}", **COST) == folder and not hub.requests
    fresh = get("hf:org/model", refresh=True, **COST)
    assert fresh != folder and (fresh / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert fresh.name == newer and get("hf:org/model", offline=True) == fresh


def test_patterns_choose_files_and_add_to_what_is_there(hub: Hub, empty_home: Path) -> None:
    hub.add("org/model", FILES)
    folder = get("hf:org/model", patterns=["*.json"], **COST)
    assert (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    hub.requests.clear()
    get("hf:org/model", patterns="config.json", **COST)
    assert hub.requests == []
    get("hf:org/model", patterns=["*.json", "*.safetensors"], **COST)
    assert [r.path.split("/")[-1] for r in hub.fetched("/resolve/")] == ["model.safetensors"]
    with pytest.raises(DownloadError, match=r"no file that matches \*\.onnx\n.*config\.json"):
        get("hf:org/model", patterns=["*.onnx"], **COST)


def test_files_without_weights_in_safetensors_come_as_they_are(hub: Hub, empty_home: Path) -> None:
    hub.add("org/old", {"config.json": b"{}", "pytorch_model.bin": b"x" * 100})
    folder = get("hf:org/old", **COST)
    assert (folder / "pytorch_model.bin").read_bytes() == b"x" * 100


def test_an_entry_without_pins_is_pinned_by_its_first_download(
    hub: Hub, empty_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.plain["/net.pth"] = WEIGHTS
    item = entry(f"{hub.url}/net.pth", pinned=False)
    folder = get(item)
    assert f"recorded net.pth sha256 {sha256(WEIGHTS)}" in capsys.readouterr().err
    hub.requests.clear()
    assert get(item, **COST) == folder and not hub.requests
    (folder / "net.pth").write_bytes(WEIGHTS[:-1] + b"!")
    hub.plain["/net.pth"] = WEIGHTS[::-1]  # the damaged file is fetched anew, as what is there now
    with pytest.raises(ChecksumError, match="sha256 is"):
        get(item, **COST)


# -- no network ------------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_without_a_network_the_answer_comes_at_once_and_names_the_ways_on(
    empty_home: Path,
) -> None:
    item = entry(f"http://127.0.0.1:{closed_port()}/net.pth", anatomy="clip")
    with pytest.raises(OfflineError) as told:
        get(item, **COST)
    text = str(told.value)
    assert "lab/net (307 kB) is not on this machine" in text
    for part in ("nothing answers there", "mmadapt zoo import FILE --as lab/net", "net.pth"):
        assert part in text
    assert "on this machine is tiny/clip" in text


def test_a_hub_id_is_to_be_brought_by_hand_under_the_revision_that_was_asked_for(
    empty_home: Path,
) -> None:
    with pytest.raises(OfflineError, match=f"zoo import FOLDER --as hf:org/m@{'a' * 40}`"):
        get(f"hf:org/m@{'a' * 40}", offline=True, **COST)


def test_what_comes_with_mmadapt_is_nowhere_to_be_fetched(hub: Hub, empty_home: Path) -> None:
    folder = get("tiny/clip")
    assert get("tiny/clip", refresh=True) == get("tiny/clip", to=empty_home / "shared") == folder
    assert not hub.requests


def test_a_network_that_swallows_packets_is_given_up(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener with a full queue drops what comes, as a firewall does."""
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        crowd = []
        for _ in range(4):
            link = socket.socket()
            link.setblocking(False)
            link.connect_ex(silent.getsockname())
            crowd.append(link)
        with pytest.raises(OfflineError, match="no answer in time"):
            get(entry(f"http://127.0.0.1:{silent.getsockname()[1]}/net.pth"), **COST)
        for link in crowd:
            link.close()


def test_the_patience_with_all_mirrors_together_is_below_three_seconds(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def silent(url: str, *, connect: float, **_: Any) -> None:
        asked.append(connect)
        raise urllib.error.URLError(TimeoutError())

    monkeypatch.setattr(download, "request", silent)
    with pytest.raises(OfflineError):
        get(entry(*(f"https://mirror-{i}.invalid/net.pth" for i in range(4))), **COST)
    assert asked == [fetch.PATIENCE / 4] * 4 and fetch.PATIENCE < 3
    asked.clear()
    monkeypatch.setattr(transfer, "request", silent)
    with pytest.raises(
        OfflineError, match="mirror-0.*mirror-1"
    ):  # the question for a size is the last
        get(entry(*(f"https://mirror-{i}.invalid/net.pth" for i in range(2)), pinned=False), **COST)
    assert asked == [fetch.PATIENCE / 2] * 2


def test_a_resolver_that_hangs_is_given_up_too(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a name server that is away does cannot be had here."""
    asked = threading.Event()
    answer = threading.Event()

    def hang(*arguments: Any, **more: Any) -> Any:
        asked.set()
        answer.wait(20)
        raise socket.gaierror("away")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.1")
    with pytest.raises(OfflineError, match=r"no answer to who hub\.invalid is"):
        get(entry("https://hub.invalid/net.pth"), **COST)
    assert asked.is_set()
    answer.set()


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MMADAPT_OFFLINE"])
def test_offline_settings_count_when_they_are_made(
    net: Entry, hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(OfflineError, match="the network is not to be used"):
        get(net, **COST)
    with pytest.raises(OfflineError, match="not to be used"):
        fetch.request(f"{hub.url}/net.pth")
    assert hub.requests == []
    monkeypatch.delenv(name)
    assert get(net, **COST)


# -- cut, killed, resumed ----------------------------------------------------------------------------


def test_a_cut_connection_goes_on_at_the_byte(net: Entry, hub: Hub) -> None:
    hub.faults.cut_after, hub.faults.times = 100_000, 1
    folder = get(net, **COST)
    assert (folder / "net.pth").read_bytes() == WEIGHTS
    assert [r.range for r in hub.fetched()] == [None, "bytes=100000-"]


def test_a_line_that_is_cut_again_and_again_still_gets_there(net: Entry, hub: Hub) -> None:
    hub.faults.cut_after = 30_000
    folder = get(net, **COST)
    assert (folder / "net.pth").read_bytes() == WEIGHTS
    assert len(hub.fetched()) == 11


def test_what_had_arrived_is_kept_when_the_server_goes_and_used_in_the_next_run(
    net: Entry, hub: Hub, empty_home: Path
) -> None:
    hub.faults.cut_after = 100_000
    hub.faults.ignore_range = True  # it never gets further
    with pytest.raises(OfflineError) as told:
        get(net, **COST)
    assert "(33 %) are kept in" in str(told.value) and "run this again" in str(told.value)
    assert part_of(empty_home).stat().st_size == 100_000
    hub.faults.cut_after, hub.faults.ignore_range = None, False
    hub.requests.clear()
    assert (get(net, **COST) / "net.pth").read_bytes() == WEIGHTS
    assert [r.range for r in hub.requests] == ["bytes=100000-"]


def test_a_server_without_ranges_starts_over(net: Entry, hub: Hub) -> None:
    hub.faults.cut_after, hub.faults.times, hub.faults.ignore_range = 100_000, 1, True
    assert (get(net, **COST) / "net.pth").read_bytes() == WEIGHTS
    assert len(hub.fetched()) == 2


def test_an_unpinned_file_is_resumed_only_while_its_etag_holds(hub: Hub, empty_home: Path) -> None:
    hub.add("org/m", {"net.pth": WEIGHTS})
    item = entry(f"{hub.url}/org/m/resolve/main/net.pth", pinned=False)
    hub.faults.cut_after, hub.faults.times = 100_000, 1
    get(item, **COST)
    resumed = hub.fetched()[-1]
    assert resumed.range == "bytes=100000-" and resumed.headers["If-Range"].strip('"') == sha256(
        WEIGHTS
    )


def test_an_etag_goes_with_the_bytes_it_came_with(hub: Hub, empty_home: Path) -> None:
    hub.add("org/m", {"net.pth": WEIGHTS})
    hub.plain["/net.pth"] = WEIGHTS
    hub.faults.cut_after, hub.faults.ignore_range = 100_000, True
    with pytest.raises(OfflineError, match="are kept in"):
        get(entry(f"{hub.url}/org/m/resolve/main/net.pth", pinned=False), **COST)
    assert list(empty_home.rglob("*.etag"))
    with pytest.raises(OfflineError, match="are kept in"):  # a mirror that tells no tag starts over
        get(entry(f"{hub.url}/net.pth", pinned=False), **COST)
    assert not list(empty_home.rglob("*.etag"))


def test_a_part_that_an_earlier_run_left_wrong_is_dropped_and_fetched_anew(
    net: Entry, hub: Hub, empty_home: Path
) -> None:
    hub.faults.cut_after, hub.faults.ignore_range = 100_000, True
    with pytest.raises(OfflineError):
        get(net, **COST)
    part_of(empty_home).write_bytes(b"?" * 100_000)
    hub.faults.cut_after, hub.faults.ignore_range = None, False
    assert (get(net, **COST) / "net.pth").read_bytes() == WEIGHTS
    too_long = part_of_name(net) / "net.pth.part"
    too_long.write_bytes(b"?" * (len(WEIGHTS) + 5))
    (part_of_name(net) / "net.pth").unlink()
    assert (get(net, **COST) / "net.pth").read_bytes() == WEIGHTS


def part_of_name(item: Entry) -> Path:
    return places.own_root() / places.slug(item) / places.key_of(item)


FETCH = """
import sys
from mmadapt.zoo import Entry, File, get
url, size, sha256 = sys.argv[1], int(sys.argv[2]), sys.argv[3]
item = Entry("lab/net", "a net", "timm:net", {"urls": [url]}, (File("net.pth", size=size, sha256=sha256),),
             {"weights": "MIT", "declared_by": "test"})
print(get(item, progress=False))
"""


def start(net: Entry) -> subprocess.Popen[str]:
    """Another process that fetches the entry."""
    file = net.files[0]
    command = [sys.executable, "-c", FETCH, net.source["urls"][0], str(file.size), file.sha256]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_a_part_that_the_next_goes_on_with(
    net: Entry, hub: Hub, empty_home: Path
) -> None:
    hub.faults.stall_after = 150_000
    process = start(net)
    wait_until(lambda: any(p.stat().st_size == 150_000 for p in empty_home.rglob("*.part")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.faults.stall_after = None
    hub.requests.clear()
    assert (get(net, **COST) / "net.pth").read_bytes() == WEIGHTS
    assert [r.range for r in hub.requests] == ["bytes=150000-"]


def test_two_processes_make_one_download(net: Entry, hub: Hub, empty_home: Path) -> None:
    hub.faults.delay = 0.05
    processes = [start(net), start(net)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert len(hub.fetched()) == 1 and said[0][0] == said[1][0]


def test_two_processes_without_locks_do_not_write_into_one_part(
    net: Entry, hub: Hub, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    def unsupported(*_: Any, **__: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", unsupported)
    hub.faults.cut_after, hub.faults.ignore_range = 100_000, True
    with pytest.raises(OfflineError, match=rf"net\.pth\.{os.getpid()}\.part"):
        get(net, **COST)
    hub.faults.cut_after = None
    assert (get(net, **COST) / "net.pth").read_bytes() == WEIGHTS


def test_an_interrupt_keeps_the_part_and_says_how_much(
    net: Entry, hub: Hub, empty_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.stall_after = 2 * BLOCK
    received = download._receive

    def interrupted(attempt: Any) -> bool:
        report = attempt.report

        def press(done: int) -> None:
            report(done)
            if done == 2 * BLOCK:
                raise KeyboardInterrupt

        object.__setattr__(attempt, "report", press)
        return received(attempt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get(net)
    assert "43 % is kept, run it again to go on" in capsys.readouterr().err
    assert part_of(empty_home).stat().st_size == 2 * BLOCK
    hub.faults.stall_after = None
    assert (get(net, **COST) / "net.pth").read_bytes() == WEIGHTS


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_nothing_that_loads_wrongly(
    net: Entry, hub: Hub, empty_home: Path
) -> None:
    import random

    draw = random.Random(0)
    hub.faults.delay = 0.05
    for _ in range(12):
        process = start(net)
        seen = len(hub.requests)
        wait_until(lambda s=seen, p=process: len(hub.requests) > s or p.poll() is not None)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found, damaged = obtain.here(net)
        assert damaged == ""
        if found is not None:
            assert (found.folder / "net.pth").read_bytes() == WEIGHTS
            rm("lab/net")
    hub.faults.delay = 0.0
    assert (get(net, **COST) / "net.pth").read_bytes() == WEIGHTS


# -- wrong content ------------------------------------------------------------------------------------


def test_wrong_bytes_of_the_right_size_are_refused_and_the_next_mirror_is_taken(
    hub: Hub, empty_home: Path
) -> None:
    wrong = b"!" + WEIGHTS[1:]
    hub.plain |= {"/bad/net.pth": wrong, "/good/net.pth": WEIGHTS}
    with pytest.raises(ChecksumError) as told:
        get(entry(f"{hub.url}/bad/net.pth"), **COST)
    text = str(told.value)
    assert sha256(wrong)[:12] in text and sha256(WEIGHTS)[:12] in text and "was deleted" in text
    assert not list(empty_home.rglob("*.part")) and not list(empty_home.rglob("net.pth"))
    folder = get(entry(f"{hub.url}/bad/net.pth", f"{hub.url}/good/net.pth"), **COST)
    assert (folder / "net.pth").read_bytes() == WEIGHTS


def test_a_web_page_in_place_of_weights_is_called_one(hub: Hub, empty_home: Path) -> None:
    page = b"<!DOCTYPE html><html>please log in" + b" " * (len(WEIGHTS) - 34)
    hub.plain["/net.pth"] = page
    item = entry(f"{hub.url}/net.pth", content=WEIGHTS)
    with pytest.raises(ChecksumError, match="sent a web page instead of the file"):
        get(item, **COST)  # of the same size
    with pytest.raises(ChecksumError, match="sent a web page"):
        get(entry(f"{hub.url}/net.pth", pinned=False), **COST)
    hub.faults.content_type = "text/html; charset=utf-8"
    hub.plain["/net.pth"] = b"moved"
    with pytest.raises(ChecksumError, match="sent a web page"):
        get(item, **COST)
    assert not list(empty_home.rglob("net.pth"))


def test_a_file_of_another_length_is_refused_before_it_is_fetched(net: Entry, hub: Hub) -> None:
    hub.faults.short_by = 1000
    with pytest.raises(ChecksumError, match="offers 306200 bytes, expected 307200"):
        get(net, **COST)


def test_a_small_hub_file_is_known_by_its_digest_in_git(hub: Hub, empty_home: Path) -> None:
    hub.add("org/model", FILES)
    hub.faults.instead = {"config.json": FILES["config.json"].replace(b"vit", b"wit")}
    with pytest.raises(ChecksumError, match=git_blob(FILES["config.json"])[:12]):
        get("hf:org/model", **COST)


def test_a_file_damaged_in_the_cache_is_noticed_and_fetched_again(
    net: Entry, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    path = get(net, **COST) / "net.pth"
    path.write_bytes(b"!" + WEIGHTS[1:])
    with pytest.raises(OfflineError, match=r"net\.pth is damaged: its sha256 is"):
        get(net, offline=True)
    get(net)
    assert path.read_bytes() == WEIGHTS and "fetching it again" in capsys.readouterr().err


# -- servers that are busy, away, or closed -----------------------------------------------------------


def test_a_busy_server_is_asked_four_times_within_four_seconds_then_the_next_mirror(
    net: Entry, hub: Hub, at_once: list[float]
) -> None:
    hub.faults.status = 503
    with pytest.raises(DownloadError, match="answered HTTP 503"):
        get(net, **COST)
    assert len(hub.requests) == 4 and len(at_once) == 3 and sum(at_once) <= 4
    hub.plain["/other/net.pth"] = WEIGHTS
    hub.faults.only = "/net.pth"
    hub.faults.status = None
    with Hub() as second:
        second.plain["/net.pth"] = WEIGHTS
        hub.faults.status = 500
        folder = get(entry(f"{hub.url}/net.pth", f"{second.url}/net.pth"), **COST)
    assert (folder / "net.pth").read_bytes() == WEIGHTS


def test_a_server_may_say_how_long_to_wait(net: Entry, hub: Hub, at_once: list[float]) -> None:
    hub.faults.status, hub.faults.retry_after, hub.faults.times = 429, "7", 1
    assert get(net, **COST)
    assert at_once == [7.0]


def test_a_server_that_asks_for_an_hour_is_not_waited_for(
    hub: Hub, net: Entry, at_once: list[float]
) -> None:
    hub.faults.status, hub.faults.retry_after = 429, "3600"
    with pytest.raises(DownloadError, match=r"asks to wait 3600 s\n.*try again then"):
        get(net, **COST)
    assert at_once == []


def test_the_api_is_asked_again_when_it_is_busy(
    hub: Hub, empty_home: Path, at_once: list[float]
) -> None:
    hub.add("org/model", FILES)
    hub.faults.status, hub.faults.times, hub.faults.only = 502, 2, "/api/"
    assert get("hf:org/model", **COST) and len(at_once) == 2
    hub.faults.times = None
    with pytest.raises(DownloadError, match="answers HTTP 502 again and again"):
        get("hf:org/model", refresh=True, **COST)


class Short(BaseHTTPRequestHandler):
    """Announces more than it sends."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b'{"sha"')

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_an_api_whose_answer_breaks_off_is_told_as_the_network_it_is(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Short) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(OfflineError, match="cannot be reached: IncompleteRead"):
            get("hf:org/model", **COST)
        server.shutdown()


def test_mirrors_that_all_fail_are_all_named(hub: Hub, empty_home: Path) -> None:
    hub.plain["/bad.pth"] = b"!" + WEIGHTS[1:]
    urls = [
        f"http://127.0.0.1:{closed_port()}/net.pth",
        f"{hub.url}/bad.pth",
        f"{hub.url}/none.pth",
    ]
    with pytest.raises(ChecksumError) as told:
        get(entry(*urls), **COST)
    text = str(told.value)
    assert all(url in text for url in urls) and "HTTP 404" in text and "nothing answers" in text


def test_a_gated_repository_is_explained_and_opens_with_a_token(
    hub: Hub, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("org/closed", FILES, gated=True)
    with pytest.raises(GatedError) as told:
        get("hf:org/closed", **COST)
    text = str(told.value)
    assert f"{hub.url}/org/closed" in text and "HF_TOKEN" in text and "hf auth login" in text
    with pytest.raises(GatedError, match="HTTP 403"):
        get("hf:org/closed", token="bad", **COST)
    files = tuple(File(n, "weights", len(c), sha256(c)) for n, c in FILES.items())
    pinned = Entry("a/b", "", "folder", {"hf": "org/closed"}, files, LICENCE, revision=commit)
    with pytest.raises(GatedError, match="a/b: the owner of org/closed asks for consent"):
        get(pinned, **COST)
    monkeypatch.setenv("HF_TOKEN", "good")
    assert get("hf:org/closed", **COST)
    assert hub.requests[-1].token == "good"


def test_the_token_of_the_login_is_used_and_false_sends_none(hub: Hub, empty_home: Path) -> None:
    home = empty_home.parent / "huggingface"
    home.mkdir(parents=True)
    (home / "token").write_text("good\n")
    hub.add("org/closed", FILES, gated=True)
    with pytest.raises(GatedError, match="HTTP 401"):
        get("hf:org/closed", token=False, **COST)
    assert get("hf:org/closed", **COST)


def test_a_repository_that_is_not_there_is_told_from_a_revision_or_a_file(
    hub: Hub, empty_home: Path
) -> None:
    hub.add("org/model", FILES)
    with pytest.raises(
        DownloadError, match="shows no repository org/none .HTTP 401.; it may have moved"
    ):
        get("hf:org/none", **COST)
    with pytest.raises(DownloadError, match="org/model has no revision 'v9'"):
        get("hf:org/model@v9", **COST)
    item = Entry("a/b", "", "x:y", {"hf": "org/model"}, (File("gone.bin"),), LICENCE)
    with pytest.raises(DownloadError, match="a/b: org/model has no such file"):
        get(item, **COST)


def test_a_token_goes_to_no_other_host(hub: Hub, empty_home: Path) -> None:
    hub.add("org/closed", FILES, gated=True)
    with Hub(host="127.0.0.2", repos=hub.repos, tokens=("good",)) as other:
        other.plain = {}
        for repo in other.repos.values():
            repo.gated = False
        hub.faults.redirect_to, hub.faults.only = other.url, "/resolve/"
        get("hf:org/closed", token="good", **COST)
        assert other.requests and {r.token for r in other.requests} == {None}
        assert {r.token for r in hub.requests} == {"good"}
    plain = Hub()
    with plain:
        plain.plain["/net.pth"] = WEIGHTS
        get(entry(f"{plain.url}/net.pth"), token="good", **COST)
        assert {r.token for r in plain.requests} == {None}


def test_a_token_stays_with_a_redirect_on_its_own_host(hub: Hub, empty_home: Path) -> None:
    hub.plain["/new"] = b"here"
    hub.plain["/old"] = b""
    hub.faults.redirect_to, hub.faults.only = f"{hub.url}/new?", "/old"
    with fetch.request(f"{hub.url}/old", token="good") as answer:
        assert answer.read() == b"here"
    assert [r.token for r in hub.requests] == ["good", "good"]


def test_redirects_lead_to_web_addresses_only(hub: Hub, empty_home: Path) -> None:
    hub.plain["/net.pth"] = WEIGHTS
    hub.faults.redirect_to = "file://"
    with pytest.raises(ZooError, match="leads astray: .*not allowed"):
        get(entry(f"{hub.url}/net.pth"), **COST)


def test_a_proxy_of_the_environment_is_used(
    hub: Hub, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.plain["http://far.invalid/net.pth"] = WEIGHTS
    monkeypatch.setenv("http_proxy", hub.url)
    item = entry("http://far.invalid/net.pth")
    assert (get(item, **COST) / "net.pth").read_bytes() == WEIGHTS


def test_a_hub_whose_answers_name_other_folders_is_refused(hub: Hub, empty_home: Path) -> None:
    hub.add("org/evil", {**FILES, "../../evil.json": b"{}"})
    with pytest.raises(DownloadError, match="is not a plain one inside its folder"):
        get("hf:org/evil", **COST)
    hub.plain["/api/models/org/odd/revision/main"] = b'{"sha": "no"}'
    with pytest.raises(DownloadError, match="answered with what is no repository"):
        get("hf:org/odd", **COST)
    hub.plain["/api/models/org/odd/revision/main"] = b"<html>"
    with pytest.raises(DownloadError, match=r"answered with no JSON.*\n.*HF_ENDPOINT"):
        get("hf:org/odd", **COST)


# -- TLS --------------------------------------------------------------------------------------------------


@pytest.fixture
def secure(hub: Hub, empty_home: Path, tmp_path: Path) -> Hub:
    """The hub behind TLS, with a certificate that nobody trusts yet: `cert.pem`."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
               "-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=127.0.0.1",
               "-addext", "subjectAltName=IP:127.0.0.1"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    hub.socket = context.wrap_socket(hub.socket, server_side=True)
    hub.url = hub.url.replace("http:", "https:")
    hub.plain["/net.pth"] = WEIGHTS
    return hub


def test_a_certificate_is_checked_and_a_companys_own_is_trusted_when_named(
    secure: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = entry(f"{secure.url}/net.pth")
    with pytest.raises(OfflineError, match=r"certificate is not trusted .*REQUESTS_CA_BUNDLE"):
        get(item, **COST)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
    assert (get(item, **COST) / "net.pth").read_bytes() == WEIGHTS


def test_tls_goes_through_a_proxy(
    secure: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    def pipe(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve(listener: socket.socket) -> None:
        link, _ = listener.accept()
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += link.recv(1)
        asked.append(head.splitlines()[0])
        inner = socket.create_connection(("127.0.0.1", secure.server_port))
        link.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        threading.Thread(target=pipe, args=(inner, link), daemon=True).start()
        pipe(link, inner)
        inner.close()
        link.close()

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
        assert (get(entry(f"{secure.url}/net.pth"), **COST) / "net.pth").read_bytes() == WEIGHTS
    assert asked[0].startswith(f"CONNECT 127.0.0.1:{secure.server_port} ".encode())


# -- disks --------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_noticed_before_the_first_byte(
    net: Entry, hub: Hub, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.plain["/other.pth"] = WEIGHTS
    get(entry(f"{hub.url}/other.pth", name="lab/other"), **COST)
    hub.requests.clear()
    usage = type("usage", (), {"free": 200_000})
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError) as told:
        get(net, **COST)
    text = str(told.value)
    assert "lab/net needs 307 kB in" in text and "200 kB are free" in text
    assert "mmadapt zoo rm lab/other" in text and hub.requests == []


def unshared(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A shell script with mounts of its own; the test is skipped where that is not allowed."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounts of one's own are not allowed here")
    command = ["unshare", "-m", "bash", "-ec", script, "bash", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


SAY = """
import sys
from mmadapt.errors import MmadaptError
sys.argv = ["-c", *sys.argv[1:]]
try:
    exec(open(sys.argv.pop(1)).read())
except MmadaptError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts")
def test_a_disk_that_fills_up_keeps_what_it_has_and_a_read_only_cache_is_read_without_locks(
    net: Entry, hub: Hub, empty_home: Path, tmp_path: Path
) -> None:
    (tmp_path / "fetch.py").write_text(FETCH)
    (tmp_path / "full.py").write_text(  # a quota, which the free space of a disk does not show
        FETCH.replace(
            "print(get", "from mmadapt.zoo import transfer\ntransfer.MARGIN = -10**9\nprint(get"
        )
    )
    file = net.files[0]
    arguments = [net.source["urls"][0], str(file.size), file.sha256]
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        'mount -t tmpfs -o size=200k tmpfs "$1"; export MMADAPT_CACHE="$1"; '
        '"$2" -c "$3" "$4" "$5" "$6" "$7"; ls -l "$1"/zoo/*/*'
    )
    done = unshared(script, str(disk), sys.executable, SAY, str(tmp_path / "full.py"), *arguments)
    assert "StorageError no room for net.pth" in done.stdout, done.stderr
    assert "are kept" in done.stdout and "net.pth.part" in done.stdout
    get(net, **COST)
    hub.requests.clear()
    script = (
        'mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; export MMADAPT_CACHE="$1"; '
        '"$2" -c "$3" "$4" "$5" "$6" "$7"'
    )
    cache = str(empty_home)
    done = unshared(script, cache, sys.executable, SAY, str(tmp_path / "fetch.py"), *arguments)
    assert done.stdout.strip() == str(part_of_name(net)), done.stderr
    assert hub.requests == []


def test_a_cache_that_cannot_be_written_gives_way_to_a_temporary_one(
    net: Entry, hub: Hub, empty_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty_home.parent.mkdir(parents=True)
    empty_home.write_text("a file in the way")
    folder = get(net)
    assert folder.is_relative_to(tmp_path) and not folder.is_relative_to(tmp_path / "home")
    assert "cannot be written" in capsys.readouterr().err
    hub.requests.clear()
    assert get(net, **COST) == folder and not hub.requests


def test_a_temporary_folder_of_someone_else_is_not_used(
    net: Entry, empty_home: Path, tmp_path: Path
) -> None:
    empty_home.parent.mkdir(parents=True)
    empty_home.write_text("a file in the way")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    places.fallback_root().parent.symlink_to(elsewhere)
    with pytest.raises(StorageError, match=r"belongs to someone else.*\n.*MMADAPT_CACHE"):
        get(net, **COST)


# -- progress --------------------------------------------------------------------------------------------


def test_a_terminal_shows_terms_then_bytes(net: Entry, capsys: pytest.CaptureFixture[str]) -> None:
    get(net)
    said = capsys.readouterr().err
    assert said.startswith("lab/net: 307 kB, licence MIT\n") and "B/s]" in said


@pytest.mark.slow
def test_a_saved_notebook_keeps_one_line_and_no_widget(net: Entry, hub: Hub) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    file = net.files[0]
    arguments = (
        f"import sys; sys.argv = ['', {net.source['urls'][0]!r}, {file.size}, {file.sha256!r}]"
    )
    code = arguments + FETCH.replace(", progress=False", "")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=300).execute()
    assert "widgets" not in notebook.metadata
    terms, bar, folder = notebook.cells[0].outputs
    assert terms.text == "lab/net: 307 kB, licence MIT\n" and str(part_of_name(net)) in folder.text
    assert bar.data["text/plain"] == "lab/net: 0.3 MB" and "<progress" not in bar.data["text/html"]
