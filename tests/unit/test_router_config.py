"""The router's command line and YAML file: what is accepted, what is refused and how that is said."""

from pathlib import Path

import pytest

from fastdeploy import __version__
from fastdeploy.errors import ConfigError
from fastdeploy.router import launch
from fastdeploy.router.config import RouterConfig, load_config, load_instances, parse_config, without_effect

pytestmark = pytest.mark.timeout(60)

WHOLE = """
server: {name: r, port: "8123", host: 127.0.0.1, mode: debug, splitwise: false}
scheduler: {policy: cache_aware, eviction-interval-secs: 30, eviction-duration-mins: 5, cache-block-size: 4,
            balance-abs-threshold: 2, balance-rel-threshold: 0.3, hit-ratio-weight: 2, load-balance-weight: 0.05,
            waiting-weight: 10, tokenizer-url: "http://t", tokenizer-timeout-secs: 1, stats-interval-secs: 1}
manager: {register-path: "", health-failure-threshold: 3, health-success-threshold: 2, health-check-timeout-secs: 4,
          health-check-interval-secs: 1, health-check-endpoint: /ping}
log: {level: warn, output: file, max-age-days: 3, max-total-size-mb: 100, cleanup-interval-secs: 60}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "router.yaml"
    path.write_text(text)
    return str(path)


def flags(*argv: str, program: str = launch.COMMAND) -> RouterConfig:
    default = launch.DEFAULT_PORT if program == launch.PROGRAM else None
    return launch._config(launch._parser(program).parse_flags(argv), default)


def test_every_key_of_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, WHOLE))
    assert (config.server.port, config.server.host, config.server.mode) == (8123, "127.0.0.1", "debug")
    assert (config.scheduler.policy, config.scheduler.load_balance_weight) == ("cache_aware", 0.05)
    assert (config.manager.health_failure_threshold, config.manager.health_check_endpoint) == (3, "/ping")
    assert (config.log.level, config.log.output, config.log.max_age_days) == ("warn", "file", 3)
    lines = without_effect(config)
    assert len(lines) == 4
    assert any("tokenizer-url" in line for line in lines)


def test_zero_and_nothing_are_the_default(tmp_path: Path) -> None:
    text = "scheduler: {cache-block-size: 0, policy: '', waiting-weight:}\nmanager:\nlog: {}\n"
    assert load_config(write(tmp_path, text)) == RouterConfig()
    assert load_config(write(tmp_path, "")) == RouterConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sheduler: {}", "no section 'sheduler'; did you mean scheduler"),
        ("scheduler: {polcy: random}", "no key scheduler.polcy; did you mean policy"),
        ("scheduler: {policy: least}", "scheduler.policy: 'least' is none of random"),
        ("scheduler: {cache-block-size: many}", "scheduler.cache-block-size: expected a whole number"),
        ("scheduler: {waiting-weight: -1}", "scheduler.waiting-weight: expected a number of 0 or more"),
        ("scheduler: {waiting-weight: .nan}", "scheduler.waiting-weight: expected a number"),
        ("scheduler: {prefill-policy: least}", "scheduler.prefill-policy: 'least' is none of random"),
        ("server: {splitwise: 1}", "server.splitwise: expected true or false"),
        ("server: {port: 70000}", "--port 70000"),
        ("manager: {health-check-endpoint: health}", "must begin with /"),
        ("- 1", "the file must hold keys and values"),
        ("server: 5", "server must hold keys and values"),
        ("a: [", "not YAML"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("dash", ["-", "--"])
def test_flags_with_one_dash_or_two(tmp_path: Path, dash: str) -> None:
    path = write(tmp_path, "server: {port: 1000}\nscheduler: {policy: random}")
    config = flags(f"{dash}port", "2000", f"{dash}config_path", path, f"{dash}splitwise=false")
    assert (config.server.port, config.scheduler.policy, config.request_timeout_s) == (2000, "random", 1800)
    config = flags(f"{dash}config-path={path}", f"{dash}policy", "round_robin", f"{dash}host=127.0.0.1")
    assert (config.server.port, config.scheduler.policy, config.server.host) == (1000, "round_robin", "127.0.0.1")


def test_the_port() -> None:
    with pytest.raises(ConfigError, match="--port: no port was given"):
        flags()
    assert flags(program=launch.PROGRAM).server.port == 9000
    assert flags("--request-timeout-secs", "5", program=launch.PROGRAM).request_timeout_s == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preempt-retry-count", "-1"], "--preempt-retry-count -1: must be 0 or more"),
        (["--pd-min-prompt-tokens", "-1"], "--pd-min-prompt-tokens -1: must be 0 or more"),
        (["--policy", "best"], "best"),
        (["--prot", "1"], "--prot: no such flag; did you mean --port"),
        (["--port", "x"], "invalid int value"),
        (["--port", "70000"], "must be in 0..65535"),
        (["--request-timeout-secs", "0"], "must be more than 0"),
    ],
)
def test_flags_that_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flags("--port", "1", *argv)


@pytest.mark.parametrize("flag", ["--version", "-version", "-V"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([flag], program=launch.COMMAND) == 0
    assert capsys.readouterr().out.startswith(f"fd-router {__version__}")


def test_errors_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--port", "-1"]) == 2
    assert "fd-router: error: --port -1" in capsys.readouterr().err


def test_servers_from_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "instances:\n- {role: mixed, host_ip: 10.0.0.1, port: 8000}\n- {role: mixed, host_ip: 10.0.0.1, port: 0}\n"
        "- {role: prefill, host_ip: 10.0.0.1, port: 8001}\n- 5\n",
    )
    records, problems = load_instances(path)
    assert [one.url for one in records] == ["http://10.0.0.1:8000", "http://10.0.0.1:8001"]
    assert ["instances[1]" in problems[0], "instances[3]" in problems[1]] == [True] * 2
    with pytest.raises(ConfigError, match="expected one key"):
        load_instances(write(tmp_path, "servers: []"))
    assert parse_config({"manager": {"register-path": path}}, "x").manager.register_path == path
