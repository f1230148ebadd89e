"""The router's page in a real browser: what a person sees are the servers that registered, and what they do."""

import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from processes import API_SERVER, PATIENCE_S, Process, wait_for
from test_router import RouterProcess

pytestmark = pytest.mark.timeout(240)

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def _seen(url: str, folder: Path) -> str:
    """The page's document after its scripts have run for some seconds."""
    assert BROWSER is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command = [BROWSER, *flags, f"--user-data-dir={folder / 'profile'}", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium here (Debian: apt install chromium)")
def test_servers_are_shown(tmp_path: Path) -> None:
    router = RouterProcess(tmp_path / "router")
    flags = [
        "--load-choices",
        "synthetic",
        "--port",
        "0",
        "--host",
        "127.0.0.1",
        "--router",
        f"127.0.0.1:{router.port}",
    ]
    server = Process([*API_SERVER, *flags], tmp_path / "server")
    try:
        wait_for(lambda: router.n_servers() == 1, what="the server at the router")
        body = {"model": "default", "prompt": "hello", "max_tokens": 3}
        assert httpx.post(f"{router.url}/v1/completions", json=body, timeout=PATIENCE_S).status_code == 200
        page = _seen(router.url, tmp_path)
        (registered,) = httpx.get(f"{router.url}/registered", timeout=PATIENCE_S).json()["mixed"]
        assert registered["url"].removeprefix("http://") in page
        assert "ready" in page and "mixed" in page
        assert "1 of 1" in page
    finally:
        for process in (server, router):
            process.popen.terminate()
            assert process.end(PATIENCE_S) == 0
