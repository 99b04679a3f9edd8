"""What is not in the data folder: downloaded once, verified, or explained."""

import http.server
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from experiments import datasets
from experiments.datasets import canonical
from experiments.datasets.canonical import RemoteFile
from tests.experiments.datasets.data_files import md5, put


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/web on this machine only; yields its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    (tmp_path / "web").mkdir()
    handler = partial(Handler, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_missing_data_set_is_downloaded_once(load, tmp_path, server, monkeypatch, tiny_cifar10):
    _, archive = tiny_cifar10
    remote = RemoteFile(f"{server}/cifar-10-binary.tar.gz", md5(archive))
    monkeypatch.setattr(canonical, "CIFAR10", canonical.CIFAR10._replace(archive=remote))
    put(tmp_path / "web/cifar-10-binary.tar.gz", archive)
    first = load("cifar10")
    (tmp_path / "web/cifar-10-binary.tar.gz").unlink()
    assert datasets.fingerprint(load("cifar10")) == datasets.fingerprint(first)


def test_a_download_with_the_wrong_checksum_is_refused_and_not_kept(
    load, tmp_path, server, monkeypatch, tiny_cifar10
):
    _, archive = tiny_cifar10
    remote = RemoteFile(f"{server}/cifar-10-binary.tar.gz", md5(archive))
    monkeypatch.setattr(canonical, "CIFAR10", canonical.CIFAR10._replace(archive=remote))
    put(tmp_path / "web/cifar-10-binary.tar.gz", archive[:-1] + b"x")
    with pytest.raises(
        ValueError, match=r"cifar-10-binary\.tar\.gz.* does not match the known hash"
    ):
        load("cifar10")
    assert list((tmp_path / "cache/cifar10").iterdir()) == []


def serve_tiny_cifar10(monkeypatch, address, archive):
    remote = RemoteFile(f"{address}/cifar-10-binary.tar.gz", md5(archive))
    monkeypatch.setattr(canonical, "CIFAR10", canonical.CIFAR10._replace(archive=remote))


def test_a_download_that_is_cut_off_is_refused_and_not_kept(
    load, tmp_path, server, monkeypatch, tiny_cifar10
):
    _, archive = tiny_cifar10
    serve_tiny_cifar10(monkeypatch, server, archive)
    put(tmp_path / "web/cifar-10-binary.tar.gz", archive)
    with monkeypatch.context() as patch:
        patch.setattr(  # the length of the whole is announced, half of it is sent
            http.server.SimpleHTTPRequestHandler,
            "copyfile",
            lambda self, source, target: target.write(source.read()[: len(archive) // 2]),
        )
        with pytest.raises(FileNotFoundError, match=r"cifar10 is not in .*could not be downloaded"):
            load("cifar10")
    assert list((tmp_path / "cache/cifar10").iterdir()) == []
    assert len(load("cifar10").test["input"]) == 2


def test_a_damaged_download_of_before_is_fetched_again(
    load, tmp_path, server, monkeypatch, tiny_cifar10
):
    _, archive = tiny_cifar10
    serve_tiny_cifar10(monkeypatch, server, archive)
    put(tmp_path / "web/cifar-10-binary.tar.gz", archive)
    put(tmp_path / "cache/cifar10/cifar-10-binary.tar.gz", archive[:100])
    assert len(load("cifar10").test["input"]) == 2


def test_downloads_at_the_same_time_do_not_disturb_each_other(
    load, tmp_path, server, monkeypatch, tiny_cifar10
):
    _, archive = tiny_cifar10
    serve_tiny_cifar10(monkeypatch, server, archive)
    put(tmp_path / "web/cifar-10-binary.tar.gz", archive)
    with ThreadPoolExecutor(4) as pool:
        fingerprints = set(pool.map(lambda _: datasets.fingerprint(load("cifar10")), range(8)))
    assert len(fingerprints) == 1
    assert [path.name for path in (tmp_path / "cache/cifar10").iterdir()] == [
        "cifar-10-binary.tar.gz"
    ]


def test_a_cache_that_cannot_be_written_says_what_to_get(load, tmp_path, monkeypatch, tiny_cifar10):
    put(tmp_path / "cache", b"in the way")
    serve_tiny_cifar10(monkeypatch, "http://127.0.0.1:9", b"")
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not in .*could not be downloaded"):
        load("cifar10")


def test_a_data_set_out_of_reach_says_exactly_what_to_get(load, tmp_path, monkeypatch, tiny_mnist):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    files = [
        file._replace(remote=RemoteFile(f"{address}/{file.remote.name}", file.remote.checksum))
        for file in canonical.MNIST
    ]
    monkeypatch.setattr(canonical, "MNIST", tuple(files))
    with pytest.raises(
        FileNotFoundError, match=r"mnist is not in .*could not be downloaded"
    ) as info:
        load("mnist")
    for file in files:
        assert file.remote.url in str(info.value)
    assert "put them into DATA_DIR/mnist/ and pass --data-dir" in str(info.value)
