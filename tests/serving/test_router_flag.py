"""`--router` of a server: it registers when it is ready, is known by its real address, and leaves when it ends."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from processes import PATIENCE_S, serving, wait_for
from test_router import RouterProcess

pytestmark = pytest.mark.timeout(120)


def test_a_server_with_the_flag_comes_and_goes(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    router = RouterProcess(tmp_path / "router")
    try:
        model = tiny_model("ernie4_5_moe", tokenizer=True)
        with serving(model, tmp_path / "server", "--router", f"0.0.0.0:{router.port}", "--metrics-port", "0") as server:
            wait_for(lambda: router.n_servers() == 1, what="its registration")
            (shown,) = httpx.get(f"{router.url}/registered", timeout=PATIENCE_S).json()["mixed"]
            assert shown["url"] == server.url
            assert shown["metrics_port"] not in ("", server.url.rpartition(":")[2])
            body = {"prompt": "the", "max_tokens": 2}
            assert httpx.post(f"{router.url}/v1/completions", json=body, timeout=PATIENCE_S).status_code == 200
            server.popen.terminate()
            assert server.end() == 0
            assert router.n_servers() == 0
            # It says good-bye, unless a health check met it while it was going.
            assert f"removed mixed instance: {server.url}" in router.console
            assert f"registered at router 127.0.0.1:{router.port}" in server.console
    finally:
        router.kill()


def test_a_server_does_without_a_router_that_is_not_there(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with serving(tiny_model("ernie4_5_moe", tokenizer=True), tmp_path / "server", "--router", "127.0.0.1:1") as server:
        wait_for(lambda: "router 127.0.0.1:1: not registered" in server.console, what="a line about it")
        assert server.complete().status_code == 200
        server.popen.terminate()
        assert server.end() == 0
