"""The cluster YAML: what is taken, what is refused, and what the refusal says."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.document import load_config
from orchestrator.config.types import Address, parse_address, parse_bytes
from orchestrator.errors import InvalidConfigs
from placement.errors import InvalidConfig
from tests.support.deploying.configs import MINIMAL, load


def refusal(tmp_path: Path, text: str, *overrides: str, **environ: str) -> InvalidConfig:
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path, text, *overrides, **environ)
    assert not isinstance(caught.value, InvalidConfigs), caught.value
    return caught.value


def test_defaults_fill_everything_but_the_model_path(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert config.model.path == str(tmp_path / "demo")
    assert config.model.name == "demo"
    assert config.cluster.ray_address == "local"
    assert config.gateway.address == Address("127.0.0.1", 50051)
    assert config.serving.kv_cache is None
    assert config.telemetry.prometheus_address is None


def test_steps_are_sized_by_their_time_unless_a_size_is_set(tmp_path: Path) -> None:
    serving = load(tmp_path, MINIMAL).serving
    assert (serving.token_budget, serving.step_time_s) == (None, 0.5)
    for text, budget in (("auto", None), ("null", None), ("48", 48)):
        assert load(tmp_path, MINIMAL + f"serving: {{token_budget: {text}}}\n").serving.token_budget == budget
    assert load(tmp_path, MINIMAL, HETERODYNE_SERVING__TOKEN_BUDGET="auto").serving.token_budget is None


@pytest.mark.parametrize(("text", "size"), [("auto", None), ("null", None), ("64MiB", 2**26), ("64 MiB", 2**26)])
def test_the_kv_cache_is_a_size_or_auto(tmp_path: Path, text: str, size: int | None) -> None:
    assert load(tmp_path, MINIMAL + f"serving: {{kv_cache: {text}}}\n").serving.kv_cache == size
    assert load(tmp_path, MINIMAL, f"serving.kv_cache={text}").serving.kv_cache == size


def test_committed_sample_is_valid() -> None:
    config = load_config(Path("deploy/local.yaml"), environ={})
    assert config.model.path == str(Path("deploy/demo").resolve())
    assert [worker.threads for worker in config.cluster.each_worker] == [1]
    assert config.telemetry.prometheus_address == Address("127.0.0.1", 9464)
    assert config.gateway.http_address == Address("127.0.0.1", 8000)


def test_variable_with_one_underscore_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, MINIMAL, HETERODYNE_GATEWAY_ADDRESS="h:1")
    assert error.field == "environment variable HETERODYNE_GATEWAY_ADDRESS"
    assert error.fix == "Write HETERODYNE_GATEWAY__ADDRESS, or unset it."


def test_worker_counts_expand_to_one_entry_a_replica(tmp_path: Path) -> None:
    text = MINIMAL + "cluster: {workers: [{count: 2, memory: 2GiB}, {device: cuda:1}]}\n"
    workers = load(tmp_path, text).cluster.each_worker
    assert [(w.device, w.memory) for w in workers] == [("cpu", 2**31), ("cpu", 2**31), ("cuda:1", None)]


@pytest.mark.parametrize(
    ("text", "field", "value", "problem", "fix"),
    [
        (
            MINIMAL + "serving:\n  max_num_seq: 3\n",
            "serving.max_num_seq", 3, "is not a known key, on line 4", "Did you mean max_num_seqs?",
        ),
        (
            MINIMAL + "servng: {}\n",
            "servng", {}, "is not a known key, on line 3", "Did you mean serving?",
        ),
        (
            MINIMAL + "serving: {max_queued: 3}\n",
            "serving.max_queued", 3, "is not a known key, on line 3",
            "Did you mean gateway.max_queued?",
        ),
        (
            MINIMAL + "launch: {zzz: 3}\n",
            "launch.zzz", 3, "is not a known key, on line 3",
            "Known here: start_timeout_s, load_timeout_s.",
        ),
        (
            MINIMAL + "cluster:\n  workers:\n    - devise: cpu\n",
            "cluster.workers.0.devise", "cpu", "is not a known key, on line 5",
            "Did you mean device?",
        ),
        (
            "model: {}\n", "model.path", None, "is missing, on line 1", "Add it.",
        ),
        (
            MINIMAL + "serving: {max_num_seqs: many}\n",
            "serving.max_num_seqs", "many", "is not a whole number, on line 3",
            "Write it without quotes, fraction or unit.",
        ),
        (
            MINIMAL + "serving: {max_num_seqs: true}\n",
            "serving.max_num_seqs", True, "is not a whole number, on line 3",
            "Write it without quotes, fraction or unit.",
        ),
        (
            MINIMAL + "serving: {block_size: 0}\n",
            "serving.block_size", 0, "is below 1, on line 3", "Set it to 1 or more.",
        ),
        (
            MINIMAL + "serving: {block_size: 4096}\n",
            "serving.block_size", 4096, "is above 1024, on line 3", "Set it to 1024 or less.",
        ),
        (
            MINIMAL + "launch: {start_timeout_s: 0}\n",
            "launch.start_timeout_s", 0, "is not above 0.0, on line 3",
            "Set it to more than 0.0.",
        ),
        (
            MINIMAL + "gateway: {request_timeout_s: .nan}\n",
            "gateway.request_timeout_s", "nan", "is not a finite number, on line 3",
            "Write a number.",
        ),
        (
            MINIMAL + "gateway: {heartbeat_timeout_s: 0.5}\n",
            "gateway.heartbeat_timeout_s", 0.5, "is below 1.0, on line 3", "Set it to 1.0 or more.",
        ),
        (
            MINIMAL + "gateway: {stall_timeout_s: 0.5}\n",
            "gateway.stall_timeout_s", 0.5, "is below 1.0, on line 3", "Set it to 1.0 or more.",
        ),
        (
            MINIMAL + "serving: {kv_cache: 12 parsecs}\n",
            "serving.kv_cache", "12 parsecs", "is not a size in bytes, on line 3",
            "Write a whole number of bytes, or a number and a unit such as 256MiB or 2GB.",
        ),
        (
            MINIMAL + "gateway: {address: 50051}\n",
            "gateway.address", 50051, "is not host:port, on line 3",
            "Write host:port, for instance 127.0.0.1:50051; port 0 takes any free port.",
        ),
        (
            MINIMAL + "cluster: {workers: [{device: gpu}]}\n",
            "cluster.workers.0.device", "gpu", "is not a device, on line 3",
            "Write cpu, or cuda:0 for the first GPU of a node.",
        ),
        (
            MINIMAL + "cluster: {workers: []}\n",
            "cluster.workers", [], "is empty, on line 3", "Give at least one.",
        ),
        (
            MINIMAL + "cluster: {workers: {device: cpu}}\n",
            "cluster.workers", {"device": "cpu"}, "is not a list, on line 3",
            "Write each entry on a line of its own that starts with '- '.",
        ),
        (
            MINIMAL + "cluster: {ray_address: 'ray://head'}\n",
            "cluster.ray_address", "ray://head", "is not the address of a Ray cluster, on line 3",
            "Write local, auto, or host:port of the head node.",
        ),
        (
            MINIMAL + "telemetry: 5\n",
            "telemetry", 5, "is not a section, on line 3",
            "Write key: value lines, indented, under it.",
        ),
        (
            MINIMAL + "telemetry: {otlp_endpoint: localhost}\n",
            "telemetry.otlp_endpoint", "localhost",
            "is not the address of an OTLP receiver, on line 3",
            "Write it as http://127.0.0.1:4317.",
        ),
        (
            "model: {path: demo, dtype: float23}\n",
            "model.dtype", "float23",
            "is not one of 'auto', 'float32' or 'bfloat16', on line 1", "Did you mean float32?",
        ),
        (
            "model: {path: demo, name: 7}\n",
            "model.name", 7, "is not text, on line 1", "Put it in quotes.",
        ),
        (
            "model: {path: 'https://host/model'}\n",
            "model.path", "https://host/model", "is not a directory, on line 1",
            "Download the model first, then give the directory it lies in.",
        ),
        (
            "model:\n  path: a\n  path: b\n",
            "model.path", "path", "stands twice, on lines 2 and 3", "Keep one of the two.",
        ),
        (
            MINIMAL + "serving: {token_budget: 16}\n",
            "serving.token_budget", 16,
            "is less than serving.max_num_seqs = 32, so decodes would stall, on line 3",
            "Set it to 32 or more, or lower serving.max_num_seqs.",
        ),
        (
            MINIMAL + "serving: {token_budget: few}\n",
            "serving.token_budget", "few", "is neither auto nor a whole number, on line 3",
            "Write auto, or a number without quotes or unit.",
        ),
        (
            MINIMAL + "serving: {step_time_s: 0}\n",
            "serving.step_time_s", 0, "is below 0.001, on line 3", "Set it to 0.001 or more.",
        ),
        (
            MINIMAL + "telemetry: {prometheus_address: '0.0.0.0:50051'}\n",
            "telemetry.prometheus_address", "0.0.0.0:50051",
            "has the port of gateway.address, on line 3", "Give each a port of its own.",
        ),
        (
            MINIMAL + "cluster: {workers: [{device: cuda:0, count: 2}]}\n",
            "cluster.workers.0.device", "cuda:0",
            "is given to more than one worker of this machine, on line 3",
            "Give each GPU to one worker.",
        ),
    ],
)  # fmt: skip
def test_refusal_names_field_value_line_and_fix(
    tmp_path: Path, text: str, field: str, value: object, problem: str, fix: str
) -> None:
    error = refusal(tmp_path, text)
    shown = "nan" if value == "nan" else error.value
    expected = (field, value, f"{problem} in cluster.yaml", fix)
    assert (error.field, shown, error.problem, error.fix) == expected


def test_same_gpu_on_two_nodes_of_a_cluster_is_taken(tmp_path: Path) -> None:
    text = MINIMAL + "cluster: {ray_address: auto, workers: [{device: cuda:0, count: 2}]}\n"
    assert len(load(tmp_path, text).cluster.each_worker) == 2


def test_cpu_worker_of_a_cluster_that_was_there_before_must_say_its_threads(tmp_path: Path) -> None:
    text = MINIMAL + "cluster: {ray_address: auto, workers: [{threads: 2}, {device: cuda:0}, {device: cpu}]}\n"
    error = refusal(tmp_path, text)
    assert (error.field, error.value) == ("cluster.workers.2.threads", None)
    assert error.problem.startswith("is required with cluster.ray_address, as the machines are not known yet")
    assert error.fix == "Set it to the cores that each such worker shall have."
    assert refusal(tmp_path, MINIMAL, RAY_ADDRESS="h:1").field == "cluster.workers.0.threads"
    assert load(tmp_path, text, "cluster.ray_address=local").cluster.workers[2].threads is None


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    text = "model: {path: a, path: b}\nserving: {block_size: 0, kv_cache: x}\n"
    text += "cluster: {workers: [{device: gpu}]}\n"
    with pytest.raises(InvalidConfigs) as caught:
        load(tmp_path, text, "serving.max_num_seqs=none")
    fields = [error.field for error in caught.value.errors]
    assert fields == [
        "model.path",
        "cluster.workers.0.device",
        "serving.max_num_seqs",
        "serving.block_size",
        "serving.kv_cache",
    ]
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'cluster.yaml'} has 5 problems:",
        *(f"  {error}" for error in caught.value.errors),
    ]


def test_command_line_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    text = MINIMAL + "gateway: {max_in_flight: 1, max_queued: 1, address: 'h:1'}\n"
    environ = {"HETERODYNE_GATEWAY__MAX_IN_FLIGHT": "2", "HETERODYNE_GATEWAY__MAX_QUEUED": "2"}
    config = load(tmp_path, text, "gateway.max_in_flight=3", **environ)
    gateway = config.gateway
    assert (gateway.max_in_flight, gateway.max_queued, gateway.address) == (3, 2, Address("h", 1))
    assert gateway.drain_grace_s == 30.0


def test_overrides_reach_into_lists_and_take_text_that_is_no_yaml(tmp_path: Path) -> None:
    text = MINIMAL + "cluster: {workers: [{}, {device: cuda:0}]}\n"
    config = load(tmp_path, text, "cluster.workers.1.device=cuda:3", "gateway.address=[::1]:6000")
    assert [worker.device for worker in config.cluster.workers] == ["cpu", "cuda:3"]
    assert config.gateway.address == Address("::1", 6000)


def test_override_of_a_list_that_the_file_lacks_starts_it(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "cluster.workers.0.device=cuda:0").cluster.workers[0].device == "cuda:0"


@pytest.mark.parametrize(
    ("override", "field", "problem", "fix"),
    [
        ("serving.block_size", "--set", "has no =", "Write --set section.key=value."),
        (
            "cluster.workers.3.device=cpu", "cluster.workers.3.device",
            "names no place in the configuration, given with --set",
            "Give the key as section.key; a list entry by its index, which starts at 0.",
        ),
        (
            "gatway.max_queued=3", "gatway", "is not a known key, given with --set", "Did you mean gateway?",
        ),
        (
            "serving.block_size=1.5", "serving.block_size", "is not a whole number, given with --set",
            "Write it without quotes, fraction or unit.",
        ),
    ],
)  # fmt: skip
def test_bad_override_is_named_as_such(tmp_path: Path, override: str, field: str, problem: str, fix: str) -> None:
    error = refusal(tmp_path, MINIMAL, override)
    assert (error.field, error.problem, error.fix) == (field, problem, fix)


def test_bad_environment_variable_is_named(tmp_path: Path) -> None:
    error = refusal(tmp_path, MINIMAL, HETERODYNE_SERVING__BLOCK_SIZE="big")
    where = "in environment variable HETERODYNE_SERVING__BLOCK_SIZE"
    assert (error.field, error.value) == ("serving.block_size", "big")
    assert error.problem == f"is not a whole number, {where}"


def test_ray_address_of_the_environment_counts_only_where_the_file_has_none(tmp_path: Path) -> None:
    given = MINIMAL + "cluster: {ray_address: auto, workers: [{threads: 1}]}\n"
    minimal = MINIMAL + "cluster: {workers: [{threads: 1}]}\n"
    assert load(tmp_path, minimal, RAY_ADDRESS="10.0.0.1:6379").cluster.ray_address == "10.0.0.1:6379"
    assert load(tmp_path, given, RAY_ADDRESS="10.0.0.1:6379").cluster.ray_address == "auto"


def test_model_path_of_an_override_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    assert load(tmp_path, MINIMAL, "model.path=other").model.path == str(tmp_path.parent / "other")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "holds no section"),
        (b"- 1\n", "is not a mapping of sections"),
        (b"\xff\xfe\xff", "is not UTF-8 text"),
        (b"#" * (2**20 + 1), "is larger than 1048576 bytes"),
        (b"model:\n\tpath: x\n", "is not valid YAML on line 2, column 1: found character '\\t'"),
        (b"a: &x 1\nb: *x\n", "is not valid YAML on line 2, column 4: aliases are not read"),
        (
            b"model: !!python/object:os.system {}\n",
            "is not valid YAML on line 1, column 8: could not determine",
        ),
        (b"[" * 5000, "is not valid YAML"),
        (b"model: 2024-13-45\n", "is not valid YAML: month must be in 1..12"),
    ],
)
def test_file_that_is_no_readable_yaml_is_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(data)
    with pytest.raises(InvalidConfig) as caught:
        load_config(file, environ={})
    assert caught.value.problem.startswith(problem)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_config(tmp_path / "none.yaml", environ={})
    error = caught.value
    assert (error.field, error.value) == ("config file", str(tmp_path / "none.yaml"))
    assert error.problem == "cannot be read: no such file or directory"
    assert error.fix == "Give the path of a cluster YAML file, for instance deploy/local.yaml."


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("256MiB", 2**28),
        ("2GB", 2 * 10**9),
        ("1.5 gib", 3 * 2**29),
        (77, 77),
        ("10 TiB", 10 * 2**40),
    ],
)
def test_sizes_are_read_with_their_units(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@settings(deadline=None)
@given(st.integers(0, 65535), st.sampled_from(["127.0.0.1", "::1", "node-1.lan", "0.0.0.0"]))
def test_address_survives_being_written_and_read(port: int, host: str) -> None:
    assert parse_address(str(Address(host, port))) == Address(host, port)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_that_is_no_configuration_is_refused_with_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InvalidConfig):
        load_config(file, environ={})
